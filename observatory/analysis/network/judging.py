"""What a fit is good for: noise, errors, and a verdict.

Shapes: C cases, R repeats.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.network.network import FormScore, Verdict, VerdictReason

#: Beyond these a fit is not to be relied on (docs/network-model.md#verdict). Noise is the relative standard
#: error of a case's median, the median over cases; errors are those of held-out matrices.
BOUNDS: dict[str, float] = {
    "repeat_noise": 0.2,
    "held_out_median": 0.25,
    "held_out_p90": 0.5,
    "other_ranks_median": 0.25,
    "other_ranks_p90": 0.5,
}
_MOST_PAIRS = 20_000
#: Quartiles of fewer repeats say nothing about noise.
_LEAST_REPEATS = 3


def repeat_noise(us_R: NDArray[np.float64]) -> float | None:
    """Relative standard error of the median of repeats, from their quartiles; None for one or two."""
    if us_R.size < _LEAST_REPEATS:
        return None
    low, middle, high = np.quantile(us_R, [0.25, 0.5, 0.75])
    return float(1.2533 * (high - low) / 1.349 / middle / np.sqrt(us_R.size))


def paired_ratios(
    ratio_C: NDArray[np.float64],
    fabric_C: Sequence[tuple[int, ...]],
    bytes_C: Sequence[NDArray[np.int64]],
    group_C: Sequence[object],
) -> NDArray[np.float64]:
    """How far measured / predicted of two different matrices of one size and the same ranks lie apart.

    What the model gets wrong about all exchanges of a size alike cancels here. Both orders of every pair;
    empty where there is no pair.
    """
    busiest_C = np.array([int(max(each.sum(axis=0).max(), each.sum(axis=1).max())) for each in bytes_C])
    log_C = np.log(ratio_C)
    apart: list[float] = []
    for i in range(len(log_C)):
        for j in range(i):
            comparable = fabric_C[i] == fabric_C[j] and group_C[i] != group_C[j]
            if comparable and 0.5 * busiest_C[i] <= busiest_C[j] <= 2.0 * busiest_C[i]:
                apart += [log_C[i] - log_C[j], log_C[j] - log_C[i]]
        if len(apart) > _MOST_PAIRS:
            break
    ratios: NDArray[np.float64] = np.exp(np.array(apart, dtype=np.float64))
    return ratios


def verdict_of(score: FormScore, *, noise: float | None, other_ranks_p90: float | None) -> Verdict:
    """Whether a fit may be relied on, and why not.

    Args:
        score: of the chosen form.
        noise: median over cases of ``repeat_noise``; None when not known.
        other_ranks_p90: 90th percentile of the error with each number of ranks held out; None without.
    """
    values = {
        "repeat_noise": noise,
        "held_out_median": score.median_error,
        "held_out_p90": score.p90_error,
        "other_ranks_median": score.other_ranks_error,
        "other_ranks_p90": other_ranks_p90,
    }
    reasons = [
        VerdictReason.model_validate({"code": code, "value": value, "bound": BOUNDS[code]})
        for code, value in values.items()
        if value is not None and value > BOUNDS[code]
    ]
    noisy = noise is not None and noise > BOUNDS["repeat_noise"]
    return Verdict(
        code="too_noisy" if noisy else "does_not_fit" if reasons else "valid",
        reasons=tuple(reasons),
        repeat_noise=noise,
        median_error=score.median_error,
        p90_error=score.p90_error,
        other_ranks_median_error=score.other_ranks_error,
        other_ranks_p90_error=other_ranks_p90,
    )
