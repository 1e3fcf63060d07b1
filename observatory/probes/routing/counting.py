"""Counting one site's decisions, eagerly or as an operator that compilers keep whole.

Shapes: T tokens, K assignments per token, E experts, N sampled positions.

``torch.compile`` sees a single operator, ``observatory::count_assignments``, which mutates the counters and
returns nothing; the same code runs behind it. Recomputation (activation checkpointing) happens while autograd
runs a graph, and is recognised by ``torch._C._current_graph_task_id()``; it is not counted.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from observatory.probes.routing.counters import SLOTS, Buffers, DeviceCounters, Layout, part_of
from observatory.probes.routing.kernels import bin_ids, count_bins, count_map
from observatory.probes.routing.sites import RoutingDecision, shown_by

_NOBODY = -1
_counters_of: weakref.WeakValueDictionary[int, SiteCounter] = weakref.WeakValueDictionary()
_lock = threading.Lock()


class SiteCounter:
    """Adds the decisions of one site to the buffers of the device they are on.

    Gate weights that are not shown, or are not one for each assignment, make the gate mass of the step NaN,
    as weights that are NaN do.

    Attributes:
        handle: number by which the operator in a compiled graph finds this object; the least that is free,
            so that a graph compiled during one watch serves the next on the same model.
        calls: calls per slot since the last ``take_calls``; on the host, so that calls without a single
            token are known as well.
        kept_calls: those of them that were counted together with others (``deferral.py``).
        experts: E.
        width: ids per token of this site's ordinary calls; 0 until the first call.
        ever_called: the site was called at least once.
        tokens_unknown: a call did not show how many tokens it had.
        error: why calls that state a slot for each token were not counted; the first one.
        on_call: called with the slot after each call, from inside compiled code as well; None when no part
            asked.
    """

    def __init__(self, index: int, layout: Layout) -> None:
        self.index = index
        self.layout = layout
        self.calls = [0] * len(SLOTS)
        self.kept_calls = 0
        self.experts = layout.experts[index]
        self.width = 0
        self.ever_called = False
        self.tokens_unknown = False
        self.error: Exception | None = None
        self.on_call: Callable[[int], None] | None = None
        self.devices: dict[torch.device, DeviceCounters] = {}
        self._sampled = [False] * len(SLOTS)
        with _lock:
            self.handle = next(number for number in itertools.count() if number not in _counters_of)
            _counters_of[self.handle] = self

    def release(self) -> None:
        """Give the handle back; doing it twice does nothing."""
        with _lock:
            if _counters_of.get(self.handle) is self:
                del _counters_of[self.handle]

    def take_calls(self) -> NDArray[np.int64]:
        """The calls per slot since the last time."""
        calls: NDArray[np.int64] = np.array(self.calls, dtype=np.int64)
        self.calls = [0] * len(SLOTS)
        self.kept_calls = 0
        self._sampled = [False] * len(SLOTS)
        return calls

    def add(self, decision: RoutingDecision, slot: int, part: Buffers, device: DeviceCounters) -> None:
        """Count one decision into ``part``: a few small kernels, and never a wait for the device."""
        ids, chosen = decision.expert_ids, decision.routing_map
        with device.lock:
            self.ever_called = True
            if ids is not None:
                self._add_ids(decision, ids, part, device)
            elif chosen is not None:
                self._add_map(decision, chosen, part)
            if part.sample is not None and decision.tokens and (not self._sampled[slot] or _in_capture(part)):
                self._sampled[slot] = True
                self._take_sample(decision, decision.tokens, part.sample)
            # Last, so that an interrupt (Ctrl-C) in between leaves no call without its counts.
            self.calls[slot] += 1
        if self.on_call is not None:
            self.on_call(slot)

    def add_tokens(
        self, ids_TK: torch.Tensor, token_slots: torch.Tensor, counts: torch.Tensor, device: DeviceCounters
    ) -> None:
        """Count ids in the slot of each token, into the counts of a whole device."""
        slots_T = token_slots[: ids_TK.shape[0]]
        with device.lock:
            self.ever_called = True
            self.width = self.width or ids_TK.shape[1]
            bins_TK = bin_ids(ids_TK, self.experts, device.scales).view(ids_TK.shape)
            index_TK = torch.add(bins_TK, slots_T[:, None], alpha=self.layout.slot_size)
            start = self.layout.starts[self.index]
            count_bins(counts[start:], index_TK.view(-1), device.scales.ones(ids_TK.numel()))
            device.note_stream()
        if self.on_call is not None:
            self.on_call(0)

    def _add_ids(
        self, decision: RoutingDecision, ids: torch.Tensor, part: Buffers, device: DeviceCounters
    ) -> None:
        mask, tokens, entries = decision.token_mask, decision.tokens, ids.numel()
        if self.width == 0 and entries:
            self.width = entries // tokens if tokens and entries % tokens == 0 else 1
        if mask is not None:
            ids = ids.reshape(mask.numel(), -1).masked_fill(mask.reshape(-1, 1).logical_not(), _NOBODY)
        if entries:
            index = bin_ids(ids, self.experts, device.scales)
            count_bins(part.counts, index, device.scales.ones(entries))
            if part.mass is not None:
                weights = decision.weights
                if weights is None or weights.numel() != entries or weights.is_complex():
                    part.mass.fill_(torch.nan)
                else:
                    count_bins(part.mass, index, weights.detach().reshape(-1).to(torch.float64))
        if mask is not None or tokens is None or tokens * self.width != entries:
            self._correct_tokens(part, tokens, mask, entries)

    def _add_map(self, decision: RoutingDecision, chosen: torch.Tensor, part: Buffers) -> None:
        self.width = self.width or 1
        mask = decision.token_mask
        chosen_TE = chosen.reshape(-1, self.experts)
        chosen_TE = chosen_TE if chosen_TE.dtype == torch.bool else chosen_TE.ne(0)
        if mask is not None:
            chosen_TE = chosen_TE & mask.reshape(-1, 1).to(torch.bool)
        sums_E = count_map(part.counts, chosen_TE)
        if part.mass is not None and chosen_TE.numel():
            weights = decision.weights
            if weights is None or weights.numel() != chosen_TE.numel() or weights.is_complex():
                part.mass.fill_(torch.nan)
            else:
                weights_TE = weights.detach().reshape(-1, self.experts)
                part.mass[1:-1].add_(weights_TE.masked_fill(~chosen_TE, 0).sum(dim=0, dtype=torch.float64))
        self._correct_tokens(part, decision.tokens, mask, 0)
        assert part.correction is not None
        part.correction.sub_(sums_E.sum())

    def _correct_tokens(
        self, part: Buffers, tokens: int | None, mask: torch.Tensor | None, entries: int
    ) -> None:
        """Make (sum of bins + correction) / width the number of tokens."""
        assert part.correction is not None
        self.width = self.width or 1
        if mask is not None:
            part.correction.add_(mask.sum() * self.width - entries)
            return
        if tokens is None:
            self.tokens_unknown = True
        difference = (tokens or 0) * self.width - entries
        if difference:
            part.correction.add_(difference)

    def _take_sample(self, decision: RoutingDecision, tokens: int, sample_NC: torch.Tensor) -> None:
        """Keep the expert ids of the first tokens of the call, in position order."""
        rows = min(tokens, sample_NC.shape[0])
        if decision.expert_ids is not None:
            if decision.expert_ids.numel() % tokens:
                return
            ids_NK = decision.expert_ids.reshape(tokens, -1)[:rows]
        else:
            assert decision.routing_map is not None
            chosen_NE = decision.routing_map.reshape(tokens, -1)[:rows].ne(0)
            experts_E = torch.arange(self.experts, device=chosen_NE.device)
            ids_NE = torch.where(chosen_NE, experts_E, _NOBODY)
            ids_NK = ids_NE.topk(min(sample_NC.shape[1], self.experts), dim=1).values
        if decision.token_mask is not None:
            hidden = decision.token_mask.reshape(-1)[:rows].logical_not()
            ids_NK = ids_NK.masked_fill(hidden[:, None], _NOBODY)
        columns = min(ids_NK.shape[1], sample_NC.shape[1])
        sample_NC[:rows, :columns].copy_(ids_NK[:, :columns].clamp(_NOBODY, self.experts))


def _in_capture(part: Buffers) -> bool:
    """Whether a CUDA graph records what is launched; each of its replays then leaves a sample."""
    return part.counts.is_cuda and torch.cuda.is_current_stream_capturing()


def count_in_graph(
    counter: SiteCounter, decision: RoutingDecision, slot: int, device: DeviceCounters
) -> None:
    """Count through the operator: what compilers, tracers and dispatch modes see."""
    if shown_by(decision) is None:
        return
    torch.ops.observatory.count_assignments(
        device.counts,
        device.mass,
        device.sample,
        decision.expert_ids,
        decision.routing_map,
        None if decision.weights is None else decision.weights.detach(),
        decision.token_mask,
        decision.token_slots,
        -1 if decision.tokens is None else decision.tokens,
        counter.handle,
        slot,
    )


def _count_assignments(
    counts: torch.Tensor,
    mass: torch.Tensor | None,
    sample: torch.Tensor | None,
    expert_ids: torch.Tensor | None,
    routing_map: torch.Tensor | None,
    weights: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    token_slots: torch.Tensor | None,
    tokens: int,
    handle: int,
    slot: int,
) -> None:
    counter = _counters_of.get(handle)
    if counter is None or torch._C._current_graph_task_id() != -1:
        return
    if expert_ids is not None and token_slots is not None:
        try:
            counter.add_tokens(expert_ids, token_slots, counts, counter.devices[counts.device])
        except Exception as error:  # the program's own run must not suffer from ours
            counter.error = counter.error or error.with_traceback(None)
        return
    # A compiler may hand over a copy of the buffers and copy it back: count into what was given.
    part = part_of(Buffers(counts=counts, mass=mass, sample=sample), counter.layout, counter.index, slot)
    decision = RoutingDecision(
        expert_ids=expert_ids,
        routing_map=routing_map,
        weights=weights,
        token_mask=token_mask,
        tokens=None if tokens < 0 else tokens,
    )
    counter.add(decision, slot, part, counter.devices[counts.device])


_library: Any = torch.library.Library("observatory", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch does not annotate it
_library.define(
    "count_assignments(Tensor(a!) counts, Tensor(b!)? mass, Tensor(c!)? sample, Tensor? expert_ids,"
    " Tensor? routing_map, Tensor? weights, Tensor? token_mask, Tensor? token_slots, SymInt tokens,"
    " int handle, int slot) -> ()"
)
_library.impl("count_assignments", _count_assignments, "CompositeExplicitAutograd")
torch.library.register_fake("observatory::count_assignments", lambda *_arguments: None, lib=_library)
