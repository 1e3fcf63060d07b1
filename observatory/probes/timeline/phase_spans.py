"""Spans of the program's phases: when prefill, decode or training was computed, on the host's clock.

A phase lasts from one boundary of the watch to the next, or from the start that an engine states. On a GPU
its ends are those of the device's work, by timing events in the current stream, not the moments at which the
program asked for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from observatory.probes.part import Boundary, Part
from observatory.probes.routing.accumulation import Snapshot
from observatory.probes.routing.counters import SLOTS
from observatory.probes.timeline.issue import Mark
from observatory.probes.timeline.log import SpanEntry
from observatory.probes.timeline.streams import Anchors, is_capturing, mark_now

#: Name of the span around one stretch of one phase.
PHASE_SPAN = "phase"


class PhaseSpans(Part):
    """Notes a span at every boundary that ends a phase.

    Args:
        add: takes the spans.
        anchors: of the host's time base, renewed at every boundary by the log.
        device: that the model computes on.
    """

    def __init__(self, add: Callable[[SpanEntry], object], anchors: Anchors, device: torch.device) -> None:
        self._add = add
        self._anchors = anchors
        self._device = device
        self._start = self._mark()
        #: Phase stated at the last end of a step, until another boundary.
        self._ended: str | None = None
        #: Phase of the stretch that runs, of its time alone; None where what was called shows it.
        self.phase: str | None = None

    def begin(self) -> None:
        """The stretch that runs starts here: the time since the last boundary belongs to no step."""
        self._start = self._mark()

    def boundary(self, boundary: Boundary) -> None:
        """Note the stretch that ends here, if it belongs to a phase."""
        end, stated, counted = self._mark(), boundary.phase, boundary.counted
        assert counted is not None
        # `with watch.phase(p): ...; watch.step()` leaves the end of the block after its last step.
        is_tail = (
            not boundary.ends_step
            and stated == self._ended
            and not any(calls.any() for calls in counted.calls)
        )
        phase = None if is_tail else stated or self.phase or _only_phase(counted)
        self.phase = None
        self._ended = stated if boundary.ends_step else None
        if phase is not None and self._start is not None and end is not None:
            self._add(SpanEntry(PHASE_SPAN, boundary.step, phase, None, self._device, self._start, end))
        self._start = end

    def _mark(self) -> Mark | None:
        if self._device.type != "cuda":
            return time.monotonic_ns()
        if is_capturing(self._device):
            return None
        if not self._anchors.has_anchor(self._device):
            self._anchors.drop_anchor(self._device)
        return mark_now(self._device)


def _only_phase(counted: Snapshot) -> str | None:
    """The phase of everything that was called, if it is one and known."""
    slots = [slot for slot, calls in enumerate(counted.calls) if calls.any()]
    return SLOTS[slots[0]] if len(slots) == 1 else None
