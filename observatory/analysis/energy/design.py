"""Time of each phase in each observation, and the powers that explain them best at a trial shift.

Shapes: N observations, J phases, Q trial shifts.

An observation describes another time than its window states. Three numbers describe that for a whole run: the
``lag`` of all observations, its ``drift`` over the run, and the ``smear``: a board's capacitors pass power on
with a time constant of milliseconds, so that an observation holds a little of what was before it.

All shifts that explain the observations count, not only the best. The sum of squared residuals at the best
powers may have many valleys: steps that repeat exactly look much the same a step later, or earlier. So the
whole range of lags is searched, every valley is followed down, and every trial that is not significantly
above the least is plausible. Of these the region's edges are looked for: if plausible trials give different
powers, or one of them cannot separate the phases, the powers are not known.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special

from observatory.analysis.energy.observations import Observations
from observatory.analysis.energy.timeline import Timeline

Float64 = npt.NDArray[np.float64]

#: Name of time that is in no phase.
IDLE = "idle"

#: Rows that are computed at once.
_CHUNK_ROWS = 200_000
#: An exponential smear is taken as the mean of so many delays, each as likely.
_DELAYS = 8
_DELAY_D = -np.log(1 - (np.arange(_DELAYS) + 0.5) / _DELAYS)
#: A trial step is a third of a typical phase, within these.
_FINEST_NS, _COARSEST_NS = 0.7e6, 4e6
#: Observations that are searched: fewer when there are many trials.
_MOST_ROWS, _FEWEST_SEARCHED, _MOST_SEARCHED = 3_000_000, 300, 2000
#: Valleys that are followed, and how.
_VALLEYS, _ROUNDS, _FINER = 24, 5, 0.4
#: Time constants of the smear that are tried; in how many valleys; in how many rounds they are refined.
_SMEARS_NS, _SMEARED_VALLEYS, _SMEAR_ROUNDS = np.array([0.7, 1.5, 3.0, 6.0, 12.0]) * 1e6, 4, 4
#: How often the plausible region is followed outwards, with steps that become finer.
_OUTWARDS = 5
#: A trial is implausible at this level of chi-squared with three parameters, for all of the grid together:
#: the least of many trials is low by chance.
_IMPLAUSIBLE = 0.01
#: Part of the moments' own error that all of a run may share.
_SHARED = 0.4


class Shift(NamedTuple):
    """How observations lie in time, nanoseconds.

    Attributes:
        lag_ns: how much later an observation is than the time it describes, in the middle of the run and
            with smear.
        drift_ns: how much that is more at the end than in the middle, and less at the start.
        smear_ns: time constant with which power reaches the sensor.
    """

    lag_ns: float
    drift_ns: float = 0.0
    smear_ns: float = 0.0


class Design:
    """Seconds of each phase in each observation.

    Attributes:
        observed: the observations.
        names: phases, :data:`IDLE` last where more than a thousandth of the time is in none.
    """

    def __init__(self, observed: Observations, timeline: Timeline) -> None:
        self.observed, self.timeline = observed, timeline
        self._idle = True
        half = max((observed.end_ns_N.max() - observed.start_ns_N.min()) / 2, 1.0)
        # Of start and end apart: a drift makes windows longer or shorter too.
        self._place_2N = (
            np.stack([observed.start_ns_N, observed.end_ns_N]) - observed.start_ns_N.min()
        ) / half - 1
        seconds_NJ = self.at(Shift(0.0))
        self._idle = bool(seconds_NJ[:, -1].sum() > 1e-3 * seconds_NJ.sum())
        self.names = (*timeline.names, IDLE) if self._idle else timeline.names

    def at(self, shift: Shift, *, moved_ns: tuple[Float64, Float64] | None = None) -> Float64:
        """The design, (N, J), with windows moved back by a shift and then on by ``moved_ns``."""
        start, end = self.observed.start_ns_N, self.observed.end_ns_N
        if moved_ns is not None:
            start, end = start + moved_ns[0], end + moved_ns[1]
        result: Float64 = self._designs(np.array([shift]), start, end)[0]
        return result

    def trials(self, shift_Q3: Float64) -> tuple[Float64, Float64, Float64]:
        """Powers (Q, J), sums of squared residuals (Q,) and condition numbers (Q,) at trial shifts.

        Args:
            shift_Q3: a row of ``Shift`` each.
        """
        energy_N = self.observed.energy_mj_N
        power_QJ = np.empty((len(shift_Q3), len(self.names)))
        squares_Q, condition_Q = np.empty(len(shift_Q3)), np.empty(len(shift_Q3))
        smeared = shift_Q3[:, 2] > 0
        for which, delays in ((np.flatnonzero(~smeared), 1), (np.flatnonzero(smeared), _DELAYS)):
            chunk = max(1, _CHUNK_ROWS // (len(energy_N) * delays))
            for first in range(0, len(which), chunk):
                places = which[first : first + chunk]
                design_QNJ = self._designs(shift_Q3[places], self.observed.start_ns_N, self.observed.end_ns_N)
                gram_QJJ = design_QNJ.transpose(0, 2, 1) @ design_QNJ
                condition_Q[places] = conditions(gram_QJJ)
                power_QJ[places] = nnls(gram_QJJ, energy_N @ design_QNJ)
                explained_QN = design_QNJ @ np.nan_to_num(power_QJ[places])[:, :, None]
                squares_Q[places] = np.square(energy_N - explained_QN[:, :, 0]).sum(axis=1)
        return power_QJ, squares_Q, condition_Q

    def _designs(self, shift_Q3: Float64, start_N: Float64, end_N: Float64) -> Float64:
        """Designs at shifts that are all smeared or all not, (Q, N, J)."""
        delays = _DELAY_D - _DELAY_D.mean() if shift_Q3[:, 2].any() else np.zeros(1)
        total: Float64 | float = 0.0
        for delay in delays:
            back_Q1 = (shift_Q3[:, 0] + delay * shift_Q3[:, 2])[:, None]
            start_QN = start_N - back_Q1 - shift_Q3[:, 1, None] * self._place_2N[0]
            end_QN = end_N - back_Q1 - shift_Q3[:, 1, None] * self._place_2N[1]
            total = total + self._seconds(start_QN.ravel(), end_QN.ravel())
        return np.asarray(total / len(delays)).reshape(len(shift_Q3), len(start_N), -1)

    def thinned(self, most: int) -> Design:
        """Itself, or runs of its observations spread over all when there are more than ``most``."""
        size = len(self.observed)
        if size <= most:
            return self
        every = -(-size // most)
        return Design(self.observed.chosen(np.arange(size) // 50 % every == 0), self.timeline)

    def _seconds(self, start: Float64, end: Float64) -> Float64:
        phases_NJ = self.timeline.seconds_in(start, end)
        if not self._idle:
            return phases_NJ
        phases_JN = phases_NJ.T
        idle_N = np.maximum((end - start) * 1e-9 - phases_JN.sum(axis=0), 0.0)
        return np.concatenate([phases_JN, idle_N[None]]).T


def conditions(gram_QJJ: Float64) -> Float64:
    """Condition numbers of designs whose columns are scaled to length 1, from their normal equations.

    Columns that are all zero are left out. Above about 1e7 it is as good as infinite.
    """
    scaled_QJJ, _, _ = _scaled(gram_QJJ)
    eigenvalue_QJ = np.linalg.eigvalsh(scaled_QJJ)
    return np.asarray(np.sqrt(eigenvalue_QJ[:, -1] / np.maximum(eigenvalue_QJ[:, 0], 1e-14)))


def _scaled(gram_QJJ: Float64) -> tuple[Float64, Float64, npt.NDArray[np.bool_]]:
    """Normal equations of columns of length 1, the lengths before, and which columns are all zero.

    A column that is all zero becomes one that is orthogonal to all others.
    """
    length_QJ = np.sqrt(np.diagonal(gram_QJJ, axis1=1, axis2=2))
    absent_QJ = length_QJ <= 0
    scale_QJ = np.where(absent_QJ, 1.0, length_QJ)
    scaled_QJJ = gram_QJJ / (scale_QJ[:, :, None] * scale_QJ[:, None, :])
    q, j = np.nonzero(absent_QJ)
    scaled_QJJ[q, j, j] = 1.0
    return scaled_QJJ, scale_QJ, absent_QJ


def nnls(gram_QJJ: Float64, right_QJ: Float64) -> Float64:
    """Non-negative least squares from normal equations, (Q, J); NaN for columns that are all zero.

    Normal equations square the condition number; columns are scaled first, and callers refuse designs whose
    square would matter.
    """
    scaled_QJJ, scale_QJ, absent_QJ = _scaled(gram_QJJ)
    scaled_QJJ += 1e-11 * np.eye(gram_QJJ.shape[-1])
    scaled_QJ = right_QJ / scale_QJ
    solved_QJ = np.linalg.solve(scaled_QJJ, scaled_QJ[:, :, None])[:, :, 0]
    for q in np.flatnonzero((solved_QJ < 0).any(axis=1)):
        from scipy.optimize import nnls

        factor_JJ = np.linalg.cholesky(scaled_QJJ[q])
        solved_QJ[q], _ = nnls(factor_JJ.T, np.linalg.solve(factor_JJ, scaled_QJ[q]))
    return np.where(absent_QJ, np.nan, solved_QJ / scale_QJ)


def plausible_shifts(whole: Design) -> list[Shift]:
    """Shifts that explain the observations.

    The best is first, then those whose powers differ most from it and the one of the worst condition.
    """
    observed = whole.observed
    length_ns = whole.timeline.end_ns_M - whole.timeline.start_ns_M
    reach_ns = observed.shift_ns + observed.own_ns
    low, high = observed.lag_low_ns - reach_ns, observed.lag_high_ns + reach_ns
    step_ns = float(np.clip(np.quantile(length_ns, 0.2) / 3, _FINEST_NS, _COARSEST_NS))
    lags = np.linspace(low, high, max(3, round((high - low) / step_ns) + 1))
    half = max(1, round(observed.shift_ns / (2 * step_ns)))
    drifts = observed.shift_ns * np.arange(-half, half + 1) / half
    grid = _grid(lags, drifts, np.zeros(1))
    most = int(np.clip(_MOST_ROWS // len(grid), _FEWEST_SEARCHED, _MOST_SEARCHED))
    tried = _Tried(whole.thinned(most), grid)
    step = np.array([lags[1] - lags[0], drifts[1] - drifts[0], 0.0])
    # All valleys are followed equally far, so that they can be compared: one may be narrower than the grid.
    lows = tried.lowest(tried.valleys((len(lags), len(drifts))), _VALLEYS)
    for finer in _FINER ** np.arange(_ROUNDS):
        lows = tried.descend(lows, step * finer, (5, 5, 1))
    lows = tried.lowest(lows, _SMEARED_VALLEYS)
    smeared = np.concatenate([lows + np.array([0.0, 0.0, smear]) for smear in _SMEARS_NS])
    lows = tried.lowest(tried.descend(smeared, step, (9, 1, 1)), _SMEARED_VALLEYS)
    step[2] = 1.5e6
    for finer in 0.5 ** np.arange(1, _SMEAR_ROUNDS + 1):
        lows = tried.descend(lows, step * finer, (5, 3, 3))
    # From the plausible trials whose answers differ most, on to others that are plausible, too.
    for finer in 0.6 ** np.arange(_OUTWARDS):
        outer = tried.trial_Q3[tried.extremes()]
        tried.add(np.concatenate([tried.around(trial, step * finer, (5, 3, 3)) for trial in outer]))
    return [Shift(*map(float, tried.trial_Q3[q])) for q in tried.extremes()]


def _grid(lags: Float64, drifts: Float64, smears: Float64) -> Float64:
    return np.stack(np.meshgrid(lags, drifts, smears, indexing="ij"), axis=-1).reshape(-1, 3)


def _enough(design: Design, least: float, places: int) -> float:
    """Sum of squares up to which a trial is plausible, where the least was found among so many places.

    The error of an observation is at least what its own moment's error does to it: half its power, as the
    phases' powers differ by about that, over ``own_ns`` at both ends. A part of it may be the same for all,
    and then does not average out.
    """
    observed = design.observed
    power_mw = float(observed.energy_mj_N.sum() / (observed.end_ns_N - observed.start_ns_N).sum()) * 1e9
    floor_mj = 0.5 * power_mw * observed.own_ns * 1e-9
    free = max(1, len(observed) - len(design.names) - 2)
    allowed = float(special.chdtri(3, _IMPLAUSIBLE / places))
    return least + allowed * max(least / free, floor_mj**2) + len(observed) * (_SHARED * floor_mj) ** 2


class _Tried:
    """All trials so far."""

    def __init__(self, design: Design, grid_Q3: Float64) -> None:
        self._design, self._places = design, len(grid_Q3)
        self._low, self._high = grid_Q3.min(axis=0), grid_Q3.max(axis=0)
        self._high[2] = np.inf
        self.trial_Q3 = np.empty((0, 3))
        self.power_QJ = np.empty((0, len(design.names)))
        self.squares_Q = np.empty(0)
        self.condition_Q = np.empty(0)
        self.add(grid_Q3)

    def valleys(self, shape: tuple[int, int]) -> Float64:
        """Of the grid of lags and drifts, the best drift at each lag that no neighbouring lag is below."""
        squares_LD = self.squares_Q.reshape(shape)
        squares_L = np.pad(squares_LD.min(axis=1), 1, constant_values=np.inf)
        is_low_L = (squares_L[1:-1] <= squares_L[:-2]) & (squares_L[1:-1] <= squares_L[2:])
        place = np.flatnonzero(is_low_L) * shape[1] + squares_LD.argmin(axis=1)[is_low_L]
        return np.asarray(self.trial_Q3[place])

    def add(self, trial_Q3: Float64) -> Float64:
        """Try more; their sums of squares."""
        power_QJ, squares_Q, condition_Q = self._design.trials(trial_Q3)
        self.trial_Q3 = np.concatenate([self.trial_Q3, trial_Q3])
        self.power_QJ = np.concatenate([self.power_QJ, power_QJ])
        self.squares_Q = np.concatenate([self.squares_Q, squares_Q])
        self.condition_Q = np.concatenate([self.condition_Q, condition_Q])
        return squares_Q

    def around(self, trial: Float64, step: Float64, points: tuple[int, int, int]) -> Float64:
        """A grid around a trial, within the range."""
        axes = (
            centre + reach * (np.linspace(-1, 1, count) if count > 1 else np.zeros(1))
            for centre, reach, count in zip(trial, step, points, strict=True)
        )
        limits = zip(axes, self._low, self._high, strict=True)
        return _grid(*(np.unique(np.clip(axis, low, high)) for axis, low, high in limits))

    def descend(self, start_V3: Float64, step: Float64, points: tuple[int, int, int]) -> Float64:
        """The lowest trial of a grid around each start."""
        grids = [self.around(start, step, points) for start in start_V3]
        squares = np.split(self.add(np.concatenate(grids)), np.cumsum([len(grid) for grid in grids])[:-1])
        return np.array([grid[square.argmin()] for grid, square in zip(grids, squares, strict=True)])

    def lowest(self, trial_V3: Float64, most: int) -> Float64:
        """The lowest of some trials."""
        return trial_V3[np.argsort(self._design.trials(trial_V3)[1], kind="stable")[:most]]

    def extremes(self) -> list[int]:
        """The best trial; of the plausible ones those of least and most power, and of the worst condition."""
        best = int(np.argmin(self.squares_Q))
        enough = _enough(self._design, float(self.squares_Q[best]), self._places)
        plausible = np.flatnonzero(self.squares_Q <= enough)
        finite_QJ = np.nan_to_num(self.power_QJ[plausible])
        worst = plausible[np.argmax(self.condition_Q[plausible])]
        outer = plausible[np.concatenate([finite_QJ.argmin(axis=0), finite_QJ.argmax(axis=0)])]
        return list(dict.fromkeys([best, *outer.tolist(), int(worst)]))
