"""What a device's readings are worth, found out before the program begins.

Protocol: read the device every few milliseconds for about a second, with nothing else done in between. A
quantity's update period is the median time between changes of its reading. The first change is left out: when
the reading before it was renewed is not known.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from observatory.devices.base import PowerDevice, Sample
from observatory.devices.event_reasons import IDLE_BIT
from observatory.errors import DeviceLostError
from observatory.run.manifest import DeviceCalibration, FieldCalibration

#: Quantities whose update period matters to what is made of them.
_PERIODIC = ("power_mw", "average_power_mw", "energy_mj")
_LEAST_CHANGES = 3
#: A counter that steps every 100 ms gives the energy of a shorter time to worse than 20 %.
_LEAST_COUNTER_S = 1.0
#: Range over mean up to which power is steady: an idle device's noise, and no program that begins or ends.
_STEADY = 0.2


def calibrate(
    devices: Sequence[PowerDevice],
    *,
    duration_s: float = 1.2,
    interval_s: float = 0.004,
    clock_ns: Callable[[], int] = time.monotonic_ns,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, DeviceCalibration]:
    """Watch the devices together for a while.

    Args:
        devices: what to watch; a device that is lost meanwhile is left out of the result.
        duration_s: for how long.
        interval_s: pause between readings, which bounds how well a period is known.
        clock_ns: monotonic clock.
        sleep: waits.

    Returns:
        Calibration per device UUID.
    """
    samples: dict[str, list[Sample]] = {device.uuid: [] for device in devices}
    end_ns = clock_ns() + round(duration_s * 1e9)
    while clock_ns() < end_ns:
        for device in devices:
            if device.uuid in samples:
                try:
                    samples[device.uuid].append(device.read())
                except DeviceLostError:
                    del samples[device.uuid]
        sleep(interval_s)
    unavailable = {device.uuid: device.unavailable for device in devices}
    return {
        uuid: calibration_of(readings, unavailable[uuid]) for uuid, readings in samples.items() if readings
    }


def calibration_of(samples: Sequence[Sample], unavailable: Mapping[str, str]) -> DeviceCalibration:
    """What the readings of one device show about it.

    Args:
        samples: at least one, in time order.
        unavailable: reasons for the quantities that the device cannot report.
    """
    duration_s = (samples[-1].time_ns - samples[0].time_ns) / 1e9
    idle_mw, idle_reason = _idle_power(samples, unavailable)
    ratio, ratio_reason = _counter_over_integral(samples, unavailable)
    return DeviceCalibration(
        fields={name: _updates(samples, name, unavailable.get(name)) for name in _PERIODIC},
        duration_s=duration_s,
        idle_power_mw=idle_mw,
        idle_reason=idle_reason,
        counter_over_integral=ratio,
        counter_reason=ratio_reason,
    )


def _updates(samples: Sequence[Sample], name: str, unavailable: str | None) -> FieldCalibration:
    if unavailable is not None:
        return FieldCalibration(reason=unavailable)
    read = [(sample.time_ns, getattr(sample, name)) for sample in samples]
    readings = [(time_ns, value) for time_ns, value in read if value is not None]
    changed_ns = [after[0] for before, after in pairwise(readings) if before[1] != after[1]]
    if len(changed_ns) < _LEAST_CHANGES:
        return FieldCalibration(
            changes=len(changed_ns),
            reason=f"the reading changed {len(changed_ns)} times, at least {_LEAST_CHANGES} are needed",
        )
    period_ms = np.diff(changed_ns) / 1e6
    low, middle, high = np.quantile(period_ms, [0.05, 0.5, 0.95])
    return FieldCalibration(
        update_period_ms=round(float(middle), 3),
        update_period_low_ms=round(float(low), 3),
        update_period_high_ms=round(float(high), 3),
        changes=len(changed_ns),
    )


def _idle_power(samples: Sequence[Sample], unavailable: Mapping[str, str]) -> tuple[int | None, str | None]:
    """Mean power, if the device was idle all the time and says so."""
    for name in ("power_mw", "event_reasons"):
        if name in unavailable:
            return None, f"{name} is not reported: {unavailable[name]}"
    busy = [s for s in samples if s.event_reasons is None or not s.event_reasons & IDLE_BIT]
    if busy:
        return None, f"the device was not idle in {len(busy)} of {len(samples)} readings"
    power_mw = [sample.power_mw for sample in samples if sample.power_mw is not None]
    if not power_mw:
        return None, "no power was read"
    return round(float(np.mean(power_mw))), None


def _counter_over_integral(
    samples: Sequence[Sample], unavailable: Mapping[str, str]
) -> tuple[float | None, str | None]:
    """Energy between the counter's first and last change over the integral of power in that time."""
    for name in ("power_mw", "energy_mj"):
        if name in unavailable:
            return None, f"{name} is not reported: {unavailable[name]}"
    usable = [s for s in samples if s.power_mw is not None and s.energy_mj is not None]
    edges = [
        index for index in range(1, len(usable)) if usable[index].energy_mj != usable[index - 1].energy_mj
    ]
    if len(edges) < _LEAST_CHANGES:
        return None, f"the counter changed {len(edges)} times, at least {_LEAST_CHANGES} are needed"
    inside = usable[edges[0] : edges[-1] + 1]
    time_s = np.array([sample.time_ns for sample in inside]) / 1e9
    if time_s[-1] - time_s[0] < _LEAST_COUNTER_S * 0.8:
        return None, f"only {time_s[-1] - time_s[0]:.2f} s lie between the counter's changes"
    power_mw = np.array([float(sample.power_mw or 0) for sample in inside])
    if np.ptp(power_mw) > _STEADY * power_mw.mean():
        low, high = power_mw.min() / 1e3, power_mw.max() / 1e3
        return (
            None,
            f"power moved between {low:.0f} and {high:.0f} W, which the counter reports at other times",
        )
    integral_mj = float(np.trapezoid(power_mw, time_s))
    counter_mj = float((inside[-1].energy_mj or 0) - (inside[0].energy_mj or 0))
    if integral_mj <= 0.0:
        return None, "the integral of power is 0"
    return round(counter_mj / integral_mj, 4), None
