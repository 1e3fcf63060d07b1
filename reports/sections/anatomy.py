"""Where the time of an MoE layer goes."""

from __future__ import annotations

import pandas as pd

from reports.figures.exchanges import layer_anatomy
from reports.frames import each_row
from reports.page import FigureBlock, Section, Table, Variant, table
from reports.sections.common import run_choice, spread
from reports.text import listing, number, percent, plain, shorten

__all__ = ["anatomy_section"]

_MEETINGS = ("count_exchange", "dispatch", "combine")

Cell = tuple[int, str, str, str, pd.DataFrame]


def anatomy_section(cells: list[Cell]) -> Section:
    """One figure per run and phase.

    Args:
        cells: (run, label, condition, phase, rows of ``critical_path``).
    """
    variants = tuple(_variant(*cell[1:]) for cell in cells)
    if not variants:
        return Section(id="anatomy", title=_TITLE)
    return Section(
        id="anatomy",
        title=_TITLE,
        short="Dispatch anatomy",
        lead=(
            "Each rank times the phases of a layer on its own clock. Hatched phases are those in which ranks "
            "meet: their time includes waiting. A diamond adds up the slowest rank's time of each computing "
            "phase and the shortest rank's time of each exchange, because who arrives last does not wait "
            "(critical path, docs/waiting.md). The diamond is what the layer takes where the slowest rank "
            "decides everything; bars above it are waiting, bars below it ranks that were done early.",
        ),
        blocks=(
            FigureBlock(
                id="layer-anatomy",
                title="Time in each phase, per layer and step",
                caption="Bars: mean over ranks and steps. Diamonds: mean over steps of the critical path.",
                choice="Run",
                variants=variants,
            ),
        ),
    )


_TITLE = "Where the time of a layer goes"


def _variant(label: str, condition: str, phase: str, rows: pd.DataFrame) -> Variant:
    total = float(rows["mean_s"].sum())
    largest = rows.groupby("name")["mean_s"].sum().sort_values(ascending=False)
    where = f"{shorten(label)} on {shorten(condition)}, {phase}"
    return Variant(
        group=shorten(label),
        label=run_choice(label, condition, phase),
        figure=layer_anatomy(rows),
        alt=f"Stacked bars of {rows['layer'].nunique()} layers for {where}: {largest.index[0]} takes most, "
        f"{percent(float(largest.iloc[0]) / total if total else None)} of the layers' time.",
        note=f"{where}. {spread(rows['steps'])} steps. Most time: "
        + listing(
            [
                f"{plain(name)} {percent(value / total if total else None)}"
                for name, value in largest.head(3).items()
            ]
        )
        + ".",
        numbers=_numbers(rows, where),
    )


def _decider(rank: float, share: float) -> str:
    return "–" if pd.isna(rank) else f"{rank} ({percent(share, 0)})"


def _numbers(rows: pd.DataFrame, where: str) -> Table:
    layers = rows.groupby("layer")
    meeting = rows[rows["name"].isin(_MEETINGS)].groupby("layer")["mean_s"].sum()
    return table(
        f"{where}: milliseconds per step",
        ["Layer", "Phase", "Mean over ranks", "On the critical path", "Share of the path",
         "Slowest rank (of steps)",         "Exchanges' share of the layer"],
        [
            [
                str(row.layer),
                plain(row.name),
                number(row.mean_s * 1e3),
                number(row.critical_s * 1e3),
                percent(row.share),
                _decider(row.critical_rank, row.critical_rank_share),
                percent(float(meeting.get(row.layer, 0.0)) / float(layers["mean_s"].sum()[row.layer])),
            ]
            for row in each_row(rows)
        ],
        text=2,
    )  # fmt: skip
