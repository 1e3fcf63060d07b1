"""Waiting split from transfer, collective by collective, rank by rank.

    rank 0   arrives |------- wait -------|--- transfer ---| ends
    rank 1            arrives |-- wait ---|--- transfer ---| ends
    rank 2               arrives (last)   |--- transfer ---| ends

A rank waits for the ranks it depends on: those it sends to or receives from, where the data goes straight
from rank to rank; the whole group in algorithms that pass data on (hierarchical, gather), where a rank
may depend on one that it exchanges nothing with.

Shapes: P ranks of a collective; [i, j] is about rank i depending on rank j.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from observatory.analysis.exchange.matching import Collective, Unmatched, match_collectives, own_times
from observatory.analysis.exchange.words import ExchangeCode, sentence
from observatory.reasons import Reason
from observatory.run.manifest import ClockSpec

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

#: What is added to a row's own columns.
WAIT_COLUMNS = (
    "peers", "depends_on", "duration_s", "wait_s", "wait_low_s", "wait_high_s", "held_s", "transfer_s",
    "transfer_low_s", "transfer_high_s", "last_rank", "arrived_last", "problem", "problem_code",
)  # fmt: skip

_KEPT = ("step", "phase", "layer", "role", "group", "sequence", "algorithm", "backend", "source_rank")
_NS = 1e-9

#: Algorithms in which data goes straight from sender to receiver. A call that was only watched from
#: outside has none recorded and is an all-to-all of pairs.
_STRAIGHT = ("flat", "pairwise", "all_to_all", "alltoall")
#: Backends whose all-to-all sends every rank a message, an empty one too [tried: gloo of torch 2.13].
_MEETS_ALL = ("gloo",)


def depends_on(algorithm: str | None, *, part: bool) -> str:
    """``peers`` (those with bytes) or ``group`` (everybody).

    A hierarchical exchange that was recorded by its stages, in nodes and across them, is straight in each.

    Args:
        algorithm: as recorded.
        part: the group is not all of the run's ranks.
    """
    straight = algorithm is None or algorithm.startswith(_STRAIGHT)
    return "peers" if straight or (algorithm == "hierarchical" and part) else "group"


def wait_and_transfer(
    exchanges: pd.DataFrame,
    *,
    ranks: int,
    clocks: Mapping[int, ClockSpec | None],
    node_of_rank: Sequence[int] | None = None,
) -> pd.DataFrame:
    """Split every row of an exchange table.

    Args:
        exchanges: columns of ``tables.EXCHANGE_SCHEMA``.
        ranks: number of ranks of the run.
        clocks: how each rank's clock relates to the reference (:func:`rank_clocks`).
        node_of_rank: node of each rank, where groups are called ``node`` and ``across``.

    Returns:
        One row per row of ``exchanges``, in its order: step, phase, layer, role (that of the whole
        collective), group, sequence, algorithm, backend, source_rank, then ``peers`` (ranks depended on),
        ``depends_on``, ``duration_s`` (own end minus own arrival), ``wait_s`` (last arrival of those
        depended on minus own arrival, at least 0),
        ``held_s`` (further time until the last of all had arrived, on backends that meet everybody),
        ``transfer_s`` (the rest), each with the bounds that the clocks' uncertainty and missing rows leave,
        ``last_rank`` (whom it waited for; itself when no rank came later), ``arrived_last``, ``problem``
        (why a number is missing, in words; missing when none is) and ``problem_code`` (its code). A rank
        that exchanges nothing waits for no rank, is not held and has no transfer.
    """
    size = len(exchanges)
    columns: dict[str, npt.NDArray[Any]] = {
        name: np.full(size, np.nan) for name in WAIT_COLUMNS if name.endswith("_s")
    }
    columns |= {name: np.full(size, -1, np.int64) for name in ("peers", "last_rank")}
    columns |= {name: np.full(size, None, object) for name in ("depends_on", "problem")}
    columns["arrived_last"] = np.zeros(size, bool)
    role_N = exchanges["role"].to_numpy(object).copy()
    for matched in match_collectives(exchanges, ranks=ranks, clocks=clocks, node_of_rank=node_of_rank):
        if isinstance(matched, Unmatched):
            columns["problem"][matched.rows] = matched.reason
            continue
        present_P = matched.row_P >= 0
        rows = matched.row_P[present_P]
        role_N[rows] = matched.role
        for name, values_P in split_collective(matched).items():
            columns[name][rows] = values_P[present_P]
    frame = exchanges[list(_KEPT)].reset_index(drop=True).assign(role=role_N)
    reason_N = columns["problem"]
    columns["problem_code"] = np.array([reason and reason.code.value for reason in reason_N], dtype=object)
    columns["problem"] = np.array([reason and sentence(reason) for reason in reason_N], dtype=object)
    for name in WAIT_COLUMNS:
        values = columns[name]
        if values.dtype == np.int64:
            frame[name] = pd.Series(values, dtype="Int64").mask(values < 0)
        else:
            frame[name] = pd.Series(values, dtype="str" if values.dtype == object else values.dtype)
    # Also where rows could not be put together, a rank's own clock says how long it was inside.
    frame["duration_s"] = _own_duration_s(exchanges)
    return frame


def _own_duration_s(exchanges: pd.DataFrame) -> Float64:
    start_N, end_N, _, ended_N = own_times(exchanges)
    return np.where(ended_N, end_N - start_N, np.nan) * _NS


def split_collective(collective: Collective) -> dict[str, npt.NDArray[Any]]:
    """Split one collective: column -> values per member, in the order of ``rank_P``."""
    c = collective
    whole = depends_on(c.algorithm, part=c.part)
    needed_PP = _needed(c, whole)
    traffic_P: Bool = np.asarray(needed_PP.any(axis=1))
    duration_P = np.where(c.ended_P, c.end_P - c.start_P, np.nan)
    later_PP = c.start_P[None, :] - c.start_P[:, None]
    blur_PP = c.uncertainty_P[None, :] + c.uncertainty_P[:, None]
    np.fill_diagonal(blur_PP, 0.0)

    # A peer that came after this rank had ended was not waited for, unless its data had to be there.
    here_PP = needed_PP & c.started_P[None, :]
    after_PP = here_PP & c.ended_P[:, None] & (c.start_P[None, :] > c.end_P[:, None])
    received_PP = (c.receive_PP > 0) & (whole == "peers")
    waited_PP = here_PP & ~(after_PP & ~received_PP & np.isfinite(blur_PP))
    early_PP = after_PP & received_PP & (later_PP - np.nan_to_num(duration_P)[:, None] > blur_PP)

    wait_P, last_P = _latest(later_PP, waited_PP)
    wait_P = np.where(c.ended_P, np.minimum(wait_P, duration_P), np.nan)
    low_P = np.clip(_latest(later_PP - blur_PP, waited_PP)[0], 0, duration_P)
    high_P = np.clip(_latest(later_PP + blur_PP, waited_PP)[0], 0, duration_P)
    held_P = _held(c, later_PP, wait_P, duration_P)

    problem_P = _wait_problems(c, needed_PP, waited_PP & ~np.isfinite(blur_PP), early_PP, whole=whole)
    sure_P = np.array([problem is None for problem in problem_P])
    low_P[early_PP.any(axis=1)] = 0
    high_P = np.where(sure_P | (waited_PP & ~np.isfinite(blur_PP)).any(axis=1), high_P, duration_P)
    for i in np.flatnonzero(sure_P & traffic_P & np.isnan(held_P)):
        problem_P[i] = Reason(ExchangeCode.LAST_ARRIVAL_UNKNOWN)
    moved_P = traffic_P & c.ended_P
    last_P = np.where(wait_P > 0, c.rank_P[last_P], c.rank_P)
    return {
        "peers": needed_PP.sum(axis=1),
        "depends_on": np.full(len(c.rank_P), whole, object),
        "wait_s": np.where(sure_P, wait_P, np.nan) * _NS,
        "wait_low_s": low_P * _NS,
        "wait_high_s": high_P * _NS,
        "held_s": np.where(moved_P, held_P, np.nan) * _NS,
        "transfer_s": np.where(sure_P & moved_P, duration_P - wait_P - held_P, np.nan) * _NS,
        "transfer_low_s": np.where(moved_P, np.fmax(duration_P - high_P - held_P, 0.0), np.nan) * _NS,
        "transfer_high_s": np.where(moved_P, duration_P - low_P, np.nan) * _NS,
        "last_rank": np.where(sure_P & traffic_P, last_P, -1),
        "arrived_last": _arrived_last(c, traffic_P),
        "problem": np.array(problem_P, dtype=object),
    }


def _needed(c: Collective, whole: str) -> Bool:
    """Whom each rank depends on, itself left out."""
    size = len(c.rank_P)
    if whole == "group":
        needed_PP = np.ones((size, size), bool)
    else:
        needed_PP = (c.send_PP > 0) | (c.receive_PP > 0)
        # What one side did not record, the other may have.
        needed_PP |= ((c.send_PP > 0) | (c.receive_PP > 0)).T
    np.fill_diagonal(needed_PP, False)
    return needed_PP


def _latest(later_PP: npt.NDArray[Any], waited_PP: Bool) -> tuple[Float64, Int64]:
    """How much later the last of those waited for came, at least 0, and which it was."""
    masked_PP = np.where(waited_PP, later_PP, -np.inf)
    last_P = masked_PP.argmax(axis=1)
    return np.maximum(masked_PP.max(axis=1), 0.0), last_P.astype(np.int64)


def _held(c: Collective, later_PP: Int64, wait_P: Float64, duration_P: Float64) -> Float64:
    """Time between the last peer's arrival and the last of all, where the backend lets no rank go before.

    NaN where that is not known.
    """
    size = len(c.rank_P)
    if c.backend not in _MEETS_ALL or size == 1:
        return np.zeros(size)
    if not (c.started_P.all() and np.isfinite(c.uncertainty_P).all()):
        return np.full(size, np.nan)
    last_of_all_P = np.maximum(later_PP.max(axis=1), 0.0)
    # Who ended before the last of all came was evidently let go.
    kept_P = last_of_all_P <= np.nan_to_num(duration_P)
    return np.where(kept_P, np.maximum(last_of_all_P - wait_P, 0.0), 0.0)


def _arrived_last(c: Collective, traffic_P: Bool) -> Bool:
    """The last arrival among ranks that exchange anything; none if one is missing or not comparable."""
    alone = int(traffic_P.sum()) < 2
    if alone or not c.started_P.all() or not np.isfinite(c.uncertainty_P).all():
        return np.zeros(len(c.rank_P), bool)
    last_P: Bool = traffic_P & (c.start_P == c.start_P[traffic_P].max())
    return last_P


def _wait_problems(
    c: Collective, needed_PP: Bool, unaligned_PP: Bool, early_PP: Bool, *, whole: str
) -> list[Reason | None]:
    """Why each rank's waiting is not known; None where it is."""
    missing_PP = needed_PP & ~c.started_P[None, :]
    unsaid_PP = ((c.send_PP < 0) | (c.receive_PP < 0)) & (whole == "peers")

    def problem(i: int) -> Reason | None:
        if c.row_P[i] < 0:
            return Reason(ExchangeCode.NO_ROW)
        if not c.started_P[i]:
            return Reason(ExchangeCode.IMPOSSIBLE_TIMES)
        if not c.ended_P[i]:
            return Reason(ExchangeCode.NEVER_ENDED)
        if missing_PP[i].any():
            peer = int(missing_PP[i].argmax())
            code = ExchangeCode.PEER_WITHOUT_ROW if c.row_P[peer] < 0 else ExchangeCode.PEER_IMPOSSIBLE_TIMES
            return Reason(code, {"rank": int(c.rank_P[peer])})
        if early_PP[i].any():
            return Reason(ExchangeCode.CLOCKS_DISAGREE, {"rank": int(c.rank_P[early_PP[i].argmax()])})
        if unaligned_PP[i].any():
            return Reason(ExchangeCode.CLOCKS_NOT_ALIGNED, {"rank": int(c.rank_P[unaligned_PP[i].argmax()])})
        return Reason(ExchangeCode.BYTES_NOT_RECORDED) if unsaid_PP[i].any() else None

    return [problem(i) for i in range(len(c.rank_P))]
