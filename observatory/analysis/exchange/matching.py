"""Rows of one collective, found again over the ranks that took part.

Shapes: P ranks of the collective's group. ``send_PP[i, j]`` is what rank i says it sent to rank j,
``receive_PP[i, j]`` what rank i says it got from rank j; rows of a rank that said nothing are -1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from observatory.analysis.exchange.alignment import to_reference_ns
from observatory.analysis.exchange.words import ExchangeCode
from observatory.reasons import Reason
from observatory.run.manifest import ClockSpec

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

#: Times beyond this many nanoseconds (73 years) are no times; below it differences cannot overflow.
_LATEST_NS = 2**61
_LABEL = re.compile(r"\d{1,7}(-\d{1,7})?(,\d{1,7}(-\d{1,7})?)*(#\d{1,7})?")
_LONGEST_LABEL, _MOST_RANKS = 65536, 65536
_MOST_BYTES = 2**50
#: Larger groups would need gigabytes for their pairs.
_LARGEST_GROUP = 4096
#: Groups of which there are several of one name.
_PARTED = ("node", "across")
#: Backends whose own numbers of a group's collectives are the same on all ranks; gloo counts sends as well.
_NUMBER_ALIKE = ("nccl",)
#: What every rank must say alike.
_COMMON = ("step", "phase", "layer", "algorithm", "backend")


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """One collective with all that its ranks said about it.

    Attributes:
        rows: positions in the frame of the rows that belong to it.
        role: what it is for, as those say who moved anything.
        part: the group is a part of the run's ranks, or a stage called so (``node``, ``across``).
        rank_P: members of the group, ascending.
        row_P: position of each member's row; -1 for a member that left none.
        start_P, end_P: on the reference clock where that is known, else the rank's own; 0 without a row.
        started_P: the row's times can be used: an arrival, and an end that is not before it.
        ended_P: likewise, and the collective ended on that rank.
        uncertainty_P: half-width of each time in ns; infinite where the rank's clock is not aligned.
        send_PP, receive_PP: bytes; -1 where a rank said nothing.
        algorithm, backend: as recorded; None when not.
    """

    rows: Int64
    role: str
    part: bool
    rank_P: Int64
    row_P: Int64
    start_P: Int64
    end_P: Int64
    started_P: Bool
    ended_P: Bool
    uncertainty_P: Float64
    send_PP: Int64
    receive_PP: Int64
    algorithm: str | None
    backend: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmatched:
    """Rows that cannot be put together.

    Attributes:
        rows: their positions in the frame.
        reason: why not.
    """

    rows: Int64
    reason: Reason


def ranks_of_group(label: str) -> tuple[int, ...] | None:
    """Ranks that a group's name lists, ascending: 0, 1, 2 and 5 for ``0-2,5``. None for any other name."""
    if len(label) > _LONGEST_LABEL or not _LABEL.fullmatch(label):
        return None
    ranks: set[int] = set()
    for run in label.partition("#")[0].split(","):
        low, _, high = run.partition("-")
        first, last = int(low), int(high or low)
        if last - first > _MOST_RANKS:
            return None
        ranks.update(range(first, last + 1))
    return tuple(sorted(ranks)) or None


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
        self.group_N = frame["group"].to_numpy(object)
        self.role_N = frame["role"].to_numpy(object)
        self.send_N = frame["send_bytes"].to_numpy(object)
        self.receive_N = frame["receive_bytes"].to_numpy(object)
        self.said = {name: frame[name].astype(object).to_numpy(object) for name in _COMMON}
        self.code = {name: pd.factorize(frame[name])[0] for name in _COMMON}

    def text(self, name: str, row: int) -> str | None:
        """A text of one row; None when it was not recorded."""
        return None if self.code[name][row] < 0 else str(self.said[name][row])


def match_collectives(
    exchanges: pd.DataFrame,
    *,
    ranks: int,
    clocks: Mapping[int, ClockSpec | None],
    node_of_rank: Sequence[int] | None = None,
) -> Iterator[Collective | Unmatched]:
    """Put together the rows of each collective: equal group and sequence.

    Args:
        exchanges: columns of ``tables.EXCHANGE_SCHEMA``. A group may be named by its ranks (``0-3``,
            ``0,4,8``, ``0-3#1`` for the second of the same ranks); groups called ``node`` (the ranks of a
            node) and ``across`` (one rank of each node, those at the same place) are many groups of one name.
        ranks: number of ranks of the run.
        clocks: how each rank's clock relates to the reference.
        node_of_rank: node of each rank; needed for those two groups.
    """
    if exchanges.empty:
        return
    columns = _Columns(exchanges, clocks)
    layout = _Layout(ranks, node_of_rank)
    keys = [pd.factorize(exchanges[name])[0] for name in ("sequence", "group")]
    keys.insert(0, layout.part_N(exchanges["group"], columns.rank_N))
    order = np.lexsort((columns.rank_N, *keys))
    changes = np.zeros(len(order), dtype=bool)
    for values in keys:
        changes[1:] |= np.diff(values[order]) != 0
    for rows in np.split(order.astype(np.int64), np.flatnonzero(changes)):
        matched = _match(rows, columns, layout)
        yield Unmatched(rows=rows, reason=matched) if isinstance(matched, Reason) else matched


