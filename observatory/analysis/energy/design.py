"""Time of each phase in each observation, and the powers that explain them best at a trial shift.

Shapes: N observations, J phases, Q trial shifts.

An observation describes another time than its window states. Three numbers describe that for a whole run: the
``lag`` of all observations, its ``drift`` over the run, and the ``smear``: a board's capacitors pass power on
with a time constant of milliseconds, so that an observation holds a little of what was before it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

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
        seen: the observations.
        names: phases, :data:`IDLE` last where more than a thousandth of the time is in none.
    """

    def __init__(self, seen: Observations, timeline: Timeline) -> None:
        self.seen, self.timeline = seen, timeline
        self._idle = True
        half = max((seen.end_ns_N.max() - seen.start_ns_N.min()) / 2, 1.0)
        # Of start and end apart: a drift makes windows longer or shorter too.
        self._place_2N = (np.stack([seen.start_ns_N, seen.end_ns_N]) - seen.start_ns_N.min()) / half - 1
        seconds_NJ = self.at(Shift(0.0))
        self._idle = bool(seconds_NJ[:, -1].sum() > 1e-3 * seconds_NJ.sum())
        self.names = (*timeline.names, IDLE) if self._idle else timeline.names

    def at(self, shift: Shift, *, moved_ns: tuple[Float64, Float64] | None = None) -> Float64:
        """The design, (N, J), with windows moved back by a shift and then on by ``moved_ns``."""
        start, end = self.seen.start_ns_N, self.seen.end_ns_N
        if moved_ns is not None:
            start, end = start + moved_ns[0], end + moved_ns[1]
        result: Float64 = self._designs(np.array([shift]), start, end)[0]
        return result

    def trials(self, shift_Q3: Float64) -> tuple[Float64, Float64, Float64]:
        """Powers (Q, J), sums of squared residuals (Q,) and condition numbers (Q,) at trial shifts.

        Args:
            shift_Q3: a row of ``Shift`` each.
        """
        energy_N = self.seen.energy_mj_N
        power_QJ = np.empty((len(shift_Q3), len(self.names)))
        squares_Q, condition_Q = np.empty(len(shift_Q3)), np.empty(len(shift_Q3))
        smeared = shift_Q3[:, 2] > 0
        for which, delays in ((np.flatnonzero(~smeared), 1), (np.flatnonzero(smeared), _DELAYS)):
            chunk = max(1, _CHUNK_ROWS // (len(energy_N) * delays))
            for first in range(0, len(which), chunk):
                places = which[first : first + chunk]
                design_QNJ = self._designs(shift_Q3[places], self.seen.start_ns_N, self.seen.end_ns_N)
                gram_QJJ = design_QNJ.transpose(0, 2, 1) @ design_QNJ
                condition_Q[places] = _conditions(gram_QJJ)
                power_QJ[places] = nnls(gram_QJJ, energy_N @ design_QNJ)
                explained_QN = design_QNJ @ np.nan_to_num(power_QJ[places])[:, :, None]
                squares_Q[places] = np.square(energy_N - explained_QN[:, :, 0]).sum(axis=1)
        return power_QJ, squares_Q, condition_Q

    def _designs(self, shift_Q3: Float64, start_N: Float64, end_N: Float64) -> Float64:
        """Designs at shifts that are all smeared or all not, (Q, N, J)."""
        lag_QN, drift_QN = shift_Q3[:, 0, None], shift_Q3[:, 1, None]
        delays = _DELAY_D - _DELAY_D.mean() if shift_Q3[:, 2].any() else np.zeros(1)
        total: Float64 | float = 0.0
        for delay in delays:
            back_QN = lag_QN + delay * shift_Q3[:, 2, None]
            start_QN = start_N - back_QN - drift_QN * self._place_2N[0]
            end_QN = end_N - back_QN - drift_QN * self._place_2N[1]
            total = total + self._seconds(start_QN.ravel(), end_QN.ravel())
        return np.asarray(total / len(delays)).reshape(len(shift_Q3), len(start_N), -1)

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


def _conditions(gram_QJJ: Float64) -> Float64:
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
