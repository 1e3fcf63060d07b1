"""What watching costs the program, as far as a program can see it itself.

Hooks time themselves (`Part.cost`); here the ends of steps are timed, and the time that is captured.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence

from pydantic import JsonValue

from observatory.probes.part import Part
from observatory.run import RunWriter
from observatory.run.manifest import SelfMeasured

#: Keys of `Part.cost` for hooks on the program's own threads: calls, and mean microseconds of one.
_HOOKS = (("eager_layer_calls", "host_us_per_layer_call"), ("exchanges", "host_us_per_exchange"))


class SelfMeasurement:
    """Counts from construction on, but for the time between `pause` and `resume`.

    Args:
        parts: those of the capture, which may still grow.
        writer: of the run.
    """

    def __init__(self, parts: Sequence[Part], writer: RunWriter) -> None:
        self._parts = parts
        self._writer = writer
        self._steps = 0
        self._step_end_ns = 0
        self._captured_ns = 0
        self._since_ns: int | None = time.perf_counter_ns()

    @contextlib.contextmanager
    def step_end(self, *, ends_step: bool) -> Iterator[None]:
        """What is done inside, the program's thread waits for; not counted in a pause."""
        start_ns = time.perf_counter_ns()
        try:
            yield
        finally:
            if self._since_ns is not None:
                self._step_end_ns += time.perf_counter_ns() - start_ns
                self._steps += ends_step

    def pause(self) -> None:
        """The time from here on is not captured; doing it twice does nothing."""
        if self._since_ns is not None:
            self._captured_ns += time.perf_counter_ns() - self._since_ns
            self._since_ns = None

    def resume(self) -> None:
        """It is again."""
        self._since_ns = time.perf_counter_ns()

    def now(self) -> SelfMeasured:
        """The cost so far; from any thread."""
        since_ns = self._since_ns
        running_ns = 0 if since_ns is None else time.perf_counter_ns() - since_ns
        return SelfMeasured(
            captured_s=(self._captured_ns + running_ns) / 1e9,
            steps=self._steps,
            hook_s=sum(_hook_s(part.cost()) for part in self._parts),
            step_end_s=self._step_end_ns / 1e9,
            thread_cpu_s=sum(part.thread_cpu_s for part in self._parts),
            bytes_written=self._writer.bytes_written,
        )


def _hook_s(cost: Mapping[str, JsonValue]) -> float:
    """Seconds of the hooks that a part states the cost of."""
    seconds = 0.0
    for calls_key, us_key in _HOOKS:
        calls, us = cost.get(calls_key), cost.get(us_key)
        if isinstance(calls, int) and isinstance(us, float):
            seconds += calls * us / 1e6
    return seconds
