"""Why a rank arrived last.

Before a collective a rank computes: since the end of its exchange before. The last rank's lateness against
the median of those that waited is compared with how much longer it computed in that time (spans), and how its
SM clock stood (telemetry). All these are times of one rank's own clock, so no alignment is needed. Where a
program records no spans, the time between a dispatch and its combine stands for computing, but only of a
rank that got more bytes to compute on than the others, and took at most twice as long as these explain.

``compute load``: its computing was longer by at least half of its lateness.
``clock``: likewise, but its lower clock alone explains the longer computing; or no spans explain the
lateness, and its clock was at least 5 % lower.
``exchange before``: that exchange ended later on this rank by at least half of its lateness, for instance
because more bytes came in.
``unknown``: everything else, and always when nothing was recorded that would show it. The thresholds are
ours.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from observatory.analysis.exchange.byte_lists import ByteLists
from observatory.analysis.exchange.codes import joint_codes
from observatory.analysis.exchange.matching import own_times

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

CAUSES = ("compute load", "clock", "exchange before", "unknown")

#: Spans of a dispatcher in which a rank computes; the others are exchanges.
COMPUTE_SPANS = ("route", "pack", "experts", "unpack")

_KEY = ("group", "sequence", "role")
_EVIDENCE = ("compute_before_s", "sm_clock_mhz", "gap_s", "work_bytes")
_MORE_WORK, _PER_BYTE = 1.05, 2.0
_EXPLAINED_SHARE = 0.5
_LOWER_CLOCK = 0.95
_SAME_WORK = 1.05
#: A telemetry sample speaks for this much time around it.
_SAMPLE_REACH_NS = 200_000_000


def explain_last(
    waits: pd.DataFrame, exchanges: pd.DataFrame, *, spans: pd.DataFrame, power: pd.DataFrame
) -> pd.DataFrame:
    """Add to every row why the rank it waited for came last.

    Args:
        waits: result of ``wait_and_transfer(exchanges)``.
        exchanges: the exchange table.
        spans: phases of the program; may be empty.
        power: telemetry; may be empty.

    Returns:
        ``waits`` with ``compute_before_s`` (own computing since the exchange before), ``sm_clock_mhz`` (own
        clock then) and ``cause``: why ``last_rank`` came last, None where the row waited for no rank.
    """
    frame = waits.assign(
        compute_before_s=compute_before_s(exchanges, spans),
        sm_clock_mhz=sm_clock_before_mhz(exchanges, power),
    )
    frame["last_rank"] = frame["last_rank"].astype("Int64")
    gap_s, work_bytes = _work_before(exchanges, waits["role"])
    evidence = frame[["compute_before_s", "sm_clock_mhz"]].assign(gap_s=gap_s, work_bytes=work_bytes)
    evidence = evidence[list(_EVIDENCE)].reset_index(drop=True)
    rank_N = frame["source_rank"].to_numpy(np.int64)
    last_N = frame["last_rank"].fillna(-1).to_numpy(np.int64)
    ranks = int(max(rank_N.max(initial=-1), last_N.max(initial=-1))) + 1
    meeting_N = joint_codes([frame[name] for name in _KEY]) * ranks
    wait_s = frame["wait_s"].to_numpy(float)
    waiting = np.flatnonzero((wait_s > 0) & (last_N >= 0) & (last_N != rank_N))
    # Each collective with the rank that others waited for in it, and that rank's own row.
    last_W, of_waiting = np.unique((meeting_N + last_N)[waiting], return_inverse=True)
    medians = evidence.iloc[waiting].assign(wait_s=wait_s[waiting]).groupby(of_waiting).median()
    own_N, first = np.unique(meeting_N + rank_N, return_index=True)
    own = evidence.iloc[first].set_axis(own_N).reindex(last_W).set_axis(medians.index)
    causes = np.array([*_cause(medians.join(own.add_suffix("_last"))), None], dtype=object)
    at_N = np.searchsorted(last_W, meeting_N + last_N)
    known_N = (last_N >= 0) & np.isin(meeting_N + last_N, last_W)
    cause_N = causes[np.where(known_N, at_N, len(last_W))]
    return frame.assign(cause=pd.Series(cause_N, index=frame.index, dtype=object))


def _cause(both: pd.DataFrame) -> npt.NDArray[np.object_]:
    """One cause per collective and last rank, from the medians of those that waited and its own values."""
    ratio = both["work_bytes_last"] / both["work_bytes"].where(both["work_bytes"] > 0)
    more_work = (ratio >= _MORE_WORK) & (both["gap_s_last"] <= _PER_BYTE * ratio * both["gap_s"])
    own_s, others_s = (
        both[f"compute_before_s{end}"].fillna(both[f"gap_s{end}"].where(more_work)) for end in ("_last", "")
    )
    explained = own_s - others_s >= _EXPLAINED_SHARE * both["wait_s"]
    slower = both["sm_clock_mhz_last"] <= _LOWER_CLOCK * both["sm_clock_mhz"]
    same_work = own_s * both["sm_clock_mhz_last"] / both["sm_clock_mhz"] <= _SAME_WORK * others_s
    by_clock = slower & (same_work | ~explained)
    ended_later_s = both["wait_s"] - (both["gap_s_last"] - both["gap_s"])
    by_exchange = ended_later_s >= _EXPLAINED_SHARE * both["wait_s"]
    chosen = np.select(
        [by_clock, explained, by_exchange], ["clock", "compute load", "exchange before"], "unknown"
    )
    return chosen.astype(object)


def compute_before_s(exchanges: pd.DataFrame, spans: pd.DataFrame) -> Float64:
    """Time each row's rank spent in compute spans between its exchange before and this arrival.

    NaN where the rank left no compute spans.
    """
    start_N, before_N = _window_before(exchanges)
    rank_N = exchanges["source_rank"].to_numpy(np.int64)
    result = np.full(len(exchanges), np.nan)
    computing = spans[spans["name"].isin(COMPUTE_SPANS) & spans["end_ns"].notna()]
    for rank, of_rank in computing.groupby("source_rank"):
        rows = np.flatnonzero(rank_N == rank)
        edges, busy = _busy_until(
            of_rank["start_ns"].to_numpy(np.int64), of_rank["end_ns"].to_numpy(np.int64)
        )
        if not len(edges):
            continue
        origin = edges[0]
        until, since = (
            np.interp((times[rows] - origin).astype(float), (edges - origin).astype(float), busy)
            for times in (start_N, before_N)
        )
        result[rows] = (until - since) * 1e-9
    return result


def _work_before(exchanges: pd.DataFrame, role: pd.Series[str]) -> tuple[Float64, Float64]:
    """Time since the exchange before, and the bytes to compute on that it brought.

    NaN where there was none before; the bytes also where the two are no dispatch and combine.

    Args:
        exchanges: the exchange table.
        role: of every row, as its collective's ranks agree on it.
    """
    start_N, before_N = _window_before(exchanges)
    row, previous = _followers(start_N, exchanges["source_rank"].to_numpy(np.int64))
    gap_N, work_N = np.full(len(exchanges), np.nan), np.full(len(exchanges), np.nan)
    gap_N[row] = (start_N[row] - before_N[row]) * 1e-9
    is_dispatch_N, is_combine_N = ((role == name).to_numpy(bool) for name in ("dispatch", "combine"))
    pair = is_dispatch_N[previous] & is_combine_N[row]
    received_N = ByteLists.of(exchanges["receive_bytes"]).sums_N()
    work_N[row[pair]] = received_N[previous[pair]]
    return gap_N, work_N


def _followers(start_N: Int64, rank_N: Int64) -> tuple[Int64, Int64]:
    """Rows that are not their rank's first, by rank and start, and the row before each of them."""
    order = np.lexsort((start_N, rank_N))
    follows = rank_N[order[1:]] == rank_N[order[:-1]]
    return order[1:][follows], order[:-1][follows]


