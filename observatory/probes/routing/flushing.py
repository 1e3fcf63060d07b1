"""The background thread that turns snapshots into rows and rows into files.

The program that is watched only puts snapshots into a queue. When the thread cannot keep up, the queue is
full and the program waits at its next step: nothing is dropped. When a row cannot be written the thread
goes on emptying the queue, keeps the first error, and the program meets it at its next step.

The thread never touches a device: asking for an event while another thread captures a CUDA graph would break
that capture. A snapshot on its way from a device waits on the program's own thread, which asks at its next
boundary, where no capture can be.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from observatory.errors import ObservatoryError
from observatory.probes.part import Boundary, Part
from observatory.probes.routing.accumulation import Snapshot, SnapshotAccumulator
from observatory.run import RunWriter

#: Stretches by which the thread may be behind before the program waits; each holds its counts.
_QUEUE_SIZE = 64
#: Stretches whose copies may be on their way from a device; each holds pinned memory.
_MOST_ON_THE_WAY = 8
#: Rows that are handed to the file at once.
_ROWS_PER_APPEND = 2048


class Flusher(Part):
    """Owns the thread, from construction to ``close``."""

    def __init__(self, writer: RunWriter, rows: SnapshotAccumulator, *, flush_s: float) -> None:
        self._writer = writer
        self._rows = rows
        self._flush_s = flush_s
        self._error: BaseException | None = None
        self._last_step = 0
        #: Called on the thread after each flush.
        self.on_flush: Callable[[], None] | None = None
        self._on_the_way: deque[Snapshot] = deque()
        self._queue: queue.Queue[Snapshot | threading.Event | None] = queue.Queue(_QUEUE_SIZE)
        # A daemon: a program that is torn down without leaving its ``with`` block must still be able to end.
        self._thread = threading.Thread(target=self._run, name="observatory-flush", daemon=True)
        self._thread.start()

    def boundary(self, boundary: Boundary) -> None:
        """Hand a stretch over with all its losses; waits when the queue is full or the device far behind."""
        counted = boundary.counted
        if counted is None or boundary.is_refused:
            return
        self._on_the_way.append(
            replace(
                counted,
                losses=(*counted.losses, *boundary.losses),
                was_interrupted=counted.was_interrupted or boundary.was_interrupted,
                is_last=boundary.is_last,
            )
        )
        self._pass_on(_MOST_ON_THE_WAY)

    def hurry(self, timeout_s: float) -> None:
        """Write what was submitted and has arrived, from any thread, waiting no longer than that."""
        written = threading.Event()
        with contextlib.suppress(queue.Full):
            self._queue.put(written, timeout=timeout_s)
            written.wait(timeout_s)

    def problem(self) -> str | None:
        """One line about the first error of the thread; None when there was none."""
        error = self._error
        if error is None:
            return None
        reason = str(error) if isinstance(error, ObservatoryError) else f"{type(error).__name__}: {error}"
        return f"captured routing could not be kept: {reason}"

    def close(self) -> None:
        """Write everything that was submitted and end the thread; doing it twice does nothing."""
        if self._thread.is_alive():
            try:
                self._pass_on(0)
            except Exception as error:  # of a device that has failed
                self._error = self._error or error
            self._queue.put(None)
            self._thread.join()

    def _pass_on(self, most: int) -> None:
        """Give the thread what has arrived, in order, and wait until no more than ``most`` are on the way."""
        waiting = self._on_the_way
        while waiting and (len(waiting) > most or all(copy.has_arrived() for copy in waiting[0].copies)):
            for copy in waiting[0].copies:
                copy.wait()
            self._queue.put(waiting.popleft())

    def _run(self) -> None:
        due = time.monotonic() + self._flush_s
        while True:
            try:
                item = self._queue.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                due = time.monotonic() + self._flush_s
                self._guarded(None, flush=True)
                continue
            if item is None:
                self._guarded(None, flush=True, last=True)
                return
            if isinstance(item, threading.Event):
                self._guarded(None, flush=True)
                item.set()
                continue
            late = time.monotonic() >= due
            if late:
                due = time.monotonic() + self._flush_s
            self._guarded(item, flush=late)

    def _guarded(self, snapshot: Snapshot | None, *, flush: bool, last: bool = False) -> None:
        try:
            if snapshot is not None:
                self._last_step = snapshot.step
                self._rows.add(snapshot)
            if last:
                self._rows.finish(self._last_step)
            if flush or self._rows.finished_rows >= _ROWS_PER_APPEND:
                for table, rows in self._rows.drain():
                    self._writer.append(table, rows)
            if flush:
                self._writer.flush()
                self._writer.set_gaps(self._rows.gaps())
                self.thread_cpu_s = time.thread_time()
                if self.on_flush is not None:
                    self.on_flush()
        except Exception as error:  # whatever it is, the watched program must get it and go on
            self._error = self._error or error
