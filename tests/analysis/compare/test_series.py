"""Differences and their intervals against known truth."""

from __future__ import annotations

import numpy as np
import pytest

from observatory.analysis.compare.series import (
    FEWEST_STEPS,
    Pooled,
    Series,
    difference_of,
    difference_of_runs,
    false_discovery,
    mean_series,
    pooled_correlation,
    statistic_series,
    trimmed_values,
)
from observatory.analysis.routing.imbalance import gini_rows
from tests.analysis.compare.made import Float64, autoregressive


def series(value_N: Float64, *, trimmed: bool = False) -> Series:
    made = mean_series(value_N, np.arange(len(value_N)), trimmed=trimmed)
    assert made is not None
    return made


@pytest.mark.parametrize(("steps", "correlation"), [(24, 0.0), (24, 0.4), (100, 0.6)])
@pytest.mark.parametrize("paired", [False, True])
def test_the_same_distribution_is_called_different_at_the_stated_rate(
    steps: int, correlation: float, paired: bool
) -> None:
    rejected = 0
    for seed in range(400):
        base = 10 + autoregressive(steps, seed=2 * seed, correlation=correlation)
        other = 10 + autoregressive(steps, seed=2 * seed + 1, correlation=correlation)
        difference = difference_of(series(base), series(other), paired=paired)
        rejected += difference.p is not None and difference.p < 0.05
    assert rejected / 400 < 0.09  # 0.05, four standard errors of 400 trials above it


def test_an_interval_holds_a_known_shift_as_often_as_stated() -> None:
    held = 0
    for seed in range(300):
        base = 10 + autoregressive(40, seed=2 * seed)
        other = 12 + autoregressive(40, seed=2 * seed + 1)
        difference = difference_of(series(base), series(other), paired=False)
        assert difference.relative_low is not None
        assert difference.relative_high is not None
        held += difference.relative_low <= 0.2 <= difference.relative_high
    assert 0.91 <= held / 300 <= 0.995


def test_matching_steps_find_what_independent_ones_do_not() -> None:
    random = np.random.default_rng(0)
    common = 100 + 20 * random.normal(size=40)
    base, other = (common + random.normal(size=40) for _ in range(2))
    paired = difference_of(series(base), series(other + 2), paired=True)
    independent = difference_of(series(base), series(other + 2), paired=False)
    assert paired.p is not None
    assert independent.p is not None
    assert paired.p < 0.001
    assert independent.p > 0.05
    assert paired.low is not None
    assert paired.high is not None
    assert paired.low < 2 < paired.high


def test_false_discoveries_are_held_over_many_layers() -> None:
    random = np.random.default_rng(1)
    share, power = [], []
    for _ in range(200):
        shift = np.where(np.arange(60) < 12, 1.5, 0.0)
        p_N = []
        for layer in range(60):
            base, other = random.normal(size=20), random.normal(size=20) + shift[layer]
            p_N.append(difference_of(series(base), series(other), paired=False).p)
        called = false_discovery(np.array(p_N, dtype=np.float64)) <= 0.05
        share.append((called & (shift == 0)).sum() / max(called.sum(), 1))
        power.append(called[shift > 0].mean())
    assert np.mean(share) <= 0.06
    assert np.mean(power) > 0.3


def test_adjusted_p_values_are_those_of_benjamini_and_hochberg() -> None:
    assert false_discovery(np.array([0.01, 0.04, 0.03, 0.5])) == pytest.approx(
        [0.04, 0.16 / 3, 0.16 / 3, 0.5]
    )


def test_a_time_leaves_out_the_slowest_tenth() -> None:
    value_N = np.concatenate([np.full(18, 10.0), [500.0, 9.0]])
    made = mean_series(value_N, np.arange(20), trimmed=True)
    assert made is not None
    assert made.value == pytest.approx(10.0)
    assert trimmed_values(np.array([1.0, 2.0, 3.0])).tolist() == [1.0, 2.0, 3.0]


