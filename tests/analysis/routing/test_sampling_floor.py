from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from observatory.analysis.routing.floor import gini_floor, gini_uniform_limit, max_over_mean_floor
from observatory.analysis.routing.imbalance import gini_rows, max_over_mean_rows
from observatory.errors import LoadError
from tests.analysis.routing.runs import uniform_loads

#: tokens, K, E: from a decode step to a prefill batch, and cases without any room for a normal law
SAMPLES = [
    (2, 4, 32),
    (8, 4, 32),
    (64, 4, 32),
    (128, 6, 64),
    (512, 6, 64),
    (32, 8, 128),
    (16, 1, 64),
    (20, 1, 2),
    (5, 3, 4),
]


@pytest.mark.parametrize(("tokens", "top_k", "experts"), SAMPLES)
def test_floors_are_what_simulated_uniform_routing_shows(tokens: int, top_k: int, experts: int) -> None:
    load_SE = uniform_loads(windows=3000, tokens=tokens, top_k=top_k, experts=experts)
    for floor, values in (
        (gini_floor, gini_rows(load_SE)),
        (max_over_mean_floor, max_over_mean_rows(load_SE)),
    ):
        noise = values.std() / math.sqrt(len(values))
        allowed = 0.0 if floor is gini_floor else (0.01 if experts >= 32 else 0.03) * values.mean()
        value = floor(tokens=tokens, top_k=top_k, experts=experts)
        assert abs(value - values.mean()) < 4 * noise + allowed + 1e-9, floor.__name__


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "groups"),
    [(8, 4, 32, 4), (8, 4, 32, 8), (64, 4, 32, 2), (64, 4, 32, 16), (4, 6, 64, 4)],
)
def test_the_floor_of_ranks_is_what_simulated_uniform_routing_shows(tokens, top_k, experts, groups) -> None:
    load_SE = uniform_loads(windows=3000, tokens=tokens, top_k=top_k, experts=experts)
    values = max_over_mean_rows(load_SE.reshape(len(load_SE), groups, -1).sum(axis=2))
    value = max_over_mean_floor(tokens=tokens, top_k=top_k, experts=experts, groups=groups)
    assert value == pytest.approx(values.mean(), rel=0.02)


def test_small_samples_have_the_floor_that_counting_by_hand_gives() -> None:
    # One token on K of E experts: loads are K ones and E - K zeros whatever the routing.
    assert gini_floor(tokens=1, top_k=4, experts=32) == pytest.approx(1 - 4 / 32)
    assert max_over_mean_floor(tokens=1, top_k=1, experts=64) == pytest.approx(64)
    # Two tokens on two experts: half the time both on one (Gini 1/2, max/mean 2), else equal (0 and 1).
    assert gini_floor(tokens=2, top_k=1, experts=2) == pytest.approx(0.25)
    assert max_over_mean_floor(tokens=2, top_k=1, experts=2) == pytest.approx(1.5)


def test_a_token_that_takes_all_experts_leaves_no_room_for_imbalance() -> None:
    assert gini_floor(tokens=7, top_k=4, experts=4) == pytest.approx(0, abs=1e-12)
    assert max_over_mean_floor(tokens=7, top_k=4, experts=4) == pytest.approx(1)
    assert gini_floor(tokens=7, top_k=1, experts=1) == 0
    assert max_over_mean_floor(tokens=7, top_k=1, experts=1) == 1


@pytest.mark.parametrize(("tokens", "value"), [(128, 0.193), (512, 0.0966), (2048, 0.0483)])
def test_the_closed_form_is_the_limit_for_many_tokens(tokens: int, value: float) -> None:
    exact = gini_floor(tokens=tokens, top_k=8, experts=128)
    closed = math.sqrt((1 - 8 / 128) / (math.pi * tokens * 8 / 128))
    assert closed == pytest.approx(value, abs=5e-5 if tokens > 128 else 5e-4)
    assert exact == pytest.approx(closed * math.sqrt(127 / 128), rel=0.02)
    assert exact < closed


@pytest.mark.parametrize(("tokens", "single_draw"), [(128, 1.83), (512, 1.36), (2048, 1.18), (8192, 1.08)])
def test_the_quoted_max_over_mean_of_64_experts_top_6_lies_within_the_scatter_of_one_window(
    tokens: int, single_draw: float
) -> None:
    spread = max_over_mean_rows(uniform_loads(windows=100, tokens=tokens, top_k=6, experts=64)).std()
    expected = max_over_mean_floor(tokens=tokens, top_k=6, experts=64)
    assert abs(single_draw - expected) < 1.5 * spread


def test_one_window_in_a_thousand_of_uniform_routing_exceeds_the_limit() -> None:
    values = gini_rows(uniform_loads(windows=4000, tokens=128, top_k=6, experts=64))
    limit = gini_uniform_limit(tokens=128, top_k=6, experts=64)
    assert 0 <= np.count_nonzero(values > limit) <= 14  # 4 expected


@given(st.integers(1, 3000), st.integers(2, 64), st.data())
def test_floors_sink_with_more_tokens_and_keep_their_bounds(tokens: int, experts: int, data) -> None:
    top_k = data.draw(st.integers(1, experts))
    floor = gini_floor(tokens=tokens, top_k=top_k, experts=experts)
    assert -1e-9 <= floor <= 1 - top_k / experts + 1e-9
    assert gini_floor(tokens=4 * tokens, top_k=top_k, experts=experts) <= floor + 1e-9
    ratio = max_over_mean_floor(tokens=tokens, top_k=top_k, experts=experts)
    assert 1 <= ratio <= experts
    assert max_over_mean_floor(tokens=4 * tokens, top_k=top_k, experts=experts) <= ratio * 1.001


@pytest.mark.parametrize("experts", [32, 256])
def test_the_change_to_the_normal_law_leaves_no_step(experts: int) -> None:
    # The standard deviation of one expert's load passes 2000 near these numbers of tokens.
    edge = int(2000**2 / (8 / experts * (1 - 8 / experts)))
    for floor in (gini_floor, max_over_mean_floor):
        below, above = (
            floor(tokens=tokens, top_k=8, experts=experts) - 1 for tokens in (edge - 10, edge + 10)
        )
        assert above == pytest.approx(below, rel=1e-3)


def test_a_billion_tokens_cost_no_more_than_a_thousand() -> None:
    started = time.perf_counter()
    value = gini_floor(tokens=10**9, top_k=8, experts=256)
    ratio = max_over_mean_floor(tokens=10**9, top_k=8, experts=256, groups=32)
    assert time.perf_counter() - started < 1.0
    assert value == pytest.approx(
        math.sqrt(255 / 256 * (1 - 8 / 256) / (math.pi * 10**9 * 8 / 256)), rel=1e-6
    )
    assert 1 < ratio < 1.001


def test_without_tokens_there_is_no_floor_and_impossible_k_is_refused() -> None:
    assert gini_floor(tokens=0, top_k=2, experts=8) is None
    assert gini_uniform_limit(tokens=0, top_k=2, experts=8) is None
    assert max_over_mean_floor(tokens=0, top_k=2, experts=8) is None
    with pytest.raises(LoadError, match="top-9 of 8"):
        gini_floor(tokens=4, top_k=9, experts=8)
    with pytest.raises(LoadError, match="3 groups do not divide 8"):
        max_over_mean_floor(tokens=4, top_k=2, experts=8, groups=3)
