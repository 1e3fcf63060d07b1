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

from observatory.analysis.network.features import (
    BYTE_TERMS,
    FORMS,
    LATENCY,
    START,
    Form,
    StageTerms,
    terms_of,
)
from observatory.analysis.network.network import FormScore
from observatory.analysis.network.parts import (
    MOST_CASES,
    Part,
    Predict,
    World,
    factors_of,
    find_parts,
    searched,
)
from observatory.analysis.network.solving import Problem, predict_all, solve
from observatory.analysis.statistics import deal_folds, hold_out, simplest
from observatory.run.exchange_algorithms import stages

_FOLDS = 5
#: Fold of exchanges in which nothing leaves its rank: they alone determine the latency.
_ALWAYS_FITTED = -1
#: Fewer numbers of ranks leave less than two in the fit when one is held out.
_RANKS_TO_HOLD_OUT = 3
#: A form needs this many cases per coefficient, without what passes before bytes flow.
_CASES_PER_TERM = 2
_MAX_CONDITION = 1e8
#: Relative error that a good form leaves where the measurement is quiet. It bounds how much more a quiet
#: long exchange counts than a noisy short one, from which alone latencies can be determined.
_LEAST_NOISE = 0.1
_SMALLEST_US = 1e-3
#: Forms whose errors differ by less than this factor, or this much, are equally good for any purpose.
_SAME_ERROR, _SAME_POINTS = 1.05, 0.005
#: Larger ones count as this: what one matrix gets wrong alone chooses no form.
_MOST_ERROR = 1.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """One measured matrix.

    Attributes:
        group: what is held out together.
        bytes_PP: bytes from rank i to rank j.
        node_of_P: node of each rank.
        host_of_P: names of their hosts where recorded.
        algorithm, role: as in the benchmark.
        us: mean microseconds over repeats, without the extremes.
        scatter: relative standard error of ``us`` by its repeats; None when they are too few.
    """

    group: tuple[object, ...]
    bytes_PP: NDArray[np.int64]
    node_of_P: tuple[int, ...]
    host_of_P: tuple[str, ...] | None
    algorithm: str
    role: str | None
    us: float
    scatter: float | None


