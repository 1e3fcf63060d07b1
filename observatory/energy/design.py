"""Time of each phase in each observation, and its solution at trial shifts of the sensor's clock.

Shapes: N observations, J phases, Q trial shifts.

The moments of observations are known up to a shift that all share (the sensor's lag, and what polling leaves
open) and a drift of that shift over the run. Both are searched: the sum of squared residuals at the best
powers is a function of (shift, drift), and every trial that is not significantly above the least is
plausible.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

from observatory.energy.observations import Observations
from observatory.energy.timeline import Timeline

__all__ = ["IDLE", "Design", "Shift", "nnls", "plausible_shifts"]

Float64 = npt.NDArray[np.float64]

#: Name of time that is in no phase.
IDLE = "idle"

#: (shift, drift) in ns: a window in the middle of the run is ``shift`` later than what it tells, one at the
#: end ``shift + drift``, one at the begin ``shift - drift``.
Shift = tuple[float, float]

#: Part of the moments' own error that all of a run may share.
_SHARED = 0.4
#: A trial step is a third of a typical phase, within these.
_FINEST_NS, _COARSEST_NS = 0.7e6, 4e6
#: Rows that one search may compute: observations times trials.
_MOST_ROWS, _FEWEST_SEARCHED, _CHUNK_ROWS = 3_000_000, 300, 200_000
_REFINED, _FINE_POINTS, _ROUNDS, _FINER = 24, 5, 5, 0.3
#: 99 % of chi-squared with two parameters.
_CHI2 = float(stats.chi2.ppf(0.99, 2))


class Design:
    """Seconds of each phase in each observation.

    Attributes:
        seen: the observations.
        names: phases, :data:`IDLE` last where more than a thousandth of the time is in none.
    """

    def __init__(self, seen: Observations, timeline: Timeline) -> None:
        self.seen, self.timeline = seen, timeline
        self._idle = True
        half = max((seen.end_ns_N.max() - seen.start_ns_N.min()) / 2, 1.0)
        # Of start and end apart: a drift makes windows longer or shorter too.
        self._place_2N = (np.stack([seen.start_ns_N, seen.end_ns_N]) - seen.start_ns_N.min()) / half - 1
        seconds_NJ = self.at((0.0, 0.0))
        self._idle = bool(seconds_NJ[:, -1].sum() > 1e-3 * seconds_NJ.sum())
        self.names = (*timeline.names, IDLE) if self._idle else timeline.names

    def at(self, shift: Shift, *, moved_ns: tuple[Float64, Float64] | None = None) -> Float64:
        """The design, (N, J), with windows moved back by a shift and then on by ``moved_ns``."""
        back_2N = shift[0] + shift[1] * self._place_2N
        start, end = self.seen.start_ns_N - back_2N[0], self.seen.end_ns_N - back_2N[1]
        if moved_ns is not None:
            start, end = start + moved_ns[0], end + moved_ns[1]
        return self._seconds(start, end)

    def trials(self, shift_Q2: Float64) -> tuple[Float64, Float64]:
        """Powers (Q, J) and sums of squared residuals (Q,) at trial shifts."""
        energy_N = self.seen.energy_mj_N
        power_QJ, squares_Q = np.empty((len(shift_Q2), len(self.names))), np.empty(len(shift_Q2))
        chunk = max(1, _CHUNK_ROWS // len(energy_N))
        for first in range(0, len(shift_Q2), chunk):
            own = shift_Q2[first : first + chunk]
            back_2QN = own[:, :1] + own[:, 1:] * self._place_2N[:, None, :]
            start_QN, end_QN = self.seen.start_ns_N - back_2QN[0], self.seen.end_ns_N - back_2QN[1]
            design_QNJ = self._seconds(start_QN.ravel(), end_QN.ravel()).reshape(*start_QN.shape, -1)
            right_QJ = energy_N @ design_QNJ
            gram_QJJ = design_QNJ.transpose(0, 2, 1) @ design_QNJ
            for q, (gram_JJ, right_J) in enumerate(zip(gram_QJJ, right_QJ, strict=True)):
                power_J = nnls(gram_JJ, right_J)
                rest_N = energy_N - design_QNJ[q] @ np.nan_to_num(power_J)
                power_QJ[first + q], squares_Q[first + q] = power_J, rest_N @ rest_N
        return power_QJ, squares_Q

    def thinned(self, most: int) -> Design:
        """Itself, or runs of its observations spread over all when there are more than ``most``."""
        size = len(self.seen)
        if size <= most:
            return self
        every = -(-size // most)
        return Design(self.seen.chosen(np.arange(size) // 50 % every == 0), self.timeline)

    def _seconds(self, start: Float64, end: Float64) -> Float64:
        phases_NJ = self.timeline.seconds_in(start, end)
        if not self._idle:
            return phases_NJ
        idle_N = np.maximum((end - start) * 1e-9 - phases_NJ.sum(axis=1), 0.0)
        return np.column_stack([phases_NJ, idle_N])


def nnls(gram_JJ: Float64, right_J: Float64) -> Float64:
    """Non-negative least squares from normal equations; NaN for columns that are all zero.

    Normal equations square the condition number; columns are scaled first, and callers refuse designs whose
    square would matter.
    """
    scale_J = np.sqrt(np.diag(gram_JJ))
    some = scale_J > 0
    result = np.full(len(right_J), np.nan)
    if not some.any():
        return result
    scaled_JJ = gram_JJ[np.ix_(some, some)] / np.outer(scale_J[some], scale_J[some])
    scaled_J = right_J[some] / scale_J[some]
    scaled_JJ += 1e-11 * np.eye(len(scaled_J))
    solved = np.linalg.solve(scaled_JJ, scaled_J)
    if (solved < 0).any():
        factor = np.linalg.cholesky(scaled_JJ)
        solved, _ = optimize.nnls(factor.T, np.linalg.solve(factor, scaled_J))
    result[some] = solved / scale_J[some]
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class _Range:
    """What is searched."""

    low: float
    high: float
    drift: float
    step: float

    def axes(self) -> tuple[Float64, Float64]:
        shifts = np.linspace(self.low, self.high, max(3, round((self.high - self.low) / self.step) + 1))
        half = max(1, round(self.drift / (2 * self.step)))
        return shifts, self.drift * np.arange(-half, half + 1) / half


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
    shifts, drifts = searched.axes()
    design = whole.thinned(max(_FEWEST_SEARCHED, _MOST_ROWS // (len(shifts) * len(drifts))))
    tried = _Tried(design)
    tried.add(np.stack(np.meshgrid(shifts, drifts), axis=-1).reshape(-1, 2))
    step = np.array([shifts[1] - shifts[0], drifts[1] - drifts[0]])
    # For each shift the best drift; then whatever is lowest anywhere. All are followed equally far, so that
    # they can be compared, as a valley may be narrower than the grid.
    for finer in _FINER ** np.arange(_ROUNDS):
        lows = tried.lowest_of_each(shifts)
        tried.add(np.concatenate([_around(low, step * [0, finer], searched) for low in lows]))
    for finer in _FINER ** np.arange(_ROUNDS):
        lows = tried.valleys(step)
        tried.add(np.concatenate([_around(low, step * finer, searched) for low in lows]))
    trial_Q2, power_QJ, squares_Q = tried.trial_Q2, tried.power_QJ, tried.squares_Q
    plausible = np.flatnonzero(squares_Q <= _enough(design, squares_Q.min()))
    best = int(np.argmin(squares_Q))
    known_QJ = np.nan_to_num(power_QJ[plausible])
    chosen = [
        best,
        *plausible[known_QJ.argmin(axis=0)].tolist(),
        *plausible[known_QJ.argmax(axis=0)].tolist(),
    ]
    return [(float(trial_Q2[q, 0]), float(trial_Q2[q, 1])) for q in dict.fromkeys(chosen)]


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
        self.trial_Q2 = np.empty((0, 2))
        self.power_QJ = np.empty((0, len(design.names)))
        self.squares_Q = np.empty(0)

    def add(self, trial_Q2: Float64) -> None:
        """Try more."""
        power_QJ, squares_Q = self._design.trials(trial_Q2)
        self.trial_Q2 = np.concatenate([self.trial_Q2, trial_Q2])
        self.power_QJ = np.concatenate([self.power_QJ, power_QJ])
        self.squares_Q = np.concatenate([self.squares_Q, squares_Q])

    def lowest_of_each(self, shifts: Float64) -> Float64:
        """The lowest trial of each shift."""
        order = np.lexsort((self.squares_Q, self.trial_Q2[:, 0]))
        ordered = self.trial_Q2[order]
        first = np.ones(len(ordered), dtype=bool)
        first[1:] = ordered[1:, 0] != ordered[:-1, 0]
        lowest: Float64 = ordered[first]
        return lowest[np.isin(lowest[:, 0], shifts)]

    def valleys(self, apart: Float64) -> Float64:
        """The lowest trials that are not near a lower one."""
        left = np.argsort(self.squares_Q)
        found: list[Float64] = []
        while len(left) and len(found) < _REFINED:
            lowest = self.trial_Q2[left[0]]
            found.append(lowest)
            left = left[(np.abs(self.trial_Q2[left] - lowest) > 1.01 * apart).any(axis=1)]
        return np.array(found)


def _around(trial: Float64, step: Float64, searched: _Range) -> Float64:
    """A finer grid around a trial."""
    shifts = trial[0] + step[0] * np.linspace(-1, 1, _FINE_POINTS) if step[0] else trial[:1]
    shifts = np.unique(np.clip(shifts, searched.low, searched.high))
    drifts = trial[1] + step[1] * np.linspace(-1, 1, _FINE_POINTS)
    return np.stack(np.meshgrid(shifts, drifts), axis=-1).reshape(-1, 2)
