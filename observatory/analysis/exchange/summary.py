"""Waiting and transfer summed up: per layer and role, and per rank.

Sums are of rank-seconds: every rank's time in every collective. Rows whose split is not known are counted
apart and never spread over the others.
"""

from __future__ import annotations

import pandas as pd

from observatory.analysis.exchange.alignment import rank_clocks
from observatory.analysis.exchange.causes import explain_last
from observatory.analysis.exchange.codes import joint_codes
from observatory.analysis.exchange.waiting import wait_and_transfer
from observatory.run import Run


def run_waits(run: Run, exchanges: pd.DataFrame | None = None) -> pd.DataFrame:
    """Every exchange row of a run split into waiting and transfer, with why the last rank came last.

    Args:
        run: an open run.
        exchanges: its exchanges, where they were read before.

    Returns:
        Columns of :func:`wait_and_transfer` and :func:`explain_last`.
    """
    if exchanges is None:
        exchanges = run.exchanges(arrow_lists=True)
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
    grouped = waits.groupby(keys, dropna=False, sort=True)
    layer_N = pd.Series(grouped.ngroup().to_numpy(), index=waits.index)
    is_split = _is_split(waits)
    split = waits.loc[is_split, ["duration_s", "wait_s", "held_s", "transfer_s"]]
    meeting_N = joint_codes([layer_N, waits["group"], waits["sequence"]])
    longest = waits[["duration_s", "transfer_s"]].groupby(meeting_N).max()
    longest["layer"] = layer_N.groupby(meeting_N).first()
    medians = longest.groupby("layer")[["duration_s", "transfer_s"]].median()
    sums = split[["wait_s", "held_s", "transfer_s"]].groupby(layer_N[is_split]).sum(min_count=1)
    split_s = split["duration_s"].groupby(layer_N[is_split]).sum()
    frame = grouped.size().rename("rows").reset_index()
    frame["collectives"] = longest.groupby("layer").size()
    frame["ranks"] = waits["source_rank"].groupby(layer_N).nunique()
    frame["rows_unknown"] = (~is_split).groupby(layer_N).sum()
    frame["duration_s"] = waits["duration_s"].groupby(layer_N).sum()
    frame = frame.join(sums)
    unknown_s = waits["duration_s"][~is_split].groupby(layer_N[~is_split]).sum()
    frame["unknown_s"] = unknown_s.reindex(frame.index, fill_value=0.0)
    split_s = split_s.reindex(frame.index, fill_value=0.0)
    frame["wait_share"] = frame["wait_s"].fillna(0.0) / split_s.where(split_s > 0)
    frame["longest_p50_s"] = medians["duration_s"]
    frame["transfer_longest_p50_s"] = medians["transfer_s"]
    frame = frame.join(_slowest(waits, layer_N))
    columns = [
        *keys, "collectives", "ranks", "rows", "rows_unknown", "duration_s", "wait_s", "held_s", "transfer_s",
        "unknown_s", "wait_share", "longest_p50_s", "transfer_longest_p50_s", "slowest_rank", "slowest_share",
        "slowest_cause",
    ]  # fmt: skip
    frame = frame[columns]
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
    split = waits.loc[is_split, ["source_rank", "wait_s", "held_s", "transfer_s"]]
    split = split.groupby("source_rank").sum(min_count=1)
    frame = frame.join(split)
    nothing = is_split & (waits["peers"] == 0)
    for name, chosen in (("idle_s", nothing), ("unknown_s", ~is_split)):
        frame[name] = (
            waits["duration_s"][chosen].groupby(waits["source_rank"]).sum().reindex(frame.index, fill_value=0)
        )
    frame["caused_wait_s"] = (
        _caused(waits).groupby("last_rank")["wait_s"].sum().reindex(frame.index, fill_value=0)
    )
    frame["times_last"] = grouped["arrived_last"].sum()
    caused = _caused(waits)
    frame["cause"] = _main_cause(caused, caused["last_rank"]).reindex(frame.index)
    frame["cause"] = frame["cause"].astype(object).where(frame["cause"].notna(), None)
    return frame.reset_index()


def problems_of(waits: pd.DataFrame) -> pd.DataFrame:
    """Why splits are missing: code, reason (in words), rows; the most frequent first."""
    counts = waits.groupby(["problem_code", "problem"], sort=False).size().sort_values(ascending=False)
    return counts.rename_axis(["code", "reason"]).rename("rows").reset_index()


def _is_split(waits: pd.DataFrame) -> pd.Series[bool]:
    return waits["problem"].isna() & waits["wait_s"].notna()


def _caused(waits: pd.DataFrame) -> pd.DataFrame:
    """Rows that waited for another rank."""
    others = (waits["wait_s"] > 0) & (waits["last_rank"] != waits["source_rank"]).fillna(False)
    return waits.loc[others, ["source_rank", "last_rank", "wait_s", "cause"]]


def _main_cause(caused: pd.DataFrame, key: pd.Series[int]) -> pd.Series[str]:
    """What most of the waiting was put down to, by key."""
    weights = caused["wait_s"].groupby([key, caused["cause"]]).sum()
    heaviest = weights.groupby(level=0).idxmax()
    return pd.Series([cause for _, cause in heaviest], index=heaviest.index, dtype="str")


def _slowest(waits: pd.DataFrame, layer_N: pd.Series[int]) -> pd.DataFrame:
    """The rank that the others waited for longest, its share of that and the cause, by layer."""
    caused = _caused(waits)
    layer, last_rank = layer_N[caused.index], caused["last_rank"].astype("int64")
    by_rank = caused["wait_s"].groupby([layer, last_rank]).sum()
    of_layer = by_rank.groupby(level=0)
    longest = of_layer.idxmax()
    slowest = pd.Series([rank for _, rank in longest], index=longest.index, dtype="Int64")
    of_slowest = last_rank == layer.map(slowest)
    return pd.DataFrame(
        {
            "slowest_rank": slowest,
            "slowest_share": of_layer.max() / of_layer.sum(),
            "slowest_cause": _main_cause(caused[of_slowest], layer[of_slowest]),
        }
    )
