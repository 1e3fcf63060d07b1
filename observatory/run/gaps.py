"""What a run lacks, as codes and values, and the one place that has words for it.

Three sources: the states of the ranks (``of_ranks``), what the ranks say they did not capture
(``CaptureGap`` of their statuses, ``of_capture``), and rows that are not there (``coverage.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

from observatory.run.files import one_line
from observatory.run.manifest import CaptureGap, Manifest

_SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """One thing that a run lacks.

    Attributes:
        code: what; a key of the words below.
        ranks: the first ranks it is about; empty for the run as a whole.
        rank_count: how many ranks it is about.
        layers: layers it is about; empty for all.
        module: name of the layer's module, where one layer is meant.
        phase: phase it is about; None for all.
        first_step, last_step: the steps it is about; None where no steps are meant.
        count: how many steps, rows or ranks there are, as the code says; None where none are counted.
        of: how many there should be.
        text: what a rank said about itself.
    """

    code: str
    ranks: tuple[int, ...] = ()
    rank_count: int = 0
    layers: tuple[int, ...] = ()
    module: str | None = None
    phase: str | None = None
    first_step: int | None = None
    last_step: int | None = None
    count: int | None = None
    of: int | None = None
    text: str | None = None


def gap_document(gap: Gap) -> dict[str, Any]:
    """A gap for a JSON document: what is set of it, and its sentence."""
    values = {key: value for key, value in asdict(gap).items() if value not in (None, (), 0)}
    return {**values, "sentence": sentence(gap)}


def sentence(gap: Gap) -> str:
    """A gap in words, one line."""
    words = _WORDS.get(gap.code)
    if words is not None:
        return words(gap)
    return f"{_place(gap)}: {one_line(gap.code.replace('_', ' '), 40)} {_when(gap)}"


def of_ranks(manifest: Manifest, routed: Collection[int]) -> Iterator[Gap]:
    """What the states of the ranks say about missing data.

    Args:
        manifest: the manifest, with the ranks' own statuses.
        routed: ranks that left routing parts.
    """
    if manifest.state != "complete":
        yield Gap(code=f"run_{manifest.state}")
    states = {status.rank: status for status in manifest.ranks}
    # The number of ranks comes from a file: never build a list of that length.
    ranks = states.keys() | set(routed)
    missing = manifest.topology.ranks - sum(rank < manifest.topology.ranks for rank in ranks)
    if missing:
        first = islice((rank for rank in range(manifest.topology.ranks) if rank not in ranks), _SHOWN)
        yield Gap(code="ranks_missing", ranks=tuple(first), rank_count=missing, of=manifest.topology.ranks)
    for rank, status in sorted(states.items()):
        if status.state != "complete":
            yield _of_rank(rank, f"rank_{status.state}", text=status.error)
        if status.dropped_rows:
            yield _of_rank(rank, "rows_dropped", count=status.dropped_rows)
    silent = [rank for rank in sorted(states) if rank not in routed]
    if silent and routed:
        yield Gap(code="no_routing_rows", ranks=tuple(silent[:_SHOWN]), rank_count=len(silent))
    lone = sorted(set(routed) - states.keys())
    if lone:
        yield Gap(code="no_status", ranks=tuple(lone[:_SHOWN]), rank_count=len(lone))


def of_capture(manifest: Manifest) -> Iterator[Gap]:
    """What the ranks say they did not capture."""
    for status in manifest.ranks:
        if status.rank < manifest.topology.ranks:
            for item in status.gaps:
                yield from_capture(item, status.rank if manifest.topology.ranks > 1 else None)


def from_capture(item: CaptureGap, rank: int | None = None) -> Gap:
    """A gap as a rank states it; ``rank`` is None in a run of one rank."""
    return Gap(
        code=item.code,
        ranks=() if rank is None else (rank,),
        rank_count=0 if rank is None else 1,
        layers=() if item.layer is None else (item.layer,),
        module=item.module,
        first_step=item.first_step,
        last_step=item.last_step,
        count=item.steps,
    )


def _of_rank(rank: int, code: str, *, count: int | None = None, text: str | None = None) -> Gap:
    return Gap(code=code, ranks=(rank,), rank_count=1, count=count, text=text)


def _ranks(gap: Gap) -> str:
    shown = ", ".join(str(rank) for rank in gap.ranks)
    if gap.rank_count == 1:
        return f"rank {shown}"
    return f"{gap.rank_count} ranks ({shown}{', ...' if gap.rank_count > len(gap.ranks) else ''})"


def _layers(gap: Gap) -> str:
    shown = ", ".join(str(layer) for layer in gap.layers[:_SHOWN])
    if len(gap.layers) == 1:
        return f"layer {shown}" + (f" ({one_line(gap.module, 80)})" if gap.module else "")
    return f"{len(gap.layers)} layers ({shown}{', ...' if len(gap.layers) > _SHOWN else ''})"


def _place(gap: Gap) -> str:
    """Ranks and layers it is about."""
    module = one_line(gap.module, 80) if gap.module and not gap.layers else None
    parts = [_ranks(gap) if gap.ranks else None, _layers(gap) if gap.layers else module]
    return ", ".join(part for part in parts if part) or "the model"


def _when(gap: Gap) -> str:
    if gap.first_step is None or gap.last_step is None:
        return "in some step"
    if gap.first_step == gap.last_step:
        return f"in step {gap.first_step}"
    between = gap.last_step - gap.first_step + 1
    if gap.count is None or gap.count >= between:
        return f"in steps {gap.first_step} to {gap.last_step}"
    return f"in {gap.count} of the steps {gap.first_step} to {gap.last_step}"


def _captured(what: str) -> Callable[[Gap], str]:
    return lambda gap: f"{_place(gap)}: {what.format(when=_when(gap))}"


def _short(gap: Gap) -> str:
    whose = " of ".join(
        part for part in (_layers(gap) if gap.layers else "", _ranks(gap) if gap.ranks else "") if part
    )
    return f"rows of {whose} are there for {gap.count} of {gap.of} steps in {gap.phase}"


_WORDS: dict[str, Callable[[Gap], str]] = {
    "run_running": lambda _: "the run was never closed: it still runs, or rank 0 was killed",
    "run_failed": lambda _: "the run failed; it does not hold everything",
    "ranks_missing": lambda gap: f"{_ranks(gap)} of {gap.of} left nothing: they never joined or are missing",
    "rank_running": lambda gap: (
        f"{_ranks(gap)} never closed: it still runs or was killed; its unflushed tail is missing"
    ),
    "rank_failed": lambda gap: f"{_ranks(gap)} failed: {one_line(gap.text or 'no reason given', 200)}",
    "rows_dropped": lambda gap: f"{_ranks(gap)} could not write {gap.count} rows",
    "no_routing_rows": lambda gap: f"{_ranks(gap)} left no routing rows",
    "no_status": lambda gap: f"{_ranks(gap)} left rows but no status file",
    # What rows there are.
    "short": _short,
    "partial_rows": lambda gap: (
        f"{gap.count} of {gap.of} rows{f', on {_ranks(gap)},' if gap.ranks else ''} are partial: calls were "
        f"made {_when(replace(gap, count=None))} that are not counted, or that ended in the middle"
    ),
    # What a rank did not capture.
    "hooks_removed": _captured(
        "its hooks were removed {when}, so that calls may be missing; they were put on again after it"
    ),
    "hooks_refused": _captured(
        "its hooks were removed {when} and could not be put on again; its calls are missing"
    ),
    "replaced": _captured(
        "its module was replaced {when}, so that calls may be missing; the new one is watched from the next "
        "step on"
    ),
    "replaced_by_unknown": _captured(
        "its module was replaced {when} by something that is not understood as the same layer; its calls are "
        "missing"
    ),
    "moved": _captured("its module changed its place {when}; it is counted under the number that it had"),
    "removed": _captured("its module was not part of the model any more {when}"),
    "added": _captured("an MoE layer that was not there when the watch began; its calls {when} are missing"),
    "bypassed": _captured(
        "its block was called {when} without the call that is read, so that what it routed is missing"
    ),
    "not_called": _captured("it was not called {when}, though other layers of its stack were"),
    "called_less": _captured("it was called less often {when} than other layers of its stack"),
    "idle": _captured(
        "no watched layer was called {when}; calls of a copy of the model, or of another one, are not counted"
    ),
    "interrupted": _captured("a call ended in the middle {when} (an exception); the rows are marked partial"),
    "phase_hooks_removed": _captured(
        "the hooks that show its phase were removed {when}; phases that were not stated are unknown there"
    ),
    "model_hooks_removed": _captured(
        "its hooks were removed {when}; a call that ended in the middle is not seen there"
    ),
    "exchange_hooks_removed": _captured(
        "the hooks that show the layers of exchanges were removed {when}; exchanges may lack them there"
    ),
    "checks_removed": _captured("the hooks that verify its counts were removed {when}"),
    "gate_mass": _captured(
        "no gate mass {when}: gate weights were not shown, not finite, or not one for each assignment"
    ),
}