def _busy_until(start_M: Int64, end_M: Int64) -> tuple[Int64, Float64]:
    """Edges of the union of intervals, and the time inside it before each edge."""
    fits = end_M > start_M
    start_M, end_M = start_M[fits], end_M[fits]
    order = np.argsort(start_M, kind="stable")
    start_M, end_M = start_M[order], np.maximum.accumulate(end_M[order])
    opens = np.ones(len(start_M), bool)
    opens[1:] = start_M[1:] > end_M[:-1]
    first = np.flatnonzero(opens)
    last = np.append(first[1:], len(start_M)) - 1 if len(first) else first
    edges = np.column_stack([start_M[first], end_M[last]]).reshape(-1)
    inside = np.diff(edges, prepend=edges[:1])
    inside[::2] = 0
    return edges, np.cumsum(inside).astype(float)


def _window_before(exchanges: pd.DataFrame) -> tuple[Int64, Int64]:
    """Arrival of each row, and the end of its rank's exchange before; its own arrival for the first."""
    start_N, end_N, _, _ = own_times(exchanges)
    rank_N = exchanges["source_rank"].to_numpy(np.int64)
    before_N = start_N.copy()
    order = np.lexsort((start_N, rank_N))
    for rows in np.split(order, np.flatnonzero(np.diff(rank_N[order])) + 1):
        latest = np.maximum.accumulate(end_N[rows])
        before_N[rows[1:]] = np.minimum(latest[:-1], start_N[rows[1:]])
        before_N[rows[:1]] = np.iinfo(np.int64).min // 4
    return start_N, before_N


def sm_clock_before_mhz(exchanges: pd.DataFrame, power: pd.DataFrame) -> Float64:
    """SM clock of the row's rank at its arrival, by the nearest sample; NaN where it is not known.

    A rank that sampled several devices is left out: which of them it computed on is not recorded.
    """
    result = np.full(len(exchanges), np.nan)
    start_N, _, _, _ = own_times(exchanges)
    rank_N = exchanges["source_rank"].to_numpy(np.int64)
    sampled = power[power["sm_clock_mhz"].notna()]
    for rank, of_rank in sampled.groupby("source_rank"):
        rows = np.flatnonzero(rank_N == rank)
        if of_rank["device_uuid"].nunique() != 1 or not len(rows):
            continue
        samples = of_rank.sort_values("time_ns")
        time_M = samples["time_ns"].to_numpy(np.int64)
        after = np.clip(np.searchsorted(time_M, start_N[rows]), 0, len(time_M) - 1)
        before = np.maximum(after - 1, 0)
        nearer = abs(time_M[before] - start_N[rows]) < abs(time_M[after] - start_N[rows])
        nearest = np.where(nearer, before, after)
        near = abs(time_M[nearest] - start_N[rows]) <= _SAMPLE_REACH_NS
        result[rows] = np.where(near, samples["sm_clock_mhz"].to_numpy(float)[nearest], np.nan)
    return result
