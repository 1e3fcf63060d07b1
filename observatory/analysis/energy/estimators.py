"""Energy of a window by the device's counter, and by its instant power, which covers part of the time only.

:mod:`observatory.analysis.energy.windows` describes both methods and their errors.

Shapes: N samples, K updates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from observatory.analysis.energy.codes import EnergyCode
from observatory.analysis.energy.edges import Updates, find_updates
from observatory.analysis.energy.traces import PowerTrace
from observatory.analysis.statistics import student_quantile
from observatory.devices.sensors import SensorModel
from observatory.reasons import Reason

Quantity = Literal["instant power", "energy counter"]

#: Period of a sensor that showed none of its own.
FALLBACK_PERIOD_NS = 100e6
#: Samples this long before and after the window are used too, to determine the sensor's period.
#: Twenty periods of 100 ms are enough for that.
MARGIN_NS = 2_000_000_000
#: Relative half-width that no interval goes below, for what the models of a sensor leave out: a board's
#: capacitors smear the edges of phases by milliseconds, say.
LEFT_OUT = 0.002
#: More than any device of today draws; a counter that runs faster, or leaps, is broken.
MOST_COUNTED_MW = 1e8
#: Half-width of a 90 % interval in standard deviations.
NORMAL_90 = 1.645
#: Steps in which sensors count, in mW.
_STEPS_MW = (1000.0, 100.0, 10.0)
#: Samples reach an end of a window when they come within so many periods of it: one may be lost to a slow
#: poll.
_REACH_PERIODS = 2.5
#: Without an update for so many periods, while samples go on, a counter stands still: one or two may be
#: missed by slow polls.
_STALE_PERIODS = 5.0
#: Longest pause between updates of the power, in periods, that an integral bridges: what happened in a longer
#: one is a guess.
_LONGEST_PAUSE = 4.0
#: Longest time that instant power of a sensor that is not known may average.
_LONGEST_AVERAGE_S = 1.0
#: Scatter of readings up to this, relative, may be noise of the sensor: about what idle devices show.
_SENSOR_NOISE = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """An energy and its error.

    Attributes:
        energy_mj: the energy.
        std_mj: standard deviation of its error.
        most_mj: its largest error.
        updates: updates of the sensor that it rests on.
    """

    energy_mj: float
    std_mj: float
    most_mj: float
    updates: int


def counted_mw(
    energy_mj: npt.NDArray[np.float64], length_ns: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Mean power between updates of a counter; lengths count as 10 ms at least, as accurate as times are."""
    return 1e9 * energy_mj / np.maximum(length_ns, 1e7)


def least_half_mw(power_mw: float, read_mw: npt.NDArray[np.float64]) -> float:
    """Half-width that a 90 % interval of mean power has at least, however little the readings scatter.

    A sensor that reads the same again and again does not give its power to the last digit: its resolution is
    the step that its readings are multiples of.

    Args:
        power_mw: the mean.
        read_mw: readings of instant power that it rests on; empty for a counter's.
    """
    value_mw = read_mw[~np.isnan(read_mw)]
    step_mw = next((step for step in _STEPS_MW if len(value_mw) and not (value_mw % step).any()), 1.0)
    return max(LEFT_OUT * abs(power_mw), 0.45 * step_mw if len(value_mw) else 0.0)


