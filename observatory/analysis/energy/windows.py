"""Energy of one device in one window, twice: from its counter and from its power, each with its error.

    window           |-----------------------------------|
    counter    |        |        |        |        |        |     renewed every D, about 100 ms
                        a <-- counted exactly ---> b              margins at the mean power between a and b
    power       ##       ##       ##       ##       ##       ##   sees the last W of every U (25 of 100 ms)

**Counter.** The first and last update inside the window bound what is counted; the margins left and right of
them, together less than 2 D, are filled at the mean power between. Under steady power a window of length T is
then off by D / (sqrt(6) T) (standard deviation) and at most by D / T: its two ends are each uniform over D.
Power that varies may differ in the margins: the first is multiplied by the root mean square of instant power
over its mean, the second by its peak over its mean. Let windows begin and end where the load does.

**Power.** The trapezoid over the updates' own windows. Power is seen part-time only (arXiv 2312.02741);
what lies between is as uncertain as the updates scatter: std = T s sqrt(1 - W/U) / sqrt(n) with s^2 half the
mean squared difference of neighbouring updates. An estimate, for loads that do not move in time with the
sensor; those that do are found by :mod:`observatory.devices.aliasing`, not by this error.

Neither holds the calibration of the device, about 5 %
(:data:`observatory.devices.sensors.CALIBRATION_ERROR`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from observatory.analysis.energy.counting import energy_by_counter
from observatory.analysis.energy.estimates import NORMAL_90, Estimate
from observatory.analysis.energy.integrating import energy_by_integral
from observatory.analysis.energy.traces import PowerTrace, Reading, trace_of_readings
from observatory.devices.sensors import SensorModel
from observatory.errors import EnergyError

#: Counter and integral that differ by more are flagged.
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
        integral_mj, integral_std_mj, integral_most_mj, integral_updates, integral_reason: by instant power.
        disagreement: counter over integral, minus 1, after the ratio that the calibration found is taken off;
            None when one is missing.
        flag: how they disagree; None when they agree or cannot be compared.
    """

    start_ns: int
    end_ns: int
    counter_mj: float | None = None
    counter_std_mj: float | None = None
    counter_most_mj: float | None = None
    counter_updates: int = 0
    counter_reason: str | None = None
    integral_mj: float | None = None
    integral_std_mj: float | None = None
    integral_most_mj: float | None = None
    integral_updates: int = 0
    integral_reason: str | None = None
    disagreement: float | None = None
    flag: str | None = None

    @property
    def duration_s(self) -> float:
        """Length of the window."""
        return (self.end_ns - self.start_ns) * 1e-9

    @property
    def source(self) -> Literal["counter", "integral"] | None:
        """Where ``energy_mj`` comes from: the counter where it tells."""
        if self.counter_mj is not None:
            return "counter"
        return None if self.integral_mj is None else "integral"

    @property
    def energy_mj(self) -> float | None:
        """The energy; None when neither tells."""
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
    def reason(self) -> str | None:
        """Why there is no energy; None when there is."""
        if self.energy_mj is not None:
            return None
        return f"counter: {self.counter_reason}; power: {self.integral_reason}"


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
    known: dict[str, Any] = {}
    for name, result in (("counter", counter), ("integral", integral)):
        if isinstance(result, str):
            known[f"{name}_reason"] = result
            continue
        known[f"{name}_mj"] = result.energy_mj
        known[f"{name}_std_mj"] = result.std_mj
        known[f"{name}_most_mj"] = result.most_mj
        known[f"{name}_updates"] = result.updates
    disagreement, flag = _compare(counter, integral, sensor.counter_over_integral)
    return WindowEnergy(start_ns=start_ns, end_ns=end_ns, disagreement=disagreement, flag=flag, **known)


def _compare(
    counter: Estimate | str, integral: Estimate | str, expected_ratio: float
) -> tuple[float | None, str | None]:
    """How far the two differ, and a sentence when that is too far."""
    if isinstance(counter, str) or isinstance(integral, str) or integral.energy_mj <= 0:
        return None, None
    difference = counter.energy_mj / expected_ratio / integral.energy_mj - 1
    allowed = (counter.most_mj + integral.most_mj) / integral.energy_mj
    if abs(difference) <= min(MOST_DISAGREEMENT, allowed):
        return difference, None
    beyond = [f"more than {limit}" for limit, over in (
        (f"{100 * MOST_DISAGREEMENT:.0f} %", abs(difference) > MOST_DISAGREEMENT),
        (f"the {100 * allowed:.1f} % that their errors allow", abs(difference) > allowed),
    ) if over]  # fmt: skip
    return (
        difference,
        f"counter and integrated power differ by {100 * difference:+.1f} %, {' and '.join(beyond)}",
    )
