"""How much a window's Gini would change with other steps of the same kind: a block bootstrap.

Shapes: B resamples, G groups of consecutive steps, E experts.

Consecutive steps share sequences and topics, so blocks of neighbouring groups are drawn (circular, length
about the cube root of G) rather than single steps. Resampling adds sampling noise of its own, which lifts
every resampled Gini; near the sampling floor an ordinary percentile interval would lie above the value it
belongs to. So the percentiles are shifted by the difference between the value and the resamples' mean.
Few blocks vary too little among themselves, so the interval is widened (`statistics.few_blocks_widening`):
ten steps do not pass for a thousand.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.statistics import block_count, block_weights, few_blocks_widening

#: With fewer steps (or groups of steps) than this, no interval is given.
FEWEST_GROUPS = 5


def resampled_gini(load_GE: NDArray[np.int64], *, resamples: int, seed: int) -> NDArray[np.float64] | None:
    """Gini of resampled windows, (B,).

    The draws depend on ``G``, ``resamples`` and ``seed`` alone, so that layers of one run are resampled
    with the same steps and their Ginis may be averaged resample by resample.

    Args:
        load_GE: loads per step (or group of steps), in time order.
        resamples: B; 0 turns intervals off.
        seed: of the drawn blocks.

    Returns:
        NaN where a resample holds no assignment; None with fewer than `FEWEST_GROUPS` groups or no resamples.
    """
    groups = load_GE.shape[0]
    if resamples < 1 or groups < FEWEST_GROUPS:
        return None
    weight_BG = block_weights(groups, resamples, seed)
    # einsum stays on this thread: `@` wakes the BLAS threads for every layer, at ten times the cost
    return _gini_of_floats(np.einsum("bg,ge->be", weight_BG, load_GE.astype(np.float64)))


def centred_interval(
    resampled_B: NDArray[np.float64] | None, value: float | None, *, groups: int, level: float = 0.95
) -> tuple[float, float] | None:
    """Percentile interval of ``resampled_B``, moved so that their mean falls on ``value``, and widened.

    Args:
        resampled_B: what `resampled_gini` returned, or its mean over layers.
        value: Gini of the window itself.
        groups: G that was resampled.
        level: probability the interval is made for.

    Returns:
        (low, high) within [0, 1]; None when there is no value or nothing was resampled.
    """
    if resampled_B is None or value is None:
        return None
    some = resampled_B[~np.isnan(resampled_B)]
    if some.size == 0:
        return None
    tail = (1 - level) / 2
    widening = few_blocks_widening(block_count(groups), level)
    low, high = value + widening * (np.quantile(some, [tail, 1 - tail]) - some.mean())
    return float(np.clip(low, 0.0, 1.0)), float(np.clip(high, 0.0, 1.0))


def _gini_of_floats(load_BE: NDArray[np.float64]) -> NDArray[np.float64]:
    experts = load_BE.shape[1]
    weight_E = (2 * np.arange(1, experts + 1) - experts - 1).astype(np.float64)
    total_B = load_BE.sum(axis=1)
    gini_B = np.full(total_B.shape, np.nan)
    some = total_B > 0
    gini_B[some] = (np.sort(load_BE[some], axis=1) @ weight_E) / (experts * total_B[some])
    return gini_B
