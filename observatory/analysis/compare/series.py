"""One measured quantity of one place of a run, and the difference between two of them.

Shapes: N steps (or groups of steps, or samples) in time order, E experts.

Steps of one run resemble their neighbours, so the error of a mean over steps is that of a first-order
autoregressive series: variance times (1 + r) / (1 - r) over N, with the correlation r of neighbours corrected
for the bias of short series (Kendall 1954) and N (1 - r) / (1 + r) - 1 degrees of freedom. Differences of
steps that match are taken step by step first; what both runs share then cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import special

from observatory.analysis.statistics import student_quantile

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
#: Standard error and degrees of freedom.
_Error = tuple[float, float]

#: Probability of the intervals of differences: those of a test at 5 %.
LEVEL = 0.95
#: With fewer steps than this on either side there is no interval.
FEWEST_STEPS = 8
#: With fewer degrees of freedom than this an interval that holds 0 does not show that nothing changed. It is
#: given nevertheless: leaving it out keeps those whose correlation was underestimated.
FEWEST_FREEDOM = 3.0
#: Share of the steps that is trimmed at each end of a time.
TRIMMED = 0.1
_HIGHEST_CORRELATION = 0.95
#: Longer series are averaged over neighbouring steps.
_MOST_STEPS = 4096


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Series:
    """A value, and what shows how sure it is.

    Attributes:
        value: of the whole run.
        sample_N: values of the steps whose mean is the value, or pseudo-values of the statistic that it is;
            None where the steps are not known.
        step_N: the steps of the samples; None where they belong to no step.
        error: standard error where there are no samples; None where it is not known.
        exact: the value is a count of everything that ran.
        tokens: what a value of routing depends on: tokens of a step, or of the run where it is added up over
            steps; None where it depends on none.
    """

    value: float
    sample_N: Float64 | None = None
    step_N: Int64 | None = None
    error: float | None = None
    exact: bool = False
    tokens: int | None = None

    @property
    def steps(self) -> int:
        """Samples behind the value; 0 where they are not known."""
        return 0 if self.sample_N is None else len(self.sample_N)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Another value less the baseline's.

    Attributes:
        difference: in the unit of the values.
        low, high: its 95 % interval; None where it is not known.
        relative, relative_low, relative_high: the same over the baseline's value; None where that is not
            above 0.
        p: probability of a difference as large by chance; None without an interval.
        paired: matching steps were compared one by one.
        steps: steps behind it, of the side with fewer.
        runs: runs of the baseline behind it, 1 where the steps of one show how sure it is.
        freedom: degrees of freedom of its error; None without an interval.
    """

    difference: float
    low: float | None = None
    high: float | None = None
    relative: float | None = None
    relative_low: float | None = None
    relative_high: float | None = None
    p: float | None = None
    paired: bool = False
    steps: int = 0
    runs: int = 1
    freedom: float | None = None


@dataclass(frozen=True, slots=True)
class Pooled:
    """Correlation of neighbouring steps, from all layers together; None where it is not known.

    Attributes:
        base, other: of the values of each side.
        paired: of the differences of matching steps.
    """

    base: float | None = None
    other: float | None = None
    paired: float | None = None


def mean_series(value_N: Float64, step_N: Int64 | None = None, *, trimmed: bool = False) -> Series | None:
    """The mean over steps, or the mean without the fastest and the slowest tenth; None without values."""
    finite_N = np.isfinite(value_N)
    value_N = value_N[finite_N]
    if not len(value_N):
        return None
    step_N = None if step_N is None else step_N[finite_N]
    sample_N = _folded(trimmed_values(value_N) if trimmed else value_N)
    steps = None if step_N is None else step_N[:: _fold(len(step_N))]
    return Series(value=float(sample_N.mean()), sample_N=sample_N, step_N=steps)


def statistic_series(
    load_NE: Int64, step_N: Int64 | None, statistic: Callable[[Int64], Float64]
) -> Series | None:
    """A statistic of loads that are added up over steps, with the pseudo-values of a jackknife.

    Args:
        load_NE: loads of steps or groups of steps.
        step_N: their first steps.
        statistic: of rows of loads, one value each.
    """
    total_1E = load_NE.sum(axis=0, keepdims=True)
    value = float(statistic(total_1E)[0])
    count = len(load_NE)
    if not np.isfinite(value):
        return None
    if count < FEWEST_STEPS:
        return Series(value=value)
    without_N = statistic(total_1E - load_NE)
    if not np.isfinite(without_N).all():
        return Series(value=value)
    pseudo_N = count * value - (count - 1) * without_N
    return Series(value=value, sample_N=pseudo_N, step_N=step_N)


