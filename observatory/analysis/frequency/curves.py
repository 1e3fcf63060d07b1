"""Curves of time and energy of one iteration against the SM clock, and samples of what the points leave open.

Shapes: N points, K measured clocks (rising), J kernels, B samples, F clocks.

With x = f0 / f, phi = f / f0 and f0 the highest measured clock:

    t(f) = sum_J seconds_j * max(1, x / knee_j)
    E(f) = iteration + static * t(f) + phi * t(f) * sum_K step_k * ramp_k(phi)

Each of J kernels takes a constant time above its knee (memory, or the host) and follows the clock below it;
a knee at 1 is compute, one at the lowest clock is flat. This is the t = host + max(memory, compute x) of
arXiv 2605.11999 for several kernels. ``step_k`` is by how much the square of the voltage, in mW at f0, grows
from clock k - 1 to clock k: never less than 0 and otherwise free, as tables of voltages have steps.
``ramp_k`` is 0 up to the clock before, 1 from clock k on.

Samples of t are of its posterior, each the end of a random walk of its own (Metropolis): Dirichlet weights
(1/2) of the kernels, knees uniform in ln x from 0.4 of the range above f0 to 0.6 below the lowest clock,
errors normal with one scatter for repeats and misfit. Samples of E are a bootstrap: deviations of repeats are
drawn anew for every point, with a random sign, and E is fitted again (non-negative least squares) over a
sample of t.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import nnls

from observatory.analysis.statistics import student_over_normal

Float64 = NDArray[np.float64]

#: J.
KERNELS = 3
#: Relative scatter of measurements that were not repeated, and degrees of freedom that this counts for.
UNREPEATED, UNREPEATED_DOF = 0.01, 3
#: Relative deviation that no instrument resolves.
_RESOLVED = 1e-4
_CONCENTRATION = 0.5
_ABOVE, _BELOW = 0.4, 0.6
_STARTS, _STEPS = 3000, 600


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Points:
    """What a fit sees.

    Attributes:
        mhz_K: median clock that was sampled.
        clock_N: which of them each point ran at.
        log_s_N: logarithm of the time of an iteration.
        log_mj_N: of its energy; NaN where it is not known.
    """

    mhz_K: Float64
    clock_N: NDArray[np.int64]
    log_s_N: Float64
    log_mj_N: Float64

    def means(self, value_N: Float64) -> tuple[Float64, Float64]:
        """Mean of each clock and the number of values in it, (K,) each; NaN is no value."""
        is_known = np.isfinite(value_N)
        count_K = np.bincount(self.clock_N[is_known], minlength=len(self.mhz_K))
        total_K = np.bincount(self.clock_N[is_known], value_N[is_known], len(self.mhz_K))
        return total_K / np.maximum(count_K, 1), count_K.astype(np.float64)

    @property
    def has_energy(self) -> bool:
        """Whether the energy is known at every clock."""
        return bool((self.means(self.log_mj_N)[1] > 0).all())


def seconds_of(row_BT: ArrayLike, f0_mhz: float, mhz_F: ArrayLike) -> Float64:
    """t(f), (B, F), for rows of :func:`sample_curves`."""
    seconds_BJ, knee_BJ, _ = np.split(np.atleast_2d(row_BT), [KERNELS, 2 * KERNELS], axis=1)
    x_F = f0_mhz / np.asarray(mhz_F, dtype=np.float64)
    longer_BJF = np.maximum(1.0, x_F / knee_BJ[..., None])
    seconds: Float64 = np.einsum("bj,bjf->bf", seconds_BJ, longer_BJF)
    return seconds


def energy_of(row_BT: ArrayLike, clock_mhz_K: ArrayLike, mhz_F: ArrayLike) -> Float64:
    """E(f) in mJ, (B, F); zeros without energy."""
    term_BC = np.atleast_2d(row_BT)[:, 2 * KERNELS :]
    clock_K = np.asarray(clock_mhz_K, dtype=np.float64)
    columns_BFC = _columns(
        clock_K, np.asarray(mhz_F, dtype=np.float64), seconds_of(row_BT, clock_K[-1], mhz_F)
    )
    energy: Float64 = np.einsum("bc,bfc->bf", term_BC, columns_BFC)
    return energy


def knees_mhz(row_BT: ArrayLike, low_mhz: float, f0_mhz: float) -> Float64:
    """f_crit, (B,): below it t follows the clock at least half as steeply as at the lowest clock.

    Of one kernel its knee; the lowest clock where time does not follow the clock at all.
    """
    seconds_BJ, knee_BJ, _ = np.split(np.atleast_2d(row_BT), [KERNELS, 2 * KERNELS], axis=1)
    slope_BJ = np.where(knee_BJ < f0_mhz / low_mhz * (1.0 - 1e-9), seconds_BJ / knee_BJ, 0.0)
    order_BJ = np.argsort(knee_BJ, axis=1)
    steep_BJ = np.cumsum(np.take_along_axis(slope_BJ, order_BJ, axis=1), axis=1)
    first_B = np.argmax(steep_BJ >= 0.5 * steep_BJ[:, -1:], axis=1)[:, None]
    knee_B = np.take_along_axis(np.take_along_axis(knee_BJ, order_BJ, axis=1), first_B, axis=1)[:, 0]
    is_flat_B = steep_BJ[:, -1] * f0_mhz / low_mhz <= _RESOLVED * seconds_BJ.sum(axis=1)
    mhz_B: Float64 = np.where(is_flat_B, low_mhz, np.clip(f0_mhz / knee_B, low_mhz, f0_mhz))
    return mhz_B


def sample_curves(points: Points, samples: int, seed: int) -> Float64:
    """Samples of both curves, (B, 2 J + 2 + K).

    Columns: seconds and knees (in x) of the kernels; energy of an iteration in mJ, static power in mW, steps
    in mW (zeros where energies are missing).

    Args:
        points: at three clocks or more.
        samples: B.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    clocks = len(points.mhz_K)
    kernel_BT = _sample_times(points, samples, generator)
    if not points.has_energy:
        return np.hstack([kernel_BT, np.zeros((samples, 2 + clocks))])
    mean_K, count_K = points.means(points.log_mj_N)
    seconds_BK = seconds_of(kernel_BT, points.mhz_K[-1], points.mhz_K)
    columns_BKC = _columns(points.mhz_K, points.mhz_K, seconds_BK)
    middle_KC = _columns(points.mhz_K, points.mhz_K, np.median(seconds_BK, axis=0)[None])[0]
    fitted_K = np.log(middle_KC @ _fit_energy(middle_KC, np.exp(mean_K), count_K))
    known_N = np.isfinite(points.log_mj_N)
    clock_N = points.clock_N[known_N]
    drawn_BN = _draws(points.log_mj_N[known_N], clock_N, mean_K, count_K, samples, generator)
    error_BK = np.zeros((samples, clocks))
    np.add.at(error_BK.T, clock_N, drawn_BN.T)
    target_BK = np.exp(fitted_K + error_BK / count_K)
    terms = [_fit_energy(*row, count_K) for row in zip(columns_BKC, target_BK, strict=True)]
    return np.hstack([kernel_BT, np.array(terms)])


