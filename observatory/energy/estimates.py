"""What the two ways to the energy of a window share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["FALLBACK_PERIOD_NS", "MARGIN_NS", "Estimate", "why_not_sampled"]

#: Period of a sensor that showed none of its own.
FALLBACK_PERIOD_NS = 100e6
#: Samples beside the window that are looked at too, for the sensor's rhythm.
MARGIN_NS = 2_000_000_000


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


def why_not_sampled(
    time_ns: npt.NDArray[np.int64], start_ns: int, end_ns: int, period_ms: float | None
) -> str | None:
    """Why samples do not reach both ends of a window; None when they do."""
    poll_ns = float(np.median(np.diff(time_ns))) if len(time_ns) > 1 else 0.0
    reach_ns = 2.5 * max(poll_ns, (period_ms or 100.0) * 1e6)
    if time_ns[0] > start_ns + reach_ns:
        return f"samples begin {(time_ns[0] - start_ns) * 1e-9:.2f} s after the window does"
    if time_ns[-1] < end_ns - reach_ns:
        return (
            f"samples end {(end_ns - time_ns[-1]) * 1e-9:.2f} s before the window does: "
            "the device was lost or the sampler ended"
        )
    return None
