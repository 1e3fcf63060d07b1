"""Dense blocks of loads, merged from the ranks' parts while streaming.

Shape legend: S steps (or windows), P source ranks, E experts, N rows.

Row groups of all ranks are read in the order of their smallest step. Everything below the smallest step
that is still unread is complete on every rank and leaves as blocks, so memory holds about one row group
per rank however long the run is, and the order of rows inside a part does not matter.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from observatory.errors import RunFormatError
from observatory.run.manifest import PHASES
from observatory.run.parts import RowGroup, Unreadable, first_step, read_row_group
from observatory.run.rows import RoutingColumns, routing_columns

Int64 = npt.NDArray[np.int64]

#: Rows are gathered up to this size before blocks are cut, so that blocks are worth their overhead.
_GATHER_BYTES = 128 * 1024 * 1024

#: More rows than this waiting for a step to complete means a run far out of step order: always allowed, per
#: byte of the parts, and at most.
_WAITING_BYTES, _WAITING_RATIO, _MAX_WAITING_BYTES = 256 << 20, 16, 4 << 30

_COLUMNS = [
    "step",
    "window_steps",
    "phase",
    "layer",
    "source_rank",
    "tokens",
    "assignments",
    "load",
    "step_max_over_mean",
    "gate_mass",
    "partial",
]

#: Columns of a block over windows and ranks: of `RoutingColumns`, and what stands where a rank has no row.
_DENSE: dict[str, tuple[str, float]] = {
    "tokens_SP": ("tokens_N", 0),
    "assignments_SP": ("assignments_N", 0),
    "load_SPE": ("load_NE", 0),
    "gate_mass_SPE": ("gate_mass_NE", np.nan),
    "step_max_over_mean_SP": ("step_max_over_mean_N", np.nan),
    "partial_SP": ("partial_N", 0),
}
#: Those of them that not every row has.
_SELDOM = ("gate_mass_SPE", "step_max_over_mean_SP", "partial_SP")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoadBlock:
    """Loads of one layer in one phase over consecutive windows of steps, from all source ranks.

    A rank that has no row for a window (it died, or was not in this phase) has ``present_SP`` False and
    zeros elsewhere. Windows that start at the same step but differ in length stand as separate entries.

    Attributes:
        phase: one of ``PHASES``.
        layer: layer number.
        experts: E.
        step_S: first step of each window, never decreasing.
        window_steps_S: steps in each window.
        source_rank_P: all source ranks of the run, the same in every block.
        tokens_SP: tokens routed.
        assignments_SP: assignments made, the sum of ``load_SPE`` over E.
        load_SPE: assignments per expert.
        present_SP: whether the rank has a row for the window.
        gate_mass_SPE: summed gate weights, NaN where not captured; None when no row of the block has any.
        step_max_over_mean_SP: largest per-step max/mean of the rank's own loads within the window, NaN
            where not captured; None when no row of the block has any.
        partial_SP: the rank's row lacks calls that were made, or a call ended in the middle; None when no
            row of the block is so.
    """

    phase: str
    layer: int
    experts: int
    step_S: Int64
    window_steps_S: Int64
    source_rank_P: Int64
    tokens_SP: Int64
    assignments_SP: Int64
    load_SPE: Int64
    present_SP: npt.NDArray[np.bool_]
    gate_mass_SPE: npt.NDArray[np.float64] | None = None
    step_max_over_mean_SP: npt.NDArray[np.float64] | None = None
    partial_SP: npt.NDArray[np.bool_] | None = None

    @property
    def load_SE(self) -> Int64:
        """Assignments per expert, summed over the source ranks, (S, E)."""
        total: Int64 = self.load_SPE.sum(axis=1)
        return total

    @property
    def tokens_S(self) -> Int64:
        """Tokens routed, summed over the source ranks, (S,)."""
        total: Int64 = self.tokens_SP.sum(axis=1)
        return total

    @property
    def step_max_over_mean_S(self) -> npt.NDArray[np.float64] | None:
        """Largest per-step max/mean in each window; None with several ranks, whose extremes do not add up."""
        if self.step_max_over_mean_SP is None or self.source_rank_P.size != 1:
            return None
        return self.step_max_over_mean_SP[:, 0]


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """Rows of one row group that wait for their steps to be complete; ``p`` indexes P."""

    p: int
    rows: RoutingColumns


def stream_blocks(
    groups: list[RowGroup],
    *,
    ranks: Int64,
    phase: str | None,
    layers: Collection[int] | None,
    max_block_bytes: int,
    report: Callable[[str], None],
    check_layer: Callable[[int, int, str], None],
) -> Iterator[LoadBlock]:
    """Merge row groups of routing parts of one E into blocks.

    Args:
        groups: the row groups, in any order.
        ranks: source ranks of the run, ascending.
        phase: only this phase.
        layers: only these layers.
        max_block_bytes: bound on ``load_SPE`` of one block; one window is always whole.
        report: called with one line for each row group that cannot be read.
        check_layer: called with layer, E and the part's name; raises when they contradict the manifest.
    """
    starts: list[tuple[int, RowGroup]] = []
    for group in groups:
        start = first_step(group)
        if start is None:
            report(f"{group.part.name}: row group {group.number} is corrupt and was left out")
        else:
            starts.append((start, group))
    starts.sort(key=lambda entry: (entry[0], entry[1].part.rank, entry[1].part.name, entry[1].number))
    place = {int(rank): p for p, rank in enumerate(ranks)}
    choose = _chooser(phase, layers)

    def decode(entry: tuple[int, RowGroup]) -> _Piece | Unreadable:
        rows = _decode(*entry, check_layer)
        return rows if isinstance(rows, Unreadable) else _Piece(place[entry[1].part.rank], choose(rows))

    stored = sum({part.name: part.file_bytes for part in (group.part for group in groups)}.values())
    most_waiting = min(_MAX_WAITING_BYTES, max(_WAITING_BYTES, _WAITING_RATIO * stored))
    waiting: list[_Piece] = []
    waiting_bytes = 0
    for done, piece in enumerate(_in_order(decode, starts)):
        if isinstance(piece, Unreadable):
            report(str(piece))
        else:
            waiting.append(piece)
            waiting_bytes += piece.rows.nbytes
        if waiting_bytes < _GATHER_BYTES or done + 1 == len(starts):
            continue
        horizon = starts[done + 1][0]
        ready, waiting = _split(waiting, horizon)
        waiting_bytes = sum(piece.rows.nbytes for piece in waiting)
        if waiting_bytes > most_waiting:
            raise RunFormatError(
                f"rows from step {horizon} on are so far out of order that {waiting_bytes >> 20} MiB "
                "wait for one step; rewrite the routing parts in step order"
            )
        yield from _cut(ready, ranks, max_block_bytes)
    yield from _cut(waiting, ranks, max_block_bytes)


def _in_order(
    decode: Callable[[tuple[int, RowGroup]], _Piece | Unreadable], starts: list[tuple[int, RowGroup]]
) -> Iterator[_Piece | Unreadable]:
    """Decode on a few threads, a few row groups ahead, and give the results in the order of ``starts``."""
    workers = min(4, os.cpu_count() or 1)
    ahead: deque[Future[_Piece | Unreadable]] = deque()
    submitted = 0
    with ThreadPoolExecutor(workers, thread_name_prefix="observatory-read") as pool:
        try:
            for done in range(len(starts)):
                while submitted < min(len(starts), done + 2 * workers):
                    ahead.append(pool.submit(decode, starts[submitted]))
                    submitted += 1
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _decode(
    start: int, group: RowGroup, check_layer: Callable[[int, int, str], None]
) -> RoutingColumns | Unreadable:
    """Checked rows of a row group, or why it cannot be read."""
    table = read_row_group(group, _COLUMNS)
    if isinstance(table, Unreadable):
        return table
    part = group.part
    rows = routing_columns(table, rank=part.rank, where=part.name)
    if rows.step_N.min() < start:
        raise RunFormatError(
            f"{part.name}: row group {group.number} holds step {rows.step_N.min()} but its footer says at "
            f"least {start}; the part is damaged or its writer wrong"
        )
    for layer in np.unique(rows.layer_N):
        check_layer(int(layer), part.experts, part.name)
    return rows


def _chooser(phase: str | None, layers: Collection[int] | None) -> Callable[[RoutingColumns], RoutingColumns]:
    """Filter of rows by phase and layers."""
    code = None if phase is None else PHASES.index(phase)
    wanted = None if layers is None else np.array(sorted(layers), dtype=np.int64)

    def choose(rows: RoutingColumns) -> RoutingColumns:
        keep = np.ones(rows.step_N.size, dtype=bool)
        if code is not None:
            keep &= rows.phase_N == code
        if wanted is not None:
            keep &= np.isin(rows.layer_N, wanted)
        return rows if keep.all() else rows.take(np.flatnonzero(keep))

    return choose


def _split(pieces: list[_Piece], horizon: int) -> tuple[list[_Piece], list[_Piece]]:
    """Rows below the horizon, and the others."""
    ready: list[_Piece] = []
    waiting: list[_Piece] = []
    for piece in pieces:
        below = piece.rows.step_N < horizon
        count = int(np.count_nonzero(below))
        if count == below.size:
            ready.append(piece)
        elif count == 0:
            waiting.append(piece)
        elif below[:count].all():  # rows in step order: no copy
            ready.append(_Piece(piece.p, piece.rows.take(slice(0, count))))
            waiting.append(_Piece(piece.p, piece.rows.take(slice(count, None))))
        else:
            ready.append(_Piece(piece.p, piece.rows.take(np.flatnonzero(below))))
            waiting.append(_Piece(piece.p, piece.rows.take(np.flatnonzero(~below))))
    return ready, waiting


def _cut(pieces: list[_Piece], ranks: Int64, max_block_bytes: int) -> Iterator[LoadBlock]:
    """Blocks of all rows of the pieces, by phase and layer."""
    pieces = [piece for piece in pieces if piece.rows.step_N.size]
    if not pieces:
        return
    experts = pieces[0].rows.load_NE.shape[1]
    sizes = [piece.rows.step_N.size for piece in pieces]
    piece_N = np.repeat(np.arange(len(pieces)), sizes)
    row_N = np.concatenate([np.arange(size) for size in sizes])
    key_N = [
        np.concatenate([getattr(piece.rows, name) for piece in pieces])
        for name in ("phase_N", "layer_N", "step_N", "window_steps_N")
    ]
    order = np.lexsort((piece_N, *reversed(key_N)))
    piece_N, row_N, (phase_N, layer_N, step_N, window_N) = (
        piece_N[order], row_N[order], [column[order] for column in key_N]
    )  # fmt: skip
    of_block = _changes(phase_N) | _changes(layer_N)
    of_window = of_block | _changes(step_N) | _changes(window_N)
    k_N = np.cumsum(of_window) - 1
    row_K = np.append(np.flatnonzero(of_window), len(order))
    starts = [*k_N[of_block].tolist(), len(row_K) - 1]
    for edges in _edges(starts, max(1, max_block_bytes // (ranks.size * experts * 8))):
        first, last = edges[0], edges[-1]
        here = slice(row_K[first], row_K[last])
        dense = _dense(pieces, piece_N[here], row_N[here], k_N[here] - first, (last - first, ranks.size))
        for start, end in pairwise(edges):
            n = row_K[start]
            values = {name: column[start - first : end - first] for name, column in dense.items()}
            block = LoadBlock(
                phase=PHASES[phase_N[n]],
                layer=int(layer_N[n]),
                experts=experts,
                step_S=step_N[row_K[start:end]],
                window_steps_S=window_N[row_K[start:end]],
                source_rank_P=ranks,
                **{name: array for name, array in values.items() if name not in _SELDOM or _any(array)},
            )
            if np.count_nonzero(block.present_SP) != row_K[end] - n:
                raise RunFormatError(
                    f"layer {block.layer} in {block.phase} has two rows of one rank for one step between "
                    f"{block.step_S[0]} and {block.step_S[-1]}",
                    expected="one row per step, layer and source rank",
                )
            yield block


def _changes(values_N: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Whether a value differs from the one before; True for the first."""
    changes = np.ones(values_N.size, dtype=bool)
    np.not_equal(values_N[1:], values_N[:-1], out=changes[1:])
    return changes


