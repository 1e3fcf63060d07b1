"""Loads of steps with any number of tokens."""

from __future__ import annotations

import numpy as np
import pytest

from observatory.analysis.capacity.loads import BalancedLoads, CapturedLoads, PowerLawLoads
from observatory.analysis.capacity.power_law import fit_power_law, power_law_loads


@pytest.mark.parametrize("tokens", [1, 3, 64, 5000])
@pytest.mark.parametrize("alpha", [0.3, 1.0, 1.2, 2.5])
def test_a_power_law_gives_every_token_its_experts(tokens, alpha):
    loads = power_law_loads(
        np.random.default_rng(0), draws=20, experts=32, top_k=4, tokens=tokens, alpha=alpha
    )
    assert loads.shape == (20, 32)
    assert (loads.sum(axis=1) == tokens * 4).all()
    assert loads.min() >= 0
    assert loads.max() <= tokens


@pytest.mark.parametrize("alpha", [0.4, 0.8, 1.2, 1.6])
def test_the_exponent_of_drawn_loads_is_found(alpha):
    drawn = power_law_loads(np.random.default_rng(1), draws=60, experts=64, top_k=4, tokens=2048, alpha=alpha)
    fit = fit_power_law(drawn[:, None], top_k=4)[0]
    assert fit.alpha == pytest.approx(alpha, abs=0.15)
    assert fit.distance < 0.03
    assert not fit.is_by_busiest
    assert fit.busiest_fitted == pytest.approx(fit.busiest_captured, rel=0.15)


def test_balanced_loads_have_no_exponent():
    loads = BalancedLoads(2, 64, 4).draw(2048, 8, np.random.default_rng(0))
    assert [fit.alpha for fit in fit_power_law(loads, top_k=4)] == [0.0, 0.0]


@pytest.mark.parametrize("share", [0.25, 0.125])
def test_one_hot_expert_is_no_balance(share):
    """Its load decides how long a rank takes; the law nearest to all loads would hide it."""
    share_E = np.full(64, (1.0 - share) / 63)
    share_E[7] = share
    loads = np.random.default_rng(0).multinomial(8192, share_E, size=(40, 1))
    fit = fit_power_law(loads, top_k=4)[0]
    assert fit.is_by_busiest
    assert fit.alpha > 0.5
    assert fit.busiest_captured == pytest.approx(64 * share, rel=0.05)
    assert fit.busiest_fitted == pytest.approx(fit.busiest_captured, rel=0.1)


def test_balanced_loads_differ_by_one_at_most():
    loads = BalancedLoads(3, 48, 5).draw(77, 2, np.random.default_rng(0))
    assert loads.shape == (2, 3, 48)
    assert (loads.sum(axis=2) == 77 * 5).all()
    assert np.ptp(loads) == 1
    of_ranks = loads.reshape(2, 3, 8, 6).sum(axis=3)
    assert np.ptp(of_ranks) <= 1


@pytest.mark.parametrize("tokens", [5, 100, 640, 3000])
def test_captured_loads_keep_their_mean_at_any_size(tokens):
    generator = np.random.default_rng(2)
    popularity = generator.dirichlet(np.full(16, 0.5))
    captured = generator.multinomial(64 * 2, popularity, size=(40, 3))
    source = CapturedLoads(captured, 2)
    drawn = source.draw(tokens, 400, np.random.default_rng(3))
    assert drawn.sum(axis=2).mean() == pytest.approx(tokens * 2, rel=0.02)
    share = drawn.sum(axis=0) / drawn.sum(axis=(0, 2))[:, None]
    expected = captured.sum(axis=0) / captured.sum(axis=(0, 2))[:, None]
    assert np.abs(share - expected).max() < 0.02
    assert source.tokens == 64 * 40


def test_larger_steps_are_more_even_than_small_ones():
    captured = np.random.default_rng(4).multinomial(32, np.full(16, 1 / 16), size=(64, 1))
    source = CapturedLoads(captured, 2)
    spread = [
        (drawn.max(axis=2) / drawn.mean(axis=2)).mean()
        for tokens in (4, 16, 256)
        for drawn in [source.draw(tokens, 200, np.random.default_rng(5))]
    ]
    assert spread == sorted(spread, reverse=True)


def test_layers_may_have_exponents_of_their_own():
    drawn = PowerLawLoads((0.0, 2.0), 32, 4).draw(512, 30, np.random.default_rng(6))
    even, steep = (drawn.max(axis=2) / drawn.mean(axis=2)).mean(axis=0)
    assert even == pytest.approx(1.0, abs=0.05)
    assert steep > 3
