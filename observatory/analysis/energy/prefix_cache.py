"""What a cache hit saves: energy of prefill as a function of the cached fraction.

    E(c) = e_fixed + e_linear (1 - c) + e_square (1 - c^2),    no coefficient negative

c is the cached share of the prompt. What is not cached passes every layer (linear in the uncached tokens);
each uncached token also attends to all before it, which for a prompt of n tokens costs n^2 - (c n)^2; the
rest (launches, splicing, reading the cache) is there always. Every term falls with c, so E does. Splitting
linear from quadratic
needs three cached fractions and is no aim by itself: the curve is.

The fit is least squares in relative error. Intervals are a bootstrap of measurements within each cached
fraction, widened for few of them (`statistics.few_blocks_widening`).

arXiv 2605.05696 states 63 % of the prefill energy saved per hit, at 4096 tokens, for its models and device.
That number is quoted next to ours and enters no fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from observatory.analysis.energy.codes import EnergyCode as Code
from observatory.analysis.statistics import few_blocks_widening, student_quantile
from observatory.errors import EnergyError
from observatory.reasons import Reason
from observatory.run.documents.prefix_cache import ReuseMeasurements

Float64 = npt.NDArray[np.float64]

PUBLISHED_SAVING = 0.63
PUBLISHED_SOURCE = "arXiv 2605.05696"

_RESAMPLES = 500


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReuseFit:
    """Energy of prefill against the cached fraction.

    Attributes:
        fixed_mj, linear_mj, square_mj: coefficients of one prefill; ``square_mj`` None with fewer than three
            cached fractions, then that term is left out.
        saved: share of a miss's energy that an exact hit saves, measured; None where a cell is missing.
        saved_low, saved_high: 90 % interval; None where it has no repeats.
        saved_reason: why one of these is None.
        saved_flag: flag of the energies of misses or exact hits; None without.
        cells: per cached fraction: cell, cached_fraction, windows, prefills, prefill_mj, low_mj, high_mj (90
            % interval of the mean; NaN without repeats), flag (of their energies, None without), missed
            (error that all windows have in common for it, relative; 0 without), fitted_mj, fitted_low_mj,
            fitted_high_mj, saved (against the measured miss).
        curve: cached_fraction, fitted_mj, fitted_low_mj, fitted_high_mj, to draw.
    """

    fixed_mj: float
    linear_mj: float
    square_mj: float | None
    saved: float | None
    saved_low: float | None
    saved_high: float | None
    saved_reason: Reason | None
    saved_flag: str | None
    cells: pd.DataFrame
    curve: pd.DataFrame

    def prefill_mj(self, cached_fraction: float) -> float:
        """Fitted energy of one prefill.

        Raises:
            EnergyError: the fraction is not from 0 to 1.
        """
        if not 0 <= cached_fraction <= 1:
            raise EnergyError(
                f"a cached fraction of {cached_fraction} is none; expected 0 (a miss) to 1 (an exact hit)"
            )
        coefficients = np.array([self.fixed_mj, self.linear_mj, self.square_mj or 0.0])
        return float(_terms(np.array([cached_fraction]), 3)[0] @ coefficients)


def fit_reuse(measured: ReuseMeasurements, *, seed: int = 0) -> ReuseFit:
    """Fit the curve.

    Args:
        measured: windows of at least two cached fractions.
        seed: of the bootstrap.

    Raises:
        EnergyError: fewer than two cached fractions.
    """
    fraction = np.array([item.cached_fraction for item in measured.measurements])
    energy = np.array([item.prefill_mj for item in measured.measurements])
    fraction_C, cell_N = np.unique(fraction, return_inverse=True)
    if len(fraction_C) < 2:
        raise EnergyError(
            f"all measurements are at a cached fraction of {fraction_C[0]:g}; expected two or more, "
            "measure a miss and an exact hit at least"
        )
    terms = min(3, len(fraction_C))
    coefficient = _solve(fraction, energy, terms)
    drawn_RN, widening = _resampled(cell_N, np.random.default_rng(seed))
    many = np.bincount(cell_N).min() > 1
    resampled_RT = np.stack([_solve(fraction[draw], energy[draw], terms) for draw in drawn_RN])
    grid = np.linspace(0, 1, 101)

    def band(at: Float64) -> pd.DataFrame:
        centre = _terms(at, terms) @ coefficient
        spread = _terms(at, terms) @ resampled_RT.T - centre[:, None]
        low, high = centre[:, None].T + widening * np.quantile(spread, [0.05, 0.95], axis=1)
        columns = {"cached_fraction": at, "fitted_mj": centre}
        nothing = np.full(len(at), np.nan)
        columns["fitted_low_mj"] = np.maximum(low, 0.0) if many else nothing
        columns["fitted_high_mj"] = high if many else nothing
        return pd.DataFrame(columns)

    cells = _cells(measured, fraction_C, cell_N, energy).merge(band(fraction_C), on="cached_fraction")
    saved, low, high, reason = _saving(
        fraction_C, cell_N, energy, drawn_RN, widening, cells["missed"].to_numpy()
    )
    ends = cells[cells["cached_fraction"].isin([0.0, 1.0])]["flag"].dropna()
    return ReuseFit(
        fixed_mj=float(coefficient[0]),
        linear_mj=float(coefficient[1]),
        square_mj=float(coefficient[2]) if terms == 3 else None,
        saved=saved,
        saved_low=low,
        saved_high=high,
        saved_reason=reason,
        saved_flag=None if saved is None or ends.empty else str(ends.iloc[0]),
        cells=cells,
        curve=band(grid),
    )


def _terms(fraction: Float64, count: int) -> Float64:
    return np.stack([np.ones_like(fraction), 1 - fraction, 1 - fraction**2], axis=1)[:, :count]


def _solve(fraction: Float64, energy: Float64, terms: int) -> Float64:
    """Non-negative coefficients with least relative error."""
    from scipy.optimize import nnls

    solved, _ = nnls(_terms(fraction, terms) / energy[:, None], np.ones(len(energy)))
    return np.asarray(solved)


def _resampled(
    cell_N: npt.NDArray[np.int64], generator: np.random.Generator
) -> tuple[npt.NDArray[np.int64], float]:
    """Indices of resamples, drawn within each cached fraction, and how much their spread is widened."""
    drawn = np.empty((_RESAMPLES, len(cell_N)), dtype=np.int64)
    for cell in np.unique(cell_N):
        members = np.flatnonzero(cell_N == cell)
        drawn[:, members] = generator.choice(members, size=(_RESAMPLES, len(members)))
    fewest = int(np.bincount(cell_N).min())
    if fewest < 2:
        return drawn, 1.0
    return drawn, few_blocks_widening(fewest)


def _cells(
    measured: ReuseMeasurements, fraction_C: Float64, cell_N: npt.NDArray[np.int64], energy: Float64
) -> pd.DataFrame:
    rows = []
    miss = energy[cell_N == 0].mean() if fraction_C[0] == 0 else np.nan
    for number, fraction in enumerate(fraction_C):
        members = np.flatnonzero(cell_N == number)
        mean = float(energy[members].mean())
        half = np.nan
        if len(members) > 1:
            half = float(
                student_quantile(len(members) - 1) * energy[members].std(ddof=1) / math.sqrt(len(members))
            )
        flagged = [
            item for item in (measured.measurements[i] for i in members) if item.energy_flag is not None
        ]
        # Windows agree on what a sensor misses of them: their scatter does not show it.
        missed = max((item.energy_error or 0.0 for item in flagged), default=0.0)
        half = math.hypot(half, missed * mean)
        rows.append(
            {
                "cell": measured.measurements[members[0]].cell,
                "cached_fraction": float(fraction),
                "windows": len(members),
                "prefills": sum(measured.measurements[i].prefills for i in members),
                "prefill_mj": mean,
                "low_mj": np.maximum(mean - half, 0.0),
                "high_mj": mean + half,
                "saved": 1 - mean / miss,
                "flag": flagged[0].energy_flag if flagged else None,
                "missed": missed,
            }
        )
    frame = pd.DataFrame(rows)
    # Words are None where there are none, not NaN.
    return frame.assign(flag=pd.Series([row["flag"] for row in rows], dtype=object))


def _saving(
    fraction_C: Float64,
    cell_N: npt.NDArray[np.int64],
    energy: Float64,
    drawn_RN: npt.NDArray[np.int64],
    widening: float,
    missed: Float64,
) -> tuple[float | None, float | None, float | None, Reason | None]:
    """Share of a miss's energy that an exact hit saves, measured, with its interval."""
    if fraction_C[0] != 0 or fraction_C[-1] != 1:
        return None, None, None, Reason(Code.NO_MISS if fraction_C[0] != 0 else Code.NO_EXACT_HIT)
    miss_N, hit_N = cell_N == 0, cell_N == len(fraction_C) - 1
    saved = 1 - float(energy[hit_N].mean() / energy[miss_N].mean())
    if min(miss_N.sum(), hit_N.sum()) < 2:
        return saved, None, None, Reason(Code.MEASURED_ONCE)
    drawn = 1 - energy[drawn_RN[:, hit_N]].mean(axis=1) / energy[drawn_RN[:, miss_N]].mean(axis=1)
    low, high = widening * (np.quantile(drawn, [0.05, 0.95]) - saved)
    common = (1 - saved) * math.hypot(missed[0], missed[-1])
    return saved, saved - math.hypot(low, common), min(saved + math.hypot(high, common), 1.0), None