def _match(rows: Int64, columns: _Columns, layout: _Layout) -> Collective | Reason:
    present = columns.rank_N[rows]
    twice = present[1:][present[1:] == present[:-1]]
    if twice.size:
        return Reason(ExchangeCode.DUPLICATE_SEQUENCE, {"rank": int(twice[0])})
    disagreement = _disagreement(rows, present, columns)
    if disagreement is not None:
        return disagreement
    lists = [[_bytes(column[row]) for column in (columns.send_N, columns.receive_N)] for row in rows]
    sizes = {len(values) for pair in lists for values in pair if values is not None}
    group = str(columns.group_N[rows[0]])
    members = layout.members(group, present, sizes)
    if isinstance(members, Reason):
        return members
    size = len(members)
    at = np.searchsorted(members, present)
    row_P = np.full(size, -1, np.int64)
    row_P[at] = rows
    matrices = _byte_matrices(members, at, lists)
    if isinstance(matrices, Reason):
        return matrices
    send_PP, receive_PP = matrices
    role = _role(rows, [_moved(pair) for pair in lists], columns)
    if role is None:
        roles = " and ".join(sorted(set(columns.role_N[rows].tolist())))
        return Reason(ExchangeCode.ROLES_DIFFER, {"roles": roles[:80]})
    here_P = row_P >= 0
    return Collective(
        rows=rows,
        role=role,
        part=group in _PARTED or size < layout.ranks,
        rank_P=members,
        row_P=row_P,
        start_P=np.where(here_P, columns.start_N[row_P], 0),
        end_P=np.where(here_P, columns.end_N[row_P], 0),
        started_P=here_P & columns.started_N[row_P],
        ended_P=here_P & columns.ended_N[row_P],
        uncertainty_P=np.where(here_P, columns.uncertainty_N[row_P], np.inf),
        send_PP=send_PP,
        receive_PP=receive_PP,
        algorithm=columns.text("algorithm", rows[0]),
        backend=columns.text("backend", rows[0]),
    )


def _disagreement(rows: Int64, present: Int64, columns: _Columns) -> Reason | None:
    """What ranks of one collective recorded differently although it must be equal."""
    for name, code_N in columns.code.items():
        other = np.flatnonzero(code_N[rows] != code_N[rows[0]])
        if other.size:
            value, other_value = (str(columns.said[name][rows[at]])[:40] for at in (0, other[0]))
            return Reason(
                ExchangeCode.FIELDS_DIFFER,
                {
                    "field": name,
                    "rank": int(present[0]),
                    "value": value,
                    "other_rank": int(present[other[0]]),
                    "other_value": other_value,
                },
            )
    if columns.text("backend", int(rows[0])) not in _NUMBER_ALIKE:
        return None
    number_N = columns.number_N[rows]
    other = np.flatnonzero((number_N >= 0) & (number_N != number_N[0]))
    if number_N[0] >= 0 and other.size:
        return Reason(
            ExchangeCode.BACKEND_NUMBERS_DIFFER,
            {
                "rank": int(present[0]),
                "number": int(number_N[0]),
                "other_rank": int(present[other[0]]),
                "other_number": int(number_N[other[0]]),
            },
        )
    return None


