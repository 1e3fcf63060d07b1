"""Statistics that several analyses share: intervals, bootstraps, folds, and the choice between forms.

Shapes: B resamples, G groups of consecutive steps, N points, K folds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Annotated, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import special

from observatory.run.records import Count, Record

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

#: Probability of every interval that says nothing else.
LEVEL = 0.90

_Finite = Annotated[float, Field(allow_inf_nan=False)]


class Interval(Record):
    """A value with its 90 % interval.

    Attributes:
        value: the value.
        low, high: ends of the interval; None where it is not known.
    """

    value: _Finite
    low: _Finite | None = None
    high: _Finite | None = None

    def percent(self) -> str:
        """For people, as percent: ``12.3 % (11.8 to 12.9)``."""
        if self.low is None or self.high is None:
            return f"{100 * self.value:.1f} % (interval not known)"
        return f"{100 * self.value:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f})"


def sample_ends(sample_B: Float64) -> tuple[float, float] | tuple[None, None]:
    """The 90 % percentile interval of bootstrap samples; None without samples."""
    if not len(sample_B):
        return None, None
    low, high = np.quantile(sample_B, [0.05, 0.95]).tolist()
    return low, high


def sample_interval(value: float, sample_B: Float64) -> Interval:
    """The 90 % interval of bootstrap samples, extended so that it contains the value."""
    low, high = sample_ends(sample_B)
    if low is None or high is None:
        return Interval(value=value)
    return Interval(value=value, low=min(low, value), high=max(high, value))


def student_interval(value: float, error: float | None, freedom: int) -> Interval:
    """The 90 % interval of a standard error with its degrees of freedom; no ends when either is missing."""
    if error is None or freedom < 1:
        return Interval(value=value)
    half = student_quantile(freedom) * error
    return Interval(value=value, low=value - half, high=value + half)


def student_quantile(freedom: float, level: float = LEVEL) -> float:
    """Half width, in standard errors, of a two-sided interval with so many degrees of freedom."""
    return float(special.stdtrit(freedom, 1 - (1 - level) / 2))


def student_over_normal(freedom: float, level: float = LEVEL) -> float:
    """How much wider an interval gets because its standard error is itself an estimate: t / z."""
    upper = 1 - (1 - level) / 2
    return float(special.stdtrit(freedom, upper) / special.ndtri(upper))


def few_blocks_widening(blocks: int, level: float = LEVEL) -> float:
    """Factor for the width of a percentile interval of so many resampled blocks, two or more.

    Few blocks vary too little among themselves: t / z * sqrt(n / (n - 1)), the expanded percentile interval
    of arXiv 1411.5279.
    """
    return student_over_normal(blocks - 1, level) * math.sqrt(blocks / (blocks - 1))


def block_length(groups: int) -> int:
    """Length of the blocks of `block_weights`: about the cube root of G."""
    return max(1, round(math.cbrt(groups)))


def block_count(groups: int) -> int:
    """Number of blocks of `block_weights`."""
    return -(-groups // block_length(groups))


@lru_cache(maxsize=8)
def block_weights(groups: int, resamples: int, seed: int) -> Float64:
    """Circular block bootstrap: how often each group is drawn in each resample, (B, G); rows add up to G.

    Neighbouring groups are drawn together because consecutive steps resemble each other.
    """
    start_BN = np.random.default_rng(seed).integers(0, groups, size=(resamples, block_count(groups)))
    drawn_BG = ((start_BN[:, :, None] + np.arange(block_length(groups))) % groups).reshape(resamples, -1)
    flat = drawn_BG[:, :groups] + groups * np.arange(resamples)[:, None]
    counts = np.bincount(flat.ravel(), minlength=resamples * groups)
    return counts.reshape(resamples, groups).astype(np.float64)


def deal_folds(count: int, folds: int, seed: int) -> Int64:
    """Fold of each of ``count`` items, dealt out at random so that folds differ by one item at most."""
    order = np.random.default_rng(seed).permutation(count)
    fold_of = np.empty(count, dtype=np.int64)
    fold_of[order] = np.arange(count) % folds
    return fold_of


def hold_out(fold_N: Int64, predict: Callable[[Int64, Int64], Float64]) -> Float64:
    """Predict every point by a fit without its fold, (N,).

    Args:
        fold_N: fold of each point.
        predict: of the points to fit and the points to predict, the predictions.
    """
    predicted_N = np.empty(len(fold_N))
    for fold in np.unique(fold_N):
        out_N = fold_N == fold
        predicted_N[out_N] = predict(np.flatnonzero(~out_N), np.flatnonzero(out_N))
    return predicted_N


class Scored(Protocol):
    """A form with its error on points that its fit did not see."""

    @property
    def parameters(self) -> int:
        """Numbers that it takes from the data."""

    @property
    def error(self) -> float:
        """Its error on held-out points."""


ScoredT = TypeVar("ScoredT", bound=Scored)


def simplest(forms: Iterable[ScoredT]) -> ScoredT:
    """The form with the fewest parameters; of several, the one with the smallest error."""
    return min(forms, key=lambda form: (form.parameters, form.error))


def within_one_standard_error(excess_N: Float64, group_N: Int64, *, negligible: float) -> bool:
    """Whether a form is as good as the best: its mean excess error is at most one standard error of itself.

    Args:
        excess_N: error of the form less that of the best form, point by point.
        group_N: points of one group err together, so the standard error is taken over groups.
        negligible: an excess up to this counts as none.

    The rule is that of Breiman et al. 1984.
    """
    excess_G = np.bincount(group_N, weights=excess_N)
    standard_error = np.sqrt(len(excess_G) * excess_G.var()) / len(excess_N)
    return bool(excess_N.mean() <= max(standard_error, negligible))


class FormScore(Record):
    """How one form did on points that were left out of its fit.

    Attributes:
        form: its name.
        parameters: numbers that it takes from the data.
        p90_error: 90th percentile of the error.
    """

    form: str
    parameters: Count
    p90_error: Annotated[float, Field(ge=0.0, le=1e30)]


def hypergeometric(marked_drawn: Iterable[int], *, population: int, marked: int, drawn: int) -> Float64:
    """Chances that so many of ``drawn`` items are among the ``marked`` ones of a population, exact."""
    ways = math.comb(population, drawn)
    return np.array(
        [
            math.comb(marked, count) * math.comb(population - marked, drawn - count) / ways
            for count in marked_drawn
        ]
    )
