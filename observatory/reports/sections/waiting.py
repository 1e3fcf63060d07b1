"""Who waits, who is waited for, and why."""

from __future__ import annotations

import pandas as pd

from observatory.analysis.exchange.document import LAYER_COLUMNS, RANK_COLUMNS
from observatory.analysis.exchange.words import cause_words
from observatory.reports.figures.exchanges import rank_time, waiting_map
from observatory.reports.frames.report import each_row
from observatory.reports.page import Block, FigureBlock, Section, Table, Variant, frame_table
from observatory.reports.sections.common import model_on, run_choice, run_keys
from observatory.reports.text import count, microseconds, percent, plain, shorten
from observatory.run.documents.writing import frame_records
from observatory.text import listing

_MOST_ROWS = 30

Cell = tuple[int, str, str, str, pd.DataFrame]


def waiting_section(cells: list[Cell], *, layers: pd.DataFrame, unknown: pd.DataFrame) -> Section:
    """Ranks, then layers: a figure of each per run and phase.

    Args:
        cells: (run, label, condition, phase, rows of ``rank_waits``).
        layers: rows of ``layer_waits`` of all runs.
        unknown: why splits are missing, of all runs.
    """
    if not cells:
        return Section(id="waiting", title=_TITLE)
    of_ranks, of_layers = [], []
    for run, label, condition, phase, ranks in cells:
        of_cell = [frame[(frame["run"] == run) & (frame["phase"] == phase)] for frame in (layers, unknown)]
        of_ranks.append(_variant(ranks, of_cell[1], label, condition, phase))
        of_layers.append(_layer_variant(of_cell[0], label, condition, phase))
    blocks: tuple[Block, ...] = (
        FigureBlock(
            id="rank-waiting",
            title="Waiting and transfer per rank",
            caption="Bars: each rank's own time inside exchanges. Diamond: what all others together waited "
            "for that rank. The slowest rank is the one waited for longest.",
            choice="Run",
            variants=tuple(of_ranks),
        ),
        FigureBlock(
            id="layer-waiting",
            title="Waiting per layer and exchange",
            caption="Share of the ranks' time in exchanges that is waiting. “other” are the small exchanges "
            "around them, counts above all. Open cells: not known.",
            choice="Run",
            variants=tuple(of_layers),
        ),
    )
    return Section(
        id="waiting",
        title=_TITLE,
        short="Waiting and transfer",
        lead=(
            "The time of an exchange is split on one clock for all ranks. Waiting: from a rank's arrival "
            "to the last arrival of those it sends to or receives from; a pair that exchanges nothing "
            "does not make a rank wait. Transfer: from then to its own end. Some backends release no rank "
            "before all have arrived; that time is shown separately. Where clocks are not aligned or a rank "
            "left no row, the split is refused and counted as unknown.",
            "Why a rank arrives last is derived from its own times since the previous exchange: it computed "
            "longer (“compute load”), its SM frequency was lower (“clock”), or that exchange ended later on "
            "it than on others (“exchange before”); “unknown” where none of these explains at least half of "
            "its lateness.",
        ),
        blocks=blocks,
    )


_TITLE = "Who waits for whom"


def _variant(ranks: pd.DataFrame, unknown: pd.DataFrame, label: str, condition: str, phase: str) -> Variant:
    where = f"{model_on(label, condition)}, {phase}"
    return Variant(
        group=shorten(label),
        label=run_choice(label, condition, phase),
        keys=run_keys(label, condition, phase),
        figure=rank_time(ranks),
        alt=f"Stacked bars of {len(ranks)} ranks for {where}. {_slowest(ranks)}",
        note=f"{where}. {_slowest(ranks)}{_reasons(unknown)}",
        numbers=frame_table(
            f"{where}: time in exchanges, sums over the run",
            RANK_COLUMNS,
            frame_records(ranks.sort_values("source_rank")),
        ),
    )


def _slowest(ranks: pd.DataFrame) -> str:
    """One sentence that names the slowest rank."""
    whole = float(ranks["caused_wait_s"].sum())
    known_s = float(ranks["duration_s"].sum() - ranks["unknown_s"].sum())
    if not whole > 0:
        return "No rank waited for another." if known_s > 0 else "How long ranks waited is not known."
    slowest, *others = each_row(ranks.sort_values("caused_wait_s", ascending=False))
    waited = [row for row in others if row.caused_wait_s > 0]
    after = (
        f"; next is rank {waited[0].source_rank} with {percent(waited[0].caused_wait_s / whole)}"
        if waited
        else ""
    )
    # Whom a rank waited for can be known where its time cannot be split: it was also kept for others.
    share = (
        f"Waiting is {percent(float(ranks['wait_s'].sum()) / known_s)} of the time in exchanges."
        if known_s > 0
        else "No rank's time could be split in full."
    )
    return (
        f"{share} Slowest is rank {slowest.source_rank}: {percent(slowest.caused_wait_s / whole)} of all "
        f"waiting was for it ({microseconds(slowest.caused_wait_s * 1e6)}; "
        f"{cause_words(slowest.cause)}){after}."
    )


def _reasons(unknown: pd.DataFrame) -> str:
    if unknown.empty:
        return ""
    reasons = [f"{plain(row.reason)} ({count(row.rows)} rows)" for row in each_row(unknown)]
    return f" Not split: {listing(reasons)}."


def _layer_variant(layers: pd.DataFrame, label: str, condition: str, phase: str) -> Variant:
    where = f"{model_on(label, condition)}, {phase}"
    known = layers.dropna(subset=["wait_share"]).sort_values("wait_share", ascending=False)
    most = f"Waiting is not known in any layer of {where}."
    if len(known):
        row = next(each_row(known))
        layer = "no known layer" if pd.isna(row.layer) else f"layer {row.layer}"
        slowest = "" if pd.isna(row.slowest_rank) else f", mostly for rank {row.slowest_rank}"
        most = f"{where}. Most waiting: {plain(row.role)} of {layer}, {percent(row.wait_share)}{slowest}."
    return Variant(
        group=shorten(label),
        label=run_choice(label, condition, phase),
        keys=run_keys(label, condition, phase),
        figure=waiting_map(layers),
        alt=f"Heatmap of {layers['layer'].nunique()} layers. {most}",
        note=most,
        numbers=_layer_table(layers, label, condition, phase),
    )


def _layer_table(layers: pd.DataFrame, label: str, condition: str, phase: str) -> Table:
    most = layers.sort_values("wait_s", ascending=False, kind="stable").head(_MOST_ROWS).sort_index()
    left_out = len(layers) - len(most)
    more = f"{left_out} rows with less waiting are left out: observatory exchanges RUN." if left_out else ""
    return frame_table(
        f"{model_on(label, condition)}, {phase}: exchanges by layer",
        LAYER_COLUMNS,
        frame_records(most),
        note=more,
        leave_out=("phase",),
    )