def _byte_matrices(
    members: Int64, at: Int64, lists: Sequence[Sequence[Int64 | None]]
) -> tuple[Int64, Int64] | Reason:
    """What was sent and received, (P, P) each; a reason when it cannot be true.

    Args:
        members: ranks of the group.
        at: place among them of each rank that left a row.
        lists: what each of those says that it sent and got.
    """
    size = len(members)
    send_PP, receive_PP = np.full((size, size), -1, np.int64), np.full((size, size), -1, np.int64)
    for position, pair in zip(at, lists, strict=True):
        for values, matrix_PP in zip(pair, (send_PP, receive_PP), strict=True):
            if values is None:
                continue
            if ((values < 0) | (values > _MOST_BYTES)).any():
                return Reason(ExchangeCode.IMPOSSIBLE_BYTES, {"rank": int(members[position])})
            if len(values) == size:
                matrix_PP[position] = values
            elif np.delete(values, members).any():
                return Reason(ExchangeCode.BYTES_OUTSIDE_GROUP, {"rank": int(members[position])})
            else:  # one entry per rank of the run, of which the group is a part
                matrix_PP[position] = values[members]
    wrong = np.argwhere((send_PP >= 0) & (receive_PP.T >= 0) & (send_PP != receive_PP.T))
    if wrong.size:
        i, j = wrong[0]
        return Reason(
            ExchangeCode.BYTES_CONTRADICT,
            {
                "rank": int(members[i]),
                "sent_bytes": int(send_PP[i, j]),
                "other_rank": int(members[j]),
                "received_bytes": int(receive_PP[j, i]),
            },
        )
    return send_PP, receive_PP


def _role(rows: Int64, moved: Sequence[bool], columns: _Columns) -> str | None:
    """Role of a collective whose ranks may see it differently; None when they contradict each other.

    A rank that sends and gets nothing cannot distinguish a dispatch from a combine, and one that skipped its
    router because it had no tokens records ``other`` for both. Where no rank moves anything, the majority
    counts.
    """
    roles = columns.role_N[rows].tolist()
    if len(set(roles)) == 1:
        return str(roles[0])
    sure = {role for role, moves in zip(roles, moved, strict=True) if moves and role != "other"}
    if len(sure) > 1:
        return None
    return str(sure.pop()) if sure else str(max(sorted(set(roles)), key=roles.count))


def _moved(pair: Sequence[Int64 | None]) -> bool:
    """Whether a rank says that it sends or gets anything, its own part included."""
    return any(values is not None and bool(values.any()) for values in pair)


class _Layout:
    """Which ranks a group stands for."""

    def __init__(self, ranks: int, node_of_rank: Sequence[int] | None) -> None:
        self.ranks = ranks
        self.parts: dict[str, Int64] = {}
        if node_of_rank is not None and len(node_of_rank) == ranks:
            node_P = np.asarray(node_of_rank, dtype=np.int64)
            place_P = np.array([int((node_P[:rank] == node).sum()) for rank, node in enumerate(node_P)])
            self.parts = {"node": node_P, "across": place_P.astype(np.int64)}

    def part_N(self, group: pd.Series[str], rank_N: Int64) -> Int64:
        """Distinguishes the groups of one name."""
        part_N = np.zeros(len(rank_N), np.int64)
        for name, part_P in self.parts.items():
            of_group = (group == name).to_numpy(bool) & (rank_N < self.ranks)
            part_N[of_group] = part_P[rank_N[of_group]]
        return part_N

    def members(self, group: str, present: Int64, sizes: set[int]) -> Int64 | Reason:
        """Ranks of the group; a reason when that is not known.

        Args:
            group: its name.
            present: ranks that left rows, ascending.
            sizes: lengths of their byte lists.
        """
        if len(sizes) > 1:
            lengths = ", ".join(str(size) for size in sorted(sizes)[:4])
            return Reason(ExchangeCode.GROUP_SIZES_DIFFER, {"sizes": lengths})
        size = next(iter(sizes), len(present))
        if size > _LARGEST_GROUP:
            return Reason(ExchangeCode.GROUP_TOO_LARGE, {"ranks": size, "most": _LARGEST_GROUP})
        if group in self.parts and present[-1] < self.ranks:
            part_P = self.parts[group]
            members = np.flatnonzero(part_P == part_P[present[0]]).astype(np.int64)
            if size in (len(members), self.ranks):
                return members
        elif group in _PARTED:
            return Reason(ExchangeCode.NODES_UNKNOWN, {"group": group})
        named = ranks_of_group(group)
        fits = named is not None and size == len(named) and named[-1] < self.ranks
        if named is not None and fits and set(present.tolist()) <= set(named):
            return np.array(named, dtype=np.int64)
        if size == len(present):
            return present
        if size == self.ranks and present[-1] < self.ranks:
            return np.arange(self.ranks, dtype=np.int64)
        if size < len(present):
            return Reason(ExchangeCode.TOO_MANY_ROWS, {"rows": len(present), "ranks": size})
        return Reason(
            ExchangeCode.ROWS_MISSING, {"rows": len(present), "ranks": size, "run_ranks": self.ranks}
        )


def _bytes(values: object) -> Int64 | None:
    """One byte list; None when it was not recorded or holds nulls."""
    if values is None or isinstance(values, float):
        return None
    array = np.asarray(values)
    return array.astype(np.int64) if np.issubdtype(array.dtype, np.integer) or array.size == 0 else None
