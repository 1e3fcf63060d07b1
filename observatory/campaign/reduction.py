"""Metrics of many runs, computed by several processes: runs are split into the shards of their ranks.

Every process takes a contiguous share of all shards, and reads them one at a time. A run that several
processes share is merged along a binary tree to the first of them, which computes its metrics; the rows go to
rank 0. Partial results hold integers only (`analysis/reduction/partial.py`), so the rows are the same, to the
last digit, for any number of processes. A reduction of MPI itself would need all steps and layers to be known
to all before the first sum; the tree needs nothing but the messages.

Memory of a process, besides what Python and its libraries take: the partial result of one run three times
(what was merged, what is being added, and what waits to be sent), its manifest, and what streaming one shard
takes: rows of at most 128 MiB that wait for their steps to be complete, and eight decoded row groups. It
grows neither with the number of runs nor with that of shards, but for 64 bytes a phase, layer and rank of one
run. The energy analysis of a run with power samples reads its spans and samples as a whole, in one process.

A shard that cannot be read becomes a stated gap of its run, a run that cannot be opened a row without
metrics.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from observatory.analysis.compare.metrics import Key
from observatory.analysis.compare.saved import add_energy
from observatory.analysis.compare.series import Series
from observatory.analysis.energy.document import energy_document
from observatory.analysis.reduction.metrics import (
    Energy,
    ReducedRow,
    reduced_rows,
    row_document,
    row_of,
    unreadable_row,
)
from observatory.analysis.reduction.partial import Partial, left_out, reduce_shard
from observatory.campaign.message_passing import Alone, World
from observatory.campaign.run_folders import captured_runs
from observatory.errors import ObservatoryError, RunError, alike
from observatory.run import Run, open_run
from observatory.run.files import one_line, os_reason
from observatory.run.head import RunHead, read_head, shard_ranks

#: One shard of a run: number of the run, and the rank; -1 where the run has no shard.
_Unit = tuple[int, int]
_NO_SHARD = -1


def reduce_runs(
    paths: Sequence[Path],
    *,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    world: World | None = None,
) -> list[ReducedRow]:
    """The metrics of all runs behind the paths: a row for each phase of each run, in the order of the paths.

    Args:
        paths: runs, grids, batch campaigns, or folders that hold runs, finished or not.
        progress: called with the shards that this process has done, and their number.
        world: the processes that work on it, all of which call this function with the same paths; None: this
            one alone.

    Returns:
        On rank 0 the rows (`ReducedRow`); nothing on other ranks. A run that cannot be opened has one row
        without a phase, whose ``problems`` say why.

    Raises:
        RunError: there is no run; all ranks raise it.
    """
    world = world or Alone()
    plan = _plan(paths, world)
    rows = list(_reduce_share(plan, world, progress))
    if world.rank:
        world.send(json.dumps([[run, row_document(row)] for run, row in rows]).encode(), 0)
    else:
        for other in range(1, world.size):
            rows += [(run, row_of(document)) for run, document in json.loads(world.receive(other))]
    world.finish()
    return [row for _, row in sorted(rows, key=lambda numbered: numbered[0])] if world.rank == 0 else []


@dataclass(frozen=True, slots=True)
class _Plan:
    """Which process works on what.

    Attributes:
        runs: run directories.
        units: shards of all runs, by run and rank.
        size: number of processes.
    """

    runs: tuple[Path, ...]
    units: tuple[_Unit, ...]
    size: int

    def share(self, rank: int) -> tuple[_Unit, ...]:
        """What a process works on: neighbouring shards, as many as every other has, or one more."""
        return self.units[self._start(rank) : self._start(rank + 1)]

    def holders(self, run: int) -> list[int]:
        """Processes that work on a run, ascending."""
        first = bisect.bisect_left(self.units, (run, _NO_SHARD))
        end = bisect.bisect_left(self.units, (run + 1, _NO_SHARD))
        return sorted({((unit + 1) * self.size - 1) // len(self.units) for unit in range(first, end)})

    def _start(self, rank: int) -> int:
        return rank * len(self.units) // self.size


def _plan(paths: Sequence[Path], world: World) -> _Plan:
    """The same plan on all ranks; rank 0 alone looks for the runs."""
    content = b""
    if world.rank == 0:
        try:
            runs = captured_runs(paths)
            content = json.dumps([[str(run), shard_ranks(run)] for run in runs]).encode()
        except ObservatoryError as error:
            content = json.dumps({"what": error.what, "advice": error.advice}).encode()
    document = json.loads(world.broadcast(content))
    if isinstance(document, dict):
        world.finish()
        raise alike(RunError(document["what"], remedy=document["advice"]))
    units = [(number, rank) for number, (_, ranks) in enumerate(document) for rank in ranks or [_NO_SHARD]]
    return _Plan(runs=tuple(Path(path) for path, _ in document), units=tuple(units), size=world.size)


def _reduce_share(
    plan: _Plan, world: World, progress: Callable[[int, int], None]
) -> Iterator[tuple[int, ReducedRow]]:
    """Work on this process's share; rows, with the number of their run, of the runs that begin in it."""
    share = plan.share(world.rank)
    ranks_of: dict[int, list[int]] = {}
    for run, rank in share:
        ranks_of.setdefault(run, []).append(rank)
    heads: dict[int, RunHead | str] = {}
    for run in list(ranks_of)[-1:]:
        # The others that share this run wait for its head, so it is read before anything else.
        holders = plan.holders(run)
        if holders[0] == world.rank and len(holders) > 1:
            heads[run] = _head(plan.runs[run])
            for other in holders[1:]:
                world.send(_head_message(heads[run]), other)
    done = 0
    for run, ranks in ranks_of.items():
        holders = plan.holders(run)
        is_first = holders[0] == world.rank
        if not is_first:
            heads[run] = _head_of(world.receive(holders[0]))
        elif run not in heads:
            heads[run] = _head(plan.runs[run])
        head = heads.pop(run)
        partial = Partial()
        for rank in ranks:
            if isinstance(head, RunHead) and rank in head.shards:
                partial = partial.merged(_reduced_shard(head, rank))
            done += 1
            progress(done, len(share))
        partial = _merge_over(world, holders, partial)
        if is_first:
            yield from ((run, row) for row in _rows(plan.runs[run], head, partial))


