"""Spans of the program's phases: when prefill, decode or training was computed, on the host's clock.

A phase lasts from one boundary of the watch to the next. On a GPU its ends are those of the device's work,
by timing events in the current stream, not the moments at which the program asked for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from observatory.probes.timeline.issue import Mark
from observatory.probes.timeline.log import SeenSpan
from observatory.probes.timeline.streams import Anchors, is_capturing, mark_now

#: Name of the span around one stretch of one phase.
PHASE_SPAN = "phase"


class PhaseSpans:
    """Notes a span at every boundary that ends a phase.

    Args:
        add: takes the spans.
        anchors: of the host's clock, renewed at every boundary by whoever owns them.
        device: that the model computes on.
    """

    def __init__(self, add: Callable[[SeenSpan], None], anchors: Anchors, device: torch.device) -> None:
        self._add = add
        self._anchors = anchors
        self._device = device
        self._start = self._mark()

    def boundary(self, step: int, phase: str | None) -> None:
        """A stretch ends here; ``phase`` is None when it belongs to none."""
        end = self._mark()
        if phase is not None and self._start is not None and end is not None:
            self._add(SeenSpan(PHASE_SPAN, step, phase, None, self._device, self._start, end))
        self._start = end

    def _mark(self) -> Mark | None:
        if self._device.type != "cuda":
            return time.monotonic_ns()
        if is_capturing(self._device):
            return None
        if not self._anchors.known(self._device):
            self._anchors.drop_anchor(self._device)
        return mark_now(self._device)
