"""The shifts of a sensor's clock that explain its observations: all of them, not only the best.

Shapes: J phases, Q trials.

The sum of squared residuals at the best powers is a function of (lag, drift, smear). It may have many
valleys: steps that repeat exactly look much the same a step later, or earlier, or with time reversed. So the
whole range is searched, every valley is followed down, and every trial that is not significantly above the
least is plausible. Of these the region's edges are looked for: if plausible trials give different powers, or
one of them cannot separate the phases, the powers are not known.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

from observatory.analysis.energy.design import Design, Shift

Float64 = npt.NDArray[np.float64]

#: A trial step is a third of a typical phase, within these.
_FINEST_NS, _COARSEST_NS = 0.7e6, 4e6
#: Observations that are searched: fewer when there are many trials.
_MOST_ROWS, _FEWEST_SEARCHED, _MOST_SEARCHED = 3_000_000, 300, 2000
_VALLEYS, _ROUNDS, _FINER = 24, 5, 0.3
#: Time constants of the smear that are tried; in how many valleys; in how many rounds they are refined.
_SMEARS_NS, _SMEARED_VALLEYS, _SMEAR_ROUNDS = np.array([0.7, 1.5, 3.0, 6.0, 12.0]) * 1e6, 6, 4
#: How often the plausible region is followed outwards, with steps that become finer.
_OUTWARDS = 5
#: A trial is implausible at this level of chi-squared with three parameters, for all of the grid together:
#: the least of many trials is low by chance.
_IMPLAUSIBLE = 0.01
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
    """Shifts that explain the observations.

    The best is first, then those whose powers differ most from it and the one of the worst condition.
    """
    observed = whole.seen
    length_ns = whole.timeline.end_ns_M - whole.timeline.start_ns_M
    searched = _Range(
        low=observed.lag_low_ns - observed.shift_ns - observed.own_ns,
        high=observed.lag_high_ns + observed.shift_ns + observed.own_ns,
        drift=observed.shift_ns,
        step=float(np.clip(np.quantile(length_ns, 0.2) / 3, _FINEST_NS, _COARSEST_NS)),
    )
    lags, drifts = searched.axes()
    most = _MOST_ROWS // (len(lags) * len(drifts))
    design = whole.thinned(int(np.clip(most, _FEWEST_SEARCHED, _MOST_SEARCHED)))
    tried = _Tried(design, places=len(lags) * len(drifts))
    tried.add(_grid(lags, drifts, np.zeros(1)))
    step = np.array([lags[1] - lags[0], drifts[1] - drifts[0], 0.0])
    _follow(tried, searched, (len(lags), len(drifts)), step)
    _spread(tried, searched, step + np.array([0.0, 0.0, 1e6]))
    return [Shift(*map(float, tried.trial_Q3[q])) for q in tried.extremes()]


def _follow(tried: _Tried, searched: _Range, shape: tuple[int, int], step: Float64) -> None:
    """Follow every valley of the grid down: along the drift at each lag, then freely, then with smears.

    The first finds valleys that are long and narrow, in which lag and powers make up for each other. All are
    followed equally far, so that they can be compared: a valley may be narrower than the grid.
    """
    squares_LD = tried.squares_Q.reshape(shape)
    lows = tried.trial_Q3[_lowest(squares_LD, ((0, -1), (0, 1)))]
    for finer in _FINER ** np.arange(_ROUNDS):
        lows = tried.descend(lows, searched, step * finer, (1, 5, 1))
    around = tuple((a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b)
    lows = tried.lowest(np.concatenate([lows, tried.trial_Q3[_lowest(squares_LD, around)]]), step, _VALLEYS)
    for finer in _FINER ** np.arange(_ROUNDS):
        lows = tried.descend(lows, searched, step * finer, (5, 5, 1))
    lows = tried.lowest(lows, step, _SMEARED_VALLEYS)
    smeared = np.concatenate([lows + smear for smear in np.outer(_SMEARS_NS, [0, 0, 1])])
    smeared = tried.descend(smeared, searched, step, (9, 1, 1))
    lows = tried.lowest(smeared, step + np.array([0, 0, 0.5e6]), _SMEARED_VALLEYS)
    step = step + np.array([0, 0, 1.5e6])
    for finer in 0.5 ** np.arange(1, _SMEAR_ROUNDS + 1):
        lows = tried.descend(lows, searched, step * finer, (5, 3, 3))


def _lowest(squares_LD: Float64, neighbours: tuple[tuple[int, int], ...]) -> npt.NDArray[np.int64]:
    """Trials of a grid that none of their neighbours is below."""
    padded = np.pad(squares_LD, 1, constant_values=np.inf)
    rows, columns = squares_LD.shape
    lowest = np.ones_like(squares_LD, dtype=bool)
    for a, b in neighbours:
        lowest &= squares_LD <= padded[1 + a : 1 + a + rows, 1 + b : 1 + b + columns]
    return np.flatnonzero(lowest).astype(np.int64)


def _spread(tried: _Tried, searched: _Range, step: Float64) -> None:
    """From the plausible trials whose answers differ most, on to others that are plausible, too."""
    for finer in 0.6 ** np.arange(_OUTWARDS):
        outer = tried.trial_Q3[tried.extremes()]
        tried.add(np.concatenate([searched.around(trial, step * finer, (5, 5, 3)) for trial in outer]))


def _enough(design: Design, least: float, places: int) -> float:
    """Sum of squares up to which a trial is plausible, where the least was found among so many places.

    The error of an observation is at least what its own moment's error does to it: half its power, as the
    phases' powers differ by about that, over ``own_ns`` at both ends. A part of it may be the same for all,
    and then does not average out.
    """
    observed = design.seen
    power_mw = float(observed.energy_mj_N.sum() / (observed.end_ns_N - observed.start_ns_N).sum()) * 1e9
    floor_mj = 0.5 * power_mw * observed.own_ns * 1e-9
    free = max(1, len(observed) - len(design.names) - 2)
    allowed = float(special.chdtri(3, _IMPLAUSIBLE / places))
    return least + allowed * max(least / free, floor_mj**2) + len(observed) * (_SHARED * floor_mj) ** 2


class _Tried:
    """All trials so far."""

    def __init__(self, design: Design, *, places: int) -> None:
        self._design, self._places = design, places
        self.trial_Q3 = np.empty((0, 3))
        self.power_QJ = np.empty((0, len(design.names)))
        self.squares_Q = np.empty(0)
        self.condition_Q = np.empty(0)

    def add(self, trial_Q3: Float64) -> Float64:
        """Try more; their sums of squares."""
        power_QJ, squares_Q, condition_Q = self._design.trials(trial_Q3)
        self.trial_Q3 = np.concatenate([self.trial_Q3, trial_Q3])
        self.power_QJ = np.concatenate([self.power_QJ, power_QJ])
        self.squares_Q = np.concatenate([self.squares_Q, squares_Q])
        self.condition_Q = np.concatenate([self.condition_Q, condition_Q])
        return squares_Q

    def descend(
        self, start_V3: Float64, searched: _Range, step: Float64, points: tuple[int, int, int]
    ) -> Float64:
        """The lowest trial of a grid around each start."""
        grids = [searched.around(start, step, points) for start in start_V3]
        squares = np.split(self.add(np.concatenate(grids)), np.cumsum([len(grid) for grid in grids])[:-1])
        return np.array([grid[square.argmin()] for grid, square in zip(grids, squares, strict=True)])

    def lowest(self, trial_V3: Float64, apart: Float64, most: int) -> Float64:
        """The lowest of some trials that are not near a lower one."""
        left = np.argsort(self._design.trials(trial_V3)[1], kind="stable")
        places: list[Float64] = []
        while len(left) and len(places) < most:
            lowest = trial_V3[left[0]]
            places.append(lowest)
            left = left[(np.abs(trial_V3[left] - lowest) > 0.99 * apart).any(axis=1)]
        return np.array(places)

    def extremes(self) -> list[int]:
        """The best trial; of the plausible ones those of least and most power, and of the worst condition."""
        best = int(np.argmin(self.squares_Q))
        enough = _enough(self._design, float(self.squares_Q[best]), self._places)
        plausible = np.flatnonzero(self.squares_Q <= enough)
        finite_QJ = np.nan_to_num(self.power_QJ[plausible])
        worst = plausible[np.argmax(self.condition_Q[plausible])]
        outer = plausible[np.concatenate([finite_QJ.argmin(axis=0), finite_QJ.argmax(axis=0)])]
        return list(dict.fromkeys([best, *outer.tolist(), int(worst)]))
