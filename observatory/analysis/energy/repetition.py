"""Power of a phase that runs alone for long enough: the energy of those windows, nothing to be solved.

The method of arXiv 2605.11999 and 2605.05696: what is shorter than the sensor's period is repeated, the whole
batch is bracketed and divided. From 5 s up, a 100 ms counter is off by 0.8 % (standard deviation).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import JsonValue

from observatory.analysis.energy.codes import EnergyCode
from observatory.analysis.energy.estimators import NORMAL_90, least_half_mw
from observatory.analysis.energy.timeline import Timeline
from observatory.analysis.energy.traces import PowerTrace
from observatory.analysis.energy.windows import WindowEnergy, energy_of_window
from observatory.analysis.statistics import student_quantile
from observatory.devices.sensors import SensorModel
from observatory.reasons import Reason

#: From here on the error of a 100 ms counter is below 1 %.
SHORTEST_REPEAT_S = 5.0
#: Windows of one phase that are measured at most: those of a day would take hours, and the mean of so many is
#: known better than any sensor is calibrated.
MOST_WINDOWS = 300
#: A phase runs alone where it has this share of the time: other work then changes its power by less than the
#: counter's error.
_ALONE = 0.99
#: A longer pause than this ends a stretch, whatever the shares: the device goes idle in it.
_LONGEST_PAUSE_NS = 50_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeated:
    """Power of a phase from windows that it fills.

    Attributes:
        power_mw, low_mw, high_mw: mean power and its 90 % interval, calibration left out.
        windows: how many.
        measured_s: their length together.
        source: ``counter``, or ``integral`` where no window had a counter; ``mixed`` where some had.
        flags: where counter and integrated power of a window disagree.
    """

    power_mw: float
    low_mw: float
    high_mw: float
    windows: int
    measured_s: float
    source: Literal["counter", "integral", "mixed"]
    flags: tuple[Reason, ...] = ()


def repeated_stretches(
    timeline: Timeline,
    name: str,
    *,
    fillers: Collection[str] = (),
    shortest_s: float = SHORTEST_REPEAT_S,
) -> list[tuple[int, int]]:
    """Start and end of the stretches in which one name runs alone for long enough.

    Args:
        timeline: what ran when.
        name: the name.
        fillers: names that may stand between, as gaps may, if they take less than a hundredth of the time.
        shortest_s: length of a stretch that counts.
    """
    if name not in timeline.names:
        return []
    allowed = [timeline.names.index(other) for other in (name, *fillers) if other in timeline.names]
    of_name = np.flatnonzero(timeline.name_M == timeline.names.index(name))
    if not len(of_name):
        return []
    foreign = np.cumsum(~np.isin(timeline.name_M, allowed))
    start, end = timeline.start_ns_M[of_name], timeline.end_ns_M[of_name]
    breaks = (np.diff(foreign[of_name]) > 0) | (start[1:] - end[:-1] > _LONGEST_PAUSE_NS)
    first = np.concatenate([[0], np.flatnonzero(breaks) + 1])
    last = np.append(first[1:], len(of_name)) - 1
    until = np.concatenate([[0], np.cumsum(end - start)])
    length, busy = end[last] - start[first], until[last + 1] - until[first]
    kept = (length >= shortest_s * 1e9) & (busy >= _ALONE * length)
    return [(int(start[a]), int(end[b])) for a, b in zip(first[kept], last[kept], strict=True)]


def measure_repeated(
    trace: PowerTrace, stretches: list[tuple[int, int]], sensor: SensorModel
) -> Repeated | Reason:
    """Mean power over stretches of one phase, or why it is not known.

    Of more than :data:`MOST_WINDOWS` stretches so many are measured, spread over the run.
    """
    chosen = stretches if len(stretches) <= MOST_WINDOWS else _spread(stretches)
    windows = [energy_of_window(trace, start, end, sensor=sensor) for start, end in chosen]
    measured = [window for window in windows if window.energy_mj is not None and window.std_mj is not None]
    if not measured:
        return windows[0].reason or Reason(EnergyCode.NO_WINDOW)
    seconds = np.array([window.duration_s for window in measured])
    energy = np.array([window.energy_mj for window in measured], dtype=np.float64)
    stds = [window.std_mj or 0.0 for window in measured]
    # What a long average adds to one window it adds to all: it does not average out.
    is_shared = sensor.window_ms is None and any(window.source == "integral" for window in measured)
    std = sum(stds) if is_shared else math.sqrt(sum(one**2 for one in stds))
    power = float(energy.sum() / seconds.sum())
    half = NORMAL_90 * std / float(seconds.sum())
    if len(measured) > 2:
        # Windows may differ by more than each one's own error: then that counts.
        between = (energy / seconds - power) * seconds / seconds.sum()
        count = len(measured)
        scatter = math.sqrt(float((between**2).sum()) * count / (count - 1))
        half = max(half, student_quantile(count - 1) * scatter)
    sources = {window.source for window in measured}
    # Many windows do not make a sensor finer.
    read = (
        []
        if sources == {"counter"}
        else [trace.power_mw_N[trace.within(window.start_ns, window.end_ns)] for window in measured]
    )
    half = max(half, least_half_mw(power, np.concatenate([np.zeros(0), *read])))
    return Repeated(
        power_mw=power,
        low_mw=max(0.0, power - half),
        high_mw=power + half,
        windows=len(measured),
        measured_s=float(seconds.sum()),
        source="mixed" if len(sources) > 1 else "counter" if "counter" in sources else "integral",
        flags=_flags(measured),
    )


def _spread(stretches: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """One stretch at random, always the same, of each of :data:`MOST_WINDOWS` equal parts of all of them.

    At random, since stretches that repeat in a pattern may move in time with every regular choice.
    """
    part = len(stretches) / MOST_WINDOWS
    within = np.random.default_rng(0).random(MOST_WINDOWS)
    return [stretches[int(place)] for place in (np.arange(MOST_WINDOWS) + within) * part]


def _flags(windows: list[WindowEnergy]) -> tuple[Reason, ...]:
    """How counter and integral disagree: of many windows that of the largest difference."""
    flags = [(abs(window.disagreement or 0.0), window.flag) for window in windows if window.flag is not None]
    if not flags:
        return ()
    _, worst = max(flags, key=lambda flag: flag[0])
    if len(flags) == 1:
        return (worst,)
    counts: dict[str, JsonValue] = {"flagged": len(flags), "windows": len(windows)}
    return (Reason(EnergyCode.SENSORS_DISAGREE_OFTEN, counts, (worst,)),)
