"""Energy of a window by the device's instant power, which sees part of the time only."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from observatory.analysis.energy.edges import find_updates
from observatory.analysis.energy.estimates import (
    FALLBACK_PERIOD_NS,
    MARGIN_NS,
    NORMAL_90,
    Estimate,
    least_half_mw,
    why_not_read,
)
from observatory.analysis.energy.traces import PowerTrace
from observatory.analysis.statistics import student_quantile
from observatory.devices.sensors import SensorModel

#: Longest pause between updates of the power, in periods, that an integral bridges.
_LONGEST_PAUSE = 4.0
#: Scatter of readings up to this, relative, may be the sensor's own.
_OWN_NOISE = 0.01


def energy_by_integral(trace: PowerTrace, start_ns: int, end_ns: int, sensor: SensorModel) -> Estimate | str:
    """Energy of a window by integrated power, or why there is none."""
    missing = why_not_read(
        trace, trace.power_mw_N, start_ns, end_ns, what="instant power", period_ms=sensor.update_ms
    )
    if missing is not None:
        return missing
    near = trace.between(start_ns, end_ns, margin_ns=MARGIN_NS)
    told = ~np.isnan(near.power_mw_N)
    nominal_ns = None if sensor.update_ms is None else sensor.update_ms * 1e6
    seen = (near.time_ns_N, near.read_ns_N, near.power_mw_N)
    updates = find_updates(*seen, period_ns=nominal_ns, equal_values=True)
    if updates.period_ns is None and (near.power_mw_N[told] == near.power_mw_N[told][0]).all():
        # Power that never changed is known all the same, and shows no period of its own.
        updates = find_updates(*seen, period_ns=FALLBACK_PERIOD_NS, equal_values=True)
    poll_ns = trace.poll_ns or 0.0
    period_ns = max(updates.period_ns or FALLBACK_PERIOD_NS, poll_ns)
    # An update belongs to the window when all it averaged surely does.
    lag_ns, width_ns = sensor.lag_low_ms * 1e6, (sensor.window_ms or 0.0) * 1e6
    measured = updates.time_ns_K - lag_ns
    inside = (measured - width_ns - updates.error_ns_K >= start_ns) & (
        measured + updates.error_ns_K <= end_ns
    )
    count, duration_ns = int(inside.sum()), end_ns - start_ns
    unread_ns = _longest_pause(near.time_ns_N[told], start_ns, end_ns)
    if unread_ns > _LONGEST_PAUSE * period_ns:
        return f"instant power was not read for {unread_ns * 1e-9:.2f} s inside the window"
    if count < 3:
        return (
            f"{count} updates of the power lie wholly inside a window of {duration_ns * 1e-6:.0f} ms, three "
            f"are needed; it is renewed every {period_ns * 1e-6:.0f} ms: repeat what is measured"
        )
    moment, value = measured[inside] - width_ns / 2, updates.value_K[inside]
    pause_ns = _longest_pause(moment, start_ns, end_ns)
    if pause_ns > _LONGEST_PAUSE * period_ns:
        return f"instant power was not renewed for {pause_ns * 1e-9:.2f} s inside the window"
    at = np.concatenate([[start_ns], moment, [end_ns]])
    energy_mj = float(np.trapezoid(np.concatenate([value[:1], value, value[-1:]]), at)) * 1e-9
    scatter_mw = math.sqrt(float(np.mean(np.diff(value) ** 2)) / 2)
    noise_mw = min(scatter_mw, _OWN_NOISE * energy_mj / (duration_ns * 1e-9))
    # Looking all the time helps against a load that varies, not against a sensor that does.
    unsure_mw = math.sqrt((scatter_mw**2 - noise_mw**2) * sensor.unseen_share + noise_mw**2)
    # What each reading stands for: the first and the last for the margins, too.
    until_ns = np.concatenate([[start_ns], (moment[1:] + moment[:-1]) / 2, [end_ns]])
    weight_s = np.diff(until_ns) * 1e-9
    # The scatter of few readings is itself uncertain; differences of neighbours tell two thirds of what
    # differences to the mean do.
    few = student_quantile(max(1.0, (count - 1) * 2 / 3)) / NORMAL_90
    std_mj = unsure_mw * few * math.sqrt(float((weight_s**2).sum()))
    least_mw = least_half_mw(energy_mj / (duration_ns * 1e-9), value)
    std_mj = max(std_mj, least_mw / NORMAL_90 * duration_ns * 1e-9)
    most_mj = abs(energy_mj) * period_ns / duration_ns + 3 * std_mj
    return Estimate(energy_mj=energy_mj, std_mj=std_mj, most_mj=most_mj, updates=count)


def _longest_pause(moment_ns: npt.NDArray[Any], start_ns: int, end_ns: int) -> float:
    """Longest time of a window in which none of these moments lies."""
    inside = moment_ns[(moment_ns > start_ns) & (moment_ns < end_ns)]
    return float(np.diff(np.concatenate([[start_ns], inside, [end_ns]])).max())