def _columns(clock_mhz_K: Float64, mhz_F: Float64, seconds_BF: Float64) -> Float64:
    """What the terms of E are multiplied by, (B, F, 2 + K)."""
    phi_F, before_K = mhz_F / clock_mhz_K[-1], np.append(0.0, clock_mhz_K[:-1])
    ramp_FK = np.clip((mhz_F[:, None] - before_K) / (clock_mhz_K - before_K), 0.0, 1.0)
    ramp_FK[:, 0] = 1.0
    of_clock_BFK = (phi_F * seconds_BF)[..., None] * ramp_FK
    return np.concatenate([np.ones_like(seconds_BF)[..., None], seconds_BF[..., None], of_clock_BFK], axis=-1)


def _fit_energy(column_KC: Float64, energy_K: Float64, count_K: Float64) -> Float64:
    weight_K = np.sqrt(count_K)
    terms: Float64 = nnls(column_KC * (weight_K / energy_K)[:, None], weight_K)[0]
    return terms


def _draws(
    value_N: Float64,
    clock_N: NDArray[np.int64],
    mean_K: Float64,
    count_K: Float64,
    samples: int,
    generator: np.random.Generator,
) -> Float64:
    """Errors of points, (B, N): deviations of repeats from the mean of their clock."""
    repeats_N = count_K[clock_N]
    freedom = int(len(value_N) - len(mean_K))
    pool = np.array([UNREPEATED])
    if freedom:
        deviation_N = (value_N - mean_K[clock_N]) * np.sqrt(repeats_N / np.maximum(repeats_N - 1.0, 1.0))
        pool = deviation_N[repeats_N > 1.0]
    sign_BN = generator.choice([-1.0, 1.0], size=(samples, len(value_N)))
    wider = student_over_normal(freedom or UNREPEATED_DOF)
    drawn_BN: Float64 = wider * sign_BN * generator.choice(pool, size=(samples, len(value_N)))
    return drawn_BN


