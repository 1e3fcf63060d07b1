"""What loads the steps that follow are likely to have.

Shapes: S steps, L layers, E experts.

Popularity drifts: the last steps say more about the next ones than the first do. How much more is measured on
the steps themselves: exponentially weighted means of a first part are compared with the mean of what follows,
for several half-lives and for equal weights.
"""

from __future__ import annotations

import numpy as np

from observatory.analysis.parallel.balancing.layouts import Float64

#: Half-lives that are tried, in steps.
_HALF_LIVES = (2.0, 4.0, 8.0, 16.0)
#: Equal weights are kept unless a half-life forecasts better by this part of the squared error.
_BETTER = 0.02
#: Fewer steps than this say nothing about drift.
_FEWEST_STEPS = 8
#: Part of the mean load of an expert that is added before loads are divided by each other.
_SMOOTHING = 0.1


def half_life(load_SLE: Float64) -> float | None:
    """Steps after which a step counts half in the best forecast; None where all should count alike."""
    steps = len(load_SLE)
    if steps < _FEWEST_STEPS:
        return None
    scale_LE = np.maximum(load_SLE.mean(axis=0), 1e-9)
    origins = range(steps // 4, steps * 3 // 4 + 1, max(1, steps // 16))

    def error(half_life: float | None) -> float:
        return sum(
            float(
                (
                    (_weighted(load_SLE[:t], half_life) - load_SLE[t : t + steps // 2].mean(axis=0)) ** 2
                    / scale_LE
                ).sum()
            )
            for t in origins
        )

    best = min(_HALF_LIVES, key=error)
    return best if error(best) < (1 - _BETTER) * error(None) else None


def forecast(load_SLE: Float64) -> tuple[Float64, Float64]:
    """Expected loads (L, E) of the steps that follow, and scenarios of single ones, (S, L, E).

    A scenario is a step that was, scaled expert by expert to the expected loads: it keeps which experts are
    busy together.
    """
    weight = half_life(load_SLE)
    mean_LE = load_SLE.mean(axis=0)
    if weight is None:
        return mean_LE, load_SLE
    expected_LE = _weighted(load_SLE, weight)
    more_LE = _SMOOTHING * mean_LE.mean(axis=1, keepdims=True)
    scale_LE = (expected_LE + more_LE) / np.maximum(mean_LE + more_LE, 1e-300)
    return expected_LE, np.asarray((load_SLE + more_LE) * scale_LE)


def _weighted(load_SLE: Float64, half_life: float | None) -> Float64:
    """Mean over steps, the last ones by most."""
    if half_life is None:
        return np.asarray(load_SLE.mean(axis=0))
    weight_S = 0.5 ** (np.arange(len(load_SLE))[::-1] / half_life)
    return np.tensordot(weight_S / weight_S.sum(), load_SLE, axes=1)
