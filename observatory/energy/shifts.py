"""The shifts of a sensor's clock that explain its observations: all of them, not only the best.

Shapes: J phases, Q trials.

The sum of squared residuals at the best powers is a function of (lag, drift, smear). It may have many
valleys: steps that repeat exactly look much the same a step later. So the whole range is searched, valleys
are followed down, and every trial that is not significantly above the least is plausible. If plausible trials
give different powers, the powers are not known.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from observatory.energy.design import Design, Shift

__all__ = ["plausible_shifts"]

Float64 = npt.NDArray[np.float64]

#: A trial step is a third of a typical phase, within these.
_FINEST_NS, _COARSEST_NS = 0.7e6, 4e6
#: Observations that are searched: fewer when there are many trials.
_MOST_ROWS, _FEWEST_SEARCHED, _MOST_SEARCHED = 3_000_000, 300, 2000
_VALLEYS, _ROUNDS, _FINER = 24, 5, 0.3
#: Time constants of the smear that are tried; in how many valleys; in how many rounds they are refined.
_SMEARS_NS, _SMEARED_VALLEYS, _SMEAR_ROUNDS = np.array([0.7, 1.5, 3.0, 6.0, 12.0]) * 1e6, 4, 4
#: 99 % of chi-squared with three parameters.
_CHI2 = float(stats.chi2.ppf(0.99, 3))
#: Part of the moments' own error that all of a run may share.
_SHARED = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Range:
    """What is searched."""

    low: float
    high: float
    drift: float
    step: float

    def axes(self) -> tuple[Float64, Float64]:
        lags = np.linspace(self.low, self.high, max(3, round((self.high - self.low) / self.step) + 1))
        half = max(1, round(self.drift / (2 * self.step)))
        return lags, self.drift * np.arange(-half, half + 1) / half

    def around(self, trial: Float64, step: Float64, points: tuple[int, int, int]) -> Float64:
        """A grid around a trial, within the range."""
        lags, drifts, smears = (
            centre + reach * np.linspace(-1, 1, count) if count > 1 else np.array([centre])
            for centre, reach, count in zip(trial, step, points, strict=True)
        )
        lags = np.unique(np.clip(lags, self.low, self.high))
        smears = np.unique(np.maximum(smears, 0.0))
        return _grid(lags, drifts, smears)


def _grid(lags: Float64, drifts: Float64, smears: Float64) -> Float64:
    return np.stack(np.meshgrid(lags, drifts, smears, indexing="ij"), axis=-1).reshape(-1, 3)


def plausible_shifts(whole: Design) -> list[Shift]:
    """Shifts that explain the observations, the best first, then those whose powers differ most from it."""
    seen = whole.seen
    length_ns = whole.timeline.end_ns_M - whole.timeline.start_ns_M
    searched = _Range(
        low=seen.lag_low_ns - seen.shift_ns,
        high=seen.lag_high_ns + seen.shift_ns,
        drift=seen.shift_ns,
        step=float(np.clip(np.quantile(length_ns, 0.2) / 3, _FINEST_NS, _COARSEST_NS)),
    )
    lags, drifts = searched.axes()
    most = _MOST_ROWS // (len(lags) * len(drifts))
    design = whole.thinned(int(np.clip(most, _FEWEST_SEARCHED, _MOST_SEARCHED)))
    tried = _Tried(design)
    tried.add(_grid(lags, drifts, np.zeros(1)))
    step = np.array([lags[1] - lags[0], drifts[1] - drifts[0], 0.0])
    _follow(tried, searched, lags, step)
    best = int(np.argmin(tried.squares_Q))
    plausible = np.flatnonzero(tried.squares_Q <= _enough(design, float(tried.squares_Q[best])))
    known_QJ = np.nan_to_num(tried.power_QJ[plausible])
    chosen = [
        best,
        *plausible[known_QJ.argmin(axis=0)].tolist(),
        *plausible[known_QJ.argmax(axis=0)].tolist(),
    ]
    return [Shift(*map(float, tried.trial_Q3[q])) for q in dict.fromkeys(chosen)]


def _follow(tried: _Tried, searched: _Range, lags: Float64, step: Float64) -> None:
    """Follow valleys down: for each lag the best drift; what is lowest anywhere; then with smears.

    All are followed equally far, so that they can be compared: a valley may be narrower than the grid.
    """
    for finer in _FINER ** np.arange(_ROUNDS):
        lows = tried.lowest_of_each(lags)
        tried.add(np.concatenate([searched.around(low, step * finer, (1, 5, 1)) for low in lows]))
    for finer in _FINER ** np.arange(_ROUNDS):
        lows = tried.valleys(step, _VALLEYS)
        tried.add(np.concatenate([searched.around(low, step * finer, (5, 5, 1)) for low in lows]))
    for low in tried.valleys(step, _SMEARED_VALLEYS):
        smeared = [searched.around(low + smear, step, (9, 1, 1)) for smear in np.outer(_SMEARS_NS, [0, 0, 1])]
        tried.add(np.concatenate(smeared))
    apart, step = step + np.array([0, 0, 0.5e6]), step + np.array([0, 0, 1.5e6])
    for finer in 0.5 ** np.arange(1, _SMEAR_ROUNDS + 1):
        lows = tried.valleys(apart, _SMEARED_VALLEYS)
        tried.add(np.concatenate([searched.around(low, step * finer, (5, 3, 3)) for low in lows]))


def _enough(design: Design, least: float) -> float:
    """Sum of squares up to which a trial is plausible.

    The error of an observation is at least what its own moment's error does to it: half its power, as the
    phases' powers differ by about that, over ``own_ns`` at both ends. A part of it may be the same for all,
    and then does not average out.
    """
    seen = design.seen
    power_mw = float(seen.energy_mj_N.sum() / (seen.end_ns_N - seen.start_ns_N).sum()) * 1e9
    floor_mj = 0.5 * power_mw * seen.own_ns * 1e-9
    free = max(1, len(seen) - len(design.names) - 2)
    return least + _CHI2 * max(least / free, floor_mj**2) + len(seen) * (_SHARED * floor_mj) ** 2


class _Tried:
    """All trials so far."""

    def __init__(self, design: Design) -> None:
        self._design = design
        self.trial_Q3 = np.empty((0, 3))
        self.power_QJ = np.empty((0, len(design.names)))
        self.squares_Q = np.empty(0)

    def add(self, trial_Q3: Float64) -> None:
        """Try more."""
        power_QJ, squares_Q = self._design.trials(trial_Q3)
        self.trial_Q3 = np.concatenate([self.trial_Q3, trial_Q3])
        self.power_QJ = np.concatenate([self.power_QJ, power_QJ])
        self.squares_Q = np.concatenate([self.squares_Q, squares_Q])

    def lowest_of_each(self, lags: Float64) -> Float64:
        """The lowest trial of each lag."""
        order = np.lexsort((self.squares_Q, self.trial_Q3[:, 0]))
        ordered = self.trial_Q3[order]
        first = np.ones(len(ordered), dtype=bool)
        first[1:] = ordered[1:, 0] != ordered[:-1, 0]
        lowest: Float64 = ordered[first]
        return lowest[np.isin(lowest[:, 0], lags)]

    def valleys(self, apart: Float64, most: int) -> Float64:
        """The lowest trials that are not near a lower one."""
        left = np.argsort(self.squares_Q)
        found: list[Float64] = []
        while len(left) and len(found) < most:
            lowest = self.trial_Q3[left[0]]
            found.append(lowest)
            left = left[(np.abs(self.trial_Q3[left] - lowest) > 1.01 * apart).any(axis=1)]
        return np.array(found)
