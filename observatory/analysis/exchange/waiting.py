"""Waiting split from transfer, for every rank of every collective.

    rank 0   arrives |------- wait -------|--- transfer ---| ends
    rank 1            arrives |-- wait ---|--- transfer ---| ends
    rank 2               arrives (last)   |--- transfer ---| ends

A rank waits for the ranks it depends on: those it sends to or receives from, where the data goes straight
from rank to rank; the whole group in algorithms that pass data on (hierarchical, gather), where a rank
may depend on one that it exchanges nothing with.

Shapes: C collectives of P ranks each; [c, i, j] is about rank i depending on rank j.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from observatory.analysis.exchange.codes import joint_codes
from observatory.analysis.exchange.matching import Collectives, Unmatched, match_collectives, own_times
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
    columns["depends_on"] = np.full(size, None, object)
    columns["arrived_last"] = np.zeros(size, bool)
    problem_N = np.full(size, -1, np.int64)
    reasons: list[Reason] = []
    role_N = exchanges["role"].to_numpy(object).copy()
    for matched in match_collectives(exchanges, ranks=ranks, clocks=clocks, node_of_rank=node_of_rank):
        if isinstance(matched, Unmatched):
            problem_N[matched.rows] = len(reasons)
            reasons.append(matched.reason)
            continue
        present_CP = matched.row_CP >= 0
        rows = matched.row_CP[present_CP]
        role_N[rows] = np.broadcast_to(matched.role_C[:, None], present_CP.shape)[present_CP]
        split = split_collectives(matched)
        for name, values_CP in split.columns.items():
            columns[name][rows] = values_CP[present_CP]
        of_row = split.problem_CP[present_CP]
        problem_N[rows] = np.where(of_row < 0, -1, of_row + len(reasons))
        reasons += split.problems
    frame = exchanges[list(_KEPT)].reset_index(drop=True).assign(role=role_N)
    # The last stands for -1: no problem.
    columns["problem"] = np.array([*map(sentence, reasons), None], object)[problem_N]
    columns["problem_code"] = np.array([*(reason.code.value for reason in reasons), None], object)[problem_N]
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Collectives that were split.

    Attributes:
        columns: values per member, shape (C, P), in the order of ``rank_CP``; names as of `WAIT_COLUMNS`.
        problems: the reasons for which numbers are missing.
        problem_CP: place of each member's reason among these; -1 where nothing is missing.
    """

    columns: dict[str, npt.NDArray[Any]]
    problems: list[Reason]
    problem_CP: Int64


