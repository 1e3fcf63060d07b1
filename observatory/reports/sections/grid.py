"""Models x data conditions: Gini, floor and excess, and the band each model falls into."""

from __future__ import annotations

from typing import Any

import pandas as pd

from observatory.analysis.columns import Column
from observatory.analysis.routing.bands import CONCENTRATED_ABOVE, RESILIENT_UP_TO
from observatory.reports.frames.report import ReportFrames, condition_order, each_row, phases_of
from observatory.reports.page import Cell, Section, Table, frame_table
from observatory.reports.sections.common import NO_LOADS, window_text
from observatory.reports.text import MISSING, interval, number, plain, shorten
from observatory.text import listing

_MODEL = Column(name="label", title="model", text=True)
_BAND = Column(name="band", title="band", text=True, otherwise="no band")


def grid_section(frames: ReportFrames) -> Section:
    """One table per phase, tinted by Gini on a scale common to all phases."""
    cells = frames.compared(frames.cells)
    title = "Imbalance by model and data"
    if cells.empty:
        return Section(id="grid", title=title, short="Model × data grid", reason=NO_LOADS)
    top = float(cells["gini"].max())
    # Bands are shown where at least one model has one.
    bands = frames.bands[frames.bands["label"].isin(cells["label"])]
    bands = bands if bands["band"].notna().any() else bands.iloc[:0]
    return Section(
        id="grid",
        title=title,
        short="Model × data grid",
        lead=(
            "Gini of assignments over experts: 0 when every expert gets the same, (E − 1)/E when one takes "
            "all. Each value is the unweighted mean over the model's MoE layers of the Gini of the whole "
            "window, source ranks summed. Below it: the sampling floor, which perfectly uniform routing of "
            "the same number of tokens would show, and the excess over that floor. Formulas: gini and "
            "gini_floor under Methods.",
        ),
        blocks=(
            *(_table(cells[cells["phase"] == phase], bands, phase, top) for phase in phases_of(cells)),
            *((_band_table(bands),) if len(bands) else ()),
        ),
        absent=() if len(bands) else (("Bands of the models", listing(sorted(set(frames.bands["reason"])))),),
    )


def _band_table(bands: pd.DataFrame) -> Table:
    """One row per model, its phases side by side."""
    phases = phases_of(bands)
    band_of = {(row.label, row.phase): row for row in each_row(bands)}
    return frame_table(
        "Bands, and why",
        (_MODEL, *(Column(name=phase, title=phase, text=True) for phase in phases)),
        [
            {
                "label": shorten(label),
                **{phase: _band(band_of.get((label, phase))) for phase in phases},
            }
            for label in dict.fromkeys(bands["label"])
        ],
        note="Bands are decided by real text alone: data-resilient when no real text exceeds "
        f"{RESILIENT_UP_TO}; persistently concentrated when every one exceeds {CONCENTRATED_ABOVE} with the "
        "floor taken out as √(G² − floor²); intermediate otherwise; none with fewer than two real texts. "
        f"{CONCENTRATED_ABOVE} is the boundary of DODOCO (arXiv 2605.20982); the rest of the rule is ours.",
    )


def _band(row: Any) -> Cell:
    if row is None:
        return Cell(text="–", detail="not run")
    return Cell(text=row.band or "no band", detail=plain(row.reason))


def _table(cells: pd.DataFrame, bands: pd.DataFrame, phase: str, top: float) -> Table:
    conditions = condition_order(cells)
    band_of = bands[bands["phase"] == phase].set_index("label")["band"].to_dict()
    rows = []
    for label, of_label in cells.groupby("label", sort=False):
        by_condition = {row.condition: row for row in each_row(of_label)}
        mixer = of_label["mixer"].iloc[0]
        mixer = shorten(mixer, 24) if isinstance(mixer, str) else ""
        rows.append(
            {
                "label": Cell(text=shorten(label), detail=mixer),
                **{f"on {name}": _cell(by_condition.get(name), top) for name in conditions},
                "band": band_of.get(label),
            }
        )
    columns = (_MODEL, *(Column(name=f"on {name}", title=shorten(name, 24)) for name in conditions))
    return frame_table(
        f"Gini over experts, {phase}",
        (*columns, _BAND) if band_of else columns,
        rows,
        note=window_text(cells) + " Intervals: 95 % bootstrap over steps.",
    )


def _cell(row: object, top: float) -> Cell:
    if row is None:
        return Cell(text="–", detail="not run")
    gini, floor, excess = (getattr(row, name) for name in ("gini", "gini_floor", "gini_excess"))
    if pd.isna(gini):
        return Cell(text=MISSING, detail="no assignments")
    return Cell(
        text=number(gini),
        detail=f"{interval(row.gini_low, row.gini_high)}\nfloor {number(floor)}\nexcess {number(excess)}",  # type: ignore[attr-defined]
        heat=float(gini / top) if top > 0 else None,
    )