def trimmed_values(value_N: Float64) -> Float64:
    """Values whose mean is the trimmed mean, and whose scatter is that of its error (Yuen 1974)."""
    count = len(value_N)
    cut = int(TRIMMED * count)
    if cut == 0:
        return value_N
    ordered_N = np.sort(value_N)
    winsorised_N = np.clip(value_N, ordered_N[cut], ordered_N[count - 1 - cut])
    widened_N = (winsorised_N - winsorised_N.mean()) * count / (count - 2 * cut)
    return np.asarray(ordered_N[cut : count - cut].mean() + widened_N)


def mean_of(series: list[Series]) -> Series:
    """The mean of several quantities of the same steps, such as of all layers of a run."""
    value = float(np.mean([item.value for item in series]))
    first = series[0]
    alike = all(
        item.sample_N is not None and item.steps == first.steps and _same(item.step_N, first.step_N)
        for item in series
    )
    tokens = first.tokens if all(item.tokens == first.tokens for item in series) else None
    if not alike:
        return Series(value=value, tokens=tokens)
    sample_N = np.mean([item.sample_N for item in series if item.sample_N is not None], axis=0)
    return replace(first, value=value, sample_N=sample_N, tokens=tokens)


def steps_match(base: Series, other: Series) -> bool:
    """Whether both have the same steps."""
    return base.step_N is not None and _same(base.step_N, other.step_N)


def difference_of(base: Series, other: Series, *, paired: bool, pooled: Pooled = Pooled()) -> Difference:
    """The difference with its interval; none with too few steps.

    The relative difference is over the baseline's value as it was measured.

    Args:
        base: the baseline.
        other: what is compared with it.
        paired: take the differences of matching steps; both must have the same steps.
        pooled: how much neighbouring steps resemble each other, where other layers show it as well.
    """
    change = other.value - base.value
    relative = change / base.value if base.value > 0 else None
    if base.exact and other.exact:
        return _of_counts(change, relative, same=paired)
    if paired:
        assert base.sample_N is not None
        assert other.sample_N is not None
        error = _error_of(other.sample_N - base.sample_N, pooled.paired)
    else:
        error = _joined(_error_of_series(base, pooled.base), _error_of_series(other, pooled.other))
    steps = min(base.steps, other.steps)
    if error is None:
        return Difference(difference=change, relative=relative, paired=paired, steps=steps)
    return _with_error(change, base.value, error, paired=paired, steps=steps)


def difference_of_runs(base_R: Float64, other: Series) -> Difference:
    """One run against several runs of a baseline, whose scatter shows how much runs of one set-up differ.

    The interval is that of the difference of one further run: deviation of the runs times the root of 1 + 1
    / R, with R - 1 degrees of freedom.
    """
    count, value = len(base_R), float(base_R.mean())
    error = float(base_R.std(ddof=1)) * float(np.sqrt(1 + 1 / count)), float(count - 1)
    return replace(
        _with_error(other.value - value, value, error, paired=False, steps=other.steps), runs=count
    )


def _with_error(change: float, base: float, error: _Error, *, paired: bool, steps: int) -> Difference:
    half = student_quantile(error[1], LEVEL) * error[0]
    low, high = change - half, change + half
    relative = (change / base, low / base, high / base) if base > 0 else (None, None, None)
    chance = float(change == 0)
    if error[0] > 0:
        chance = float(2 * special.stdtr(error[1], -abs(change) / error[0]))
    return Difference(
        difference=change, low=low, high=high, relative=relative[0], relative_low=relative[1],
        relative_high=relative[2], p=chance, paired=paired, steps=steps, freedom=error[1],
    )  # fmt: skip


