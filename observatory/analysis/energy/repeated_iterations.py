"""What a sensor of instant power may miss of a window of equal iterations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from observatory.analysis.energy.codes import EnergyCode
from observatory.analysis.energy.edges import find_updates
from observatory.analysis.energy.estimators import NORMAL_90
from observatory.analysis.energy.least_squares import WIDEST_INTERVAL
from observatory.analysis.energy.traces import PowerTrace
from observatory.analysis.energy.windows import WindowEnergy
from observatory.devices.aliasing import TOLERATED, missed_error
from observatory.devices.sensors import SensorModel
from observatory.reasons import Reason
from observatory.run.manifest import EnergyFlag

#: With fewer iterations there is no regular period.
_FEWEST_ITERATIONS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RepeatedEnergy:
    """Energy of a window of equal iterations, what the sensor may have missed of them allowed for.

    Attributes:
        energy_mj: the energy; None where ``reason`` says why.
        error: half-width of its 90 % interval, relative; None like it.
        flag: ``in time with the sensor``; None where the energy does not rest on such readings.
        reason: why there is no energy, or what to know of it; None without either.
    """

    energy_mj: float | None
    error: float | None
    flag: EnergyFlag | None
    reason: Reason | None


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
    half = NORMAL_90 * missed
    if half > WIDEST_INTERVAL:
        return RepeatedEnergy(
            energy_mj=None, error=None, flag="in time with the sensor", reason=_in_time(missed, kept=False)
        )
    return RepeatedEnergy(
        energy_mj=energy.energy_mj,
        error=math.hypot(energy.relative_error or 0.0, half),
        flag="in time with the sensor",
        reason=_in_time(missed, kept=True),
    )


def _in_time(error: float, *, kept: bool) -> Reason:
    return Reason(EnergyCode.ITERATIONS_IN_TIME, {"error": error, "allowed_for": kept})


def _missed(duration_s: float, trace: PowerTrace, sensor: SensorModel, iterations: int) -> float:
    """Predicted relative error of integrated power; 0 where the sensor's periods are not known."""
    update_ms = update_period_ms(trace, sensor)
    if update_ms is None or sensor.window_ms is None:
        return 0.0
    period_ms = 1e3 * duration_s / iterations
    start_ns = np.rint(np.arange(iterations) * period_ms * 1e6).astype(np.int64)
    return missed_error(start_ns, period_ms, update_ms=update_ms, window_ms=sensor.window_ms)


def update_period_ms(trace: PowerTrace, sensor: SensorModel) -> float | None:
    """Update period of instant power, on the sampler's clock; None where that is not known."""
    update_ms = sensor.update_ms
    updates = find_updates(
        trace.time_ns_N, trace.read_ns_N, trace.power_mw_N, equal_values=True,
        period_ns=None if update_ms is None else update_ms * 1e6,
    )  # fmt: skip
    measured_ms = None if updates.period_ns is None else updates.period_ns * 1e-6
    # The device's clock is not ours: its updates give the period on our clock more precisely, where they show
    # one. A sensor that reads the same value again and again shows none, or a wrong one.
    if update_ms is None or (
        measured_ms is not None and updates.regular and abs(measured_ms - update_ms) < 0.01 * update_ms
    ):
        return measured_ms
    return update_ms
