"""How copies of an expert share its load."""

from __future__ import annotations

import numpy as np
import pytest

from observatory.advice.placement_scores import PlacementRules, Scorer
from observatory.analysis.parallel.dispatch_rules import balancing_shares, slot_loads
from observatory.errors import PlacementError

#: Experts 0 and 1 on rank 0, 0 and 2 on rank 1, 0 and 3 on rank 2.
LAYOUT = np.array([[[0, 1], [0, 2], [0, 3]]])


def one_step(*loads: int) -> np.ndarray:
    return np.array([[loads]])


def test_equal_copies_share_whole_assignments_and_first_ranks_get_the_remainder() -> None:
    got_PK = slot_loads(one_step(8, 5, 0, 1), LAYOUT)[0, 0]
    assert got_PK.tolist() == [[3, 5], [3, 0], [2, 1]]


def test_a_step_of_its_own_is_split_so_that_the_busiest_rank_has_least() -> None:
    got_PK = slot_loads(one_step(6, 9, 0, 3), LAYOUT, rule="per-step")[0, 0]
    # 18 in all; rank 0 has 9 without any of expert 0, so the other two share its 6: 4.5 each.
    assert got_PK[0].tolist() == [0, 9]
    assert got_PK[:, 0].sum() == pytest.approx(6)
    assert got_PK.sum(axis=1).max() == pytest.approx(9)
    spread = slot_loads(one_step(30, 3, 3, 3), LAYOUT, rule="per-step")[0, 0]
    assert spread.sum(axis=1) == pytest.approx([13, 13, 13])


def test_no_split_is_better_than_that_of_the_step() -> None:
    generator = np.random.default_rng(0)
    load_SLE = generator.poisson(generator.lognormal(2, 1, 12), size=(20, 2, 12))
    layout = np.stack(
        [generator.permutation(np.r_[np.arange(12), [0, 1, 2, 3]]).reshape(4, 4) for _ in range(2)]
    )
    best_SLP = slot_loads(load_SLE, layout, rule="per-step").sum(axis=3)
    share = balancing_shares(load_SLE[:10].mean(axis=0), layout)
    for other in (
        slot_loads(load_SLE, layout),
        slot_loads(load_SLE, layout, rule="weighted", share_LPK=share),
    ):
        assert np.allclose(other.sum(axis=(2, 3)), load_SLE.sum(axis=2))
        assert np.all(best_SLP.max(axis=2) <= other.sum(axis=3).max(axis=2) + 1e-6)
    on_mean = slot_loads(load_SLE[:10].mean(axis=0)[None], layout, rule="weighted", share_LPK=share)
    assert on_mean.sum(axis=3).max() == pytest.approx(
        slot_loads(load_SLE[:10].mean(axis=0)[None], layout, rule="per-step").sum(axis=3).max()
    )


def test_a_rank_of_three_times_the_speed_gets_three_times_as_much() -> None:
    speed = np.array([2.0, 2.0, 6.0])
    got_PK = slot_loads(one_step(50, 0, 0, 0), LAYOUT, rule="per-step", speed_P=speed)[0, 0]
    assert got_PK[:, 0] == pytest.approx([10, 10, 30])
    share_PK = balancing_shares(np.array([[50.0, 0, 0, 0]]), LAYOUT, speed)[0]
    assert share_PK[:, 0] == pytest.approx([0.2, 0.2, 0.6])


def test_no_split_is_done_earlier_than_that_of_the_step_where_speeds_differ() -> None:
    generator = np.random.default_rng(0)
    load_SLE = generator.poisson(generator.lognormal(2, 1, 12), size=(20, 2, 12))
    layout = np.stack(
        [generator.permutation(np.r_[np.arange(12), [0, 1, 2, 3]]).reshape(4, 4) for _ in range(2)]
    )
    scorer = Scorer(load_SLE.astype(np.float64), PlacementRules(speed_P=np.array([1.0, 1.0, 2.0, 1.5])))
    share = balancing_shares(load_SLE.mean(axis=0), layout, scorer.rules.speed_P)
    weighted = scorer.score(layout, rule="weighted", share_LPK=share)
    assert scorer.score(layout, rule="per-step") < weighted < scorer.score(layout)


def test_one_copy_is_activated_and_the_fullest_rank_has_fewest_activated() -> None:
    layout = np.array([[[0, 1, 2], [3, 0, 1], [4, 2, 5]]])
    got_PK = slot_loads(one_step(5, 5, 5, 5, 5, 0), layout, rule="one-copy")[0, 0]
    assert (got_PK > 0).sum(axis=1).tolist() == [2, 2, 1] or (got_PK > 0).sum(axis=1).max() == 2
    assert (got_PK > 0).sum() == 5
    assert got_PK.sum() == 25


@pytest.mark.parametrize("share", [None, np.full((1, 3, 2), 0.5), np.full((1, 2, 2), 1.0)])
def test_shares_must_be_there_and_add_up(share: np.ndarray | None) -> None:
    with pytest.raises(PlacementError):
        slot_loads(one_step(1, 1, 1, 1), LAYOUT, rule="weighted", share_LPK=share)
