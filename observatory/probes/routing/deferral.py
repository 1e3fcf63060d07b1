"""Ids of small calls, copied when they are seen and counted together when the pass of the model ends.

Between the layers of a model our code and data have left the processor's caches, so that a hook costs what it
touches rather than what it computes (docs/evidence/cost.md). A call that needs nothing but its ids counted
is one operator: a copy, which stays what it is when the model writes to its ids. A few values that all hooks
share show that nothing unusual is going on; whatever is not plain takes the other way, where each call is
read and counted by itself.

Shapes: N kept calls, T tokens of one call, K assignments per token, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import Any, Protocol

import torch
from torch import nn

from observatory.probes.routing.attachment import NO_KWARGS, PreHook
from observatory.probes.routing.counters import DeviceCounters
from observatory.probes.routing.counting import SiteCounter

#: Ids of a call that is kept; longer ones are counted at once, which costs little of what they do.
MOST_IDS = 1024
#: Calls that are kept before they are counted in the middle of a pass: 4 MiB of ids at most.
MOST_KEPT = 512

#: Of so many sites one times its calls: a look at the clock is a large part of what a call costs.
_TIMED = 16

_is_compiling = torch.compiler.is_compiling
_graph_task = torch._C._current_graph_task_id
_tracing_state = torch._C._get_tracing_state
_modes = torch._C._len_torch_dispatch_stack
_clock_ns = time.perf_counter_ns
_Tensor = torch.Tensor


#: A call that waits to be counted: the counter of its site and a copy of its ids, (T, K). A bare tuple, which
#: costs less to make than an object of a class.
Kept = tuple[SiteCounter, torch.Tensor]


class HookCost:
    """Host time of eager calls of sites, of which not all are timed.

    Attributes:
        layer_calls: calls so far.
        pass_ns: time in which calls that were kept were counted, nanoseconds.
    """

    __slots__ = ("_timed_calls", "_timed_ns", "layer_calls", "pass_ns")

    def __init__(self) -> None:
        self.layer_calls = 0
        self.pass_ns = 0
        self._timed_calls = 0
        self._timed_ns = 0

    def add(self, taken_ns: int, *, stands_for: int = 1) -> None:
        """Take the time of one call, which stands for so many."""
        self._timed_calls += stands_for
        self._timed_ns += taken_ns * stands_for

    def us_per_layer_call(self) -> float | None:
        """Mean host time of a call, microseconds; None where none was timed."""
        if not self._timed_calls:
            return None
        return (self._timed_ns / self._timed_calls + self.pass_ns / max(self.layer_calls, 1)) / 1000


class Pass(Protocol):
    """What a thread is in: a call of the model. ``kept`` has what waits to be counted at its end."""

    kept: list[Kept]


def keeping_hook(
    ids: tuple[str, int],
    counter: SiteCounter,
    *,
    see: PreHook,
    is_ready: Callable[[], bool],
    passes: Mapping[int, Pass],
    count: Callable[[Any], None],
    looks: set[Any],
    cost: HookCost,
) -> PreHook:
    """A hook before a call that is given the expert of each token.

    Args:
        ids: name and position of the argument.
        counter: of the site.
        see: reads and counts a call by itself.
        is_ready: whether it has shown that calls of the site may be kept.
        passes: by thread: what it is in.
        count: counts what one of them has kept.
        cost: takes the time of calls that are kept.
        looks: not empty while calls are looked at, on any thread: whose call this is has to be asked then.
    """
    name, position = ids
    is_timed = counter.index % _TIMED == 0
    keeps = False

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = NO_KWARGS) -> None:
        nonlocal keeps
        if _is_compiling():
            see(module, args, kwargs)
            return
        if keeps and not looks and _graph_task() == -1 and _tracing_state() is None and not _modes():
            start_ns = _clock_ns() if is_timed else 0
            now = passes.get(get_ident())
            given = kwargs[name] if name in kwargs else args[position] if position < len(args) else None
            if (
                now is not None
                and type(given) is _Tensor
                and given.is_cpu
                and given.dim() == 2
                and given.numel() <= MOST_IDS
            ):
                kept = now.kept
                kept.append((counter, given.clone()))
                if len(kept) >= MOST_KEPT:
                    count(now)
                if is_timed:
                    cost.add(_clock_ns() - start_ns, stands_for=_TIMED)
                return
        see(module, args, kwargs)
        keeps = is_ready()

    return before


@dataclass(frozen=True, slots=True)
class _Alike:
    """Calls of one E and shape.

    Attributes:
        counters: of their sites, in order.
        shape: (T, K).
        starts_N11: where each site's bin of expert 0 is.
    """

    counters: list[SiteCounter]
    shape: torch.Size
    starts_N11: torch.Tensor


class KeptCounts:
    """Adds kept calls to the counters of a device: one addition for all calls of one E and shape."""

    def __init__(self) -> None:
        #: what the calls of the last pass were, on whatever thread; the next one's are the same as a rule
        self._last = _Alike([], torch.Size(()), torch.empty(0))

    def add(self, kept: Sequence[Kept], slot: int, device: DeviceCounters) -> None:
        """Count calls of one phase; they are on the CPU."""
        last, ids = self._last, [ids_TK for _, ids_TK in kept]
        if [counter for counter, _ in kept] == last.counters and all(i.shape == last.shape for i in ids):
            _add_alike(last, ids, slot, device)
            return
        groups: dict[tuple[int, torch.Size], list[Kept]] = {}
        for call in kept:
            counter, ids_TK = call
            groups.setdefault((counter.experts, ids_TK.shape), []).append(call)
        for (_, shape), calls in groups.items():
            counters = [counter for counter, _ in calls]
            with torch.inference_mode(False):
                starts_N = torch.tensor([device.layout.starts[counter.index] + 1 for counter in counters])
            alike = self._last = _Alike(counters, shape, starts_N[:, None, None])
            _add_alike(alike, [ids_TK for _, ids_TK in calls], slot, device)


def _add_alike(calls: _Alike, ids: list[torch.Tensor], slot: int, device: DeviceCounters) -> None:
    tokens, columns = calls.shape
    ids_NTK = torch.stack(ids)
    if ids_NTK.dtype is not torch.int64 and ids_NTK.dtype is not torch.int32:
        ids_NTK = ids_NTK.to(torch.int64)
    bins_NTK = ids_NTK.clamp_(-1, calls.counters[0].experts).add_(calls.starts_N11)
    with device.lock:
        if bins_NTK.numel():
            device.slots[slot].index_add_(0, bins_NTK.view(-1), device.scales.ones(bins_NTK.numel()))
        for counter in calls.counters:
            if columns != counter.width:
                correction = device.parts[slot][counter.index].correction
                assert correction is not None
                correction.add_(tokens * (counter.width - columns))
            counter.kept_calls += 1
            counter.calls[slot] += 1
