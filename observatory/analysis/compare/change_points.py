"""Where a series changes its level, by a permutation test.

Shapes: N points in order, B permutations.

The statistic is the largest difference of mean ranks before and after a split, standardised, over all splits
that leave two points or more on each side (after Pettitt 1979); ranks, so that one outlier is no change. Its
distribution without a change is that over permutations, which depends on N alone. A series that changes is
split where the means of its values (the extreme twentieths cut) differ most, and its parts are tested in turn
(binary segmentation, Vostrikova 1981).

Points that resemble their neighbours, as steps of a run do, are no permutation of each other. They are made
independent first, x[i] - r x[i-1] with the correlation r of neighbours around the levels of the best split
(corrected for short series), and tested at a fifth of the level, as r is an estimate. So are the parts of a
series that changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Float64 = NDArray[np.float64]

#: Share of series without a change in which one is found.
FALSE_ALARMS = 0.05
#: Fewer points than this show no change: with four on each side, 2 of 70 orders are as extreme.
FEWEST_POINTS = 8
#: Fewer steps of one run than this say too little of how they resemble each other.
FEWEST_STEPS = 40
_STRICT_LEVEL = FALSE_ALARMS / 5
_PERMUTATIONS = 3999
_FEWEST_ON_A_SIDE = 2
_MOST_POINTS = 256
_HIGHEST_CORRELATION = 0.95
#: Of the bias of a correlation around two levels, in (2 + 4 r) / N.
_CORRECTION = 1.7


@dataclass(frozen=True, slots=True)
class Split:
    """The best split of a series.

    Attributes:
        at: first point behind it.
        p: probability of one as good without a change.
    """

    at: int
    p: float


def best_split(value_N: Float64, *, alike: bool) -> Split | None:
    """The best split; None with too few points, or where all are equal.

    Args:
        value_N: finite values in order.
        alike: neighbours resemble each other: steps of one run.
    """
    if len(value_N) < (FEWEST_STEPS if alike else FEWEST_POINTS) or np.ptp(value_N) == 0:
        return None
    tested_N = _whitened(value_N) if alike else value_N
    fold = -(-len(tested_N) // _MOST_POINTS)
    kept = len(tested_N) // fold
    tested_N = tested_N[: kept * fold].reshape(kept, fold).mean(axis=1)
    best = float(_gains(_ranks(tested_N)).max())
    null_B = _null(len(tested_N))
    beyond = len(null_B) - int(np.searchsorted(null_B, best - 1e-9))
    return Split(at=_place(value_N), p=(1 + beyond) / (len(null_B) + 1))


def level(*, alike: bool) -> float:
    """The p value up to which a split is a change."""
    return _STRICT_LEVEL if alike else FALSE_ALARMS


def splits(value_N: Float64, first: Split, *, alike: bool) -> list[int]:
    """All changes of a series in order, each the first point of its new level, given its best split."""
    places = [first.at]
    waiting = [(0, first.at), (first.at, len(value_N))]
    while waiting:
        start, end = waiting.pop()
        split = best_split(value_N[start:end], alike=alike)
        if split is not None and split.p <= _STRICT_LEVEL:
            at = start + split.at
            places.append(at)
            waiting += [(start, at), (at, end)]
    return sorted(places)


def _place(value_N: Float64) -> int:
    """First point behind the split at which the levels of the values differ most; extremes count less."""
    low, high = np.quantile(value_N, [0.05, 0.95]).tolist()
    cut_1N = np.asarray(np.clip(value_N, low, high), dtype=np.float64)[None]
    return int(_gains(cut_1N).argmax()) + _FEWEST_ON_A_SIDE


def _ranks(value_N: Float64) -> Float64:
    return np.asarray(rankdata(value_N), dtype=np.float64)[None]


def _whitened(value_N: Float64) -> Float64:
    at = _place(value_N)
    rest_N = np.concatenate([part - part.mean() for part in (value_N[:at], value_N[at:])])
    square = float(rest_N @ rest_N)
    r = float(rest_N[1:] @ rest_N[:-1]) / square if square > 0 else 0.0
    r = min(max(r + _CORRECTION * (2 + 4 * r) / len(value_N), 0.0), _HIGHEST_CORRELATION)
    return np.asarray(value_N[1:] - r * value_N[:-1])


def _gains(rank_BN: Float64) -> Float64:
    """How much each split separates, (B, splits)."""
    count = rank_BN.shape[1]
    rest_BN = rank_BN - rank_BN.mean(axis=1, keepdims=True)
    sum_BK = np.cumsum(rest_BN, axis=1)[:, _FEWEST_ON_A_SIDE - 1 : count - _FEWEST_ON_A_SIDE]
    left_K = np.arange(_FEWEST_ON_A_SIDE, count - _FEWEST_ON_A_SIDE + 1)
    return np.asarray(np.abs(sum_BK) / np.sqrt(left_K * (count - left_K) / count))


@lru_cache(maxsize=512)
def _null(count: int) -> Float64:
    """Best gains of random orders, ascending."""
    random = np.random.default_rng(count)
    rank_BN = np.argsort(random.random((_PERMUTATIONS, count)), axis=1).astype(np.float64)
    return np.sort(_gains(rank_BN).max(axis=1))