class Cases:
    """Measured matrices of one algorithm.

    Attributes:
        case_C: the matrices.
        us_C: measured microseconds.
        noise_C: expected relative error.
        group_C: what is held out together.
        ranks_C: number of ranks.
    """

    def __init__(self, cases: Sequence[Case]) -> None:
        self.case_C = list(cases)
        self.us_C = np.array([case.us for case in cases])
        self.noise_C = np.hypot(_LEAST_NOISE, [case.scatter or 0.0 for case in cases])
        self.group_C = [case.group for case in cases]
        self.ranks_C = np.array([len(case.node_of_P) for case in cases])
        self._stages = [
            np.array(stages(case.bytes_PP, case.node_of_P, case.algorithm, role=case.role)) for case in cases
        ]
        self._plain: list[StageTerms] = []
        self._plain = self.terms()

    def terms(self, parts: Sequence[Part] = (), case_K: NDArray[np.int64] | None = None) -> list[StageTerms]:
        """What the forms look at, of all or some cases; bytes through slower parts count so many times."""
        found: dict[int, StageTerms] = {}
        chosen = range(len(self.case_C)) if case_K is None else case_K.tolist()
        for node_of_P in dict.fromkeys(self.case_C[i].node_of_P for i in chosen):
            factors = factors_of(parts, node_of_P)
            places = [i for i in chosen if self.case_C[i].node_of_P == node_of_P]
            if factors is None and self._plain:
                found |= {i: self._plain[i] for i in places}
                continue
            counts = [len(self._stages[i]) for i in places]
            terms_HPF = terms_of(np.concatenate([self._stages[i] for i in places]), node_of_P, factors)
            split = np.split(terms_HPF, np.cumsum(counts)[:-1])
            found |= {i: StageTerms(terms_SPF=terms_SPF) for i, terms_SPF in zip(places, split, strict=True)}
        return [found[i] for i in chosen]

    def worlds(self) -> list[World]:
        """The cases by set of ranks."""
        groups = {group: number for number, group in enumerate(dict.fromkeys(self.group_C))}
        worlds = []
        for node_of_P in dict.fromkeys(case.node_of_P for case in self.case_C):
            own_C = np.array([i for i, case in enumerate(self.case_C) if case.node_of_P == node_of_P])
            own_C = own_C[np.linspace(0, len(own_C) - 1, min(len(own_C), MOST_CASES)).round().astype(int)]
            worlds.append(
                World(
                    node_of_P=node_of_P,
                    case_C=own_C,
                    bytes_CPP=np.array([self.case_C[i].bytes_PP for i in own_C]),
                    group_C=np.array([groups[self.group_C[i]] for i in own_C]),
                    us_C=self.us_C[own_C],
                    noise_C=self.noise_C[own_C],
                )
            )
        return worlds

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
        stays_C = np.array(
            [not (item.bytes_PP * ~np.eye(len(item.bytes_PP), dtype=bool)).any() for item in self.case_C]
        )
        also = f"; and each of {', '.join(map(str, ranks))} ranks in turn" if ranks else ""
        if whole:
            index_of = {group: index for index, group in enumerate(distinct)}
            fold_C = np.array([fold_of[index_of[group]] for group in self.group_C])
            return np.where(
                stays_C, _ALWAYS_FITTED, fold_C
            ), f"{min(_FOLDS, count)} folds of whole patterns, all sizes of one together{also}"
        return (
            np.where(stays_C, _ALWAYS_FITTED, fold_of),
            f"{min(_FOLDS, count)} folds of matrices; other sizes of a held-out pattern are in the fit{also}",
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trial:
    """One form with what it got wrong on held-out matrices.

    Attributes:
        form: the form.
        parts: ranks, pairs and nodes that are slower.
        problem: terms of all cases.
        determined_F: terms that the cases can separate.
        cases: the cases.
        ratio_C: measured / predicted, patterns held out.
        ranks_ratio_C: measured / predicted, the case's number of ranks held out, with what is slower there
            not known; None where too few were measured.
        informed_ratio_C: the same with what is slower there known, by which forms are compared.
    """

    form: Form
    parts: tuple[Part, ...]
    problem: Problem
    determined_F: NDArray[np.bool_]
    cases: Cases
    ratio_C: NDArray[np.float64]
    ranks_ratio_C: NDArray[np.float64] | None
    informed_ratio_C: NDArray[np.float64] | None

    @property
    def parameters(self) -> int:
        """Coefficients that the cases determine, and factors of slower parts."""
        return int(self.determined_F.sum()) + len(self.parts)

    @property
    def error_C(self) -> NDArray[np.float64]:
        """Held-out error of every case, counting the less the more its repeats scatter, (C,).

        Where numbers of ranks were held out as well, the mean of both kinds.
        """
        kinds = [self.ratio_C] if self.informed_ratio_C is None else [self.ratio_C, self.informed_ratio_C]
        weight_C = 1.0 / self.cases.noise_C
        mean_C = np.mean([np.minimum(_error(ratio_C), _MOST_ERROR) for ratio_C in kinds], axis=0)
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
        """Coefficients of all terms fitted to some of the cases, 0 where not determined, (F,)."""
        return _Fit(self.form, self.determined_F, self.cases)(self.problem, case_K, start_F)


def try_forms(cases: Cases, seed: int) -> tuple[list[Trial], str]:
    """Every form that has enough cases, and what was held out in words."""
    fold_C, sharing = cases.folds(seed)
    plain, worlds = cases.terms(), searched(cases.worlds())
    searched_C = np.concatenate([np.zeros(0, dtype=int), *(world.case_C for world in worlds)])
    trials = []
    for form in FORMS.values():
        whole = Problem.build(plain, form)
        if not any(item.has(form.needs) for item in plain):
            continue
        determined_F = np.concatenate([_determined(Problem.build(plain, side)) for side in form.separate])
        counted = [term not in START for term in form.terms]
        if len(cases.us_C) < _CASES_PER_TERM * int(determined_F[counted].sum()):
            continue
        fit = _Fit(form, determined_F, cases)
        parts = tuple(find_parts(worlds, fit.on(searched_C)))
        problem = Problem.build(cases.terms(parts), form) if parts else whole
        trials.append(
            Trial(
                form=form,
                parts=parts,
                problem=problem,
                determined_F=determined_F,
                cases=cases,
                ratio_C=_held_out(fit, problem, problem, fold_C),
                ranks_ratio_C=(
                    _held_out(fit, problem, whole, cases.ranks_C) if cases.ranks_held_out else None
                ),
                informed_ratio_C=(
                    _held_out(fit, problem, problem, cases.ranks_C) if cases.ranks_held_out else None
                ),
            )
        )
    return trials, sharing


def choose(trials: Sequence[Trial]) -> Trial:
    """The form with the fewest parameters of those whose error is practically the smallest."""
    least = min(trial.error for trial in trials)
    return simplest(
        trial for trial in trials if trial.error <= max(_SAME_ERROR * least, least + _SAME_POINTS)
    )


def _error(ratio_C: NDArray[np.float64]) -> NDArray[np.float64]:
    """|predicted - measured| / measured from measured / predicted."""
    error_C: NDArray[np.float64] = np.abs(1.0 / ratio_C - 1.0)
    return error_C


def _held_out(
    fit: _Fit, fitted: Problem, predicted: Problem, fold_C: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Measured / predicted of every case by a fit without its fold."""

    def predict(case_K: NDArray[np.int64], held_out_C: NDArray[np.int64]) -> NDArray[np.float64]:
        stays = fold_C[held_out_C[0]] == _ALWAYS_FITTED
        return predict_all(
            predicted.take(held_out_C), fit(fitted, np.arange(fitted.cases) if stays else case_K)
        )

    ratio_C: NDArray[np.float64] = fit.cases.us_C / np.maximum(hold_out(fold_C, predict), _SMALLEST_US)
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


@dataclass(slots=True)
class _Fit:
    """Fits one form; coefficients of all terms, 0 where not determined."""

    form: Form
    determined_F: NDArray[np.bool_]
    cases: Cases

    def __call__(
        self, problem: Problem, case_K: NDArray[np.int64], start_F: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """Fit some of the cases.

        Without a start, every term begins as if it alone explained half of the time of the exchanges that
        have most of it.
        """
        return self._solved(problem.take(case_K), case_K, start_F)

    def on(self, case_K: NDArray[np.int64]) -> Predict:
        """Fits some cases with slower parts: their predicted microseconds, and the latency in them."""
        last_F: NDArray[np.float64] | None = None

        def predict(parts: Sequence[Part]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            nonlocal last_F
            problem = Problem.build(self.cases.terms(parts, case_K), self.form)
            last_F = self._solved(problem, case_K, last_F)
            latency_F = np.where([term in BYTE_TERMS for term in self.form.terms], 0.0, last_F)
            return (
                np.maximum(predict_all(problem, last_F), _SMALLEST_US),
                np.maximum(predict_all(problem, latency_F), _SMALLEST_US),
            )

        return predict

    def _solved(
        self, problem: Problem, case_K: NDArray[np.int64], start_F: NDArray[np.float64] | None
    ) -> NDArray[np.float64]:
        us_K, noise_K = self.cases.us_C[case_K], self.cases.noise_C[case_K]
        narrow = replace(problem, terms_NF=problem.terms_NF[:, self.determined_F])
        if start_F is None:
            start_F = _guess(narrow, us_K)
            # The latency shows by itself before anything adds to it.
            start_F[[term in START for term in np.array(self.form.terms)[self.determined_F]]] = 0.0
        else:
            start_F = start_F[self.determined_F]
        value_F = np.zeros(len(self.determined_F))
        value_F[self.determined_F] = solve(narrow, us_K, noise_K, start_F)
        return self._with_latency(problem, value_F)

    def _with_latency(self, problem: Problem, value_F: NDArray[np.float64]) -> NDArray[np.float64]:
        """Where no exchange shows the latency by itself, it is what passes before bytes flow."""
        terms = self.form.terms
        if START[0] in terms and not problem.slowest(value_F)[:, terms.index(LATENCY[0])].any():
            for own, start in zip(LATENCY, START, strict=True):
                value_F[terms.index(own)] = value_F[terms.index(start)]
        return value_F


def _guess(problem: Problem, us_C: NDArray[np.float64]) -> NDArray[np.float64]:
    stage_F = np.maximum.reduceat(problem.terms_NF, problem.start_G, axis=0)
    most_CF = np.maximum.reduceat(stage_F, np.searchsorted(problem.case_G, np.arange(problem.cases)), axis=0)
    guess_F = np.zeros(most_CF.shape[1])
    for term, most_C in enumerate(most_CF.T):
        has = (most_C > 0) & (most_C >= np.median(most_C))
        guess_F[term] = 0.5 * np.median(us_C[has] / most_C[has]) if has.any() else 0.0
        if most_C.min() == most_C.max() > 0:  # the same in all exchanges: latency
            guess_F[term] = 0.5 * us_C.min() / most_C[0]
    return guess_F
