from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from observatory.analysis.routing.locality import local_consistency
from observatory.errors import LoadError


def samples(
    expert_ids: list[list[int]], *, positions: list[int] | None = None, ranks: list[int] | None = None
) -> pd.DataFrame:
    count = len(expert_ids)
    return pd.DataFrame(
        {
            "step": 0,
            "phase": "prefill",
            "layer": 0,
            "source_rank": ranks or [0] * count,
            "position": positions or list(range(count)),
            "expert_ids": expert_ids,
        }
    )


def test_hit_share_of_a_hand_computed_example() -> None:
    # Segment 1 uses 0 three times and 1 once; segment 2 uses 2, 3, 4, 5 once each. One expert cached.
    frame = local_consistency(
        samples([[0, 1], [0], [0], [2, 3], [4], [5]]), segment_tokens=3, cached_experts=1
    )
    row = frame.iloc[0]
    assert (row["segments"], row["tokens"], row["assignments"]) == (2, 6, 8)
    assert row["hit_share"] == pytest.approx((3 + 1) / 8)


def test_a_cache_of_twice_k_is_the_default() -> None:
    frame = local_consistency(samples([[0, 1], [2, 3], [4, 5], [0, 1]]), segment_tokens=4)
    assert frame.iloc[0]["cached_experts"] == 4
    assert frame.iloc[0]["hit_share"] == pytest.approx(6 / 8)


def test_tokens_that_follow_topics_gain_by_their_order_and_independent_ones_do_not() -> None:
    generator = np.random.default_rng(0)
    local = samples([list(generator.choice(4, 2, replace=False) + 4 * (t // 16 % 8)) for t in range(512)])
    skewed = samples(
        [
            list(generator.choice(32, 2, replace=False, p=np.r_[[0.1] * 8, [0.2 / 24] * 24]))
            for _ in range(512)
        ]
    )
    for frame, gains in ((local, True), (skewed, False)):
        row = local_consistency(frame, cached_experts=4).iloc[0]
        assert (row["locality_gain"] > 0.3) == gains
        assert row["hit_share"] - row["locality_gain"] == pytest.approx(row["hit_share_shuffled"])
    skewed_row = local_consistency(skewed, cached_experts=4).iloc[0]
    assert skewed_row["hit_share"] > 4 / 32, "skew alone gives hits"
    assert abs(skewed_row["locality_gain"]) < 0.03


@pytest.mark.parametrize(
    ("positions", "ranks"), [([0, 1, 2, 10, 11, 12], None), ([0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 1, 1])]
)
def test_segments_never_join_tokens_that_are_not_neighbours(positions, ranks) -> None:
    frame = local_consistency(samples([[0]] * 6, positions=positions, ranks=ranks), segment_tokens=2)
    assert frame.iloc[0]["segments"] == 2, "one token is left over on either side"
    whole = local_consistency(samples([[0]] * 6), segment_tokens=2)
    assert whole.iloc[0]["segments"] == 3


def test_rows_may_come_in_any_order() -> None:
    ordered = samples([[t // 8] for t in range(32)])
    mixed = ordered.sample(frac=1, random_state=0)
    assert local_consistency(ordered, segment_tokens=8, cached_experts=1).equals(
        local_consistency(mixed, segment_tokens=8, cached_experts=1)
    )


def test_too_few_tokens_give_no_share_and_nothing_gives_an_empty_table() -> None:
    row = local_consistency(samples([[0], [1]]), segment_tokens=16).iloc[0]
    assert row["segments"] == 0
    assert np.isnan(row["hit_share"])
    assert local_consistency(samples([[], []]), segment_tokens=2).iloc[0].isna()["hit_share"]
    assert local_consistency(samples([])).empty


def test_impossible_samples_are_refused() -> None:
    with pytest.raises(LoadError, match="negative expert"):
        local_consistency(samples([[0], [-1]]), segment_tokens=1)
    with pytest.raises(LoadError, match="segments of 0 tokens"):
        local_consistency(samples([[0]]), segment_tokens=0)