def energy_by_counter(
    trace: PowerTrace, start_ns: int, end_ns: int, sensor: SensorModel
) -> Estimate | Reason:
    """Energy of a window by the counter, or why there is none."""
    missing = _why_not_read(
        trace, trace.energy_mj_N, start_ns, end_ns, quantity="energy counter", period_ms=sensor.counter_ms
    )
    if missing is not None:
        return missing
    near = trace.between(start_ns, end_ns, margin_ns=MARGIN_NS)
    is_read_N = ~np.isnan(near.energy_mj_N)
    updates = find_updates(
        near.time_ns_N, near.read_ns_N, near.energy_mj_N,
        period_ns=None if sensor.counter_ms is None else sensor.counter_ms * 1e6,
    )  # fmt: skip
    period_ns = updates.period_ns or FALLBACK_PERIOD_NS
    inside = np.flatnonzero((updates.time_ns_K >= start_ns) & (updates.time_ns_K <= end_ns))
    duration_ns = end_ns - start_ns
    if len(inside) < 2:
        return _why_no_updates(near, start_ns, end_ns, len(inside), period_ns)
    a, b = int(inside[0]), int(inside[-1])
    rows = slice(int(updates.row_K[a]), int(updates.row_K[b]) + 1)
    values = near.energy_mj_N[rows][is_read_N[rows]]
    back = np.flatnonzero(np.diff(values) < 0)
    if len(back):
        before_mj, after_mj = values[back[0] : back[0] + 2].tolist()
        return Reason(EnergyCode.COUNTER_WENT_BACK, {"before_mj": before_mj, "after_mj": after_mj})
    still_ns = _longest_still(updates, inside, near, start_ns, end_ns)
    if still_ns > _STALE_PERIODS * period_ns and _draws_power(near, start_ns, end_ns):
        return Reason(EnergyCode.COUNTER_STALE, {"still_s": still_ns * 1e-9})
    counted_mj = float(updates.value_K[b] - updates.value_K[a])
    counted_ns = float(updates.time_ns_K[b] - updates.time_ns_K[a])
    # One leap spoils the whole window and may be lost in its mean.
    between = slice(a, b + 1)
    fastest_mw = float(
        counted_mw(np.diff(updates.value_K[between]), np.diff(updates.time_ns_K[between])).max()
    )
    if fastest_mw > MOST_COUNTED_MW:
        return Reason(EnergyCode.COUNTER_BROKEN, {"power_mw": fastest_mw})
    energy_mj = counted_mj * duration_ns / counted_ns
    usual, peak = _unsteadiness(near, start_ns, end_ns)
    share = period_ns / duration_ns
    return Estimate(
        energy_mj=energy_mj,
        std_mj=energy_mj * max(share / math.sqrt(6) * usual, LEFT_OUT / NORMAL_90),
        most_mj=energy_mj * max(share * peak, LEFT_OUT),
        updates=len(inside),
    )


def _unsteadiness(near: PowerTrace, start_ns: int, end_ns: int) -> tuple[float, float]:
    """Root mean square and peak of instant power over its mean, 1 where the device reports none."""
    power = near.power_mw_N[near.within(start_ns, end_ns)]
    power = power[~np.isnan(power)]
    mean = float(power.mean()) if len(power) else 0.0
    if mean <= 0:
        return 1.0, 1.0
    return math.sqrt(float((power**2).mean())) / mean, float(power.max()) / mean


def _why_no_updates(near: PowerTrace, start_ns: int, end_ns: int, inside: int, period_ns: float) -> Reason:
    length_ns = end_ns - start_ns
    if inside == 0 and length_ns > _STALE_PERIODS * period_ns and _draws_power(near, start_ns, end_ns):
        return Reason(EnergyCode.COUNTER_STALE, {"still_s": length_ns * 1e-9})
    return _too_few_updates("energy counter", inside, 2, length_ns, period_ns)


def _too_few_updates(
    quantity: Quantity, updates: int, needed: int, length_ns: int, period_ns: float
) -> Reason:
    return Reason(
        EnergyCode.TOO_FEW_UPDATES,
        {
            "quantity": quantity, "updates": updates, "needed": needed, "window_ms": length_ns * 1e-6,
            "period_ms": period_ns * 1e-6,
        },
    )  # fmt: skip


def _longest_still(
    updates: Updates, inside: npt.NDArray[np.int64], near: PowerTrace, start_ns: int, end_ns: int
) -> float:
    """Longest time inside the window without an update although the counter was read."""
    moments = np.concatenate([[start_ns], updates.time_ns_K[inside], [end_ns]])
    still = np.diff(moments)
    read_ns = near.time_ns_N[~np.isnan(near.energy_mj_N)]
    gaps = np.diff(read_ns)
    long = gaps > 2 * np.median(gaps)
    if not long.any():
        return float(still.max())
    # Time without readings is no time in which the counter was observed to stand.
    edge_ns = np.column_stack([read_ns[:-1][long], read_ns[1:][long]]).reshape(-1)
    until_ns = np.cumsum(np.column_stack([np.zeros(long.sum()), gaps[long]]).reshape(-1))
    return float((still - np.diff(np.interp(moments, edge_ns, until_ns))).max())


