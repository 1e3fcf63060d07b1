"""Pauses between steps, so that a sensor that looks part-time does not always see the same part of a step.

    steps   |####----|####----|      |####----|####----|            # drawing more power
    sensor      ^        ^               ^        ^                 looks every 100 ms for 25
    before: always the end of #;  after a pause of p / 4: always the start of -;  and so on

Which pause, and whether any helps, follows from the rhythm of the steps and of the sensor
(:mod:`observatory.devices.aliasing`): n equal parts of a phase, each begun a little later in its steps. Where
the number of steps is known beforehand, these are n parts of it. Else parts follow each other, so long that
pauses take less than a hundredth of the time; what is left over at the end is then measured with its part of
the error, so the longer the run, the better. Steps to which the sensor does not lock are left alone.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pydantic import JsonValue

from observatory.devices.aliasing import phase_shifts_ms, predicted_error, rhythm_of
from observatory.devices.sensors import SensorModel

#: Share of the time that pauses may take: below the hundredth that docs/power.md promises.
_MOST_PAUSED = 0.009
#: A longer one would end the stretch in which a phase runs alone
#: (:mod:`observatory.analysis.energy.repetition`).
_LONGEST_MS = 45.0
#: Length of a run whose error counts; 5 s is also the shortest that measures a phase alone.
_WITHIN_S = 5.0
#: The rhythm is looked at so long after a pause: a dozen updates of a sensor of 100 ms.
_LOOK_S = 1.25
#: Errors from here on are worth a pause: a choice, about twice what pauses may cost in time.
_TOLERATED = 0.02
#: Steps whose lengths count, and the fewest that show a rhythm.
_REMEMBERED, _FEWEST = 64, 8


class PhaseShifts:
    """Decides after each step whether to pause, and does it.

    Args:
        sensors: of the devices that are sampled; those that see all the time, or of which nothing is known,
            need nothing.
        synchronise: waits until the device has done what it was given: else it would work on in the pause.
        steps: steps of one rhythm, where that is known: after so many the next one starts.
        now_ns: monotonic clock.
        sleep: waits so many seconds.
    """

    def __init__(
        self,
        sensors: Sequence[SensorModel],
        *,
        synchronise: Callable[[], None],
        steps: int | None = None,
        now_ns: Callable[[], int] = time.monotonic_ns,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._sensors = {
            (sensor.update_ms, sensor.window_ms)
            for sensor in sensors
            if sensor.update_ms and sensor.window_ms and sensor.unseen_share > 0
        }
        self._synchronise, self._now_ns, self._sleep = synchronise, now_ns, sleep
        self._steps = steps
        self._gaps_ns: deque[int] = deque(maxlen=_REMEMBERED)
        #: End of the last step; None before the first of a rhythm, whose start is not known.
        self._last_ns: int | None = None
        self._since_ns = now_ns()
        self._done = 0
        self._wanted: tuple[float, ...] | None = None
        self._parts = 1
        self._looked_ns = 0
        self._pauses = 0
        self._paused_ns = 0
        self._error = 0.0

    def after_step(self) -> bool:
        """To be called when a step has ended; whether time went by that belongs to no step."""
        if not self._sensors:
            return False
        now_ns = self._now_ns()
        if self._last_ns is not None:
            self._gaps_ns.append(now_ns - self._last_ns)
        self._last_ns = now_ns
        self._done += 1
        if self._steps is not None and self._done >= self._steps:
            self._done, self._wanted, self._since_ns, self._last_ns = 0, None, now_ns, None
            self._gaps_ns.clear()
            return False
        if self._wanted is None:
            if len(self._gaps_ns) < _FEWEST or now_ns - self._since_ns < _LOOK_S * 1e9:
                return False
            self._wanted = self._look()
            self._looked_ns = self._now_ns() - now_ns
        elif not self._due(now_ns):
            return False
        else:
            if self._wanted:
                self._pause(now_ns, self._wanted[0])
                self._wanted = self._wanted[1:]
            if self._steps is None:
                self._wanted = None
            self._since_ns = self._now_ns()
        self._last_ns = self._now_ns()
        return True

    def _due(self, now_ns: int) -> bool:
        """Whether the next pause, or the next look, is due."""
        assert self._wanted is not None
        if self._steps is not None:
            parts = self._parts
            return bool(self._wanted) and self._done >= self._steps * (1 - len(self._wanted) / parts)
        pause_s = self._wanted[0] * 1e-3 if self._wanted else 0.0
        return (now_ns - self._since_ns) * 1e-9 >= max(_LOOK_S, pause_s / _MOST_PAUSED)

    def _pause(self, now_ns: int, pause_ms: float) -> None:
        self._synchronise()
        # Looking moved the steps on already.
        gone_ns = self._looked_ns + self._now_ns() - now_ns
        self._looked_ns = 0
        self._sleep(max(0.0, pause_ms * 1e-3 - gone_ns * 1e-9))
        self._pauses += 1
        self._paused_ns += self._now_ns() - now_ns

    def summary(self) -> JsonValue:
        """What was done, for the manifest."""
        if not self._sensors:
            return {"pauses": 0, "reason": "no sampled device is known to see its power part-time only"}
        return {
            "pauses": self._pauses,
            "paused_s": round(self._paused_ns * 1e-9, 6),
            "error_without": round(self._error, 4),
        }

    def _look(self) -> tuple[float, ...]:
        """The pauses that the sensor which is worst off needs; empty for none."""
        rhythm = rhythm_of(np.cumsum([0, *self._gaps_ns]))
        worst = _TOLERATED
        wanted: tuple[float, ...] = ()
        if rhythm is None:
            return ()
        length_ms = _WITHIN_S * 1e3 if self._steps is None else rhythm.period_ms * self._steps
        most_ms = math.inf if self._steps is None else _MOST_PAUSED * length_ms
        wander_ms = rhythm.jitter_ms * (length_ms / rhythm.period_ms) ** 0.5 / 2
        for update_ms, window_ms in self._sensors:
            assert update_ms is not None
            assert window_ms is not None
            common: dict[str, Any] = {
                "update_ms": update_ms, "window_ms": window_ms, "jitter_ms": wander_ms,
                "samples": max(1, round(length_ms / update_ms)),
            }  # fmt: skip
            error = predicted_error(rhythm.period_ms, **common)
            self._error = max(self._error, error)
            if error > worst:
                worst = error
                wanted = phase_shifts_ms(
                    rhythm.period_ms, **common, tolerated=_TOLERATED, longest_ms=_LONGEST_MS, most_ms=most_ms
                )
        self._parts = len(wanted) + 1
        return wanted
