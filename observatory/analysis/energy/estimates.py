"""What the two ways to the energy of a window share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from observatory.analysis.energy.traces import PowerTrace

#: Period of a sensor that showed none of its own.
FALLBACK_PERIOD_NS = 100e6
#: Samples beside the window that are looked at too, for the sensor's rhythm.
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
    """Mean power between updates of a counter; lengths count as 10 ms at least, as moments are known to."""
    return 1e9 * energy_mj / np.maximum(length_ns, 1e7)


def least_half_mw(power_mw: float, read_mw: npt.NDArray[np.float64]) -> float:
    """Half-width that a 90 % interval of mean power has at least, however little the readings scatter.

    A sensor that reads the same again and again has not told its power to the last digit: it is as fine as
    the steps that its readings are multiples of.

    Args:
        power_mw: the mean.
        read_mw: readings of instant power that it rests on; empty for a counter's.
    """
    known = read_mw[~np.isnan(read_mw)]
    step_mw = next((step for step in _STEPS_MW if len(known) and not (known % step).any()), 1.0)
    return max(LEFT_OUT * abs(power_mw), 0.45 * step_mw if len(known) else 0.0)


def why_not_read(
    trace: PowerTrace,
    value_N: npt.NDArray[np.float64],
    start_ns: int,
    end_ns: int,
    *,
    what: str,
    period_ms: float | None,
) -> str | None:
    """Why a quantity is not known all through a window; None when it is known at both ends and inside.

    Samples that are missing and samples without a reading of the quantity have different reasons.

    Args:
        trace: all samples of the device.
        value_N: the quantity in them, NaN where a sample does not hold it.
        start_ns: start of the window.
        end_ns: its end.
        what: name of the quantity.
        period_ms: how often it is renewed; None where that is not known.
    """
    near = (trace.time_ns_N >= start_ns - MARGIN_NS) & (trace.time_ns_N <= end_ns + MARGIN_NS)
    if not near.any():
        return "no sample was taken in the window"
    read = ~np.isnan(value_N)
    if not read.any():
        return f"the device reported no {what}"
    for chosen, whose, cause in (
        (near, "samples", ": the device was lost or the sampler ended"),
        (near & read, f"readings of the {what}", ", samples go on without"),
    ):
        short = _unreached(trace.time_ns_N[chosen], start_ns, end_ns, period_ms, whose, cause)
        if short is not None:
            return short
    inside = (trace.time_ns_N >= start_ns) & (trace.time_ns_N <= end_ns)
    if inside.any() and not (inside & read).any():
        return f"no sample in the window holds a reading of the {what}"
    return None


def _unreached(
    time_ns: npt.NDArray[np.int64],
    start_ns: int,
    end_ns: int,
    period_ms: float | None,
    whose: str,
    cause: str,
) -> str | None:
    """Which end of a window these times do not reach; None when they reach both."""
    if not len(time_ns):
        return f"no sample of the window holds {whose}"
    poll_ns = float(np.median(np.diff(time_ns))) if len(time_ns) > 1 else 0.0
    reach_ns = 2.5 * max(poll_ns, (period_ms or 100.0) * 1e6)
    if time_ns[0] > start_ns + reach_ns:
        return f"{whose} begin {(time_ns[0] - start_ns) * 1e-9:.2f} s after the window does"
    if time_ns[-1] < end_ns - reach_ns:
        return f"{whose} end {(end_ns - time_ns[-1]) * 1e-9:.2f} s before the window does{cause}"
    return None