def split_collectives(collectives: Collectives) -> Split:
    """Split collectives of groups of one size."""
    c = collectives
    straight_C = _straight_C(c)
    needed_CPP = _needed(c, straight_C)
    traffic_CP: Bool = np.asarray(needed_CPP.any(axis=2))
    duration_CP = np.where(c.ended_CP, c.end_CP - c.start_CP, np.nan)
    arrival_CP, own_CP = c.start_CP[:, None, :], c.start_CP[:, :, None]
    later_CPP = arrival_CP - own_CP
    blur_CPP = c.uncertainty_CP[:, None, :] + c.uncertainty_CP[:, :, None]
    _set_own(blur_CPP, 0.0)
    comparable_CPP = np.isfinite(blur_CPP)

    # A peer that came after this rank had ended was not waited for, unless its data had to be there.
    here_CPP = needed_CPP & c.started_CP[:, None, :]
    after_CPP = here_CPP & c.ended_CP[:, :, None] & (arrival_CP > c.end_CP[:, :, None])
    received_CPP = (c.receive_CPP > 0) & straight_C[:, None, None]
    waited_CPP = here_CPP & ~(after_CPP & ~received_CPP & comparable_CPP)
    unaligned_CPP = waited_CPP & ~comparable_CPP
    since_end_CPP = later_CPP - np.nan_to_num(duration_CP)[:, :, None]
    early_CPP = after_CPP & received_CPP & (since_end_CPP > blur_CPP)

    wait_CP, last_CP = _latest(later_CPP, waited_CPP)
    wait_CP = np.where(c.ended_CP, np.minimum(wait_CP, duration_CP), np.nan)
    low_CP = np.clip(_latest(later_CPP - blur_CPP, waited_CPP)[0], 0, duration_CP)
    high_CP = np.clip(_latest(later_CPP + blur_CPP, waited_CPP)[0], 0, duration_CP)
    held_CP = _held(c, later_CPP, wait_CP, duration_CP)

    code_CP, peer_CP = _wait_problems(c, needed_CPP, unaligned_CPP, early_CPP, straight_C)
    sure_CP = code_CP < 0
    low_CP[early_CPP.any(axis=2)] = 0
    high_CP = np.where(sure_CP | unaligned_CPP.any(axis=2), high_CP, duration_CP)
    code_CP[sure_CP & traffic_CP & np.isnan(held_CP)] = _CODES.index(ExchangeCode.LAST_ARRIVAL_UNKNOWN)
    problems, problem_CP = _reasons(code_CP, peer_CP)
    moved_CP = traffic_CP & c.ended_CP
    last_rank_CP = np.where(wait_CP > 0, np.take_along_axis(c.rank_CP, last_CP, axis=1), c.rank_CP)
    depends_C = np.where(straight_C, "peers", "group").astype(object)
    columns = {
        "peers": needed_CPP.sum(axis=2),
        "depends_on": np.broadcast_to(depends_C[:, None], c.rank_CP.shape),
        "wait_s": np.where(sure_CP, wait_CP, np.nan) * _NS,
        "wait_low_s": low_CP * _NS,
        "wait_high_s": high_CP * _NS,
        "held_s": np.where(moved_CP, held_CP, np.nan) * _NS,
        "transfer_s": np.where(sure_CP & moved_CP, duration_CP - wait_CP - held_CP, np.nan) * _NS,
        "transfer_low_s": np.where(moved_CP, np.fmax(duration_CP - high_CP - held_CP, 0.0), np.nan) * _NS,
        "transfer_high_s": np.where(moved_CP, duration_CP - low_CP, np.nan) * _NS,
        "last_rank": np.where(sure_CP & traffic_CP, last_rank_CP, -1),
        "arrived_last": _arrived_last(c, traffic_CP),
    }
    return Split(columns=columns, problems=problems, problem_CP=problem_CP)


def _straight_C(c: Collectives) -> Bool:
    """Whether each rank depends on its peers alone."""
    kind_C = joint_codes([c.algorithm_C, c.part_C])
    first = np.unique(kind_C, return_index=True)[1]
    straight = [depends_on(c.algorithm_C[at], part=bool(c.part_C[at])) == "peers" for at in first]
    return np.array(straight, bool)[kind_C]


def _set_own(pairs_CPP: npt.NDArray[Any], value: float) -> None:
    """Set what each rank has with itself."""
    own = np.arange(pairs_CPP.shape[1])
    pairs_CPP[:, own, own] = value


def _needed(c: Collectives, straight_C: Bool) -> Bool:
    """Whom each rank depends on, itself left out."""
    exchange_CPP = (c.send_CPP > 0) | (c.receive_CPP > 0)
    # What one side did not record, the other may have.
    needed_CPP = exchange_CPP | exchange_CPP.swapaxes(1, 2) | ~straight_C[:, None, None]
    _set_own(needed_CPP, False)
    return needed_CPP


def _latest(later_CPP: npt.NDArray[Any], waited_CPP: Bool) -> tuple[Float64, Int64]:
    """How much later the last of those waited for came, at least 0, and which it was."""
    masked_CPP = np.where(waited_CPP, later_CPP, -np.inf)
    last_CP = masked_CPP.argmax(axis=2)
    return np.maximum(masked_CPP.max(axis=2), 0.0), last_CP.astype(np.int64)


def _held(c: Collectives, later_CPP: Int64, wait_CP: Float64, duration_CP: Float64) -> Float64:
    """Time between the last peer's arrival and the last of all, where the backend lets no rank go before.

    NaN where that is not known.
    """
    meets_C = np.isin(c.backend_C, _MEETS_ALL) & (c.rank_CP.shape[1] > 1)
    last_of_all_CP = np.maximum(later_CPP.max(axis=2), 0.0)
    # Who ended before the last of all came was evidently let go.
    kept_CP = last_of_all_CP <= np.nan_to_num(duration_CP)
    held_CP = np.where(kept_CP, np.maximum(last_of_all_CP - wait_CP, 0.0), 0.0)
    held_CP = np.where(_all_known_C(c)[:, None], held_CP, np.nan)
    return np.where(meets_C[:, None], held_CP, 0.0)