def _draws_power(near: PowerTrace, start_ns: int, end_ns: int) -> bool:
    return bool((near.power_mw_N[near.within(start_ns, end_ns)] > 0).any())


def energy_by_integral(
    trace: PowerTrace, start_ns: int, end_ns: int, sensor: SensorModel
) -> Estimate | Reason:
    """Energy of a window by integrated power, or why there is none."""
    missing = _why_not_read(
        trace, trace.power_mw_N, start_ns, end_ns, quantity="instant power", period_ms=sensor.update_ms
    )
    if missing is not None:
        return missing
    near = trace.between(start_ns, end_ns, margin_ns=MARGIN_NS)
    is_read_N = ~np.isnan(near.power_mw_N)
    nominal_ns = None if sensor.update_ms is None else sensor.update_ms * 1e6
    samples = (near.time_ns_N, near.read_ns_N, near.power_mw_N)
    updates = find_updates(*samples, period_ns=nominal_ns, equal_values=True)
    if updates.period_ns is None and (near.power_mw_N[is_read_N] == near.power_mw_N[is_read_N][0]).all():
        # Power that never changed is known all the same, and shows no period of its own.
        updates = find_updates(*samples, period_ns=FALLBACK_PERIOD_NS, equal_values=True)
    poll_ns = trace.poll_ns or 0.0
    period_ns = max(updates.period_ns or FALLBACK_PERIOD_NS, poll_ns)
    # An update belongs to the window when all it averaged surely does.
    lag_ns, width_ns = sensor.lag_low_ms * 1e6, (sensor.window_ms or 0.0) * 1e6
    measured = updates.time_ns_K - lag_ns
    inside = (measured - width_ns - updates.error_ns_K >= start_ns) & (
        measured + updates.error_ns_K <= end_ns
    )
    count, duration_ns = int(inside.sum()), end_ns - start_ns
    unread_ns = _longest_pause(near.time_ns_N[is_read_N], start_ns, end_ns)
    if unread_ns > _LONGEST_PAUSE * period_ns:
        return Reason(EnergyCode.NOT_READ, {"quantity": "instant power", "gap_s": unread_ns * 1e-9})
    if count < 3:
        return _too_few_updates("instant power", count, 3, duration_ns, period_ns)
    moment, value = measured[inside] - width_ns / 2, updates.value_K[inside]
    pause_ns = _longest_pause(moment, start_ns, end_ns)
    if pause_ns > _LONGEST_PAUSE * period_ns:
        return Reason(EnergyCode.NOT_UPDATED, {"quantity": "instant power", "gap_s": pause_ns * 1e-9})
    at = np.concatenate([[start_ns], moment, [end_ns]])
    energy_mj = float(np.trapezoid(np.concatenate([value[:1], value, value[-1:]]), at)) * 1e-9
    scatter_mw = math.sqrt(float(np.mean(np.diff(value) ** 2)) / 2)
    noise_mw = min(scatter_mw, _SENSOR_NOISE * energy_mj / (duration_ns * 1e-9))
    # Looking all the time helps against a load that varies, not against a sensor that does.
    unsure_mw = math.sqrt((scatter_mw**2 - noise_mw**2) * sensor.unseen_share + noise_mw**2)
    # What each reading stands for: the first and the last for the margins, too.
    until_ns = np.concatenate([[start_ns], (moment[1:] + moment[:-1]) / 2, [end_ns]])
    weight_s = np.diff(until_ns) * 1e-9
    # The scatter of few readings is itself uncertain; differences of neighbours carry two thirds of the
    # information of differences from the mean.
    few = student_quantile(max(1.0, (count - 1) * 2 / 3)) / NORMAL_90
    # What lies before the first and after the last of them no reading covers, however long each averages.
    open_s = np.array([moment[0] - width_ns / 2 - start_ns, end_ns - moment[-1] - width_ns / 2]) * 1e-9
    squares = unsure_mw**2 * float((weight_s**2).sum()) + scatter_mw**2 * float((open_s**2).sum())
    std_mj = math.sqrt(squares) * few
    if sensor.window_ms is None:
        std_mj += _averaged_mj(near, start_ns, end_ns) / NORMAL_90
    least_mw = least_half_mw(energy_mj / (duration_ns * 1e-9), value)
    std_mj = max(std_mj, least_mw / NORMAL_90 * duration_ns * 1e-9)
    most_mj = abs(energy_mj) * period_ns / duration_ns + 3 * std_mj
    return Estimate(energy_mj=energy_mj, std_mj=std_mj, most_mj=most_mj, updates=count)


