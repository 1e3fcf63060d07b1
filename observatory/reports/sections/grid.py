"""Models x data conditions: Gini, floor and excess, and the band each model falls into."""

from __future__ import annotations

from typing import Any

import pandas as pd

from observatory.analysis.routing.bands import CONCENTRATED_ABOVE, RESILIENT_UP_TO
from observatory.reports.frames.report import ReportFrames, condition_order, each_row, phases_of
from observatory.reports.page import Cell, Head, Section, Table, table
from observatory.reports.sections.common import NO_LOADS, window_text
from observatory.reports.text import MISSING, interval, number, plain, shorten
from observatory.text import listing


def grid_section(frames: ReportFrames) -> Section:
    """One table per phase, tinted by Gini on a scale common to all phases."""
    cells = frames.cells
    title = "Imbalance by model and data"
    if cells.empty:
        return Section(id="grid", title=title, short="Model × data grid", reason=NO_LOADS)
    top = float(cells["gini"].max())
    # Bands are shown where at least one model has one.
    bands = frames.bands if frames.bands["band"].notna().any() else frames.bands.iloc[:0]
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
    return table(
        "Bands, and why",
        ["Model", *(phase.capitalize() for phase in phases)],
        [
            [shorten(label), *(_band(band_of.get((label, phase))) for phase in phases)]
            for label in dict.fromkeys(bands["label"])
        ],
        text=1 + len(phases),
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
        rows.append(
            (
                Cell(
                    text=shorten(label),
                    detail=shorten(mixer, 24) if isinstance(mixer, str) else "",
                    heading=True,
                ),
                *(_cell(by_condition.get(condition), top) for condition in conditions),
                *((Cell(text=band_of.get(label) or "no band"),) if band_of else ()),
            )
        )
    return Table(
        caption=f"Gini over experts, {phase}",
        columns=(
            Head(title="Model", numeric=False),
            *(Head(title=shorten(condition, 24)) for condition in conditions),
            *((Head(title="Band", numeric=False),) if band_of else ()),
        ),
        rows=tuple(rows),
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
