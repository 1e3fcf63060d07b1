"""Tries the forms of the network model on matrices, and on numbers of ranks, that their fit did not see.

Shapes: C cases (a matrix under one algorithm), F terms, G groups, K folds.

Two kinds of folds:

* Patterns. A group is one pattern and seed at all its sizes, or, where there are fewer than five of these,
  one matrix: so no held-out matrix has a scaled copy of itself in the fit where this can be avoided.
* Numbers of ranks, where three or more were measured: each is left out once. What a form gets wrong then is
  what it may get wrong at another EP degree, which patterns of the same number of ranks cannot show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.network.features import FORMS, Form, StageTerms
from observatory.analysis.network.network import FormScore
from observatory.analysis.network.solving import Problem, predict_all, solve
from observatory.analysis.statistics import deal_folds, hold_out, simplest, within_one_standard_error

_FOLDS = 5
#: Fewer numbers of ranks leave less than two in the fit when one is held out.
_RANKS_TO_HOLD_OUT = 3
#: A form needs this many cases per coefficient.
_CASES_PER_TERM = 2
_MAX_CONDITION = 1e8
_SMALLEST_US = 1e-9
#: Forms whose errors differ by less than this are equally good for any purpose.
_SAME_ERROR = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cases:
    """Measured matrices of one algorithm.

    Attributes:
        terms_C: what the forms look at.
        us_C: measured microseconds.
        noise_C: expected relative error.
        group_C: what is held out together.
        ranks_C: number of ranks.
    """

    terms_C: Sequence[StageTerms]
    us_C: NDArray[np.float64]
    noise_C: NDArray[np.float64]
    group_C: Sequence[tuple[object, ...]]
    ranks_C: NDArray[np.int64]

    @property
    def ranks_held_out(self) -> tuple[int, ...]:
        """Numbers of ranks that are left out in turn; none where too few were measured."""
        distinct = tuple(np.unique(self.ranks_C).tolist())
        return distinct if len(distinct) >= _RANKS_TO_HOLD_OUT else ()

    def folds(self, seed: int) -> tuple[NDArray[np.int64], str]:
        """Fold of every case, groups dealt out whole; and in words."""
        distinct = list(dict.fromkeys(self.group_C))
        whole = len(distinct) >= _FOLDS
        count = len(distinct) if whole else len(self.group_C)
        fold_of = deal_folds(count, min(_FOLDS, count), seed)
        ranks = self.ranks_held_out
        also = f"; and each of {', '.join(map(str, ranks))} ranks in turn" if ranks else ""
        if whole:
            index_of = {group: index for index, group in enumerate(distinct)}
            fold_C = np.array([fold_of[index_of[group]] for group in self.group_C])
            return fold_C, f"{min(_FOLDS, count)} folds of whole patterns, all sizes of one together{also}"
        return (
            fold_of,
            f"{min(_FOLDS, count)} folds of matrices; other sizes of a held-out pattern are in the fit{also}",
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trial:
    """One form with what it got wrong on held-out matrices.

    Attributes:
        form: the form.
        problem: its terms of all cases.
        added: the same without a floor, all terms in one sum.
        determined_F: terms that the cases can separate.
        cases: the cases.
        ratio_C: measured / predicted, patterns held out.
        ranks_ratio_C: measured / predicted, the case's number of ranks held out; None where too few were
            measured.
    """

    form: Form
    problem: Problem
    added: Problem
    determined_F: NDArray[np.bool_]
    cases: Cases
    ratio_C: NDArray[np.float64]
    ranks_ratio_C: NDArray[np.float64] | None

    @property
    def parameters(self) -> int:
        """Coefficients that the cases determine."""
        return int(self.determined_F.sum())

    @property
    def error_C(self) -> NDArray[np.float64]:
        """Held-out error of every case, counting the less the more its repeats scatter, (C,).

        Where numbers of ranks were held out as well, the mean of both kinds.
        """
        kinds = [self.ratio_C] if self.ranks_ratio_C is None else [self.ratio_C, self.ranks_ratio_C]
        weight_C = 1.0 / self.cases.noise_C
        mean_C = np.mean([_error(ratio_C) for ratio_C in kinds], axis=0)
        weighted_C: NDArray[np.float64] = mean_C * weight_C / weight_C.mean()
        return weighted_C

    @property
    def error(self) -> float:
        """Mean of ``error_C``, by which forms are compared."""
        return float(self.error_C.mean())

    def score(self) -> FormScore:
        """The errors in numbers."""
        error_C, other = _error(self.ratio_C), self.ranks_ratio_C
        return FormScore(
            form=self.form.name,
            parameters=self.parameters,
            median_error=float(np.median(error_C)),
            p90_error=float(np.quantile(error_C, 0.9)),
            other_ranks_error=None if other is None else float(np.median(_error(other))),
            weighted_error=self.error,
        )

    def fit(
        self, case_K: NDArray[np.int64], start_F: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """Coefficients of all terms fitted to some of the cases, 0 where not determined, (F,).

        Without a start, from the fit of the plain sum: which of its sides counts where must be guessed first.
        """
        return _fit(self.problem, self.added, self.cases, self.determined_F, case_K, start_F)


def try_forms(cases: Cases, seed: int) -> tuple[list[Trial], str]:
    """Every form that has enough cases, and what was held out in words."""
    fold_C, sharing = cases.folds(seed)
    trials = []
    for form in FORMS.values():
        problem = Problem.build(cases.terms_C, form)
        added = Problem.build(cases.terms_C, replace(form, floor=()))
        determined_F = _determined(added)
        if len(cases.us_C) < _CASES_PER_TERM * int(determined_F.sum()):
            continue
        ratios = [
            _held_out(problem, added, cases, determined_F, kind_C)
            for kind_C in ([fold_C, cases.ranks_C] if cases.ranks_held_out else [fold_C])
        ]
        trials.append(
            Trial(
                form=form,
                problem=problem,
                added=added,
                determined_F=determined_F,
                cases=cases,
                ratio_C=ratios[0],
                ranks_ratio_C=ratios[1] if len(ratios) > 1 else None,
            )
        )
    return trials, sharing


def choose(trials: Sequence[Trial]) -> Trial:
    """The form with the fewest parameters whose error is within one standard error of the smallest.

    The standard error is taken over groups, because the sizes of one pattern err together.
    """
    best = min(trials, key=lambda trial: trial.error)
    group_of = {group: index for index, group in enumerate(dict.fromkeys(best.cases.group_C))}
    group_C = np.array([group_of[group] for group in best.cases.group_C])
    return simplest(
        trial
        for trial in trials
        if within_one_standard_error(trial.error_C - best.error_C, group_C, negligible=_SAME_ERROR)
    )


def _error(ratio_C: NDArray[np.float64]) -> NDArray[np.float64]:
    """|predicted - measured| / measured from measured / predicted."""
    error_C: NDArray[np.float64] = np.abs(1.0 / ratio_C - 1.0)
    return error_C


def _held_out(
    problem: Problem, added: Problem, cases: Cases, determined_F: NDArray[np.bool_], fold_C: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Measured / predicted of every case by a fit without its fold."""

    def predict(case_K: NDArray[np.int64], held_out_C: NDArray[np.int64]) -> NDArray[np.float64]:
        return predict_all(problem.take(held_out_C), _fit(problem, added, cases, determined_F, case_K))

    ratio_C: NDArray[np.float64] = cases.us_C / np.maximum(hold_out(fold_C, predict), _SMALLEST_US)
    return ratio_C