def _all_known_C(c: Collectives) -> Bool:
    """Whether the arrivals of all ranks of a group are known and comparable."""
    return np.asarray((c.started_CP & np.isfinite(c.uncertainty_CP)).all(axis=1))


def _arrived_last(c: Collectives, traffic_CP: Bool) -> Bool:
    """The last arrival among ranks that exchange anything; none if one is missing or not comparable."""
    judged_C = (traffic_CP.sum(axis=1) >= 2) & _all_known_C(c)
    last_C = np.where(traffic_CP, c.start_CP, np.iinfo(np.int64).min).max(axis=1)
    last_CP: Bool = judged_C[:, None] & traffic_CP & (c.start_CP == last_C[:, None])
    return last_CP


#: Why a rank's waiting is not known; of several the first.
_CODES = (
    ExchangeCode.NO_ROW,
    ExchangeCode.IMPOSSIBLE_TIMES,
    ExchangeCode.NEVER_ENDED,
    ExchangeCode.PEER_WITHOUT_ROW,
    ExchangeCode.PEER_IMPOSSIBLE_TIMES,
    ExchangeCode.CLOCKS_DISAGREE,
    ExchangeCode.CLOCKS_NOT_ALIGNED,
    ExchangeCode.BYTES_NOT_RECORDED,
    ExchangeCode.LAST_ARRIVAL_UNKNOWN,
)


def _wait_problems(
    c: Collectives, needed_CPP: Bool, unaligned_CPP: Bool, early_CPP: Bool, straight_C: Bool
) -> tuple[Int64, Int64]:
    """Why each rank's waiting is not known, as place in ``_CODES``, and the rank it is about; -1 for none."""
    missing_CPP = needed_CPP & ~c.started_CP[:, None, :]
    unsaid_CPP = ((c.send_CPP < 0) | (c.receive_CPP < 0)) & straight_C[:, None, None]
    no_row_CP = c.row_CP < 0
    missing_at_CP = missing_CPP.argmax(axis=2)
    no_peer_CP = np.take_along_axis(no_row_CP, missing_at_CP, axis=1)
    missing_CP = missing_CPP.any(axis=2)
    conditions: tuple[tuple[Any, Int64 | None], ...] = (
        (no_row_CP, None),
        (~c.started_CP, None),
        (~c.ended_CP, None),
        (missing_CP & no_peer_CP, missing_at_CP),
        (missing_CP, missing_at_CP),
        (early_CPP.any(axis=2), early_CPP.argmax(axis=2)),
        (unaligned_CPP.any(axis=2), unaligned_CPP.argmax(axis=2)),
        (unsaid_CPP.any(axis=2), None),
    )
    code_CP = np.full(c.rank_CP.shape, -1, np.int64)
    peer_CP = np.full(c.rank_CP.shape, -1, np.int64)
    for code, (condition_CP, at_CP) in enumerate(conditions):
        holds_CP = condition_CP & (code_CP < 0)
        code_CP[holds_CP] = code
        if at_CP is not None and holds_CP.any():
            peer_CP[holds_CP] = np.take_along_axis(c.rank_CP, at_CP, axis=1)[holds_CP]
    return code_CP, peer_CP


def _reasons(code_CP: Int64, peer_CP: Int64) -> tuple[list[Reason], Int64]:
    """Different reasons, and which of them each rank has; -1 for none."""
    problem_CP = np.full(code_CP.shape, -1, np.int64)
    holds_CP = code_CP >= 0
    if not holds_CP.any():
        return [], problem_CP
    codes, peers = code_CP[holds_CP], peer_CP[holds_CP]
    of_row = joint_codes([codes, peers])
    problem_CP[holds_CP] = of_row
    first = np.unique(of_row, return_index=True)[1]
    return [
        Reason(_CODES[code], {} if peer < 0 else {"rank": int(peer)})
        for code, peer in zip(codes[first], peers[first], strict=True)
    ], problem_CP
