"""Experts that are used again, on traces whose hit rates are known by construction."""

from __future__ import annotations

import numpy as np
import pytest

from observatory.analysis.parallel.expert_reuse import next_layer, recent_misses
from observatory.analysis.parallel.token_samples import LayerTokens

#: One layer, one rank that holds four experts.
SLOTS = np.arange(4).reshape(1, 1, 4)


def loads(*experts: int) -> np.ndarray:
    """One assignment to one expert in each step."""
    return np.eye(4, dtype=np.int64)[list(experts)][:, None, :]


def test_an_expert_that_serves_four_steps_misses_one_of_four() -> None:
    order = [step // 4 % 4 for step in range(64)]
    missed = recent_misses(loads(*order), SLOTS, 2)[16:]
    assert missed.sum() == 12
    assert missed.any(axis=(1, 2, 3)).tolist() == [step % 4 == 0 for step in range(48)]


def test_experts_that_take_turns_miss_all_unless_all_are_kept() -> None:
    turns = loads(*[step % 4 for step in range(40)])
    assert recent_misses(turns, SLOTS, 3)[4:].sum() == 36
    assert recent_misses(turns, SLOTS, 4).sum() == 0
    assert recent_misses(turns, SLOTS, 0).sum() == 40


def test_of_one_step_the_experts_with_most_assignments_are_kept() -> None:
    load_SLE = np.array([[[5, 1, 9, 2]], [[0, 0, 1, 0]], [[1, 1, 1, 1]]])
    missed = recent_misses(load_SLE, SLOTS, 2)
    # Kept are 0 and 1 by place, then 2 and 0 by load, then 2 and 0 as before.
    assert missed[:, 0, 0].tolist() == [[False, False, True, True], [False] * 4, [False, True, False, True]]


def sampled(experts_TK: np.ndarray, steps: int = 40) -> LayerTokens:
    number = np.arange(len(experts_TK))
    return LayerTokens(
        experts_TK=experts_TK, step_T=number % steps, source_T=number * 0, position_T=number // steps
    )


def test_a_permutation_of_experts_is_predicted_and_popularity_is_not_enough() -> None:
    first_TK = np.random.default_rng(0).integers(0, 16, (4000, 1))
    shown = next_layer([sampled(first_TK), sampled((first_TK + 5) % 16)], 16, 20, fewest=200)
    assert shown is not None
    assert shown.recall == 1.0
    assert shown.popular == pytest.approx(1 / 16, abs=0.02)
    assert shown.tokens == 2000
    assert (shown.follow_LEE[0].argmax(axis=1) == (np.arange(16) + 5) % 16).all()


def test_layers_that_choose_independently_predict_no_better_than_popularity() -> None:
    generator = np.random.default_rng(0)
    share_E = np.arange(1, 17) / np.arange(1, 17).sum()
    layers = [sampled(generator.choice(16, (8000, 1), p=share_E)) for _ in range(3)]
    shown = next_layer(layers, 16, 20, fewest=200)
    assert shown is not None
    assert shown.recall == pytest.approx(shown.popular, abs=0.03)
    assert shown.popular == pytest.approx(16 / 136, abs=0.02)


def test_tokens_are_matched_by_place_and_too_few_are_no_answer() -> None:
    first_TK = np.random.default_rng(0).integers(0, 16, (4000, 1))
    first, second = sampled(first_TK), sampled((first_TK + 1) % 16)
    backwards = LayerTokens(
        **{name: getattr(second, name)[::-1] for name in ("experts_TK", "step_T", "source_T", "position_T")}
    )
    shown = next_layer([first, backwards], 16, 20, fewest=200)
    assert shown is not None
    assert shown.recall == 1.0
    assert next_layer([first, backwards], 16, 20, fewest=2001) is None
    assert next_layer([first, backwards], 16, 40, fewest=1) is None
    assert next_layer([first], 16, 20, fewest=1) is None
