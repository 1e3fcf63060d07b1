"""Who sends how much to whom."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from observatory.analysis.columns import Column
from observatory.reports.figures.exchanges import traffic_map
from observatory.reports.page import FigureBlock, Section, Variant, frame_table
from observatory.reports.sections.common import model_on, run_choice, run_keys
from observatory.reports.text import number, percent, shorten, times

#: Cells of all maps together; more would make the file too large, so single layers are left out then.
_MOST_CELLS = 200_000
_MOST_ROWS = 64
_ROLES = ("dispatch", "combine")
_RANKS = (
    Column(name="rank", title="rank"),
    Column(name="sent", title="sends to others", unit="bytes"),
    Column(name="received", title="receives from others", unit="bytes"),
    Column(name="kept", title="keeps", unit="bytes"),
    Column(name="most_to", title="most to rank", otherwise="-"),
    Column(name="most", title="bytes", otherwise=""),
)

Cell = tuple[int, str, str, str, pd.DataFrame]


def traffic_section(cells: list[Cell]) -> Section:
    """One map per run, phase and role over all layers, and of the dispatch of single layers.

    Args:
        cells: (run, label, condition, phase, rows of ``exchange_traffic``).
    """
    variants: list[Variant] = []
    left_out, drawn = 0, 0
    for _, label, condition, phase, rows in cells:
        ranks = int(rows[["source_rank", "peer_rank"]].max().max()) + 1
        for role in (role for role in _ROLES if (rows["role"] == role).any()):
            of_role = rows[rows["role"] == role]
            variants.append(_variant(of_role, ranks, label, condition, phase, f"{role}, all layers"))
            drawn += ranks * ranks
            if role != "dispatch" or of_role["layer"].nunique() < 2:
                continue
            for layer, of_layer in of_role.groupby("layer"):
                drawn += ranks * ranks
                if drawn > _MOST_CELLS:
                    left_out += 1
                    continue
                variants.append(_variant(of_layer, ranks, label, condition, phase, f"{role}, layer {layer}"))
    if not variants:
        return Section(id="traffic", title=_TITLE)
    lead: tuple[str, ...] = (
        "Bytes that rank i (row) sent to rank j (column), as recorded by the ranks themselves, summed "
        "over the run. What a rank keeps is on the diagonal, without a colour: it travels over no link.",
    )
    if left_out:
        lead += (f"{left_out} maps of single layers are left out to keep this file small.",)
    return Section(
        id="traffic",
        title=_TITLE,
        short="Traffic",
        lead=lead,
        blocks=(
            FigureBlock(
                id="traffic-map",
                title="Traffic between ranks",
                caption="MB are 10⁶ bytes. Open cells: no row says anything about the pair.",
                choice="Run and exchange",
                narrow=True,
                variants=tuple(variants),
            ),
        ),
    )


_TITLE = "Who sends how much to whom"


def _variant(rows: pd.DataFrame, ranks: int, label: str, condition: str, phase: str, what: str) -> Variant:
    pairs = rows.groupby(["source_rank", "peer_rank"], as_index=False)[["bytes", "collectives"]].sum()
    apart = pairs[pairs["source_rank"] != pairs["peer_rank"]]
    travelling, total = float(apart["bytes"].sum()), float(pairs["bytes"].sum())
    mean = travelling / len(apart) if len(apart) else None
    top = float(apart["bytes"].max()) if len(apart) else None
    skew = top / mean if top is not None and mean else None
    where = f"{model_on(label, condition)}, {phase}, {what}"
    return Variant(
        group=shorten(label),
        label=f"{run_choice(label, condition, phase)} · {what}",
        keys=run_keys(label, condition, phase),
        figure=traffic_map(pairs, ranks=ranks),
        alt=f"Heatmap of {ranks} by {ranks} ranks for {where}: {_megabytes(travelling)} travel "
        f"between ranks, the busiest pair {times(skew)} the mean pair.",
        note=f"{where}. {_megabytes(total)} in all, {percent(travelling / total if total else None)} of it "
        f"between different ranks; busiest pair {times(skew)} the mean of pairs.",
        numbers=frame_table(
            f"{where}: bytes by rank" + (f", the first {_MOST_ROWS} ranks" if ranks > _MOST_ROWS else ""),
            _RANKS,
            _by_rank(pairs, min(ranks, _MOST_ROWS)),
            below={"most_to": "most"},
        ),
    )


def _megabytes(value: float) -> str:
    return f"{number(value / 1e6, 1)} MB"


def _by_rank(pairs: pd.DataFrame, ranks: int) -> list[dict[str, Any]]:
    size = int(pairs[["source_rank", "peer_rank"]].max().max()) + 1
    sent_PP = np.zeros((size, size), dtype=np.int64)
    sent_PP[pairs["source_rank"].to_numpy(int), pairs["peer_rank"].to_numpy(int)] = pairs["bytes"]
    kept_P = sent_PP.diagonal().copy()
    np.fill_diagonal(sent_PP, 0)
    most_P = sent_PP.argmax(axis=1)
    return [
        {
            "rank": rank,
            "sent": int(sent_PP[rank].sum()),
            "received": int(sent_PP[:, rank].sum()),
            "kept": int(kept_P[rank]),
            "most_to": int(most_P[rank]) if sent_PP[rank].any() else None,
            "most": int(sent_PP[rank].max()) if sent_PP[rank].any() else None,
        }
        for rank in range(ranks)
    ]