def _sample_times(points: Points, samples: int, generator: np.random.Generator) -> Float64:
    """Seconds and knees of the kernels, (B, 2 J), from the posterior of t (Metropolis)."""
    mean_K, count_K = points.means(points.log_s_N)
    freedom = int(len(points.log_s_N) - len(mean_K))
    squares = float(((points.log_s_N - mean_K[points.clock_N]) ** 2).sum())
    if not freedom:
        freedom, squares = UNREPEATED_DOF, UNREPEATED_DOF * UNREPEATED**2
    squares += len(points.log_s_N) * _RESOLVED**2
    x_K = points.mhz_K[-1] / points.mhz_K
    reach, repeats = float(np.log(x_K[0])), float(count_K.sum())
    low, high = -_ABOVE * reach, (1.0 + _BELOW) * reach

    def knees(log_knee_BJ: Float64) -> Float64:
        return np.exp(np.clip(log_knee_BJ, 0.0, reach))

    def shape(amount_BJ: Float64, log_knee_BJ: Float64) -> tuple[Float64, Float64, Float64]:
        """Shares of the kernels, and mean and weighted squares of what they leave of the logarithms."""
        share_BJ = np.exp(amount_BJ - amount_BJ.max(axis=1, keepdims=True))
        share_BJ /= share_BJ.sum(axis=1, keepdims=True)
        row_BT = np.hstack([share_BJ, knees(log_knee_BJ)])
        left_BK = mean_K - np.log(seconds_of(row_BT, 1.0, 1.0 / x_K))
        mean_B = left_BK @ count_K / repeats
        return share_BJ, mean_B, ((left_BK - mean_B[:, None]) ** 2) @ count_K

    def cost(amount_BJ: Float64, log_knee_BJ: Float64) -> Float64:
        """Minus the logarithm of likelihood (Student, the scatter integrated out) and prior."""
        left_B = shape(amount_BJ, log_knee_BJ)[2]
        likelihood = 0.5 * (freedom + len(x_K) - 1) * np.log(squares + left_B)
        value: Float64 = likelihood - (_CONCENTRATION * amount_BJ - np.exp(amount_BJ)).sum(axis=1)
        return value

    amount = np.log(generator.gamma(_CONCENTRATION, size=(_STARTS, KERNELS)) + 1e-12)
    log_knee = generator.uniform(low, high, size=(_STARTS, KERNELS))
    start_S = 0.125 * (freedom + len(x_K) - 1) * np.log(squares + shape(amount, log_knee)[2])
    weight_S = np.exp(start_S.min() - start_S)
    chosen_B = generator.choice(_STARTS, size=samples, p=weight_S / weight_S.sum())
    amount, log_knee = amount[chosen_B], log_knee[chosen_B]
    cost_B = cost(amount, log_knee)
    for _ in range(_STEPS):
        kind_B1 = generator.random((samples, 1))
        one_BJ = np.eye(KERNELS, dtype=bool)[generator.integers(KERNELS, size=samples)]
        moved_BJ = one_BJ | (kind_B1 >= 0.5)
        size_B1 = 10.0 ** generator.uniform(-2.5, 0.3, size=(samples, 1))
        # A twelfth of the moves draws one knee from all of the range; some move knees or amounts alone.
        is_fresh = kind_B1 > 0.92
        step_BJ = size_B1 * moved_BJ * generator.normal(size=(samples, KERNELS))
        knee_to = log_knee + np.where((kind_B1 >= 0.2) & (kind_B1 < 0.35), 0.0, reach * step_BJ)
        fresh_BJ = generator.uniform(low, high, size=(samples, KERNELS))
        knee_to = np.where(is_fresh, np.where(one_BJ, fresh_BJ, log_knee), knee_to)
        more_BJ = 2.0 * size_B1 * moved_BJ * generator.normal(size=(samples, KERNELS))
        amount_to = amount + np.where((kind_B1 < 0.2) | is_fresh, 0.0, more_BJ)
        inside_B = ((knee_to >= low) & (knee_to <= high)).all(axis=1)
        cost_to_B = cost(amount_to, knee_to)
        taken_B = inside_B & (np.log(generator.random(samples)) < cost_B - cost_to_B)
        amount = np.where(taken_B[:, None], amount_to, amount)
        log_knee = np.where(taken_B[:, None], knee_to, log_knee)
        cost_B = np.where(taken_B, cost_to_B, cost_B)
    share_BJ, mean_B, left_B = shape(amount, log_knee)
    scatter_B = np.sqrt((squares + left_B) / generator.chisquare(freedom + len(x_K) - 1, size=samples))
    scale_B = np.exp(mean_B + scatter_B / np.sqrt(repeats) * generator.normal(size=samples))
    return np.hstack([scale_B[:, None] * share_BJ, knees(log_knee)])
