"""Whether a change pays: the gain that steps which follow are likely to show, layer by layer.

Shapes: S steps, L layers, E experts, P ranks, K slots of each rank, B blocks of steps.

A layout promises on its own steps about three times what it holds. So the same solver is run on the first
half and on the first three quarters of the steps, and is judged on the steps after them. What single layers
show is noisy: it is shrunk towards the mean of all layers, by as much as it scatters between blocks of
steps.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from observatory.analysis.parallel.balancing.layouts import Float64, Int64

#: Fewer steps than this cannot be split.
FEWEST_STEPS = 8
#: Steps of a block: neighbouring steps are alike.
_BLOCK = 4

#: Makes a layout of loads (S, L, E).
StepsMaker = Callable[[Float64], Int64]
#: Times of the busiest rank over those of a perfect balance, (S, L), of loads and a layout.
Judge = Callable[[Float64, Int64], Float64]


def expected_gain(load_SLE: Float64, today_LPK: Int64, make: StepsMaker, judge: Judge) -> Float64 | None:
    """What a layout made on these steps is likely to gain over today's on the next ones, (L,).

    Returns:
        Differences of the ratio of busiest to mean rank; None where the steps are too few for an estimate.
    """
    steps = len(load_SLE)
    if steps < FEWEST_STEPS:
        return None
    gains = []
    for origin in (steps // 2, steps * 3 // 4):
        after_SLE = load_SLE[origin:]
        gain_SL = judge(after_SLE, today_LPK) - judge(after_SLE, make(load_SLE[:origin]))
        gains.append(shrunk(gain_SL))
    return np.asarray(np.mean(gains, axis=0))


def shrunk(gain_SL: Float64) -> Float64:
    """Mean gains of layers, drawn towards the mean of all by their sampling noise, (L,)."""
    mean_L = gain_SL.mean(axis=0)
    blocks = len(gain_SL) // _BLOCK
    if blocks < 2 or len(mean_L) < 2:
        return np.asarray(mean_L if len(mean_L) < 2 else np.full_like(mean_L, mean_L.mean()))
    block_BL = gain_SL[len(gain_SL) - blocks * _BLOCK :].reshape(blocks, _BLOCK, -1).mean(axis=1)
    noise_L = block_BL.var(axis=0, ddof=1) / blocks
    between = max(float(mean_L.var(ddof=1) - noise_L.mean()), 0.0)
    kept_L = between / np.maximum(between + noise_L, 1e-300)
    return np.asarray(mean_L.mean() + kept_L * (mean_L - mean_L.mean()))
