"""Times in the order of a CUDA stream, brought to the host's monotonic clock.

An event is recorded where a time is wanted; nothing waits for it. To place it on the host's clock, *anchors*
are recorded at step boundaries: an event on a stream that has nothing else to do, between two readings of the
host's clock. The device reaches it within the launch latency, a few microseconds, which is how well the host
time is known. Durations between two events do not depend on it. The latest anchor before an event counts, so
that the single precision of ``elapsed_time`` stays below a microsecond for steps of seconds.
"""

from __future__ import annotations

import threading
import time
from collections import deque

import torch

#: Anchors kept of each device: one a step, and an event is placed within some steps.
_KEPT = 64


def is_capturing(device: torch.device) -> bool:
    """Whether work on this device is recorded into a CUDA graph instead of being run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def mark_now(device: torch.device) -> torch.cuda.Event:
    """A timing event on the device's current stream."""
    event = _timing_event()
    event.record(torch.cuda.current_stream(device))
    return event


class Anchors:
    """Events whose host time is known, per device."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._anchors: dict[torch.device, deque[tuple[torch.cuda.Event, int]]] = {}
        self._lock = threading.Lock()

    def drop_anchor(self, device: torch.device) -> None:
        """Record an anchor; not during the capture of a CUDA graph."""
        with self._lock, torch.cuda.device(device):
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                self._anchors[device] = deque(maxlen=_KEPT)
            event = _timing_event()
            before_ns = time.monotonic_ns()
            event.record(self._streams[device])
            self._anchors[device].append((event, (before_ns + time.monotonic_ns()) // 2))

    def renew(self) -> None:
        """Another anchor on every device that was used so far."""
        for device in list(self._streams):
            if not is_capturing(device):
                self.drop_anchor(device)

    def has_anchor(self, device: torch.device) -> bool:
        """Whether the device has an anchor."""
        return device in self._anchors

    def host_ns(self, event: torch.cuda.Event, device: torch.device) -> int | None:
        """Host time of an event; None as long as the device has not reached it."""
        if not _reached(event):
            return None
        with self._lock:
            anchors = [pair for pair in self._anchors.get(device, ()) if _reached(pair[0])]
        if not anchors:
            return None
        for anchor, anchor_ns in reversed(anchors):
            after_ms: float = anchor.elapsed_time(event)
            if after_ms >= 0:
                return anchor_ns + round(after_ms * 1e6)
        anchor, anchor_ns = anchors[0]
        before_ms: float = event.elapsed_time(anchor)
        return anchor_ns - round(before_ms * 1e6)


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch does not annotate it


def _reached(event: torch.cuda.Event) -> bool:
    return bool(event.query())  # type: ignore[no-untyped-call]  # likewise
