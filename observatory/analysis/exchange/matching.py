"""Rows of the same collective, found again over the ranks that took part.

Collectives of groups of one size are worked on together, a bounded number at a time.

Shapes: C collectives, P ranks of the group of each, M of which left a row; N rows of the frame.
``send_CPP[c, i, j]`` is what rank i says it sent to rank j, ``receive_CPP[c, i, j]`` what rank i says it got
from rank j; rows of a rank that said nothing are -1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import numpy.typing as npt
import pandas as pd

from observatory.analysis.exchange.alignment import to_reference_ns
from observatory.analysis.exchange.byte_lists import ByteLists
from observatory.analysis.exchange.codes import joint_codes
from observatory.analysis.exchange.groups import PARTED, GroupLayout
from observatory.analysis.exchange.words import ExchangeCode
from observatory.reasons import Reason
from observatory.run.manifest import ClockSpec

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]
Texts = npt.NDArray[np.object_]

#: Times beyond this many nanoseconds (73 years) are no times; below it differences cannot overflow.
_LATEST_NS = 2**61
_MOST_BYTES = 2**50
#: Backends whose own numbers of a group's collectives are the same on all ranks; gloo counts sends as well.
_NUMBER_ALIKE = ("nccl",)
#: Pairs of ranks that are worked on together: few enough to stay in the processor's caches.
_PAIRS_AT_ONCE = 1 << 18
#: What every rank must say alike.
_COMMON = ("step", "phase", "layer", "algorithm", "backend")
_TEXTS = ("algorithm", "backend", "group", "role")


@dataclass(frozen=True, slots=True, kw_only=True)
class Collectives:
    """Collectives of groups of one size with all that their ranks said about them.

    Attributes:
        place_C: place of each in the order of groups and their sequence numbers.
        first_row_C: position in the frame of the row of the first rank that left one.
        role_C: what it is for, as those say who moved anything.
        part_C: the group is a part of the run's ranks, or a stage called so (``node``, ``across``).
        rank_CP: members of the group, ascending.
        row_CP: position of each member's row; -1 for a member that left none.
        start_CP, end_CP: on the reference clock where that is known, else the rank's own; 0 without a row.
        started_CP: the row's times can be used: an arrival, and an end that is not before it.
        ended_CP: likewise, and the collective ended on that rank.
        uncertainty_CP: half-width of each time in ns; infinite where the rank's clock is not aligned.
        send_CPP, receive_CPP: bytes; -1 where a rank said nothing.
        algorithm_C, backend_C: as recorded; None when not.
    """

    place_C: Int64
    first_row_C: Int64
    role_C: Texts
    part_C: Bool
    rank_CP: Int64
    row_CP: Int64
    start_CP: Int64
    end_CP: Int64
    started_CP: Bool
    ended_CP: Bool
    uncertainty_CP: Float64
    send_CPP: Int64
    receive_CPP: Int64
    algorithm_C: Texts
    backend_C: Texts

    def where(self, chosen_C: Bool) -> Collectives:
        """Some of them."""
        return Collectives(**{field.name: getattr(self, field.name)[chosen_C] for field in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmatched:
    """Rows that cannot be put together.

    Attributes:
        rows: their positions in the frame.
        reason: why not.
    """

    rows: Int64
    reason: Reason


def own_times(frame: pd.DataFrame) -> tuple[Int64, Int64, Bool, Bool]:
    """Start and end of every row as written, whether the start can be used, and whether the end can.

    Times that cannot be used, and ends before their start, come back as 0.
    """
    start_N = frame["start_ns"].to_numpy(np.int64)
    has_end_N = frame["end_ns"].notna().to_numpy(bool)
    end_N = np.where(has_end_N, frame["end_ns"].fillna(0).to_numpy(np.int64), start_N)
    possible_N = (abs(start_N) < _LATEST_NS) & (abs(end_N) < _LATEST_NS) & (end_N >= start_N)
    return (
        np.where(possible_N, start_N, 0),
        np.where(possible_N, end_N, 0),
        possible_N,
        possible_N & has_end_N,
    )


class _Columns:
    """Columns of an exchange frame as arrays, times on the reference clock."""

    def __init__(self, frame: pd.DataFrame, clocks: Mapping[int, ClockSpec | None]) -> None:
        self.frame = frame
        self.rank_N: Int64 = frame["source_rank"].to_numpy(np.int64)
        self.start_N, self.end_N, self.started_N, self.ended_N = own_times(frame)
        self.uncertainty_N: Float64 = np.full(len(frame), np.inf)
        for rank in np.unique(self.rank_N):
            here_N = self.rank_N == rank
            self.start_N[here_N], _ = to_reference_ns(self.start_N[here_N], clocks.get(int(rank)))
            self.end_N[here_N], self.uncertainty_N[here_N] = to_reference_ns(
                self.end_N[here_N], clocks.get(int(rank))
            )
        numbers = frame.get("backend_sequence", pd.Series(-1, index=frame.index))
        self.number_N: Int64 = pd.to_numeric(numbers).fillna(-1).to_numpy(np.int64)
        self.send, self.receive = (ByteLists.of(frame[name]) for name in ("send_bytes", "receive_bytes"))
        self.code_N: dict[str, Int64] = {}
        self.text_of: dict[str, Texts] = {}
        for name in (*_COMMON, "group", "sequence", "role"):
            codes, values = pd.factorize(frame[name], sort=name == "role")
            self.code_N[name] = codes.astype(np.int64)
            if name in _TEXTS:  # the last stands for the code -1
                self.text_of[name] = np.array([*map(str, values), None], dtype=object)

    def texts(self, name: str, rows: Int64) -> Texts:
        """Texts of rows; None where they were not recorded."""
        return self.text_of[name][self.code_N[name][rows]]

    def is_any(self, name: str, rows: Int64, texts: Sequence[str]) -> Bool:
        """Whether rows have one of these texts."""
        return np.isin(self.text_of[name], texts)[self.code_N[name][rows]]

    def code_of(self, name: str, text: str) -> int:
        """Code of a text; -1 where no row has it."""
        return next(iter(np.flatnonzero(self.text_of[name][:-1] == text).tolist()), -1)

    def said(self, name: str, rows: Int64) -> list[str]:
        """What rows say, for messages."""
        return [str(value)[:40] for value in self.frame[name].iloc[rows].astype(object)]


def match_collectives(
    exchanges: pd.DataFrame,
    *,
    ranks: int,
    clocks: Mapping[int, ClockSpec | None],
    node_of_rank: Sequence[int] | None = None,
) -> Iterator[Collectives | Unmatched]:
    """Put together the rows of each collective: equal group and sequence.

    Args:
        exchanges: columns of ``tables.EXCHANGE_SCHEMA``. A group may be named by its ranks (``0-3``,
            ``0,4,8``, ``0-3#1`` for the second of the same ranks); groups called ``node`` (the ranks of a
            node) and ``across`` (one rank of each node, those at the same place) are many groups of one name.
        ranks: number of ranks of the run.
        clocks: how each rank's clock relates to the reference.
        node_of_rank: node of each rank; needed for those two groups.

    Yields:
        Every collective once, in no order.
    """
    if exchanges.empty:
        return
    columns = _Columns(exchanges, clocks)
    layout = GroupLayout(ranks, node_of_rank)
    keys = [layout.part_N(exchanges["group"], columns.rank_N)]
    keys += [columns.code_N[name] for name in ("sequence", "group")]
    order = np.lexsort((columns.rank_N, *keys)).astype(np.int64)
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = np.any([np.diff(values[order]) != 0 for values in keys], axis=0)
    first = np.flatnonzero(begins)
    rows_C = np.diff(first, append=len(order))
    for present in np.unique(rows_C):
        place_C = np.flatnonzero(rows_C == present)
        row_CM = order[first[place_C][:, None] + np.arange(present)]
        for check in _CHECKS:
            wrong_C, reasons = check(row_CM, columns)
            yield from _unmatched(row_CM[wrong_C], reasons)
            if reasons:
                place_C, row_CM = place_C[~wrong_C], row_CM[~wrong_C]
        yield from _match(place_C, row_CM, columns, layout)


def _unmatched(row_CM: Int64, reasons: Sequence[Reason]) -> Iterator[Unmatched]:
    return (Unmatched(rows=rows, reason=reason) for rows, reason in zip(row_CM, reasons, strict=True))


#: Which collectives are wrong, and the reason of each of these.
_Check = Callable[[Int64, _Columns], tuple[Bool, list[Reason]]]


def _duplicates(row_CM: Int64, columns: _Columns) -> tuple[Bool, list[Reason]]:
    rank_CM = columns.rank_N[row_CM]
    twice_CM = rank_CM[:, 1:] == rank_CM[:, :-1]
    wrong_C = twice_CM.any(axis=1)
    at = twice_CM[wrong_C].argmax(axis=1) if wrong_C.any() else np.zeros(0, np.int64)
    ranks = rank_CM[np.flatnonzero(wrong_C), at]
    return wrong_C, [Reason(ExchangeCode.DUPLICATE_SEQUENCE, {"rank": int(rank)}) for rank in ranks]


def _fields_differ(name: str, row_CM: Int64, columns: _Columns) -> tuple[Bool, list[Reason]]:
    code_CM = columns.code_N[name][row_CM]
    other_CM = code_CM != code_CM[:, :1]
    wrong_C = other_CM.any(axis=1)
    if not wrong_C.any():
        return wrong_C, []
    wrong = np.flatnonzero(wrong_C)
    one, other = row_CM[wrong, 0], row_CM[wrong, other_CM[wrong].argmax(axis=1)]
    said = zip(
        columns.rank_N[one].tolist(),
        columns.said(name, one),
        columns.rank_N[other].tolist(),
        columns.said(name, other),
        strict=True,
    )
    names = ("field", "rank", "value", "other_rank", "other_value")
    return wrong_C, [
        Reason(ExchangeCode.FIELDS_DIFFER, dict(zip(names, (name, *values), strict=True))) for values in said
    ]


def _numbers_differ(row_CM: Int64, columns: _Columns) -> tuple[Bool, list[Reason]]:
    alike_C = columns.is_any("backend", row_CM[:, 0], _NUMBER_ALIKE)
    number_CM = columns.number_N[row_CM]
    other_CM = (number_CM >= 0) & (number_CM != number_CM[:, :1])
    wrong_C = alike_C & (number_CM[:, 0] >= 0) & other_CM.any(axis=1)
    rank_CM = columns.rank_N[row_CM]
    wrong = np.flatnonzero(wrong_C)
    return wrong_C, [
        Reason(
            ExchangeCode.BACKEND_NUMBERS_DIFFER,
            {
                "rank": int(rank_CM[c, 0]),
                "number": int(number_CM[c, 0]),
                "other_rank": int(rank_CM[c, m]),
                "other_number": int(number_CM[c, m]),
            },
        )
        for c, m in zip(wrong, other_CM[wrong].argmax(axis=1), strict=True)
    ]


def _group_size_C(row_CM: Int64, columns: _Columns) -> tuple[Int64, Int64]:
    """Smallest and largest length of each collective's byte lists; how many left rows without one."""
    length_CM = np.concatenate([columns.send.length_N[row_CM], columns.receive.length_N[row_CM]], axis=1)
    most_C = length_CM.max(axis=1)
    least_C = np.where(length_CM < 0, np.iinfo(np.int64).max, length_CM).min(axis=1)
    said_C = most_C >= 0
    return np.where(said_C, least_C, row_CM.shape[1]), np.where(said_C, most_C, row_CM.shape[1])


