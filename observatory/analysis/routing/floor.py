"""What perfectly uniform routing looks like at a finite sample size.

Shapes: T tokens, K experts per token, E experts, R groups of n = E / R experts (experts themselves: n = 1).

Null model: every token picks K different experts, all sets equally likely, tokens independent. Even then
loads differ, so that Gini and max/mean have a floor which sinks as T grows. Read no value without it.
Real tokens are correlated, so that a routing without any preference can still lie somewhat above.

Gini: one token adds +1, -1 or 0 to the difference of two experts' loads, with probability
q = K (E - K) / (E (E - 1)) for each sign; the expected Gini (E - 1) / E * E|D_T| / (2 mu), mu = T K / E,
with D_T the sum of T such steps, is exact. For large mu it is sqrt((E - 1) / E) * sqrt((1 - K/E) / (pi mu)),
the usual closed form (derived from DODOCO's setting, arXiv 2605.20982) but for a factor near 1.

max/mean: the load of one group is a sum of T hypergeometric counts, whose distribution is computed.
The expected largest of R independent such loads follows; loads add up to T K, so that any two of them
have correlation -1 / (R - 1), which stretches deviations by sqrt(R / (R - 1)) (exact for normal loads,
and for R = 1). An approximation, within 1 % of simulation from 32 experts up and 3 % for a handful; R = 2
is exact.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special

from observatory.analysis.statistics import hypergeometric
from observatory.errors import LoadError

#: Above this standard deviation (in assignments) sums of tokens are taken as normal: skewness < 1e-3.
_NORMAL_FROM_DEVIATION = 2000.0


def gini_floor(*, tokens: int, top_k: float, experts: int) -> float | None:
    """Expected Gini of uniform routing at this sample size, exact.

    Args:
        tokens: T, tokens routed in the window.
        top_k: K; a mean number of experts per token may be given, which makes the answer an estimate.
        experts: E.

    Returns:
        The floor; None when there were no assignments.

    Raises:
        LoadError: K above E, or a negative number.
    """
    _check(tokens, top_k, experts)
    if tokens == 0 or top_k == 0:
        return None
    if experts == 1:
        return 0.0
    return _gini_floor(tokens, float(top_k), experts)


def gini_uniform_limit(*, tokens: int, top_k: float, experts: int) -> float | None:
    """Gini that uniform routing exceeds in about one window of a thousand (from some 32 experts up).

    Floor times 1 + 3.09 * 0.715 / sqrt(E): the relative standard deviation of Gini's mean difference over E
    normal values is sqrt(0.511 / E). Below it a Gini cannot be distinguished from uniform routing at this
    sample size.
    """
    floor = gini_floor(tokens=tokens, top_k=top_k, experts=experts)
    return None if floor is None else floor * (1.0 + 3.09 * 0.715 / math.sqrt(experts))


def max_over_mean_floor(
    *, tokens: int, top_k: float, experts: int, groups: int | None = None
) -> float | None:
    """Expected max/mean of uniform routing at this sample size, over experts or equal groups of experts.

    Args:
        tokens: T, tokens routed in the window.
        top_k: K; for single experts a mean number of experts per token may be given, for groups it is
            rounded to a whole number.
        experts: E.
        groups: R, ranks that hold E / R experts each; None for the experts themselves.

    Returns:
        The floor (1.0 for one group); None when there were no assignments.

    Raises:
        LoadError: K above E, a negative number, or groups that do not divide the experts.
    """
    _check(tokens, top_k, experts)
    groups = experts if groups is None else groups
    if groups < 1 or experts % groups:
        raise LoadError(f"{groups} groups do not divide {experts} experts; expected equal groups")
    if tokens == 0 or top_k == 0:
        return None
    if groups == 1:
        return 1.0
    return _max_over_mean_floor(tokens, float(top_k), experts, groups)


def _check(tokens: int, top_k: float, experts: int) -> None:
    if experts < 1 or tokens < 0 or not 0 <= top_k <= experts:
        raise LoadError(
            f"no sampling floor for {tokens} tokens, top-{top_k:g} of {experts} experts; "
            "expected tokens >= 0 and 0 <= top-k <= experts"
        )


@lru_cache(maxsize=4096)
def _gini_floor(tokens: int, top_k: float, experts: int) -> float:
    step = top_k * (experts - top_k) / (experts * (experts - 1))
    deviation = math.sqrt(2 * step * tokens)
    if deviation > _NORMAL_FROM_DEVIATION:
        mean_difference = deviation * math.sqrt(2 / math.pi)
    else:
        values, chances = _sum_distribution(np.array([step, 1 - 2 * step, step]), tokens)
        mean_difference = float(np.dot(chances, np.abs(values - tokens)))
    return (experts - 1) / experts * mean_difference / (2 * tokens * top_k / experts)


@lru_cache(maxsize=4096)
def _max_over_mean_floor(tokens: int, top_k: float, experts: int, groups: int) -> float:
    size = experts // groups
    if size == 1:
        one_token = np.array([1 - top_k / experts, top_k / experts])
    else:
        whole_k = max(1, round(top_k))
        counted = range(min(size, whole_k) + 1)
        one_token = hypergeometric(counted, population=experts, marked=size, drawn=whole_k)
    counts = np.arange(one_token.size)
    mean_one = float(np.dot(one_token, counts))
    deviation = math.sqrt(max(0.0, tokens * float(np.dot(one_token, (counts - mean_one) ** 2))))
    mean = tokens * mean_one
    if deviation > _NORMAL_FROM_DEVIATION:
        stretch = math.sqrt(groups / (groups - 1))
        return 1.0 + stretch * deviation * _expected_largest_normal(groups) / mean
    values, chances = _sum_distribution(one_token, tokens)
    if groups == 2:  # the larger of two that add up lies as far above the mean as the smaller below
        return min(2.0, 1.0 + float(np.dot(chances, np.abs(values - mean))) / mean)
    below = np.minimum(np.cumsum(chances), 1.0)
    largest = float(values[0] + np.sum(1.0 - below**groups))
    largest = max(largest, math.ceil(mean - 1e-9))  # some group holds at least the mean, in whole assignments
    return min(groups, 1.0 + math.sqrt(groups / (groups - 1)) * max(0.0, largest / mean - 1.0))


def _sum_distribution(one: NDArray[np.float64], terms: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Values and probabilities of a sum of ``terms`` independent counts with probabilities ``one``.

    Fourier inversion on a window of 12 standard deviations and 20 counts to each side, outside of which
    the mass is far below rounding; so the cost does not grow with ``terms``.
    """
    counts = np.arange(one.size)
    mean = float(np.dot(one, counts))
    deviation = math.sqrt(max(0.0, terms * float(np.dot(one, (counts - mean) ** 2))))
    reach = math.ceil(12 * deviation + 20)
    size = 1 << (max(2 * reach, one.size) + 1).bit_length()
    first = max(0, math.floor(terms * mean) - reach)
    spectrum = np.fft.rfft(one, size)
    powered = np.abs(spectrum) ** terms * np.exp(1j * terms * np.angle(spectrum))
    wrapped = np.fft.irfft(powered, size)
    values = first + np.arange(size)
    chances = np.clip(wrapped[values % size], 0.0, None)
    return values, chances / chances.sum()


@lru_cache(maxsize=256)
def _expected_largest_normal(count: int) -> float:
    """Expected largest of ``count`` independent standard normal values."""
    value_N = np.linspace(-10.0, 12.0, 4001)  # smooth, and zero at both ends: exact to rounding
    density_N = np.exp(-(value_N**2) / 2) / math.sqrt(2 * math.pi)
    return float(np.trapezoid(value_N * count * density_N * special.ndtr(value_N) ** (count - 1), value_N))