def test_pseudo_values_of_a_mean_are_its_values() -> None:
    load_NE = np.random.default_rng(0).multinomial(50, [0.1, 0.2, 0.3, 0.4], size=12)
    made = statistic_series(load_NE, np.arange(12), lambda rows: rows[:, 0] / rows.sum(axis=1))
    assert made is not None
    assert made.sample_N is not None
    assert made.sample_N == pytest.approx(load_NE[:, 0] / 50)


def test_a_gini_has_an_error_of_the_right_size() -> None:
    values, errors = [], []
    for seed in range(150):
        load_NE = np.random.default_rng(seed).multinomial(64, np.arange(1, 9) / 36, size=30)
        made = statistic_series(load_NE, np.arange(30), gini_rows)
        assert made is not None
        assert made.sample_N is not None
        values.append(made.value)
        errors.append(made.sample_N.std(ddof=1) / np.sqrt(30))
    assert 0.8 < np.mean(errors) / np.std(values) < 1.25


def test_few_steps_have_no_interval_and_equal_ones_no_difference() -> None:
    few = np.arange(FEWEST_STEPS - 1.0)
    assert difference_of(series(few), series(few + 1), paired=True).low is None
    equal = series(np.full(20, 3.0))
    difference = difference_of(equal, equal, paired=True)
    assert (difference.difference, difference.low, difference.high, difference.p) == (0.0, 0.0, 0.0, 1.0)
    changed = difference_of(equal, series(np.full(20, 4.0)), paired=False)
    assert (changed.relative, changed.p) == (pytest.approx(1 / 3), 0.0)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("steps", [8, 24])
def test_intervals_of_few_steps_that_resemble_each_other_hold_the_change(
    steps: int, correlation: float
) -> None:
    held = []
    for seed in range(300):
        base, other = (
            series(mean + autoregressive(steps, seed=2 * seed + side, correlation=correlation))
            for side, mean in enumerate((10.0, 11.0))
        )
        difference = difference_of(base, other, paired=False)
        assert difference.low is not None
        assert difference.high is not None
        held.append(difference.low <= 1.0 <= difference.high)
    assert np.mean(held) > 0.85


def test_counts_of_other_tokens_have_no_interval() -> None:
    base, other = (Series(value=value, exact=True) for value in (3.0, 1.0))
    assert difference_of(base, other, paired=False).low is None
    assert difference_of(base, other, paired=True).high == -2.0


def test_several_runs_of_a_baseline_show_how_much_runs_differ() -> None:
    alarms, detected = 0, 0
    for seed in range(400):
        random = np.random.default_rng(seed)
        runs_R = 10 * (1 + 0.1 * random.normal(size=6))  # of one set-up: steps of one run scatter far less
        base_R, other = runs_R[:5], series(runs_R[5] + 0.01 * random.normal(size=50))
        none, some = (difference_of_runs(base_R, Series(value=factor * other.value)) for factor in (1.0, 2.0))
        assert none.p is not None
        assert some.p is not None
        alarms += none.p < 0.05
        detected += some.p < 0.05
    assert alarms / 400 < 0.09
    assert detected / 400 > 0.9


def test_layers_show_together_how_much_steps_resemble_each_other() -> None:
    any_alarm = 0
    for trial in range(60):
        sides = [
            [
                series(autoregressive(24, seed=1000 * trial + 100 * side + layer, correlation=0.6))
                for layer in range(40)
            ]
            for side in range(2)
        ]
        samples = [[item.sample_N for item in side if item.sample_N is not None] for side in sides]
        pooled = Pooled(base=pooled_correlation(samples[0]), other=pooled_correlation(samples[1]))
        p_N = [difference_of(*pair, paired=False, pooled=pooled).p for pair in zip(*sides, strict=True)]
        any_alarm += bool((false_discovery(np.array(p_N, dtype=np.float64)) <= 0.05).any())
    assert any_alarm / 60 <= 0.13