def _averaged_mj(near: PowerTrace, start_ns: int, end_ns: int) -> float:
    """Most energy that readings of a window hold from before it, less what they lack of its end.

    Where a sensor's averaging window is not known, it may be a second, as that of a GPU's mean power.
    """
    bounds_mw = []
    for edge_ns in (start_ns, end_ns):
        power_mw = near.power_mw_N[near.within(int(edge_ns - 1e9 * _LONGEST_AVERAGE_S), edge_ns)]
        power_mw = power_mw[~np.isnan(power_mw)]
        if not len(power_mw):
            return 0.0
        bounds_mw.append((float(power_mw.min()), float(power_mw.max())))
    (low_mw, high_mw), (end_low_mw, end_high_mw) = bounds_mw
    return _LONGEST_AVERAGE_S / 2 * max(high_mw - end_low_mw, end_high_mw - low_mw)


def _longest_pause(moment_ns: npt.NDArray[Any], start_ns: int, end_ns: int) -> float:
    """Longest time of a window in which none of these moments lies."""
    inside = moment_ns[(moment_ns > start_ns) & (moment_ns < end_ns)]
    return float(np.diff(np.concatenate([[start_ns], inside, [end_ns]])).max())


def _why_not_read(
    trace: PowerTrace,
    value_N: npt.NDArray[np.float64],
    start_ns: int,
    end_ns: int,
    *,
    quantity: Quantity,
    period_ms: float | None,
) -> Reason | None:
    """Why a quantity is not known throughout a window; None when it is known at both ends and inside.

    Samples that are missing and samples without a reading of the quantity have different reasons.

    Args:
        trace: all samples of the device.
        value_N: the quantity in them, NaN where a sample does not hold it.
        start_ns: start of the window.
        end_ns: its end.
        quantity: its name.
        period_ms: its update period; None where that is not known.
    """
    near = trace.within(start_ns, end_ns, margin_ns=MARGIN_NS)
    time_ns = trace.time_ns_N[near]
    if not len(time_ns):
        return Reason(EnergyCode.NO_SAMPLES)
    read = ~np.isnan(value_N[near])
    if not read.any() and np.isnan(value_N).all():
        return Reason(EnergyCode.NOT_REPORTED, {"quantity": quantity})
    short = _unreached(time_ns, start_ns, end_ns, period_ms, None)
    if short is not None:
        return short
    no_reading = Reason(EnergyCode.NO_READING, {"quantity": quantity})
    if not read.any():
        return no_reading
    short = _unreached(time_ns[read], start_ns, end_ns, period_ms, quantity)
    if short is not None:
        return short
    inside_value = value_N[trace.within(start_ns, end_ns)]
    return no_reading if len(inside_value) and np.isnan(inside_value).all() else None


def _unreached(
    time_ns: npt.NDArray[np.int64],
    start_ns: int,
    end_ns: int,
    period_ms: float | None,
    quantity: Quantity | None,
) -> Reason | None:
    """Which end of a window these times do not reach; None when they reach both.

    Args:
        time_ns: times of samples, or of those with a reading of ``quantity``; at least one.
        start_ns: start of the window.
        end_ns: its end.
        period_ms: update period of the quantity; None where that is not known.
        quantity: None for all samples.
    """
    poll_ns = float(np.median(np.diff(time_ns))) if len(time_ns) > 1 else 0.0
    period_ns = FALLBACK_PERIOD_NS if period_ms is None else period_ms * 1e6
    reach_ns = _REACH_PERIODS * max(poll_ns, period_ns)
    if time_ns[0] > start_ns + reach_ns:
        late_s = float(time_ns[0] - start_ns) * 1e-9
        return Reason(EnergyCode.STARTS_LATE, {"quantity": quantity, "late_s": late_s})
    if time_ns[-1] < end_ns - reach_ns:
        early_s = float(end_ns - time_ns[-1]) * 1e-9
        return Reason(EnergyCode.ENDS_EARLY, {"quantity": quantity, "early_s": early_s})
    return None
