"""Which form is chosen, and what is held out for it."""

from __future__ import annotations

import numpy as np
import pytest

from observatory.analysis.network.features import FORMS
from observatory.analysis.network.solving import Problem
from observatory.analysis.network.trials import Case, Cases, Trial, choose

GROUPS, SIZES = 10, 4
CASES = Cases(
    [
        Case(
            group=(group,),
            bytes_PP=np.ones((ranks, ranks), dtype=np.int64),
            node_of_P=tuple(range(ranks)),
            host_of_P=None,
            algorithm="flat",
            role=None,
            us=1.0,
            scatter=None,
        )
        for group, ranks in zip(range(GROUPS), [3, 5, 6, 6, 6, 3, 5, 5, 3, 6], strict=True)
        for _ in range(SIZES)
    ]
)


def trial(parameters: int, error_G: list[float], other_ranks_error: float | None = None) -> Trial:
    """A form that errs by so much on all sizes of every group, and on numbers of ranks it did not see."""
    form = FORMS["directions"]
    ratio_C = 1.0 / (1.0 + np.repeat(error_G, SIZES))
    other = None if other_ranks_error is None else np.full(len(ratio_C), 1.0 / (1.0 + other_ranks_error))
    return Trial(
        form=form,
        parts=(),
        problem=Problem.build(CASES.terms(), form),
        determined_F=np.arange(len(form.terms)) < parameters,
        cases=CASES,
        ratio_C=ratio_C,
        ranks_ratio_C=other,
        informed_ratio_C=other,
    )


def test_of_forms_that_are_practically_as_good_the_simpler_one_is_chosen() -> None:
    best = trial(5, [0.10] * GROUPS)
    simpler = trial(3, [0.102] * GROUPS)
    assert choose([simpler, best]) is simpler


def test_a_simpler_form_that_is_worse_is_not() -> None:
    best = trial(5, [0.10] * GROUPS)
    assert choose([trial(3, [0.12, 0.11] * (GROUPS // 2)), best]) is best


def test_one_matrix_that_is_far_off_chooses_no_form() -> None:
    best = trial(5, [0.05] * (GROUPS - 1) + [50.0])
    assert choose([best, trial(3, [0.3] * GROUPS)]) is best


def test_a_form_that_fails_at_another_number_of_ranks_is_not_chosen_for_its_patterns() -> None:
    fails = trial(3, [0.05] * GROUPS, other_ranks_error=0.6)
    holds = trial(5, [0.08] * GROUPS, other_ranks_error=0.1)
    assert choose([fails, holds]) is holds
    assert holds.error == pytest.approx(0.09)


def test_numbers_of_ranks_are_held_out_from_three_on() -> None:
    assert CASES.ranks_held_out == (3, 5, 6)
    assert CASES.folds(0)[1].endswith("and each of 3, 5, 6 ranks in turn")
    assert Cases(CASES.case_C[: 2 * SIZES]).ranks_held_out == ()
