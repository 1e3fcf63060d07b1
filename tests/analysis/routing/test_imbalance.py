from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from observatory.analysis.routing.imbalance import (
    balancedness,
    checked_loads,
    coefficient_of_variation,
    entropy_bits,
    gini,
    gini_rows,
    idle_experts,
    lorenz_curve,
    max_over_mean,
    max_over_mean_rows,
)
from observatory.errors import LoadError

loads = st.lists(st.integers(0, 10**15), min_size=1, max_size=40)
some_loads = loads.filter(any)


def naive_gini(load_E: list[int]) -> float:
    """Mean absolute difference over all ordered pairs, over twice the mean, in whole numbers."""
    pairs = sum(abs(one - other) for one in load_E for other in load_E)
    return pairs / (2 * len(load_E) * sum(load_E))


@pytest.mark.parametrize(
    ("load_E", "value"),
    [
        ([5, 5, 5, 5], 0.0),
        ([0, 0, 0, 8], 0.75),  # (E - 1) / E
        ([1, 2, 3, 4], 0.25),  # 2 * 30 / (4 * 10) - 5 / 4
        ([0, 1], 0.5),
        ([2, 0, 1, 1], 3 / 8),
        ([7], 0.0),
    ],
)
def test_gini_of_hand_computed_tables(load_E: list[int], value: float) -> None:
    assert gini(load_E) == value


@pytest.mark.parametrize(
    ("load_E", "ratio", "deviation", "bits", "idle"),
    [
        ([4, 4, 4, 4], 1.0, 0.0, 2.0, 0),
        ([0, 0, 0, 8], 4.0, math.sqrt(3), 0.0, 3),
        ([4, 2, 1, 1], 2.0, math.sqrt(6) / 4, 1.75, 0),
        ([9], 1.0, 0.0, 0.0, 0),
    ],
)
def test_other_metrics_of_hand_computed_tables(
    load_E: list[int], ratio: float, deviation: float, bits: float, idle: int
) -> None:
    assert max_over_mean(load_E) == ratio
    assert balancedness(load_E) == 1 / ratio
    assert coefficient_of_variation(load_E) == pytest.approx(deviation)
    assert entropy_bits(load_E) == pytest.approx(bits)
    assert idle_experts(load_E) == idle


def test_a_histogram_without_assignments_has_no_imbalance_and_all_experts_idle() -> None:
    empty = [0, 0, 0]
    for metric in (gini, max_over_mean, balancedness, coefficient_of_variation, entropy_bits, lorenz_curve):
        assert metric(empty) is None
    assert idle_experts(empty) == 3
    assert np.isnan(gini_rows([[0, 0], [1, 3]])).tolist() == [True, False]
    assert np.isnan(max_over_mean_rows([[0, 0], [1, 3]])).tolist() == [True, False]


@given(some_loads)
def test_gini_agrees_with_all_pairs_of_experts(load_E: list[int]) -> None:
    assert gini(load_E) == pytest.approx(naive_gini(load_E), rel=1e-14)


@given(some_loads, st.randoms(use_true_random=False), st.integers(1, 1000))
def test_no_metric_sees_which_expert_is_which_or_how_many_tokens_there_were(load_E, random, factor) -> None:
    shuffled = list(load_E)
    random.shuffle(shuffled)
    for metric in (gini, max_over_mean, coefficient_of_variation, entropy_bits):
        assert metric(shuffled) == pytest.approx(metric(load_E), rel=1e-9, abs=1e-12)
        assert metric([factor * load for load in load_E]) == pytest.approx(
            metric(load_E), rel=1e-9, abs=1e-12
        )


@given(some_loads, st.integers(2, 5))
def test_replicating_every_expert_changes_only_entropy(load_E: list[int], copies: int) -> None:
    for metric in (gini, max_over_mean, coefficient_of_variation):
        assert metric(load_E * copies) == pytest.approx(metric(load_E), rel=1e-9, abs=1e-12)
    assert entropy_bits(load_E * copies) == pytest.approx(
        entropy_bits(load_E) + math.log2(copies), rel=1e-9, abs=1e-12
    )