def _merge_over(world: World, holders: Sequence[int], partial: Partial) -> Partial:
    """Merge partial results along a binary tree of processes; the first of them has the whole in the end."""
    place, step = holders.index(world.rank), 1
    while step < len(holders):
        if place % (2 * step):
            world.send(partial.to_bytes(), holders[place - step])
            break
        if place + step < len(holders):
            partial = partial.merged(Partial.from_bytes(world.receive(holders[place + step])))
        step *= 2
    return partial


def _head(path: Path) -> RunHead | str:
    try:
        return read_head(path)
    except ObservatoryError as error:
        return str(error)


def _head_message(head: RunHead | str) -> bytes:
    return json.dumps(head if isinstance(head, str) else {"head": head.to_json()}).encode()


def _head_of(message: bytes) -> RunHead | str:
    document = json.loads(message)
    return document if isinstance(document, str) else RunHead.from_json(document["head"])


def _reduced_shard(head: RunHead, rank: int) -> Partial:
    try:
        return reduce_shard(Run.open_shard(head, rank), rank)
    except ObservatoryError as error:
        return left_out(rank, one_line(error))
    except OSError as error:
        return left_out(rank, os_reason(error))
    except pa.ArrowException as error:
        return left_out(rank, one_line(error))


def _rows(path: Path, head: RunHead | str, partial: Partial) -> list[ReducedRow]:
    if isinstance(head, str):
        return [unreadable_row(str(path), head)]
    try:
        return reduced_rows(head, partial, _energy(head))
    except ObservatoryError as error:
        return [unreadable_row(str(path), one_line(error))]


def _energy(head: RunHead) -> Energy:
    """Energy per token by phase, where power was captured."""
    if not head.ranks_of["power"]:
        return Energy()
    series: dict[Key, Series] = {}
    try:
        add_energy(energy_document(open_run(head.path)), series)
    except ObservatoryError as error:
        return Energy(problem=f"energy is not known: {one_line(error)}")
    found = {key.phase: item.value for key, item in series.items() if key.metric == "mj_per_token"}
    return Energy(
        mj_per_token=found, problem=None if found else "energy is not known: no phase has energy and tokens"
    )
