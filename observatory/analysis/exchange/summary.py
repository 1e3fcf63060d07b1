"""Waiting and transfer summed up: per layer and role, and per rank.

Sums are of rank-seconds: every rank's time in every collective. Rows whose split is not known are counted
apart and never spread over the others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from observatory.analysis.exchange.alignment import rank_clocks
from observatory.analysis.exchange.causes import explain_last
from observatory.analysis.exchange.waiting import wait_and_transfer
from observatory.run import Run


def run_waits(run: Run) -> pd.DataFrame:
    """Every exchange row of a run split into waiting and transfer, with why the last rank came last.

    Columns: those of :func:`wait_and_transfer` and :func:`explain_last`.
    """
    exchanges = run.exchanges()
    topology = run.manifest.topology
    waits = wait_and_transfer(
        exchanges,
        ranks=topology.ranks,
        clocks=rank_clocks(run.manifest),
        node_of_rank=topology.node_of_rank,
    )
    return explain_last(waits, exchanges, spans=run.spans(), power=run.power())


def layer_waits(waits: pd.DataFrame) -> pd.DataFrame:
    """One row per phase, layer and role.

    Columns: phase, layer, role, collectives, ranks, rows, rows_unknown (their split is not known),
    ``duration_s`` (all rows), ``wait_s``, ``held_s``, ``transfer_s`` (sums over rows that are known; NaN
    where none is), ``unknown_s`` (duration of the rows whose split is not known), ``wait_share`` (of the
    known rows' duration), ``longest_p50_s`` (median over collectives of the longest rank),
    ``transfer_longest_p50_s`` (likewise of the longest transfer), ``slowest_rank`` (whom the others waited
    for longest, in sum), ``slowest_share`` (of all waiting), ``slowest_cause`` (what most of that waiting
    was put down to).
    """
    keys = ["phase", "layer", "role"]
    rows = [
        {**dict(zip(keys, key, strict=True)), **_layer_row(of_layer)}
        for key, of_layer in waits.groupby(keys, dropna=False, sort=True)
    ]
    columns = [
        *keys, "collectives", "ranks", "rows", "rows_unknown", "duration_s", "wait_s", "held_s", "transfer_s",
        "unknown_s", "wait_share", "longest_p50_s", "transfer_longest_p50_s", "slowest_rank", "slowest_share",
        "slowest_cause",
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=columns)
    frame["_role"] = frame["role"].map({"dispatch": 0, "combine": 1}).fillna(2)
    frame = (
        frame.sort_values(["phase", "layer", "_role", "role"]).drop(columns="_role").reset_index(drop=True)
    )
    return frame.astype({"layer": "Int64", "slowest_rank": "Int64"})


def rank_waits(waits: pd.DataFrame) -> pd.DataFrame:
    """One row per rank.

    Columns: source_rank, rows, rows_unknown, duration_s, wait_s, held_s, transfer_s, ``idle_s`` (inside
    collectives in which it exchanged nothing), unknown_s, ``caused_wait_s`` (waiting of the others for this
    rank), ``times_last`` (collectives in which it arrived last of all) and ``cause`` (what most of the
    waiting for it was put down to).
    """
    is_split = _is_split(waits)
    grouped = waits.groupby("source_rank", sort=True)
    frame = pd.DataFrame(
        {
            "rows": grouped.size(),
            "rows_unknown": (~is_split).groupby(waits["source_rank"]).sum(),
            "duration_s": grouped["duration_s"].sum(),
        }
    )
    split = waits[is_split].groupby("source_rank")[["wait_s", "held_s", "transfer_s"]].sum(min_count=1)
    frame = frame.join(split)
    nothing = is_split & (waits["peers"] == 0)
    for name, chosen in (("idle_s", nothing), ("unknown_s", ~is_split)):
        frame[name] = (
            waits[chosen].groupby("source_rank")["duration_s"].sum().reindex(frame.index, fill_value=0)
        )
    frame["caused_wait_s"] = (
        _caused(waits).groupby("last_rank")["wait_s"].sum().reindex(frame.index, fill_value=0)
    )
    frame["times_last"] = grouped["arrived_last"].sum()
    causes = {rank: _main_cause(of_rank) for rank, of_rank in _caused(waits).groupby("last_rank")}
    frame["cause"] = pd.Series(frame.index.map(causes.get), index=frame.index, dtype=object)
    return frame.reset_index()


def problems_of(waits: pd.DataFrame) -> pd.DataFrame:
    """Why splits are missing: code, reason (in words), rows; the most frequent first."""
    counts = waits.groupby(["problem_code", "problem"], sort=False).size().sort_values(ascending=False)
    return counts.rename_axis(["code", "reason"]).rename("rows").reset_index()


def _is_split(waits: pd.DataFrame) -> pd.Series[bool]:
    return waits["problem"].isna() & waits["wait_s"].notna()


def _caused(waits: pd.DataFrame) -> pd.DataFrame:
    """Rows that waited for another rank."""
    return waits[(waits["wait_s"] > 0) & (waits["last_rank"] != waits["source_rank"]).fillna(False)]


def _main_cause(caused: pd.DataFrame) -> str | None:
    weights = caused.groupby("cause")["wait_s"].sum()
    return None if weights.empty else str(weights.idxmax())


def _layer_row(rows: pd.DataFrame) -> dict[str, Any]:
    is_split = _is_split(rows)
    split = rows[is_split]
    collectives = rows.groupby(["group", "sequence"], sort=False)
    caused = _caused(rows)
    by_rank = caused.groupby("last_rank")["wait_s"].sum()
    slowest = None if by_rank.empty else int(by_rank.index[int(by_rank.to_numpy(float).argmax())])
    duration_s = float(split["duration_s"].sum())
    return {
        "collectives": collectives.ngroups,
        "ranks": rows["source_rank"].nunique(),
        "rows": len(rows),
        "rows_unknown": int((~is_split).sum()),
        "duration_s": float(rows["duration_s"].sum()),
        **{name: split[name].sum(min_count=1) for name in ("wait_s", "held_s", "transfer_s")},
        "unknown_s": float(rows.loc[~is_split, "duration_s"].sum()),
        "wait_share": float(split["wait_s"].sum()) / duration_s if duration_s > 0 else np.nan,
        "longest_p50_s": float(collectives["duration_s"].max().median()),
        "transfer_longest_p50_s": float(collectives["transfer_s"].max().median()),
        "slowest_rank": slowest,
        "slowest_share": float(by_rank.max() / by_rank.sum()) if slowest is not None else np.nan,
        "slowest_cause": None if slowest is None else _main_cause(caused[caused["last_rank"] == slowest]),
    }
