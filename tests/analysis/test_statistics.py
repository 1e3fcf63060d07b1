"""Intervals, bootstraps, folds and the choice between forms."""

from dataclasses import dataclass

import numpy as np
import pytest

from observatory.analysis.statistics import (
    block_weights,
    deal_folds,
    few_blocks_widening,
    hold_out,
    sample_interval,
    simplest,
    student_interval,
    within_one_standard_error,
)


@dataclass
class _Form:
    parameters: int
    error: float


def test_an_interval_of_samples_contains_its_value() -> None:
    interval = sample_interval(5.0, np.linspace(0, 1, 101))
    assert (interval.low, interval.high) == (pytest.approx(0.05), 5.0)


def test_nothing_is_known_of_an_interval_without_samples_or_freedom() -> None:
    assert sample_interval(1.0, np.empty(0)).low is None
    assert student_interval(1.0, None, 5).high is None
    assert student_interval(1.0, 0.1, 0).high is None


def test_a_student_interval_is_t_standard_errors_wide() -> None:
    interval = student_interval(10.0, 2.0, 4)
    assert interval.high == pytest.approx(10 + 2.131847 * 2, abs=1e-5)


def test_few_blocks_widen_an_interval_and_many_do_not() -> None:
    # t(0.95, 1) / z(0.95) * sqrt(2)
    assert few_blocks_widening(2) == pytest.approx(6.313752 / 1.644854 * np.sqrt(2), rel=1e-5)
    assert few_blocks_widening(100_000) == pytest.approx(1.0, abs=1e-4)


def test_every_resample_draws_as_many_groups_as_there_are() -> None:
    weight_BG = block_weights(30, 50, 0)
    assert (weight_BG.sum(axis=1) == 30).all()
    assert weight_BG.mean(axis=0) == pytest.approx(1.0, abs=0.5)


def test_folds_differ_by_one_item_at_most() -> None:
    sizes = np.bincount(deal_folds(23, 5, 0))
    assert sizes.sum() == 23
    assert sizes.max() - sizes.min() == 1


def test_no_point_is_predicted_by_a_fit_that_saw_it() -> None:
    fold_N = deal_folds(11, 3, 1)
    value_N = np.arange(11.0)

    def predict(fitted: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        assert not set(fitted) & set(held_out)
        assert len(fitted) + len(held_out) == 11
        return np.full(len(held_out), value_N[fitted].sum())

    predicted_N = hold_out(fold_N, predict)
    of_fold = {fold: value_N[fold_N != fold].sum() for fold in range(3)}
    assert predicted_N.tolist() == [of_fold[fold] for fold in fold_N]


def test_the_simplest_form_is_that_with_the_fewest_parameters_then_the_smallest_error() -> None:
    forms = [_Form(3, 0.1), _Form(2, 0.3), _Form(2, 0.2)]
    assert simplest(forms) is forms[2]


def test_points_of_one_group_count_as_one_when_forms_are_compared() -> None:
    excess_N = np.array([0.3, 0.3, 0.3, -0.1, -0.1, -0.1])
    # mean 0.1; by points the standard error is 0.2 / sqrt(6) = 0.082, by two groups 0.2 / sqrt(2) = 0.141
    assert not within_one_standard_error(excess_N, np.arange(6), negligible=0.0)
    assert within_one_standard_error(excess_N, np.repeat([0, 1], 3), negligible=0.0)
