"""From what was seen to rows of the run, on a thread of its own.

The program only appends to a queue. The thread takes what is complete, turns it into rows and writes them;
what is still in flight waits for the next round. When the queue is full, further exchanges are dropped and
counted: the program never waits for us.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa
import torch

from observatory.errors import ObservatoryError
from observatory.probes.part import Boundary, Part
from observatory.probes.timeline.flight import FlightRecorder
from observatory.probes.timeline.groups import GroupFacts
from observatory.probes.timeline.issue import Issue, Mark, per_peer_bytes
from observatory.probes.timeline.streams import Anchors
from observatory.run import RunWriter
from observatory.run.flight_recorder import RecorderMatch
from observatory.run.tables import EXCHANGE_SCHEMA, SPAN_SCHEMA

#: Entries that may wait; about 100 MB at the very most.
_MOST_WAITING = 1 << 18
#: Entries at which the thread wakes before its time: a few percent of the room.
_WAKE_AT = 1 << 13
#: Rows built at a stretch, under half a millisecond, so that the program's threads get their turn.
_STRETCH = 256
#: How long the end of a watch waits for a device that has not come to our events yet.
_GRACE_S = 5.0
#: Reasons that notes name; the rows hold all.
_NAMED_GAPS = 3
#: Looks of 100 ms at the recorder before the end: NCCL's thread takes one or two.
_RECORDER_ROUNDS = 10
#: Different reasons that are counted apart; there are fewer unless they hold numbers.
_MOST_GAPS = 32


#: One row, by the names of its table's schema.
Row = dict[str, object]


@dataclass(slots=True)
class ExchangeEntry:
    """An exchange together with where in the run it belongs; fields as in ``EXCHANGE_SCHEMA``."""

    issue: Issue
    step: int
    phase: str
    layer: int | None
    role: str
    algorithm: str
    group: GroupFacts
    sequence: int
    backend: str
    backend_sequence: int | None = None


@dataclass(slots=True)
class SpanEntry:
    """A stretch of the program; fields as in ``SPAN_SCHEMA``."""

    name: str
    step: int
    phase: str
    layer: int | None
    device: torch.device
    start: Mark
    end: Mark


class Seen(Protocol):
    """An exchange or a span of which it is worked out later where in the run it belongs."""

    def placed(self) -> ExchangeEntry | SpanEntry | None:
        """The entry; None where that failed. Called once, in the order in which they were added."""
        ...


class ExchangeLog(Part):
    """Owns the thread, from construction to ``close``.

    Args:
        writer: run that rows go to.
        anchors: what places events of devices on the host's clock.
        flush_s: seconds after which rows are on disk.
        recorder: torch's flight recorder as a second source; None to do without.

    Attributes:
        dropped: entries lost because the queue was full or their time never became known.
        unended: exchanges written without an end.
        written: exchanges written.
        recorder_gaps: what the flight recorder did not say of them, and how often.
        recorder_error: why it could not be read any more; None as long as it can.
    """

    def __init__(
        self,
        writer: RunWriter,
        anchors: Anchors,
        *,
        flush_s: float,
        recorder: FlightRecorder | None = None,
    ) -> None:
        self.dropped = 0
        self.unended = 0
        self.written = 0
        self.recorder_gaps: Counter[str] = Counter()
        self.recorder_error: str | None = None
        self._writer = writer
        self._anchors = anchors
        self._flush_s = flush_s
        self._recorder = recorder
        self._wake_at = _WAKE_AT if recorder is None else min(_WAKE_AT, recorder.due_after)
        self._queue: deque[ExchangeEntry | SpanEntry | Seen] = deque()
        self._waiting: list[ExchangeEntry | SpanEntry] = []
        self._error: Exception | None = None
        self._wake = threading.Event()
        self._drained = threading.Event()
        self._closing = False
        # A daemon: a program that is torn down without leaving its ``with`` block must still be able to end.
        self._thread = threading.Thread(target=self._run, name="observatory-exchange", daemon=True)
        self._thread.start()

    def add(self, entry: ExchangeEntry | SpanEntry | Seen) -> bool:
        """Keep an entry, called on the program's threads; whether there was room."""
        waiting = len(self._queue)
        if waiting >= _MOST_WAITING:
            self.dropped += 1
            return False
        self._queue.append(entry)
        if waiting == self._wake_at:
            self._wake.set()
        return True

    def boundary(self, boundary: Boundary) -> None:
        """Place what comes next by anchors of its own."""
        del boundary
        self._anchors.renew()

    def problem(self) -> str | None:
        """One line about the first error of the thread; None when there was none."""
        if self._error is None:
            return None
        error = self._error
        reason = str(error) if isinstance(error, ObservatoryError) else f"{type(error).__name__}: {error}"
        return f"captured exchanges could not be kept: {reason}"

    def notes(self, *, steps: int) -> tuple[str, ...]:
        """Stated limits of what was kept; final after ``close``."""
        del steps
        notes = []
        if self.unended:
            notes.append(f"{self.unended} exchanges have no end: they failed or were still in flight")
        if self.dropped:
            notes.append(f"{self.dropped} exchanges or spans were lost: they came faster than the disk")
        for reason, gaps in self.recorder_gaps.most_common(_NAMED_GAPS):
            notes.append(f"flight recorder, {gaps} of {self.written} exchanges: {reason}")
        if self.recorder_error is not None:
            notes.append(f"the flight recorder was given up: {self.recorder_error}")
        return tuple(notes)

    def hurry(self, timeout_s: float) -> None:
        """Write what is complete, from any thread, waiting no longer than that."""
        self._drained.clear()
        self._wake.set()
        self._drained.wait(timeout_s)

    def close(self) -> None:
        """Write everything and end the thread; doing it twice does nothing."""
        self._closing = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing:
            self._wake.wait(self._flush_s)
            self._wake.clear()
            self._guarded(last=False)
            self._drained.set()
        self._guarded(last=False)
        deadline = time.monotonic() + _GRACE_S
        while self._devices_are_late() and time.monotonic() < deadline:
            time.sleep(0.01)
        if self._recorder is not None:
            self._wait_for_recorder()
        self._guarded(last=True)

    def _wait_for_recorder(self) -> None:
        """NCCL's entries are completed by a thread of its own that looks every 100 ms."""
        for _ in range(_RECORDER_ROUNDS):
            self._guarded(last=False)
            if not any(
                isinstance(entry, ExchangeEntry) and entry.issue.end is not None for entry in self._waiting
            ):
                return
            time.sleep(0.1)

    def _devices_are_late(self) -> bool:
        return any(
            self._host_ns(mark, entry) is None
            for entry in self._waiting
            for mark in (_marks(entry))
            if isinstance(mark, torch.cuda.Event)
        )

    def _guarded(self, *, last: bool) -> None:
        try:
            self._drain(last=last)
        except Exception as error:  # whatever it is, the watched program must get it and go on
            self._error = self._error or error

    def _drain(self, *, last: bool) -> None:
        entries, self._waiting = self._waiting, []
        while self._queue:
            seen = self._queue.popleft()
            entry = seen if isinstance(seen, ExchangeEntry | SpanEntry) else seen.placed()
            if entry is not None:
                entries.append(entry)
        if self._recorder is not None and any(isinstance(entry, ExchangeEntry) for entry in entries):
            self._read(self._recorder)
        for first in range(0, len(entries), _STRETCH):
            stretch = entries[first : first + _STRETCH]
            rows = [
                self._exchange_row(entry, last=last) for entry in stretch if isinstance(entry, ExchangeEntry)
            ]
            spans = [self._span_row(entry, last=last) for entry in stretch if isinstance(entry, SpanEntry)]
            self._append("exchange", [row for row in rows if row is not None], EXCHANGE_SCHEMA)
            self._append("spans", [row for row in spans if row is not None], SPAN_SCHEMA)
            time.sleep(0)
        if entries:
            self._writer.flush()

    def _read(self, recorder: FlightRecorder) -> None:
        try:
            recorder.read()
        except Exception as error:  # the first source goes on without the second
            self._recorder = None
            self.recorder_error = " ".join(f"{error}".split())[:500]

    def _append(self, table: str, rows: Sequence[Row], schema: pa.Schema) -> None:
        if rows:
            columns = [pa.array([row[field.name] for row in rows], field.type) for field in schema]
            self._writer.append(table, pa.Table.from_arrays(columns, schema=schema))

    def _exchange_row(self, entry: ExchangeEntry, *, last: bool) -> Row | None:
        issue = entry.issue
        start_ns = self._host_ns(issue.start, entry)
        end_ns = None if issue.end is None else self._host_ns(issue.end, entry)
        over = issue.state in ("failed", "unknown") or end_ns is not None
        if start_ns is None or not over:
            if not last:
                self._waiting.append(entry)
                return None
            if start_ns is None:
                self.dropped += 1
                return None
        sends, receives = (per_peer_bytes(side, entry.group.size) for side in (issue.send, issue.receive))
        second = self._second_source(entry, sends, receives)
        if not (second.final or last):
            self._waiting.append(entry)
            return None
        self.written += 1
        self.unended += end_ns is None
        if second.problem is not None:
            is_full = len(self.recorder_gaps) >= _MOST_GAPS
            self.recorder_gaps["other reasons" if is_full else second.problem] += 1
        return {
            "step": entry.step,
            "phase": entry.phase,
            "layer": entry.layer,
            "source_rank": self._writer.rank,
            "role": entry.role,
            "group": entry.group.label,
            "sequence": entry.sequence,
            "algorithm": entry.algorithm,
            "backend": entry.backend,
            "start_ns": start_ns,
            "end_ns": end_ns,
            "send_bytes": sends,
            "receive_bytes": receives,
            "blocking": issue.blocking,
            "backend_group": entry.group.name,
            "backend_sequence": entry.backend_sequence,
            "recorder_start_ns": second.start_ns,
            "recorder_duration_ns": second.duration_ns,
            "recorder_problem": second.problem,
        }

    def _second_source(
        self, entry: ExchangeEntry, sends: list[int] | None, receives: list[int] | None
    ) -> RecorderMatch:
        """What torch's flight recorder states of an exchange."""
        if self._recorder is None:
            return RecorderMatch()
        return self._recorder.index.match(
            backend=entry.backend,
            group=entry.group.name,
            number=entry.backend_sequence,
            send_bytes=sends,
            receive_bytes=receives,
        )

    def _span_row(self, entry: SpanEntry, *, last: bool) -> Row | None:
        start_ns, end_ns = self._host_ns(entry.start, entry), self._host_ns(entry.end, entry)
        if start_ns is None or end_ns is None:
            if last:
                self.dropped += 1
            else:
                self._waiting.append(entry)
            return None
        return {
            "step": entry.step,
            "phase": entry.phase,
            "layer": entry.layer,
            "source_rank": self._writer.rank,
            "name": entry.name,
            "start_ns": start_ns,
            "end_ns": end_ns,
        }

    def _host_ns(self, mark: Mark, entry: ExchangeEntry | SpanEntry) -> int | None:
        if isinstance(mark, int):
            return mark
        device = entry.device if isinstance(entry, SpanEntry) else entry.issue.device
        return self._anchors.host_ns(mark, device)


def _marks(entry: ExchangeEntry | SpanEntry) -> tuple[Mark | None, Mark | None]:
    return (entry.start, entry.end) if isinstance(entry, SpanEntry) else (entry.issue.start, entry.issue.end)