def _of_counts(change: float, relative: float | None, *, same: bool) -> Difference:
    """Of counts: certain where the same was counted on both sides; else chance is an unknown part of it."""
    if not same:
        return Difference(difference=change, relative=relative)
    return Difference(
        difference=change, low=change, high=change, p=1.0 if change == 0 else 0.0, paired=True,
        relative=relative, relative_low=relative, relative_high=relative,
    )  # fmt: skip


def pooled_correlation(samples: Sequence[Float64]) -> float | None:
    """Correlation of neighbouring steps, the mean over layers; None with fewer than two of them."""
    correlations = [r for sample_N in samples if (r := neighbour_correlation(sample_N)) is not None]
    return float(np.mean(correlations)) if len(correlations) > 1 else None


def neighbour_correlation(sample_N: Float64) -> float | None:
    """Correlation of neighbours, corrected for the length of the series; None of a short or constant one."""
    count = len(sample_N)
    rest_N = sample_N - sample_N.mean()
    square = float(rest_N @ rest_N)
    if count < FEWEST_STEPS or square <= 1e-24 * count * float(np.abs(sample_N).max()) ** 2:
        return None
    r = float(rest_N[1:] @ rest_N[:-1]) / square
    return r + (1 + 3 * r) / count


def _error_of(sample_N: Float64, pooled: float | None = None) -> _Error | None:
    """Of the mean of a series of neighbouring steps; None with too few."""
    count = len(sample_N)
    if count < FEWEST_STEPS:
        return None
    r = neighbour_correlation(sample_N)
    if r is None:
        return 0.0, float(count - 1)
    if pooled is not None:  # a layer of its own kind is not taken to be like the others
        r = max(pooled, (pooled + r) / 2)
    r = min(max(r, 0.0), _HIGHEST_CORRELATION)
    spread = (1 + r) / (1 - r)
    variance = float(sample_N.var(ddof=1))
    if pooled is not None:  # steps that resemble each other scatter too little around their own mean
        variance /= max(1 - (spread - 1) / (count - 1), 0.2)
    return float(np.sqrt(variance * spread / count)), max(count / spread - 1, 1.0)


def _joined(first: _Error | None, second: _Error | None) -> _Error | None:
    """Error of a difference of two that have nothing to do with each other (Welch)."""
    if first is None or second is None:
        return None
    parts = first[0] ** 2, second[0] ** 2
    variance = sum(parts)
    if variance == 0:
        return 0.0, first[1] + second[1]
    freedom = variance**2 / (parts[0] ** 2 / first[1] + parts[1] ** 2 / second[1])
    return float(np.sqrt(variance)), float(freedom)


def standard_error(series: Series) -> float | None:
    """Of the value; None with too few steps, or where nothing shows it."""
    error = _error_of_series(series, None)
    return None if error is None else error[0]


def interval_of(series: Series) -> tuple[float, float] | None:
    """95 % interval of the value; None with too few steps, or where nothing shows it."""
    error = _error_of_series(series, None)
    if error is None:
        return None
    half = student_quantile(error[1], LEVEL) * error[0]
    return series.value - half, series.value + half


def _error_of_series(series: Series, pooled: float | None) -> _Error | None:
    if series.exact:
        return 0.0, 1e6
    if series.sample_N is not None:
        return _error_of(series.sample_N, pooled)
    return None if series.error is None else (series.error, 1e6)


def false_discovery(p_N: Float64) -> Float64:
    """Adjust p values for their number: at most a share q of those up to q is false (Benjamini-Hochberg)."""
    count = len(p_N)
    order = np.argsort(p_N)[::-1]
    adjusted = np.minimum.accumulate(p_N[order] * count / np.arange(count, 0, -1))
    result = np.empty(count)
    result[order] = np.minimum(adjusted, 1.0)
    return result


def _fold(count: int) -> int:
    """Neighbouring steps that become one, so that no more than `_MOST_STEPS` remain."""
    return max(1, -(-count // _MOST_STEPS))


def _folded(value_N: Float64) -> Float64:
    fold = _fold(len(value_N))
    return np.add.reduceat(value_N, np.arange(0, len(value_N), fold)) / np.diff(
        np.append(np.arange(0, len(value_N), fold), len(value_N))
    )


def _same(one_N: Int64 | None, other_N: Int64 | None) -> bool:
    if one_N is None or other_N is None:
        return one_N is other_N
    return bool(np.array_equal(one_N, other_N))
