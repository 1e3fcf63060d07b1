"""Energy of one device in one window, twice: from its counter and from its power, each with its error.

    window           |-----------------------------------|
    counter    |        |        |        |        |        |     updated every D, about 100 ms
                        a <-- counted exactly ---> b              margins at the mean power between a and b
    power       ##       ##       ##       ##       ##       ##   mean of the last W of every U, 25 of 100 ms

**Counter.** The first and last update inside the window bound what is counted; the margins left and right of
them, together less than 2 D, are filled at the mean power between. Under steady power a window of length T is
then off by D / (sqrt(6) T) (standard deviation) and at most by D / T: its two ends are each uniform over D.
Power that varies may differ in the margins: the first is multiplied by the root mean square of instant power
over its mean, the second by its peak over its mean. Let windows start and end where the load does.

**Power.** The trapezoid over the updates' averaging windows. These cover part of the time only (arXiv
2312.02741); what lies between is as uncertain as the updates scatter: std = T s sqrt(1 - W/U) / sqrt(n) with
s^2 half the mean squared difference of neighbouring updates. An estimate, for loads that do not move in time
with the sensor; those that do are found by :mod:`observatory.devices.aliasing`, not by this error.

Neither holds the calibration of the device, about 5 %
(:data:`observatory.devices.sensors.CALIBRATION_ERROR`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pydantic import JsonValue

from observatory.analysis.energy.codes import EnergyCode
from observatory.analysis.energy.estimators import (
    NORMAL_90,
    Estimate,
    energy_by_counter,
    energy_by_integral,
)
from observatory.analysis.energy.traces import PowerTrace, Reading, trace_of_readings
from observatory.devices.sensors import SensorModel
from observatory.errors import EnergyError
from observatory.reasons import Reason

#: Counter and integral that differ by more are flagged: sensors are calibrated to about this.
MOST_DISAGREEMENT = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowEnergy:
    """Energy of one window; every value None where its reason says why.

    Attributes:
        start_ns, end_ns: the window.
        counter_mj: by the counter.
        counter_std_mj: standard deviation of its error.
        counter_most_mj: its largest error.
        counter_updates: updates of the counter inside the window.
        counter_reason: why ``counter_mj`` is None.
        integral_mj, integral_std_mj, integral_updates, integral_reason: by instant power.
        disagreement: counter over integral, minus 1, corrected for the ratio that the calibration measured;
            None when one is missing.
        flag: how they disagree; None when they agree or cannot be compared.
    """

    start_ns: int
    end_ns: int
    counter_mj: float | None = None
    counter_std_mj: float | None = None
    counter_most_mj: float | None = None
    counter_updates: int = 0
    counter_reason: Reason | None = None
    integral_mj: float | None = None
    integral_std_mj: float | None = None
    integral_updates: int = 0
    integral_reason: Reason | None = None
    disagreement: float | None = None
    flag: Reason | None = None

    @property
    def duration_s(self) -> float:
        """Length of the window."""
        return (self.end_ns - self.start_ns) * 1e-9

    @property
    def source(self) -> Literal["counter", "integral"] | None:
        """Where ``energy_mj`` comes from: the counter where it has a value."""
        if self.counter_mj is not None:
            return "counter"
        return None if self.integral_mj is None else "integral"

    @property
    def energy_mj(self) -> float | None:
        """The energy; None when neither sensor gives one."""
        return self.integral_mj if self.counter_mj is None else self.counter_mj

    @property
    def std_mj(self) -> float | None:
        """Standard deviation of the error of ``energy_mj``."""
        return self.integral_std_mj if self.counter_mj is None else self.counter_std_mj

    @property
    def power_mw(self) -> float | None:
        """Mean power."""
        return None if self.energy_mj is None else self.energy_mj / self.duration_s

    @property
    def relative_error(self) -> float | None:
        """Half-width of the 90 % interval of ``energy_mj``, relative; calibration left out."""
        if self.energy_mj is None or self.std_mj is None or self.energy_mj <= 0:
            return None
        return NORMAL_90 * self.std_mj / self.energy_mj

    @property
    def reason(self) -> Reason | None:
        """Why there is no energy; None when there is."""
        if self.counter_reason is None or self.integral_reason is None:
            return None
        return Reason(EnergyCode.NEITHER_SENSOR, because=(self.counter_reason, self.integral_reason))


def energy_of_window(
    samples: PowerTrace | Iterable[Reading],
    start_ns: int,
    end_ns: int,
    *,
    sensor: SensorModel | None = None,
) -> WindowEnergy:
    """Energy of a device between two moments of the sampler's clock.

    Args:
        samples: of one device, before and after the window too where there are any.
        start_ns: start of the window.
        end_ns: its end.
        sensor: what is known of the device's sensors; None: what the samples show.

    Raises:
        EnergyError: the window does not end after it starts.
    """
    if end_ns <= start_ns:
        raise EnergyError(
            f"the window from {start_ns} to {end_ns} ns has no length; expected an end after the start, "
            "check which clock each time is of"
        )
    trace = samples if isinstance(samples, PowerTrace) else trace_of_readings(samples)
    sensor = sensor or SensorModel()
    counter = energy_by_counter(trace, start_ns, end_ns, sensor)
    integral = energy_by_integral(trace, start_ns, end_ns, sensor)
    disagreement, flag = _compare(counter, integral, sensor.counter_over_integral)
    by_counter = None if isinstance(counter, Reason) else counter
    by_integral = None if isinstance(integral, Reason) else integral
    return WindowEnergy(
        start_ns=start_ns,
        end_ns=end_ns,
        counter_mj=None if by_counter is None else by_counter.energy_mj,
        counter_std_mj=None if by_counter is None else by_counter.std_mj,
        counter_most_mj=None if by_counter is None else by_counter.most_mj,
        counter_updates=0 if by_counter is None else by_counter.updates,
        counter_reason=counter if isinstance(counter, Reason) else None,
        integral_mj=None if by_integral is None else by_integral.energy_mj,
        integral_std_mj=None if by_integral is None else by_integral.std_mj,
        integral_updates=0 if by_integral is None else by_integral.updates,
        integral_reason=integral if isinstance(integral, Reason) else None,
        disagreement=disagreement,
        flag=flag,
    )


def _compare(
    counter: Estimate | Reason, integral: Estimate | Reason, expected_ratio: float
) -> tuple[float | None, Reason | None]:
    """How far the two differ, and a flag when that is too far."""
    if isinstance(counter, Reason) or isinstance(integral, Reason) or integral.energy_mj <= 0:
        return None, None
    difference = counter.energy_mj / expected_ratio / integral.energy_mj - 1
    allowed = (counter.most_mj + integral.most_mj) / integral.energy_mj
    if abs(difference) <= min(MOST_DISAGREEMENT, allowed):
        return difference, None
    values: dict[str, JsonValue] = {"difference": difference, "limit": MOST_DISAGREEMENT, "allowed": allowed}
    return difference, Reason(EnergyCode.SENSORS_DISAGREE, values)
