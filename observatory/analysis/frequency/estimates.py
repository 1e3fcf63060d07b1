"""Clocks that follow from the model: f_crit, f_energy and the optimum, with intervals.

Shapes: B bootstrap samples, F clocks of a grid.

f_crit is where memory and compute take equally long; above it a memory-bound phase only burns power. f_energy
is where the energy of an iteration would be least if compute were always the longer: below it static power
costs more over the longer time than the lower clock and voltage save. Where the longer of memory and compute
alone counts, time is flat above f_crit and energy rises with the clock, below it t(f) is the compute branch:
so energy is least at min(f_crit, f_energy). With a smooth knee the least lies a little higher; the optimum is
therefore taken from E(f) itself. Nothing is said outside the measured range; a value at its edge says ``at
most`` or ``at least``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.frequency.model import compute_branch_s, critical_mhz, energy_mj, power_mw
from observatory.analysis.frequency.records import ClockEstimate

Float64 = NDArray[np.float64]

_GRID_STEP_MHZ = 5.0
_MOST_STEPS = 1000
_INTERVAL = (0.05, 0.95)


def clock_estimates(
    time_1T: Float64,
    power_1T: Float64 | None,
    time_BT: Float64,
    power_BT: Float64 | None,
    *,
    low_mhz: float,
    f0_mhz: float,
) -> tuple[ClockEstimate, ClockEstimate, ClockEstimate]:
    """f_crit, f_energy and the optimum.

    Args:
        time_1T: fitted parameters of t(f).
        power_1T: of P(f); None without energies.
        time_BT: bootstrap samples of the same.
        power_BT: likewise.
        low_mhz: lowest clock measured.
        f0_mhz: highest one.
    """
    critical_1, critical_B = (_critical(time, low_mhz, f0_mhz) for time in (time_1T, time_BT))
    no_knee = f"no knee was seen between {low_mhz:.0f} and {f0_mhz:.0f} MHz"
    critical = _estimate(critical_1, critical_B, low_mhz, f0_mhz, no_knee)
    if power_1T is None or power_BT is None:
        unknown = ClockEstimate(mhz=None, reason="energies are missing")
        return critical, unknown, unknown
    compute_1 = _compute_optimum(time_1T, power_1T, low_mhz, f0_mhz)
    compute_B = _compute_optimum(time_BT, power_BT, low_mhz, f0_mhz)
    hidden = "no clock was low enough to see compute: its time is unknown"
    optimum_1 = _optimum(time_1T, power_1T, low_mhz, f0_mhz)
    optimum_B = _optimum(time_BT, power_BT, low_mhz, f0_mhz)
    return (
        critical,
        _estimate(compute_1, compute_B, low_mhz, f0_mhz, hidden),
        _estimate(optimum_1, optimum_B, low_mhz, f0_mhz, "not known"),
    )


def _critical(time_BT: Float64, low_mhz: float, f0_mhz: float) -> Float64:
    """f_crit within the range, (B,); the low end where no clock changed the time, NaN without a knee."""
    flat_B = time_BT[:, 3] <= 0.0
    found_B = np.where(flat_B, low_mhz, critical_mhz(time_BT, f0_mhz))
    return np.clip(found_B, low_mhz, f0_mhz)


def _compute_optimum(time_BT: Float64, power_BT: Float64, low_mhz: float, f0_mhz: float) -> Float64:
    """f_energy, (B,); NaN where compute is hidden."""
    grid_F = _grid(low_mhz, f0_mhz)
    seconds_BF = compute_branch_s(time_BT, f0_mhz, grid_F)
    hidden_B = time_BT[:, 3] <= 0.0
    seconds_BF = np.where(hidden_B[:, None], 1.0, seconds_BF)
    energy_BF = power_mw(power_BT, f0_mhz, grid_F, seconds_BF) * seconds_BF
    return np.where(hidden_B, np.nan, grid_F[np.argmin(energy_BF, axis=1)])


def _optimum(time_BT: Float64, power_BT: Float64, low_mhz: float, f0_mhz: float) -> Float64:
    """The clock of least energy, (B,)."""
    grid_F = _grid(low_mhz, f0_mhz)
    least_B: Float64 = grid_F[np.argmin(energy_mj(time_BT, power_BT, f0_mhz, grid_F), axis=1)]
    return least_B


def _grid(low_mhz: float, f0_mhz: float) -> Float64:
    steps = min(_MOST_STEPS, round((f0_mhz - low_mhz) / _GRID_STEP_MHZ) + 1)
    return np.linspace(low_mhz, f0_mhz, max(2, steps))


def _estimate(
    value_1: Float64, sample_B: Float64, low_mhz: float, f0_mhz: float, reason: str
) -> ClockEstimate:
    value = float(value_1[0])
    if np.isnan(value):
        return ClockEstimate(mhz=None, reason=reason)
    known_B = sample_B[np.isfinite(sample_B)]
    low, high = np.quantile(known_B, _INTERVAL) if len(known_B) else (None, None)
    edge = _GRID_STEP_MHZ / 2.0
    return ClockEstimate(
        mhz=value,
        low_mhz=None if low is None else min(float(low), value),
        high_mhz=None if high is None else max(float(high), value),
        relation="at most" if value < low_mhz + edge else "at least" if value > f0_mhz - edge else "at",
    )