def _sizes_differ(row_CM: Int64, columns: _Columns) -> tuple[Bool, list[Reason]]:
    least_C, most_C = _group_size_C(row_CM, columns)
    wrong_C = least_C != most_C
    reasons = []
    for rows in row_CM[wrong_C]:
        lengths = np.unique([columns.send.length_N[rows], columns.receive.length_N[rows]])
        sizes = ", ".join(str(size) for size in lengths[lengths >= 0][:4])
        reasons.append(Reason(ExchangeCode.GROUP_SIZES_DIFFER, {"sizes": sizes}))
    return wrong_C, reasons


#: In this order: the first reason counts.
_CHECKS: tuple[_Check, ...] = (
    _duplicates,
    *(partial(_fields_differ, name) for name in _COMMON),
    _numbers_differ,
    _sizes_differ,
)


def _match(
    place_C: Int64, row_CM: Int64, columns: _Columns, layout: GroupLayout
) -> Iterator[Collectives | Unmatched]:
    """Collectives of which as many ranks left rows, which agree with each other."""
    if not len(row_CM):
        return
    size_C, _ = _group_size_C(row_CM, columns)
    group_C = columns.code_N["group"][row_CM[:, 0]]
    kind_CX = np.column_stack([group_C, size_C, columns.rank_N[row_CM]])
    of_C = joint_codes(kind_CX.T)
    seen = kind_CX[np.unique(of_C, return_index=True)[1]]
    found_K = [
        layout.members(str(columns.text_of["group"][group]), present, int(size))
        for group, size, present in zip(seen[:, 0], seen[:, 1], seen[:, 2:], strict=True)
    ]
    ranks_K = np.array([0 if isinstance(found, Reason) else len(found) for found in found_K])
    for c in np.flatnonzero(ranks_K[of_C] == 0):
        reason = found_K[of_C[c]]
        assert isinstance(reason, Reason)
        yield Unmatched(rows=row_CM[c], reason=reason)
    for ranks, size in np.unique(np.column_stack([ranks_K, seen[:, 1]])[ranks_K > 0], axis=0):
        alike_K = np.flatnonzero((ranks_K == ranks) & (seen[:, 1] == size))
        rank_KP = np.array([found_K[k] for k in alike_K], np.int64)
        at_KM = np.stack(
            [np.searchsorted(rank_P, seen[k, 2:]) for k, rank_P in zip(alike_K, rank_KP, strict=True)]
        )
        chosen = np.flatnonzero(np.isin(of_C, alike_K))
        at_once = max(1, _PAIRS_AT_ONCE // max(ranks * ranks, row_CM.shape[1] * size))
        for begin in range(0, len(chosen), at_once):
            block = chosen[begin : begin + at_once]
            k = np.searchsorted(alike_K, of_C[block])
            yield from _collectives(
                place_C[block], row_CM[block], rank_KP[k], at_KM[k], int(size), columns, layout
            )


def _collectives(
    place_C: Int64,
    row_CM: Int64,
    rank_CP: Int64,
    at_CM: Int64,
    size: int,
    columns: _Columns,
    layout: GroupLayout,
) -> Iterator[Collectives | Unmatched]:
    """Collectives of groups of one size; ``at_CM`` is the place of each row's rank in its group."""
    every_C = np.arange(len(row_CM))[:, None]
    row_CP = np.full(rank_CP.shape, -1, np.int64)
    row_CP[every_C, at_CM] = row_CM
    here_CP = row_CP >= 0
    moved_CM = np.zeros(row_CM.shape, bool)
    matrices, refused = [], []
    for lists in (columns.send, columns.receive):
        bytes_CML, said_CM = lists.of_rows(row_CM, size)
        moved_CM |= bytes_CML.any(axis=2)
        code_CM = np.where(((bytes_CML < 0) | (bytes_CML > _MOST_BYTES)).any(axis=2), 1, 0)
        if size != rank_CP.shape[1]:  # one entry per rank of the run, of which the group is a part
            inside_CMP = np.take_along_axis(bytes_CML, rank_CP[:, None, :], axis=2)
            outside_CM = np.count_nonzero(bytes_CML, axis=2) > np.count_nonzero(inside_CMP, axis=2)
            code_CM[outside_CM & (code_CM == 0)] = 2
            bytes_CML = inside_CMP
        matrix_CPP = np.full((*rank_CP.shape, rank_CP.shape[1]), -1, np.int64)
        matrix_CPP[every_C, at_CM] = np.where(said_CM[:, :, None], bytes_CML, -1)
        matrices.append(matrix_CPP)
        refused.append(code_CM)
    send_CPP, receive_CPP = matrices
    role_C, roles_differ_C = _roles(
        columns.code_N["role"][row_CM], moved_CM, other=columns.code_of("role", "other")
    )
    first_row_C = row_CM[:, 0]
    matched = Collectives(
        place_C=place_C,
        first_row_C=first_row_C,
        role_C=columns.text_of["role"][role_C],
        part_C=columns.is_any("group", first_row_C, PARTED) | (rank_CP.shape[1] < layout.ranks),
        rank_CP=rank_CP,
        row_CP=row_CP,
        start_CP=np.where(here_CP, columns.start_N[row_CP], 0),
        end_CP=np.where(here_CP, columns.end_N[row_CP], 0),
        started_CP=here_CP & columns.started_N[row_CP],
        ended_CP=here_CP & columns.ended_N[row_CP],
        uncertainty_CP=np.where(here_CP, columns.uncertainty_N[row_CP], np.inf),
        send_CPP=send_CPP,
        receive_CPP=receive_CPP,
        algorithm_C=columns.texts("algorithm", first_row_C),
        backend_C=columns.texts("backend", first_row_C),
    )
    code_CR = np.stack(refused, axis=2).reshape(len(row_CM), -1)
    got_CPP = receive_CPP.swapaxes(1, 2)
    contradict_CPP = (send_CPP >= 0) & (got_CPP >= 0) & (send_CPP != got_CPP)
    wrong_C = code_CR.any(axis=1) | contradict_CPP.any(axis=(1, 2)) | roles_differ_C
    for c in np.flatnonzero(wrong_C):
        if code_CR[c].any():
            first = int((code_CR[c] != 0).argmax())
            code = (ExchangeCode.IMPOSSIBLE_BYTES, ExchangeCode.BYTES_OUTSIDE_GROUP)[code_CR[c, first] - 1]
            reason = Reason(code, {"rank": int(rank_CP[c, at_CM[c, first // 2]])})
        elif contradict_CPP[c].any():
            reason = _contradiction(rank_CP[c], send_CPP[c], receive_CPP[c], contradict_CPP[c])
        else:
            roles = " and ".join(sorted(set(columns.texts("role", row_CM[c]))))
            reason = Reason(ExchangeCode.ROLES_DIFFER, {"roles": roles[:80]})
        yield Unmatched(rows=row_CM[c], reason=reason)
    yield matched.where(~wrong_C) if wrong_C.any() else matched


def _contradiction(rank_P: Int64, send_PP: Int64, receive_PP: Int64, contradict_PP: Bool) -> Reason:
    i, j = np.argwhere(contradict_PP)[0]
    return Reason(
        ExchangeCode.BYTES_CONTRADICT,
        {
            "rank": int(rank_P[i]),
            "sent_bytes": int(send_PP[i, j]),
            "other_rank": int(rank_P[j]),
            "received_bytes": int(receive_PP[j, i]),
        },
    )


def _roles(role_CM: Int64, moved_CM: Bool, *, other: int) -> tuple[Int64, Bool]:
    """Role of each collective, whose ranks may see it differently, and whether they contradict each other.

    A rank that sends and gets nothing cannot distinguish a dispatch from a combine, and one that skipped its
    router because it had no tokens records ``other`` for both. Where no rank moves anything, the majority
    counts, of equals the first by name.

    Args:
        role_CM: codes, in the order of the roles' names.
        moved_CM: whether a rank says that it sends or gets anything, its own part included.
        other: code of ``other``; -1 where no rank recorded that.
    """
    role_C = role_CM[:, 0].copy()
    mixed = np.flatnonzero((role_CM != role_CM[:, :1]).any(axis=1))
    differ_C = np.zeros(len(role_CM), bool)
    if mixed.size:
        code_CM = role_CM[mixed]
        sure_CM = moved_CM[mixed] & (code_CM != other)
        low_C = np.where(sure_CM, code_CM, np.iinfo(np.int64).max).min(axis=1)
        high_C = np.where(sure_CM, code_CM, -1).max(axis=1)
        count_CM = (code_CM[:, :, None] == code_CM[:, None, :]).sum(axis=2)
        often_CM = count_CM * (code_CM.max() + 1) - code_CM
        major_C = code_CM[np.arange(len(mixed)), often_CM.argmax(axis=1)]
        is_sure_C = sure_CM.any(axis=1)
        role_C[mixed] = np.where(is_sure_C, low_C, major_C)
        differ_C[mixed] = is_sure_C & (low_C != high_C)
    return role_C, differ_C
