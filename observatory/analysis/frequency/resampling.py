"""Bootstrap samples of both curves.

Shapes: B bootstrap samples, N points, K clocks.

The fit's error at each clock, all repeats of the clock together as one block, is one draw from how far
repeats and settings scatter. A sample gives every clock the error of another clock drawn at random, with a
random sign, and fits again. One draw serves time and power, since what disturbs a measurement disturbs both.
Errors are scaled by sqrt(n / (n - p)) t / z, because n clocks are few beside p parameters, and by a factor
for the form having been chosen on the same points. The samples are spread over all forms that are as good as
the best, so that not knowing the form widens an interval too. No sample loses a clock: the ends of the range
stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.frequency.choosing import Trial
from observatory.analysis.frequency.curves import Points, fit_power, fit_time, spread_last_knees
from observatory.analysis.frequency.model import (
    POWER_TERMS,
    TIME_TERMS,
    PowerForm,
    TimeForm,
    iteration_s,
    power_mw,
)
from observatory.analysis.statistics import student_over_normal

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

#: The form was chosen on the same points, which no redrawing of their errors shows. Set so that intervals
#: hold the truth of synthetic devices about as often as they say (docs/evidence/power.md).
_CHOSEN = 1.15
_MOST_SCALE = 3.0
#: Largest error, in ln, that a sample moves a clock by; points that far from any curve tell nothing anyway.
_MOST_ERROR = 2.0


def bootstrap_curves(
    times: Sequence[Trial], powers: Sequence[Trial], points: Points, samples: int, seed: int
) -> tuple[Float64, Float64, Int64, Int64]:
    """Parameters of t(f) and P(f), (B, 5) and (B, 6), and which trial each sample is of.

    Args:
        times: all forms of t(f), the chosen one first.
        powers: likewise of P(f); none without energies.
        points: what they were fitted to.
        samples: B.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    drawn_BK = generator.integers(points.blocks, size=(samples, points.blocks))
    sign_BK = generator.choice([-1.0, 1.0], size=(samples, points.blocks))
    time_good = [index for index, trial in enumerate(times) if trial.as_good]
    power_good = [index for index, trial in enumerate(powers) if trial.as_good]
    row_B = np.arange(samples)
    time_form_B = np.array(time_good)[row_B % len(time_good)]
    power_form_B = np.zeros(samples, dtype=np.int64)
    if power_good:
        power_form_B = np.array(power_good)[row_B // len(time_good) % len(power_good)]
    time_BT = np.zeros((samples, len(TIME_TERMS)))
    power_BT = np.zeros((samples, len(POWER_TERMS)))
    for index in time_good:
        rows, trial = np.flatnonzero(time_form_B == index), times[index]
        assert isinstance(trial.form, TimeForm)
        if len(rows):
            fitted_N = iteration_s(trial.value_T, points.f0_mhz, points.mhz_N)[0]
            target_BN = _targets(
                points.iteration_s_N,
                fitted_N,
                trial.parameters,
                points.block_N,
                drawn_BK[rows],
                sign_BK[rows],
            )
            sample_BT = fit_time(trial.form, points, np.ones_like(target_BN), target_BN)
            sample_BT = spread_last_knees(trial.form, sample_BT, points, generator)
            time_BT[rows] = _or_fit(sample_BT, sample_BT[:, [0, 1, 3]], trial)
    for index in power_good:
        rows, trial = np.flatnonzero(power_form_B == index), powers[index]
        assert isinstance(trial.form, PowerForm)
        linear = tuple(term for term in trial.terms if term in POWER_TERMS[:4])
        if len(rows):
            fitted_N = power_mw(trial.value_T, points.f0_mhz, points.mhz_N, points.iteration_s_N)[0]
            target_BN = _targets(
                points.power_mw_N, fitted_N, trial.parameters, points.block_N, drawn_BK[rows], sign_BK[rows]
            )
            sample_BT = fit_power(trial.form, linear, points, np.ones_like(target_BN), target_BN)
            power_BT[rows] = _or_fit(sample_BT, sample_BT[:, :4], trial)
    return time_BT, power_BT, time_form_B, power_form_B


def _or_fit(sample_BT: Float64, amount_BK: Float64, trial: Trial) -> Float64:
    """Samples, with the fit itself in place of those that came out as nothing at all."""
    return np.where((amount_BK.sum(axis=1) > 0.0)[:, None], sample_BT, trial.value_T)


def _targets(
    measured_N: Float64, fitted_N: Float64, parameters: int, block_N: Int64, drawn_BK: Int64, sign_BK: Float64
) -> Float64:
    """Values to fit over those measured, (B, N): the fitted curve with other clocks' errors."""
    known_N = np.isfinite(measured_N)
    measured_N = np.where(known_N, measured_N, fitted_N)  # without weight in the fit
    error_N = np.log(measured_N / fitted_N)
    count_K = np.bincount(block_N[known_N], minlength=drawn_BK.shape[1])
    mean_K = np.bincount(block_N[known_N], error_N[known_N], drawn_BK.shape[1]) / count_K
    # The mean of more repeats errs less: put all clocks on one scale, and back on that of where the error
    # goes.
    standard_K = mean_K * np.sqrt(count_K) * _scale(len(count_K), parameters)
    moved_BK = np.clip(sign_BK * standard_K[drawn_BK] / np.sqrt(count_K), -_MOST_ERROR, _MOST_ERROR)
    return np.exp(moved_BK[:, block_N] - error_N)


def _scale(clocks: int, parameters: int) -> float:
    freedom = max(clocks - parameters, 1)
    quantile = student_over_normal(freedom)
    return min(_CHOSEN * float(np.sqrt(clocks / freedom)) * quantile, _MOST_SCALE)