def _any(values: npt.NDArray[Any]) -> bool:
    """Whether a column that not all rows have holds anything."""
    return bool((~np.isnan(values) if values.dtype.kind == "f" else values).any())


def _edges(starts: list[int], most: int) -> Iterator[list[int]]:
    """Edges of blocks that follow each other and have at most ``most`` windows together.

    Args:
        starts: first window of each phase and layer, then the number of all windows.
        most: windows, at least 1; a phase and layer with more is cut.
    """
    edges = starts[:1]
    for start, end in pairwise(starts):
        if end - edges[0] > most and start > edges[0]:
            yield edges
            edges = [start]
        while end - edges[0] > most:
            yield [edges[0], edges[0] + most]
            edges = [edges[0] + most]
        edges.append(end)
    yield edges


def _dense(
    pieces: list[_Piece],
    piece_N: npt.NDArray[np.intp],
    row_N: npt.NDArray[np.intp],
    k_N: npt.NDArray[np.intp],
    shape: tuple[int, int],
) -> dict[str, npt.NDArray[Any]]:
    """Columns of `LoadBlock` over windows k and ranks, of these rows of the pieces."""
    dense: dict[str, npt.NDArray[Any]] = {"present_SP": np.zeros(shape, dtype=bool)}
    order = np.argsort(piece_N, kind="stable")
    for part in np.split(order, np.flatnonzero(np.diff(piece_N[order])) + 1):
        piece, n = pieces[piece_N[part[0]]], row_N[part]
        at = k_N[part] * shape[1] + piece.p
        dense["present_SP"].reshape(-1)[at] = True
        for name, (column, missing) in _DENSE.items():
            values = getattr(piece.rows, column)
            if values is None:
                continue
            if name not in dense:
                dense[name] = np.full((*shape, *values.shape[1:]), missing, values.dtype)
            dense[name].reshape(-1, *values.shape[1:])[at] = values[n]
    return dense
