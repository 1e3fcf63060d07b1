"""Tracks of a trace on which slices do not overlap.

Viewers take slices of one thread for calls: they must lie apart or inside each other. What runs at the same
time (exchanges that do not block, spans inside spans) therefore gets lanes.
"""

from __future__ import annotations

from typing import Any

#: Lanes of one kind on one rank; more would be a fault in the times, not concurrency.
MOST_LANES = 64


class Lanes:
    """Lanes of one kind of events of one process.

    Attributes:
        name: of the kind; the second lane is called ``name 2``.
        pid, tid: process, and thread of the first lane.
        crowded: events that found all lanes taken and overlap another one.
    """

    def __init__(self, name: str, *, pid: int, tid: int) -> None:
        self.name, self.pid, self.tid = name, pid, tid
        self.crowded = 0
        self._until_ns: list[int] = []

    def place(self, start_ns: int, end_ns: int) -> tuple[int, list[dict[str, Any]]]:
        """Thread for an event, and what names that thread when it is a new one."""
        for lane, until_ns in enumerate(self._until_ns):
            if until_ns <= start_ns:
                self._until_ns[lane] = end_ns
                return self.tid + lane, []
        lane = len(self._until_ns)
        if lane == MOST_LANES:
            self.crowded += 1
            self._until_ns[-1] = max(self._until_ns[-1], end_ns)
            return self.tid + lane - 1, []
        self._until_ns.append(end_ns)
        tid = self.tid + lane
        name = self.name if lane == 0 else f"{self.name} {lane + 1}"
        return tid, [
            metadata("thread_name", self.pid, tid, name=name),
            metadata("thread_sort_index", self.pid, tid, sort_index=tid),
        ]


def metadata(what: str, pid: int, tid: int = 0, **args: Any) -> dict[str, Any]:
    """A metadata event."""
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": args}
