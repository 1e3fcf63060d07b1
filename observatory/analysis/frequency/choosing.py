"""Chooses the form of a curve by points that it did not see, and draws bootstrap samples of it.

Shapes: N points, B bootstrap samples, K clocks.

1. Each form of t(f) and P(f) is fitted with whole clocks left out and judged by ln(measured / predicted) on
   those. The highest clock and the two lowest are never left out whole, as nothing is ever predicted outside
   them and a knee needs two clocks below it: of their repeats some are held out while others stay.
2. Of the forms that are as good as the best (a likelihood at most e^2 times smaller), the one with the fewest
   parameters is chosen.
3. Bootstrap samples: the fit's error at each clock, all repeats of the clock together as one block, is one
   draw from how far repeats and settings scatter. A sample gives every clock the error of another clock drawn
   at random, with a random sign, and fits again. One draw serves time and power, since what disturbs a
   measurement disturbs both. Errors are scaled by sqrt(n / (n - p)) t / z, because n clocks are few compared
   with p parameters, and by a factor for the form having been chosen on the same points. The samples are
   spread over all forms that are as good as the best, so that not knowing the form widens an interval too. No
   sample loses a clock: the ends of the range stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.frequency.curves import (
    Points,
    determined_terms,
    fit_power,
    fit_time,
    spread_last_knees,
)
from observatory.analysis.frequency.model import (
    POWER_FORMS,
    POWER_TERMS,
    TIME_FORMS,
    TIME_TERMS,
    PowerForm,
    TimeForm,
    iteration_s,
    power_mw,
)
from observatory.analysis.frequency.model_file import Coefficient, CurveFit, FitCode, FormScore
from observatory.analysis.frequency.words import fit_words
from observatory.analysis.statistics import sample_ends, simplest, student_over_normal
from observatory.reasons import Reason

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

#: A knee takes one clock more.
_LEAST_CLOCKS = 3
_MOST_FOLDS = 12
#: Forms that err less than this cannot be distinguished by any sensor.
_NO_ERROR = 3e-4
#: Twice the logarithm of how much less likely a form may be than the best.
_AS_GOOD = 4.0
#: The form was chosen on the same points, which no redrawing of their errors shows. Set so that intervals
#: hold the truth of synthetic devices about as often as they say (docs/evidence/power.md).
_CHOSEN = 1.15
_MOST_SCALE = 3.0
#: Largest error, in ln, that a sample moves a clock by; points that far from any curve carry no information.
_MOST_ERROR = 2.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trial:
    """One form, what it got wrong on held-out points, and its fit to all of them; ``chosen`` comes first."""

    form: TimeForm | PowerForm
    terms: tuple[str, ...]
    error_N: Float64
    value_T: Float64
    as_good: bool = False

    @property
    def parameters(self) -> int:
        """How many numbers it takes from the data."""
        return len(self.terms)

    @property
    def error(self) -> float:
        """Root mean square of the held-out errors, missing ones left out."""
        return float(np.sqrt(np.nanmean(self.error_N**2)))

    def score(self) -> FormScore:
        """The errors in numbers."""
        return FormScore(
            form=self.form.name,
            parameters=self.parameters,
            rms_error=self.error,
            p90_error=float(np.quantile(np.abs(self.error_N[np.isfinite(self.error_N)]), 0.9)),
            as_good=self.as_good,
        )


def choose_time(points: Points, fold_N: Int64) -> list[Trial]:
    """All forms of t(f) that the points can pay for, the chosen one first."""
    forms = [form for form in TIME_FORMS.values() if _affordable(form, points)]
    return _choose([_try_time(form, points, fold_N) for form in forms])


def choose_power(points: Points, fold_N: Int64) -> list[Trial]:
    """Likewise of P(f); none when there are too few clocks for any."""
    trials = [_try_power(form, points, fold_N) for form in POWER_FORMS.values()]
    return _choose([trial for trial in trials if trial is not None])


def _affordable(form: TimeForm, points: Points) -> bool:
    """Whether there are clocks enough: one more than parameters, and four for a knee."""
    return form.parameters < points.blocks and (not form.has_knee or points.blocks > _LEAST_CLOCKS)


def fold_of(block_N: Int64, seed: int) -> Int64:
    """Fold in which each point is held out; -1 never."""
    last = int(block_N.max())
    ends = (0, last) if last < _LEAST_CLOCKS else (0, 1, last)
    whole = np.setdiff1d(np.arange(last + 1), ends)
    inner = np.random.default_rng(seed).permutation(whole)
    folds = max(2, min(_MOST_FOLDS, len(inner)))
    fold_of = np.full(last + 1, -1)
    fold_of[inner] = np.arange(len(inner)) % folds
    fold_N = fold_of[block_N]
    for end in ends:
        members = np.flatnonzero(block_N == end)
        if len(members) > 1:
            fold_N[members] = np.arange(len(members)) % folds
    return fold_N


def _weights(fold_N: Int64) -> Float64:
    """One row per fold, in which it is left out, and a last row with all points."""
    return np.vstack([fold_N[None] != fold for fold in [*range(int(fold_N.max()) + 1), -2]]).astype(
        np.float64
    )


def _try_time(form: TimeForm, points: Points, fold_N: Int64) -> Trial:
    value_KT = fit_time(form, points, _weights(fold_N))
    predicted_KN = iteration_s(value_KT, points.f0_mhz, points.mhz_N)
    predicted_N = predicted_KN[fold_N, np.arange(len(fold_N))]  # fold -1 is the row with all points
    return Trial(
        form=form,
        terms=form.terms,
        error_N=np.log(points.iteration_s_N / predicted_N),
        value_T=value_KT[-1],
    )


def _try_power(form: PowerForm, points: Points, fold_N: Int64) -> Trial | None:
    linear = determined_terms(form, points)
    shape = tuple(term for term in form.terms if term in POWER_TERMS[4:])
    if len(linear) + len(shape) >= points.blocks:
        return None
    value_KT = fit_power(form, linear, points, _weights(fold_N))
    seconds_N = points.iteration_s_N
    predicted_KN = power_mw(value_KT, points.f0_mhz, points.mhz_N, seconds_N)
    predicted_N = predicted_KN[fold_N, np.arange(len(fold_N))]
    error_N = np.log(points.power_mw_N / predicted_N)
    return Trial(form=form, terms=(*linear, *shape), error_N=error_N, value_T=value_KT[-1])


def _choose(trials: Sequence[Trial]) -> list[Trial]:
    """All trials, the chosen one first."""
    best = min(trial.error for trial in trials)
    count = int(np.isfinite(trials[0].error_N).sum())

    def as_good(trial: Trial) -> bool:
        if trial.error <= _NO_ERROR:
            return True
        return bool(2.0 * count * np.log(trial.error / max(best, 1e-300)) <= _AS_GOOD)

    judged = [replace(trial, as_good=as_good(trial)) for trial in trials]
    chosen = simplest(trial for trial in judged if trial.as_good)
    return [chosen, *(trial for trial in judged if trial is not chosen)]


def curve_fit(trials: Sequence[Trial], names: tuple[str, ...], sample_BT: Float64, form_B: Int64) -> CurveFit:
    """The chosen trial as a record.

    Args:
        trials: all forms, the chosen one first.
        names: all parameters of the curve.
        sample_BT: bootstrap samples, of several forms.
        form_B: which trial each sample is of.
    """
    chosen = trials[0]
    chosen_BT = sample_BT[form_B == 0]
    coefficients = []
    for index, term in enumerate(names):
        reason = _why_absent(term, chosen)
        low, high = (None, None) if reason else sample_ends(chosen_BT[:, index])
        coefficients.append(
            Coefficient(
                term=term,
                value=None if reason else float(chosen.value_T[index]),
                low=low,
                high=high,
                reason=fit_words(reason) if reason else "",
                reason_code=reason.code.value if reason else None,
            )
        )
    return CurveFit(
        form=chosen.form.name,
        parameters=tuple(chosen.value_T.tolist()),
        coefficients=tuple(coefficients),
        scores=tuple(trial.score() for trial in sorted(trials, key=lambda trial: trial.parameters)),
    )


def _why_absent(term: str, trial: Trial) -> Reason | None:
    """Why a parameter has no value; None when it has one."""
    if term in trial.terms:
        return None
    if trial.form.name == "flat":
        return Reason(FitCode.TIME_IS_FLAT)
    if trial.form.name == "linear" and term == "memory_s":
        return Reason(FitCode.TIME_IS_LINEAR)
    if term in trial.form.terms:
        return Reason(FitCode.NOT_SEPARABLE)
    return Reason(FitCode.NOT_IN_FORM, {"form": trial.form.name})


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
    measured_at_N = np.isfinite(measured_N)
    measured_N = np.where(measured_at_N, measured_N, fitted_N)  # without weight in the fit
    error_N = np.log(measured_N / fitted_N)
    count_K = np.bincount(block_N[measured_at_N], minlength=drawn_BK.shape[1])
    mean_K = np.bincount(block_N[measured_at_N], error_N[measured_at_N], drawn_BK.shape[1]) / count_K
    # The mean of more repeats errs less: put all clocks on one scale, and back on that of where the error
    # goes.
    standard_K = mean_K * np.sqrt(count_K) * _scale(len(count_K), parameters)
    moved_BK = np.clip(sign_BK * standard_K[drawn_BK] / np.sqrt(count_K), -_MOST_ERROR, _MOST_ERROR)
    return np.exp(moved_BK[:, block_N] - error_N)


def _scale(clocks: int, parameters: int) -> float:
    freedom = max(clocks - parameters, 1)
    return min(_CHOSEN * float(np.sqrt(clocks / freedom)) * student_over_normal(freedom), _MOST_SCALE)
