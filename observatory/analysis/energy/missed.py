"""What a sensor of instant power may miss of equal iterations that a window repeats."""

from __future__ import annotations

import math
from dataclasses import dataclass

from observatory.analysis.energy.edges import find_updates
from observatory.analysis.energy.estimates import NORMAL_90
from observatory.analysis.energy.least_squares import WIDEST_INTERVAL
from observatory.analysis.energy.traces import PowerTrace
from observatory.analysis.energy.windows import WindowEnergy
from observatory.devices.aliasing import TOLERATED, StepRhythm, find_aliasing
from observatory.devices.sensors import SensorModel
from observatory.run.manifest import EnergyFlag

#: With fewer iterations there is no rhythm.
_FEWEST_ITERATIONS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RepeatedEnergy:
    """Energy of a window of equal iterations, what the sensor may have missed of them allowed for.

    Attributes:
        energy_mj: the energy; None where ``reason`` says why.
        error: half-width of its 90 % interval, relative; None like it.
        flag: ``in time with the sensor``; None where the energy does not rest on such readings.
        reason: why there is no energy, or what the flag says, in words; None without either.
    """

    energy_mj: float | None
    error: float | None
    flag: EnergyFlag | None
    reason: str | None


def energy_of_repeats(
    energy: WindowEnergy, trace: PowerTrace, sensor: SensorModel, *, iterations: int
) -> RepeatedEnergy:
    """Energy of a window that repeats one iteration.

    Iterations are taken to be of one length: those that wander are missed less.

    Args:
        energy: of the window.
        trace: samples of the device.
        sensor: what is known of its sensors.
        iterations: in the window.
    """
    missed = 0.0
    if energy.source == "integral" and iterations >= _FEWEST_ITERATIONS:
        missed = _missed(energy.duration_s, trace, sensor, iterations)
    if missed <= TOLERATED:
        return RepeatedEnergy(
            energy_mj=energy.energy_mj, error=energy.relative_error, flag=None,
            reason=energy.flag or energy.reason,
        )  # fmt: skip
    text = f"its iterations move in time with the power sensor, which may be off by {100 * missed:.0f} %"
    half = NORMAL_90 * missed
    if half > WIDEST_INTERVAL:
        return RepeatedEnergy(energy_mj=None, error=None, flag="in time with the sensor", reason=text)
    return RepeatedEnergy(
        energy_mj=energy.energy_mj,
        error=math.hypot(energy.relative_error or 0.0, half),
        flag="in time with the sensor",
        reason=f"{text}: its error allows for it",
    )


def _missed(duration_s: float, trace: PowerTrace, sensor: SensorModel, iterations: int) -> float:
    """Predicted relative error of integrated power; 0 where the sensor's rhythm is not known."""
    update_ms = update_period_ms(trace, sensor)
    if update_ms is None or sensor.window_ms is None:
        return 0.0
    rhythm = StepRhythm(period_ms=1e3 * duration_s / iterations, jitter_ms=0.0, steps=iterations)
    return find_aliasing(rhythm, update_ms=update_ms, window_ms=sensor.window_ms, duration_s=duration_s).error


def update_period_ms(trace: PowerTrace, sensor: SensorModel) -> float | None:
    """Period at which instant power is renewed, on the sampler's clock; None where that is not known."""
    update_ms = sensor.update_ms
    updates = find_updates(
        trace.time_ns_N, trace.read_ns_N, trace.power_mw_N, equal_values=True,
        period_ns=None if update_ms is None else update_ms * 1e6,
    )  # fmt: skip
    found_ms = None if updates.period_ns is None else updates.period_ns * 1e-6
    # The device's clock is not ours: its own period is known better from its updates, where these show one.
    # A locked sensor that reads the same value again and again shows none, or a wrong one.
    if update_ms is None or (
        found_ms is not None and updates.regular and abs(found_ms - update_ms) < 0.01 * update_ms
    ):
        return found_ms
    return update_ms
