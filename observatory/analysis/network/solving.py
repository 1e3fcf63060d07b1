"""Least squares for one form of the network model.

Shapes: C cases (exchanges), N rows of terms (ranks of all stages of all cases), F terms of the form, G
    stages.

The form is a sum of maxima, so the fit alternates: with the slowest row of each stage known, coefficients
are a non-negative linear least-squares problem in relative error; with coefficients known, the slowest rows
follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.network.features import Form, StageTerms

_ROUNDS = 40
_REWEIGHTINGS = 8
_HUBER = 1.345
#: Median of |x| of a standard normal: makes the median absolute error a standard deviation.
_MEDIAN_OF_NORMAL = 0.6745
_SMALLEST_ERROR = 1e-6
#: Smaller relative changes count as none.
_SETTLED = 1e-6
#: Predictions that weights change by less stay as they are.
_STEADY = 1e-3
#: Predicted and measured are never taken to be further apart, which keeps units sane while a fit settles.
_MOST_APART = 10.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """Terms of all cases under one form, rows of one stage together.

    Attributes:
        terms_NF: terms of every row.
        start_G: first row of every stage.
        case_G: case of every stage.
        cases: C.
    """

    terms_NF: NDArray[np.float64]
    start_G: NDArray[np.int64]
    case_G: NDArray[np.int64]
    cases: int

    @classmethod
    def build(cls, exchanges: Sequence[StageTerms], form: Form) -> Problem:
        """Stack the terms of exchanges.

        A form gets a row per rank for each of its sides: the largest counts.
        """
        sums_XF = form.sums_XF
        terms_NF = np.concatenate(
            [item.terms_SPF.reshape(-1, item.terms_SPF.shape[-1]) for item in exchanges]
        )
        stages_C = np.array([len(item.terms_SPF) for item in exchanges])
        length_G = np.repeat([item.terms_SPF.shape[1] * len(sums_XF) for item in exchanges], stages_C)
        return cls(
            terms_NF=(terms_NF[:, None, form.columns] * sums_XF).reshape(-1, sums_XF.shape[1]),
            start_G=np.cumsum(length_G) - length_G,
            case_G=np.repeat(np.arange(len(exchanges)), stages_C),
            cases=len(exchanges),
        )

    def take(self, case_K: NDArray[np.int64]) -> Problem:
        """The problem of chosen cases, repeated ones included."""
        length_G = np.diff(np.append(self.start_G, len(self.terms_NF)))
        # Stages of a case, and rows of a stage, lie one after another.
        stages_C = np.bincount(self.case_G, minlength=self.cases)
        first_C = np.cumsum(stages_C) - stages_C
        stage_H = _ranges(first_C[case_K], stages_C[case_K])
        length_H = length_G[stage_H]
        return Problem(
            terms_NF=self.terms_NF[_ranges(self.start_G[stage_H], length_H)],
            start_G=np.cumsum(length_H) - length_H,
            case_G=np.repeat(np.arange(len(case_K)), stages_C[case_K]),
            cases=len(case_K),
        )

    def slowest(self, coefficient_F: NDArray[np.float64]) -> NDArray[np.float64]:
        """Terms of the slowest row of each stage, added up by case: (C, F)."""
        us_N = self.terms_NF @ coefficient_F
        most_G = np.maximum.reduceat(us_N, self.start_G)
        slowest_N = us_N == np.repeat(most_G, np.diff(np.append(self.start_G, len(us_N))))
        last_G = np.maximum.reduceat(np.where(slowest_N, np.arange(len(us_N)), -1), self.start_G)
        first_C = np.searchsorted(self.case_G, np.arange(self.cases))
        design_CF: NDArray[np.float64] = np.add.reduceat(self.terms_NF[last_G], first_C, axis=0)
        return design_CF


def _ranges(start_K: NDArray[np.int64], length_K: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers from each start on, so many as each length, one after another."""
    before_K = np.cumsum(length_K) - length_K
    numbers: NDArray[np.int64] = np.arange(length_K.sum()) + np.repeat(start_K - before_K, length_K)
    return numbers


def predict_all(problem: Problem, coefficient_F: NDArray[np.float64]) -> NDArray[np.float64]:
    """Predicted microseconds of every case, (C,)."""
    us_C: NDArray[np.float64] = problem.slowest(coefficient_F) @ coefficient_F
    return us_C


def solve(
    problem: Problem,
    us_C: NDArray[np.float64],
    noise_C: NDArray[np.float64],
    start_F: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Non-negative coefficients of the smallest relative error found, (F,).

    Least squares of the relative error over its expected size, solved again with two changes until both
    settle: the error is taken relative to the geometric mean of measured and predicted, because relative to
    the measured time alone a prediction of half costs less than one of double and noisy data pull it down;
    and cases that lie far off are weighted down (Huber, from 1.345 robust standard deviations on), so that a
    few disturbed matrices do not bend the model.

    Args:
        problem: the terms.
        us_C: measured microseconds, positive.
        noise_C: expected relative error of each case, positive.
        start_F: coefficients to start from; None starts from the busiest rows.
    """
    scale_F = problem.terms_NF.max(axis=0)
    scale_F[scale_F == 0] = 1.0
    weight_C, unit_us_C = 1.0 / noise_C**2, us_C
    current_F = 1.0 / scale_F if start_F is None else start_F
    design_CF, before_C = problem.slowest(current_F), np.zeros(problem.cases)
    for _ in range(_REWEIGHTINGS):
        current_F, design_CF = _least_squares(problem, us_C, weight_C, unit_us_C, design_CF, scale_F)
        predicted_C = np.clip(design_CF @ current_F, us_C / _MOST_APART, us_C * _MOST_APART)
        if (np.abs(predicted_C - before_C) < _STEADY * predicted_C).all():
            break
        before_C = predicted_C
        unit_us_C = np.sqrt(us_C * predicted_C)
        error_C = np.abs(np.log(predicted_C / us_C)) / noise_C
        usual = _HUBER * max(float(np.median(error_C)) / _MEDIAN_OF_NORMAL, _SMALLEST_ERROR)
        weight_C = np.minimum(1.0, usual / np.maximum(error_C, _SMALLEST_ERROR)) / noise_C**2
    return current_F


def _least_squares(
    problem: Problem,
    us_C: NDArray[np.float64],
    weight_C: NDArray[np.float64],
    unit_us_C: NDArray[np.float64],
    design_CF: NDArray[np.float64],
    scale_F: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Alternate between slowest rows and coefficients until the error stops falling: (F,) and (C, F)."""
    from scipy.optimize import nnls

    per_us_C = np.sqrt(weight_C) / unit_us_C
    best_F, best_CF, best_error = np.zeros(len(scale_F)), design_CF, np.inf
    for _ in range(_ROUNDS):
        current_F = nnls(design_CF * per_us_C[:, None] / scale_F, us_C * per_us_C)[0] / scale_F
        design_CF = problem.slowest(current_F)
        error = float(np.sum((per_us_C * (design_CF @ current_F - us_C)) ** 2))
        if error >= best_error * (1.0 - _SETTLED):
            break
        best_F, best_CF, best_error = current_F, design_CF, error
    return best_F, best_CF
