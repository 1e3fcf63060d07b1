"""Which form is chosen, and what is held out for it."""

from __future__ import annotations

import numpy as np
import pytest

from observatory.analysis.network.features import FORMS, stage_terms
from observatory.analysis.network.solving import Problem
from observatory.analysis.network.trials import Cases, Trial, choose

GROUPS, SIZES = 10, 4
EMPTY = stage_terms(np.zeros((2, 2)), (0, 1), "flat")
CASES = Cases(
    terms_C=[EMPTY] * (GROUPS * SIZES),
    us_C=np.ones(GROUPS * SIZES),
    noise_C=np.full(GROUPS * SIZES, 0.1),
    group_C=[(group,) for group in range(GROUPS) for _ in range(SIZES)],
    ranks_C=np.repeat([3, 5, 6, 6], GROUPS),
)


def trial(parameters: int, error_G: list[float], other_ranks_error: float | None = None) -> Trial:
    """A form that errs by so much on all sizes of every group, and on numbers of ranks it did not see."""
    form = FORMS["contention"]
    problem = Problem.build(CASES.terms_C, form)
    determined_F = np.arange(len(form.terms)) < parameters
    ratio_C = 1.0 / (1.0 + np.repeat(error_G, SIZES))
    other = None if other_ranks_error is None else np.full(len(ratio_C), 1.0 / (1.0 + other_ranks_error))
    return Trial(
        form=form,
        problem=problem,
        added=problem,
        determined_F=determined_F,
        cases=CASES,
        ratio_C=ratio_C,
        ranks_ratio_C=other,
    )


def test_a_simpler_form_that_is_a_little_worse_by_chance_is_chosen() -> None:
    best = trial(5, [0.10] * GROUPS)
    simpler = trial(3, [0.04, 0.18] * (GROUPS // 2))
    assert simpler.error > best.error
    assert choose([simpler, best]) is simpler


def test_a_simpler_form_that_is_a_little_worse_on_every_pattern_is_not() -> None:
    best = trial(5, [0.10] * GROUPS)
    assert choose([trial(3, [0.12, 0.11] * (GROUPS // 2)), best]) is best


def test_sizes_of_one_pattern_do_not_count_as_so_many_proofs() -> None:
    """All of the difference is in two patterns: these tell nothing apart, however many sizes they have."""
    best = trial(5, [0.10] * GROUPS)
    simpler = trial(3, [0.34, 0.06] + [0.10] * (GROUPS - 2))
    assert choose([best, simpler]) is simpler


def test_a_form_that_fails_at_another_number_of_ranks_is_not_chosen_for_its_patterns() -> None:
    fails = trial(3, [0.05] * GROUPS, other_ranks_error=0.6)
    holds = trial(5, [0.08] * GROUPS, other_ranks_error=0.1)
    assert choose([fails, holds]) is holds
    assert holds.error == pytest.approx(0.09)


def test_numbers_of_ranks_are_held_out_from_three_on() -> None:
    assert CASES.ranks_held_out == (3, 5, 6)
    assert CASES.folds(0)[1].endswith("and each of 3, 5, 6 ranks in turn")
    two = Cases(
        terms_C=CASES.terms_C,
        us_C=CASES.us_C,
        noise_C=CASES.noise_C,
        group_C=CASES.group_C,
        ranks_C=np.repeat([3, 6], 2 * GROUPS),
    )
    assert two.ranks_held_out == ()
