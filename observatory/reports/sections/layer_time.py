"""Where the time of an MoE layer goes."""

from __future__ import annotations

import pandas as pd

from observatory.analysis.columns import Column
from observatory.reports.figures.exchanges import layer_anatomy
from observatory.reports.page import FigureBlock, Section, Table, Variant, frame_table
from observatory.reports.sections.common import model_on, run_choice, run_keys, spread
from observatory.reports.text import percent, plain, shorten
from observatory.run.documents.writing import frame_records
from observatory.text import listing

Cell = tuple[int, str, str, str, pd.DataFrame]

_PHASES = (
    Column(name="layer", title="layer"),
    Column(name="name", title="phase", text=True),
    Column(name="mean_s", title="mean over ranks", unit="ms", scale=1e3, digits=3),
    Column(name="wait_s", title="of it waiting", unit="ms", scale=1e3, digits=3),
    Column(name="critical_s", title="slowest rank's", unit="ms", scale=1e3, digits=3),
    Column(name="critical_rank", title="slowest rank", otherwise="not known"),
    Column(name="critical_rank_share", title="of the steps", unit="%", digits=0, otherwise=""),
)


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
            "Each rank times the phases of a layer on its own clock. Hatched phases are exchanges: their "
            "time includes waiting.",
            "Two marks show what could be gained. The diamond: where the layer would end if no rank waited, "
            "as a mean over ranks. The dash: the sum over phases of the slowest rank's time without waiting; "
            "far above the diamond, slow ranks determine how long the layer takes.",
        ),
        blocks=(
            FigureBlock(
                id="layer-anatomy",
                title="Time in each phase, per layer and step",
                caption="Milliseconds per step: bars and diamonds are means over ranks and steps, dashes "
                "means over steps of the slowest rank.",
                choice="Run",
                variants=variants,
            ),
        ),
    )


_TITLE = "Where the time of a layer goes"


def _variant(label: str, condition: str, phase: str, rows: pd.DataFrame) -> Variant:
    total = float(rows["mean_s"].sum())
    largest = rows.groupby("name")["mean_s"].sum().sort_values(ascending=False)
    where = f"{model_on(label, condition)}, {phase}"
    waiting = float(rows["wait_s"].sum()) / total if total and rows["wait_s"].notna().all() else None
    return Variant(
        group=shorten(label),
        label=run_choice(label, condition, phase),
        keys=run_keys(label, condition, phase),
        figure=layer_anatomy(rows),
        alt=f"Stacked bars of {rows['layer'].nunique()} layers for {where}: {plain(largest.index[0])} takes "
        f"most, {percent(float(largest.iloc[0]) / total if total else None)} of the layers' time.",
        note=f"{where}. {spread(rows['steps'])} steps. Most time: "
        + listing(
            [
                f"{plain(name)} {percent(value / total if total else None)}"
                for name, value in largest.head(3).items()
            ]
        )
        + f". Of the whole, waiting: {percent(waiting) if waiting is not None else 'not known'}.",
        numbers=_numbers(rows, where),
    )


def _numbers(rows: pd.DataFrame, where: str) -> Table:
    return frame_table(
        f"{where}: time per step",
        _PHASES,
        frame_records(rows),
        note="Where waiting is not known, the shortest rank's time stands for the slowest's: a lower bound.",
        below={"critical_rank": "critical_rank_share"},
    )