@given(some_loads)
def test_metrics_stay_in_their_bounds(load_E: list[int]) -> None:
    experts = len(load_E)
    slack = 1 + 1e-12
    assert 0 <= gini(load_E) <= (experts - 1) / experts
    assert 1 <= max_over_mean(load_E) <= experts
    assert 1 / experts <= balancedness(load_E) <= 1
    assert 0 <= coefficient_of_variation(load_E) <= math.sqrt(experts - 1) * slack + 1e-12
    assert 0 <= entropy_bits(load_E) <= math.log2(experts) * slack + 1e-12


@given(some_loads)
def test_gini_is_one_minus_twice_the_area_under_the_lorenz_curve(load_E: list[int]) -> None:
    x, y = lorenz_curve(load_E)
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert len(x) == len(load_E) + 1
    assert np.all(np.diff(y) >= 0)
    assert np.all(y <= x + 1e-12)
    assert 1 - 2 * np.trapezoid(y, x) == pytest.approx(gini(load_E), abs=1e-9)


@given(
    st.integers(1, 8).flatmap(
        lambda e: st.tuples(*[st.lists(st.integers(0, 999), min_size=e, max_size=e)] * 2)
    )
)
def test_merging_two_windows_never_raises_gini_above_their_weighted_mean(windows) -> None:
    one, other = (np.array(load_E) for load_E in windows)
    if one.sum() == 0 or other.sum() == 0:
        return
    weighted = (one.sum() * gini(one) + other.sum() * gini(other)) / (one.sum() + other.sum())
    assert gini(one + other) <= weighted + 1e-12


@given(st.lists(st.lists(st.integers(0, 10**6), min_size=5, max_size=5), min_size=1, max_size=6))
def test_rows_are_measured_like_single_histograms(load_SE: list[list[int]]) -> None:
    for rows, one in ((gini_rows, gini), (max_over_mean_rows, max_over_mean)):
        expected = [math.nan if one(load_E) is None else one(load_E) for load_E in load_SE]
        np.testing.assert_array_equal(rows(load_SE), expected)


def test_counts_of_a_quadrillion_over_many_experts_do_not_overflow() -> None:
    load_E = np.full(65536, 10**15)
    assert gini(load_E) == 0.0
    load_E[0] = 0
    assert gini(load_E) == pytest.approx(1 / 65536, rel=1e-12)
    assert max_over_mean(load_E) == pytest.approx(65536 / 65535, rel=1e-15)
    assert gini([2**63 - 1, 0]) == 0.5


def test_the_smallest_possible_difference_between_huge_counts_is_seen() -> None:
    load_E = [10**15 + 1, 10**15]
    assert gini(load_E) == pytest.approx(1 / (2 * (2 * 10**15 + 1)), rel=1e-14)


@pytest.mark.parametrize(
    ("load", "complaint"),
    [
        ([1, -2, 3], "a load is -2"),
        ([1.0, math.nan], "float64"),
        ([0.5, 0.5], "float64"),
        ([True, False], "bool"),
        (["3"], "expected integer counts"),
        ([], "no experts"),
        ([[1, 2]], "shape"),
        (7, "shape"),
        (np.array([2**64 - 1], dtype=np.uint64), "above 2"),
    ],
)
def test_impossible_loads_are_refused_with_what_is_wrong(load: object, complaint: str) -> None:
    with pytest.raises(LoadError, match=complaint):
        gini(load)  # type: ignore[arg-type]


def test_checked_loads_leaves_the_callers_array_alone() -> None:
    mine = np.array([3, 1], dtype=np.int32)
    assert checked_loads(mine).dtype == np.int64
    assert mine.tolist() == [3, 1]
