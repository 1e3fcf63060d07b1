"""The exponent of a power law is found again in loads that were drawn from it."""

from __future__ import annotations

import numpy as np
import pytest

from observatory.analysis.routing.power_law import ALPHAS, fit_power_law, power_law_shares
from observatory.errors import LoadError


def drawn(alpha: float, *, steps: int, experts: int, tokens: int, top_k: int, seed: int) -> np.ndarray:
    """Loads drawn as the performance model does: by inverse distribution function, then scaled."""
    generator = np.random.default_rng(seed)
    low, high = (1.0, 0.8 * tokens) if tokens * top_k > experts else (0.01, 2.0)
    u = generator.random((steps, experts))
    if alpha == 1:
        x = low * (high / low) ** u
    else:
        power = 1 - alpha
        x = ((high**power - low**power) * u + low**power) ** (1 / power)
    return np.rint(x / x.sum(axis=1, keepdims=True) * tokens * top_k).astype(np.int64)


@pytest.mark.parametrize("alpha", [0.6, 1.0, 1.01, 1.2, 1.5])
def test_the_exponent_is_found_again(alpha: float) -> None:
    load_SE = drawn(alpha, steps=40, experts=128, tokens=4096, top_k=8, seed=1)
    fit = fit_power_law(load_SE, top_k=8)
    assert fit is not None
    assert fit.alpha == pytest.approx(alpha, abs=0.05)
    assert fit.nearest == (1.2 if alpha > 1.1 else 1.01)
    assert fit.misplaced_share < 0.15 < fit.balanced_misplaced_share
    assert (fit.steps, fit.tokens) == (40, pytest.approx(4096, rel=1e-3))


def test_few_tokens_have_the_other_range() -> None:
    fit = fit_power_law(drawn(1.2, steps=400, experts=64, tokens=8, top_k=8, seed=2), top_k=8)
    assert fit is not None
    assert fit.alpha == pytest.approx(1.2, abs=0.15)
    shares_AE = power_law_shares(64, tokens=8, assignments=64)
    assert shares_AE[ALPHAS.index(1.2)].max() < 0.2, "at most 2 of what is at least 0.01"


def test_equal_loads_are_balanced_and_none_are_nothing() -> None:
    fit = fit_power_law(np.full((3, 16), 10), top_k=2)
    assert fit is not None
    assert (fit.alpha, fit.misplaced_share, fit.balanced_misplaced_share) == (0.0, 0.0, 0.0)
    assert fit_power_law(np.zeros((3, 16), np.int64), top_k=2) is None
    with pytest.raises(LoadError, match="two experts"):
        fit_power_law(np.ones((3, 1), np.int64), top_k=1)


def test_shares_follow_the_formula() -> None:
    shares_AE = power_law_shares(2, tokens=100, assignments=200)
    assert np.allclose(shares_AE.sum(axis=1), 1)
    # alpha 2 on [1, 80] at u = 1/4 and 3/4: x = 1 / (1 - u (1 - 1/80)).
    x = [1 / (1 - u * (1 - 1 / 80)) for u in (0.25, 0.75)]
    assert shares_AE[ALPHAS.index(2.0)] == pytest.approx(np.array(x) / sum(x))