def _determined(problem: Problem) -> NDArray[np.bool_]:
    """Terms that the cases can separate, earlier ones first, (F,)."""
    scale_F = problem.terms_NF.max(axis=0)
    scale_F[scale_F == 0] = 1.0
    design_CF = problem.slowest(1.0 / scale_F) / scale_F
    determined_F = np.zeros(len(scale_F), dtype=bool)
    for term in range(len(scale_F)):
        if not design_CF[:, term].any():
            continue
        determined_F[term] = True
        if np.linalg.cond(design_CF[:, determined_F]) > _MAX_CONDITION:
            determined_F[term] = False
    return determined_F


def _fit(
    problem: Problem,
    added: Problem,
    cases: Cases,
    determined_F: NDArray[np.bool_],
    case_K: NDArray[np.int64],
    start_F: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    us_K, noise_K = cases.us_C[case_K], cases.noise_C[case_K]
    narrow, narrow_added = (_only(whole.take(case_K), determined_F) for whole in (problem, added))
    if start_F is None:
        most_F = np.maximum(narrow_added.terms_NF.max(axis=0), 1.0)
        start_F = np.maximum(solve(narrow_added, us_K, noise_K), 0.5 * us_K.min() / most_F)
    else:
        start_F = start_F[determined_F]
    value_F = np.zeros(len(determined_F))
    value_F[determined_F] = solve(narrow, us_K, noise_K, start_F)
    return value_F


def _only(problem: Problem, determined_F: NDArray[np.bool_]) -> Problem:
    """The problem with some of its terms."""
    return replace(problem, terms_NF=problem.terms_NF[:, determined_F])
