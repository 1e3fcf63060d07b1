"""What one rank's shard of a run adds to the run's metrics, and how such parts merge.

Shapes: S steps, E experts, C rows of coverage (one for each phase, layer and rank).

Everything is an integer, and merging takes sums, maxima and unions: it is associative and commutative, so
that the result depends neither on the order of the shards nor on who merged them. Floating-point numbers are
computed once, from what all shards add up to (`metrics.py`). Sums stop at `SATURATED`, which keeps them
associative; a run that reaches it is refused then.

Memory of a partial result: 64 bytes for each step of each phase, 8 (E + 1) for each layer of each phase, 64
for each phase, layer and rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from observatory.analysis.exchange.matching import own_times
from observatory.errors import RunFormatError
from observatory.run import LoadBlock, Run
from observatory.run.manifest import PHASES

Int64 = NDArray[np.int64]

#: No sum goes above: two of them add up within 64 bits.
SATURATED = 1 << 61

#: Columns of `Partial.step_SX`. ``window``: steps that a row of loads covers. ``step_ns``: duration of the
#: step on the rank that took longest. Sums over ranks: ``exchange_ns`` in exchanges, ``exchanges`` rows of
#: them, ``sent_bytes`` handed to them, ``unsaid`` rows that do not state their bytes.
STEP_COLUMNS = ("phase", "step", "window", "step_ns", "exchange_ns", "exchanges", "sent_bytes", "unsaid")
_KEYS, _LARGEST = 2, 4
#: Columns of `Partial.coverage_CX`: steps covered by the rank's rows, rows, and rows that are partial with
#: the first and last of their steps.
COVERAGE_COLUMNS = ("phase", "layer", "rank", "covered", "rows", "partial", "first_step", "last_step")

#: Rows of steps that wait to be put together: 4 MiB.
_MOST_WAITING = 1 << 16

#: Phase, layer and number of experts: one layer has one number of experts, unless shards contradict.
LoadKey = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Partial:
    """What some shards of one run add up to.

    Attributes:
        loads: tokens, then assignments per expert, (1 + E,), by phase, layer and E.
        step_SX: rows of `STEP_COLUMNS`, ascending by phase and step.
        coverage_CX: rows of `COVERAGE_COLUMNS`, ascending.
        routed: ranks with readable routing parts.
        exchanging: ranks with rows of exchanges.
        problems: what is wrong with files of a rank, a sentence each, by rank.
        left_out: why nothing of a rank was taken, a sentence, by rank.
        shards: shards that were read.
    """

    loads: Mapping[LoadKey, Int64] = field(default_factory=dict)
    step_SX: Int64 = field(default_factory=lambda: np.zeros((0, len(STEP_COLUMNS)), np.int64))
    coverage_CX: Int64 = field(default_factory=lambda: np.zeros((0, len(COVERAGE_COLUMNS)), np.int64))
    routed: frozenset[int] = frozenset()
    exchanging: frozenset[int] = frozenset()
    problems: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    left_out: Mapping[int, str] = field(default_factory=dict)
    shards: int = 0

    def merged(self, other: Partial) -> Partial:
        """Both together; they must be of different shards of one run."""
        loads = dict(self.loads)
        for key, load in other.loads.items():
            loads[key] = np.minimum(loads[key] + load, SATURATED) if key in loads else load
        coverage = np.concatenate([self.coverage_CX, other.coverage_CX])
        return Partial(
            loads=loads,
            step_SX=_merged_steps(self.step_SX, other.step_SX),
            coverage_CX=coverage[np.lexsort(coverage[:, 2::-1].T)],
            routed=self.routed | other.routed,
            exchanging=self.exchanging | other.exchanging,
            problems={**self.problems, **other.problems},
            left_out={**self.left_out, **other.left_out},
            shards=self.shards + other.shards,
        )

    def to_bytes(self) -> bytes:
        """For another process: the length of a JSON header, the header, and the integers as they lie here."""
        header = {
            "loads": list(self.loads),
            "steps": len(self.step_SX),
            "coverage": len(self.coverage_CX),
            "routed": sorted(self.routed),
            "exchanging": sorted(self.exchanging),
            "problems": list(self.problems.items()),
            "left_out": list(self.left_out.items()),
            "shards": self.shards,
        }
        text = json.dumps(header).encode()
        arrays = [*self.loads.values(), self.step_SX, self.coverage_CX]
        return b"".join([len(text).to_bytes(8, "little"), text, *(array.tobytes() for array in arrays)])

    @classmethod
    def from_bytes(cls, content: bytes | bytearray) -> Partial:
        """What `to_bytes` wrote."""
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(bytes(content[8:start]))
        numbers = np.frombuffer(content, dtype=np.uint8)[start:].copy().view(np.int64)
        loads: dict[LoadKey, Int64] = {}
        at = 0
        for phase, layer, experts in header["loads"]:
            loads[phase, layer, experts] = numbers[at : at + experts + 1]
            at += experts + 1
        end = at + header["steps"] * len(STEP_COLUMNS)
        return cls(
            loads=loads,
            step_SX=numbers[at:end].reshape(-1, len(STEP_COLUMNS)),
            coverage_CX=numbers[end:].reshape(-1, len(COVERAGE_COLUMNS)),
            routed=frozenset(header["routed"]),
            exchanging=frozenset(header["exchanging"]),
            problems={rank: tuple(texts) for rank, texts in header["problems"]},
            left_out=dict(header["left_out"]),
            shards=header["shards"],
        )


def left_out(rank: int, why: str) -> Partial:
    """The partial result of a shard of which nothing can be taken."""
    return Partial(left_out={rank: why}, shards=0)


def reduce_shard(run: Run, rank: int) -> Partial:
    """The partial result of one shard, in one streaming pass over each of its tables.

    Args:
        run: of `Run.open_shard`.
        rank: whose shard it is.

    Raises:
        RunFormatError, LoadError: rows that cannot be true.
    """
    loads: dict[LoadKey, Int64] = {}
    steps = _Steps()
    coverage: dict[tuple[int, int], Int64] = {}
    for block in run.iter_loads():
        _add_block(block, rank, loads, steps, coverage)
    for rows in run.iter_rows("spans"):
        _add_spans(rows, steps)
    exchanges = 0
    for rows in run.iter_rows("exchange"):
        exchanges += len(rows)
        _add_exchanges(rows, steps)
    return Partial(
        loads=loads,
        step_SX=steps.finish(),
        coverage_CX=np.array([coverage[key] for key in sorted(coverage)], np.int64).reshape(
            -1, len(COVERAGE_COLUMNS)
        ),
        routed=frozenset({rank} if run.has_parts("routing") else ()),
        exchanging=frozenset({rank} if exchanges else ()),
        problems={rank: run.damage} if run.damage else {},
        shards=1,
    )


class _Steps:
    """Rows of `STEP_COLUMNS` of one rank; what falls on one step is put together now and then."""

    def __init__(self) -> None:
        self.waiting: list[Int64] = []
        self.rows = 0

    def add(self, phase_N: Int64, step_N: Int64, **columns: Int64) -> None:
        """Add values of steps."""
        rows = np.zeros((len(step_N), len(STEP_COLUMNS)), np.int64)
        rows[:, 0], rows[:, 1] = phase_N, step_N
        for name, value_N in columns.items():
            rows[:, STEP_COLUMNS.index(name)] = value_N
        self.waiting.append(rows)
        self.rows += len(rows)
        if self.rows > 2 * len(self.waiting[0]) + _MOST_WAITING:
            self.waiting = [self.finish()]
            self.rows = len(self.waiting[0])

    def finish(self) -> Int64:
        """One row for each phase and step: spans of one rank add up, between ranks the longest counts."""
        rows = np.concatenate([np.zeros((0, len(STEP_COLUMNS)), np.int64), *self.waiting])
        return _grouped(rows, largest=_LARGEST - 1)


def _add_block(
    block: LoadBlock,
    rank: int,
    loads: dict[LoadKey, Int64],
    steps: _Steps,
    coverage: dict[tuple[int, int], Int64],
) -> None:
    phase = PHASES.index(block.phase)
    key = (phase, block.layer, block.experts)
    load = np.concatenate([[block.tokens_SP.sum()], block.load_SPE.sum(axis=(0, 1))])
    # Counts are below 2^40 each and 2^62 in all (`iter_loads`).
    loads[key] = np.minimum(loads.get(key, 0) + load, SATURATED)
    steps.add(np.full(len(block.step_S), phase), block.step_S, window=block.window_steps_S)
    row = coverage.setdefault(
        (phase, block.layer), np.array([phase, block.layer, rank, 0, 0, 0, -1, -1], np.int64)
    )
    row[3] += int(block.window_steps_S.sum())
    row[4] += len(block.step_S)
    if block.partial_SP is not None:
        partial = block.step_S[block.partial_SP.any(axis=1)]
        if len(partial):
            row[5] += len(partial)
            row[6] = int(partial.min()) if row[6] < 0 else min(int(row[6]), int(partial.min()))
            row[7] = max(int(row[7]), int(partial.max()))


def _add_spans(rows: pa.Table, steps: _Steps) -> None:
    """Durations of phases: the spans that `observatory compare` takes for the time of a step."""
    kept = rows.filter(pc.equal(rows.column("name"), "phase"))
    start_N, end_N = _times(kept)
    steps.add(_phases(kept), _integers(kept.column("step")), step_ns=end_N - start_N)


def _add_exchanges(rows: pa.Table, steps: _Steps) -> None:
    """Time inside exchanges, as in `analysis.exchange.waiting`, and bytes."""
    start_N, end_N = _times(rows)
    start_N, end_N, _, ended_N = own_times(pd.DataFrame({"start_ns": start_N, "end_ns": end_N}))
    sent_N, unsaid_N = _row_sums(rows, "send_bytes")
    steps.add(
        _phases(rows),
        _integers(rows.column("step")),
        exchange_ns=np.where(ended_N, end_N - start_N, 0),
        exchanges=np.ones(len(rows), np.int64),
        sent_bytes=sent_N,
        unsaid=unsaid_N.astype(np.int64),
    )


def _times(rows: pa.Table) -> tuple[Int64, Int64]:
    """Starts and ends; what never ended lasts no time."""
    start = rows.column("start_ns")
    end = pc.coalesce(rows.column("end_ns"), start) if "end_ns" in rows.column_names else start
    return _integers(start), _integers(end)


def _phases(rows: pa.Table) -> Int64:
    codes = pc.index_in(rows.column("phase"), pa.array(PHASES))
    return _integers(codes)


def _row_sums(rows: pa.Table, name: str) -> tuple[Int64, NDArray[np.bool_]]:
    """Sums of a column of lists, and where there is no list."""
    if name not in rows.column_names:
        return np.zeros(len(rows), np.int64), np.ones(len(rows), dtype=bool)
    column = rows.column(name).combine_chunks()
    items = _integers(pc.fill_null(pc.list_flatten(column), 0))
    row_I = _integers(pc.list_parent_indices(column))
    sums = np.zeros(len(rows), np.int64)
    np.add.at(sums, row_I, items)
    sums[np.bincount(row_I, weights=items, minlength=len(rows)) >= SATURATED] = SATURATED
    return sums, np.asarray(pc.is_null(column).to_numpy(zero_copy_only=False), dtype=bool)


def _integers(column: pa.Array | pa.ChunkedArray) -> Int64:
    return np.asarray(column).astype(np.int64)


def _merged_steps(one: Int64, other: Int64) -> Int64:
    return _grouped(np.concatenate([one, other]), largest=_LARGEST)


def _grouped(rows: Int64, *, largest: int) -> Int64:
    """One row for each phase and step: the largest of the columns up to ``largest``, sums of the others."""
    if not len(rows):
        return rows
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    new = np.ones(len(rows), dtype=bool)
    new[1:] = (np.diff(rows[:, :_KEYS], axis=0) != 0).any(axis=1)
    starts = np.flatnonzero(new)
    totals = np.minimum(rows[:, largest:], SATURATED)
    grouped = np.empty((len(starts), rows.shape[1]), np.int64)
    grouped[:, :largest] = np.maximum.reduceat(rows[:, :largest], starts, axis=0)
    grouped[:, largest:] = _saturating_sums(totals, starts)
    return grouped


def _saturating_sums(rows: Int64, starts: NDArray[np.intp]) -> Int64:
    sums: Int64 = np.add.reduceat(rows, starts, axis=0)
    if float(np.abs(rows).max(initial=0)) * len(rows) < SATURATED:
        return sums
    exact = np.add.reduceat(rows.astype(object), starts, axis=0)
    return np.minimum(exact, SATURATED).astype(np.int64)


def check_unsaturated(partial: Partial) -> None:
    """Refuse sums that are not known because they are too large.

    Raises:
        RunFormatError: a sum has reached `SATURATED`.
    """
    arrays: Iterable[Int64] = [*partial.loads.values(), partial.step_SX[:, _KEYS:]]
    if any((array >= SATURATED).any() for array in arrays):
        raise RunFormatError(
            "counts, times or bytes of all ranks add up to over 2**61", remedy="capture it again"
        )
