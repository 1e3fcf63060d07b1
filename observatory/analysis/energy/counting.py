"""Energy of a window by the device's counter: the first and last update inside it, and the margins beside."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from observatory.analysis.energy.edges import Updates, find_updates
from observatory.analysis.energy.estimates import (
    FALLBACK_PERIOD_NS,
    LEFT_OUT,
    MARGIN_NS,
    MOST_COUNTED_MW,
    NORMAL_90,
    Estimate,
    counted_mw,
    why_not_read,
)
from observatory.analysis.energy.traces import PowerTrace
from observatory.devices.sensors import SensorModel

#: Without an update for so many periods, while samples go on, a counter stands still.
_STALE_PERIODS = 5.0


def energy_by_counter(trace: PowerTrace, start_ns: int, end_ns: int, sensor: SensorModel) -> Estimate | str:
    """Energy of a window by the counter, or why there is none."""
    missing = why_not_read(
        trace, trace.energy_mj_N, start_ns, end_ns, what="energy counter", period_ms=sensor.counter_ms
    )
    if missing is not None:
        return missing
    near = trace.between(start_ns, end_ns, margin_ns=MARGIN_NS)
    told = ~np.isnan(near.energy_mj_N)
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
    values = near.energy_mj_N[rows][told[rows]]
    back = np.flatnonzero(np.diff(values) < 0)
    if len(back):
        return (
            f"the counter went back from {values[back[0]]:.0f} to {values[back[0] + 1]:.0f} mJ: "
            "it was reset or ran over"
        )
    still_ns = _longest_still(updates, inside, near, start_ns, end_ns)
    if still_ns > _STALE_PERIODS * period_ns and _draws_power(near, start_ns, end_ns):
        return f"the counter stood still for {still_ns * 1e-9:.2f} s while the device drew power: it is stale"
    counted_mj = float(updates.value_K[b] - updates.value_K[a])
    counted_ns = float(updates.time_ns_K[b] - updates.time_ns_K[a])
    # One leap spoils the whole window and may be lost in its mean.
    between = slice(a, b + 1)
    fastest_mw = float(
        counted_mw(np.diff(updates.value_K[between]), np.diff(updates.time_ns_K[between])).max()
    )
    if fastest_mw > MOST_COUNTED_MW:
        return f"the counter says {fastest_mw * 1e-6:.0f} kW: it is broken"
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
    """Root mean square and peak of instant power over its mean, 1 where the device told none."""
    inside = (near.time_ns_N >= start_ns) & (near.time_ns_N <= end_ns)
    power = near.power_mw_N[inside]
    power = power[~np.isnan(power)]
    mean = float(power.mean()) if len(power) else 0.0
    if mean <= 0:
        return 1.0, 1.0
    return math.sqrt(float((power**2).mean())) / mean, float(power.max()) / mean


def _why_no_updates(near: PowerTrace, start_ns: int, end_ns: int, inside: int, period_ns: float) -> str:
    length_ns = end_ns - start_ns
    if inside == 0 and length_ns > _STALE_PERIODS * period_ns and _draws_power(near, start_ns, end_ns):
        return (
            f"the counter stood still for {length_ns * 1e-9:.2f} s while the device drew power: it is stale"
        )
    found = "no update" if inside == 0 else "one update"
    return (
        f"{found} of the counter yet in a window of {length_ns * 1e-6:.0f} ms, two are needed; it is renewed "
        f"every {period_ns * 1e-6:.0f} ms: repeat what is measured"
    )


def _longest_still(
    updates: Updates, inside: npt.NDArray[np.int64], near: PowerTrace, start_ns: int, end_ns: int
) -> float:
    """Longest time inside the window without an update although the counter was read."""
    moments = np.concatenate([[start_ns], updates.time_ns_K[inside], [end_ns]])
    still = np.diff(moments)
    read_ns = near.time_ns_N[~np.isnan(near.energy_mj_N)]
    gaps = np.diff(read_ns)
    long = gaps > 2 * np.median(gaps)
    # Time without readings is no time in which the counter was seen to stand.
    unseen = np.zeros(len(still))
    for low, high in zip(read_ns[:-1][long], read_ns[1:][long], strict=True):
        unseen += np.clip(np.minimum(moments[1:], high) - np.maximum(moments[:-1], low), 0, None)
    return float((still - unseen).max())


def _draws_power(near: PowerTrace, start_ns: int, end_ns: int) -> bool:
    inside = (near.time_ns_N >= start_ns) & (near.time_ns_N <= end_ns)
    return bool((np.nan_to_num(near.power_mw_N[inside]) > 0).any())
