"""Loads of experts from a power law, as capacity tools assume them, and the exponent of captured loads.

Shapes: S draws or steps, L layers, E experts.

The sampler is that of aiconfigurator (collector/helper.py and docs/POWER_LAW_DISTRIBUTION.md of
ai-dynamo/aiconfigurator): a load for each expert from a density proportional to x^-alpha between 1 and 0.8 of
the tokens (0.01 and 2 where there are fewer assignments than experts), scaled to the number of assignments.
It is no Zipf law by rank, so an exponent from a regression over ranks must not be given to such a tool.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

#: What aiconfigurator takes for all layers, batches and data of most models, and of DeepSeek's and others.
USUAL_ALPHA, DEEPSEEK_ALPHA = 1.2, 1.01

_GRID = np.round(np.concatenate([np.arange(0.05, 2.0, 0.05), np.arange(2.0, 4.01, 0.25)]), 2)
_DRAWS = 200
#: Loads further from the nearest law than this are not like any.
_FAR = 0.1


def power_law_loads(
    generator: np.random.Generator, *, draws: int, experts: int, top_k: int, tokens: int, alpha: float
) -> Int64:
    """Loads of experts drawn from a power law, (S, E), each at most ``tokens``."""
    assignments = tokens * top_k
    low, high = (1.0, max(0.8 * tokens, 1.0)) if assignments > experts else (0.01, 2.0)
    power = 1.0 - (alpha if abs(alpha - 1.0) > 1e-6 else 1.0 + 1e-6)
    uniform_SE = generator.random((draws, experts))
    value_SE = (uniform_SE * (high**power - low**power) + low**power) ** (1.0 / power)
    load_SE = np.rint(value_SE / value_SE.sum(axis=1, keepdims=True) * assignments).astype(np.int64)
    for load_E in load_SE:
        _fit_total(load_E, assignments, tokens)
    return np.asarray(load_SE)


def _fit_total(load_E: Int64, assignments: int, most: int) -> None:
    """Change loads in place so that none is above ``most`` and all add up; the largest give or take first."""
    np.minimum(load_E, most, out=load_E)
    order_E = np.argsort(-load_E, kind="stable")
    lacking = assignments - int(load_E.sum())
    while lacking:
        room_E = order_E[load_E[order_E] < most] if lacking > 0 else order_E[load_E[order_E] > 0][::-1]
        step = max(1, abs(lacking) // len(room_E))
        few_E = room_E[: min(len(room_E), abs(lacking))]
        limit_E = most - load_E[few_E] if lacking > 0 else load_E[few_E]
        change_E = np.minimum(step, limit_E)
        load_E[few_E] += change_E if lacking > 0 else -change_E
        lacking = assignments - int(load_E.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerLawFit:
    """The power law that is nearest to loads of a layer.

    Attributes:
        alpha: its exponent; 0 where loads are nearer to perfect balance, which tools call 0.
        is_by_busiest: no law has loads like these (one hot expert above equal ones): the exponent is that
            with the captured load of the busiest expert, on which times depend.
        distance: part of the assignments that would have to move to another expert to turn the mean sorted
            loads of the law into the captured ones, 0 to 1.
        busiest_captured, busiest_fitted: load of the busiest expert over the mean, mean over steps.
    """

    alpha: float
    is_by_busiest: bool
    distance: float
    busiest_captured: float
    busiest_fitted: float


def fit_power_law(load_SLE: Int64, *, top_k: int, seed: int = 0) -> tuple[PowerLawFit, ...]:
    """Fit the exponent of each layer to the sorted loads of its steps.

    Tokens of a step may differ; the law is drawn at their median.

    Args:
        load_SLE: assignments of steps of one phase.
        top_k: experts of a token.
        seed: of the draws.
    """
    layers, experts = load_SLE.shape[1:]
    tokens = max(1, int(np.median(load_SLE.sum(axis=2)) / top_k))
    generator = np.random.default_rng(seed)
    balanced_E = np.full(experts, 1.0 / experts)
    laws: list[tuple[float, Float64]] = [(0.0, balanced_E)]
    for alpha in _GRID.tolist():
        drawn_SE = power_law_loads(
            generator, draws=_DRAWS, experts=experts, top_k=top_k, tokens=tokens, alpha=alpha
        )
        laws.append((alpha, _sorted_shares(drawn_SE)))
    fits = []
    for layer in range(layers):
        captured_E = _sorted_shares(load_SLE[:, layer][load_SLE[:, layer].sum(axis=1) > 0])
        distances = [0.5 * float(np.abs(law_E - captured_E).sum()) for _, law_E in laws]
        best = int(np.argmin(distances))
        is_by_busiest = distances[best] > _FAR
        if is_by_busiest:
            best = int(np.argmin([abs(float(law_E[0] - captured_E[0])) for _, law_E in laws]))
        fits.append(
            PowerLawFit(
                is_by_busiest=is_by_busiest,
                alpha=laws[best][0],
                distance=distances[best],
                busiest_captured=float(captured_E[0] * experts),
                busiest_fitted=float(laws[best][1][0] * experts),
            )
        )
    return tuple(fits)


def _sorted_shares(load_SE: Int64) -> Float64:
    """Mean share of the busiest, second, ... expert, (E,)."""
    if not len(load_SE):
        return np.full(load_SE.shape[1], 1.0 / load_SE.shape[1])
    share_SE = load_SE / load_SE.sum(axis=1, keepdims=True)
    return np.asarray(-np.sort(-share_SE, axis=1).mean(axis=0))
