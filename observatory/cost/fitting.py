"""Fits the network model to benchmark results.

Shapes: C cases (a matrix under one algorithm), F terms, B bootstrap samples, K folds.

1. The time of a case is the median over its repeats of the slowest rank's time: one scheduling accident does
   not move it.
2. Each form is fitted with whole groups of matrices left out, and judged by |predicted - measured| /
   measured on those. A group is one pattern and seed at all its sizes, or, where there are fewer than five
   of these, one matrix: so no held-out matrix has a scaled copy of itself in the fit where this can be
   avoided.
3. The form with the smallest mean error is the best. Another form is as good when it errs more, case by case,
   by no more than one standard error of that difference. Of these the one with the fewest parameters is
   chosen.
4. Intervals: matrices are drawn again with replacement and the chosen form is fitted to each draw.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from observatory.cost.features import FORMS, Form, StageTerms, stage_terms
from observatory.cost.network import AlgorithmFit, Coefficient, Domain, FormScore, NetworkModel
from observatory.cost.solving import Problem, predict_all, solve
from observatory.errors import BenchmarkError
from observatory.records_bench import BenchResult

__all__ = ["fit_network"]

_FOLDS = 5
_RATIO_QUANTILES = np.arange(1, 40, 2) / 40
#: A form needs this many cases per coefficient.
_CASES_PER_TERM = 2
_MAX_CONDITION = 1e8


def fit_network(
    results: Sequence[BenchResult],
    *,
    sources: Sequence[str] = (),
    argv: Sequence[str] = (),
    bootstrap: int = 100,
    seed: int = 0,
) -> NetworkModel:
    """Fit every algorithm in the results.

    Args:
        results: benchmark or replay results of one backend.
        sources: names of their files.
        argv: command line, for the document.
        bootstrap: B.
        seed: of folds and bootstrap.

    Raises:
        BenchmarkError: no results, several backends, data that arrived wrong, or too few matrices.
    """
    if not results:
        raise BenchmarkError("no benchmark result was given; make one with `observatory bench alltoall`")
    backends = sorted({result.backend for result in results})
    if len(backends) > 1:
        raise BenchmarkError(f"the results are of backends {', '.join(backends)}; fit each on its own")
    by_algorithm: dict[str, list[_Case]] = {}
    for result in results:
        for case in result.cases:
            if not case.correct:
                raise BenchmarkError(
                    f"{case.algorithm} over {result.backend} delivered wrong bytes of {case.pattern} "
                    f"on {result.ranks} ranks; its times mean nothing: mend the fabric and measure again"
                )
            by_algorithm.setdefault(case.algorithm, []).append(
                _Case(
                    group=(case.pattern, case.seed, case.step, case.layer, case.role, result.ranks),
                    bytes_PP=case.bytes_PP,
                    node_of_P=result.node_of_P,
                    terms=stage_terms(case.bytes_PP, result.node_of_P, case.algorithm),
                    us=case.median_us,
                )
            )
    from observatory.provenance import find_git_sha

    hosts = sorted({host.name for result in results for host in result.hosts})
    return NetworkModel(
        created_unix_s=time.time(),
        argv=tuple(argv),
        backend=backends[0],
        fits=tuple(
            _fit_algorithm(algorithm, cases, bootstrap, seed)
            for algorithm, cases in sorted(by_algorithm.items())
        ),
        sources=(*sources, *(f"host {host}" for host in hosts)),
        git_sha=find_git_sha(),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Case:
    """One measured matrix; ``group`` is what is held out together."""

    group: tuple[object, ...]
    bytes_PP: NDArray[np.int64]
    node_of_P: tuple[int, ...]
    terms: StageTerms
    us: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Trial:
    """One form with what it got wrong on held-out matrices."""

    form: Form
    problem: Problem
    known_F: NDArray[np.bool_]
    ratio_C: NDArray[np.float64]

    @property
    def error_C(self) -> NDArray[np.float64]:
        """|predicted - measured| / measured, (C,)."""
        return np.abs(1.0 / self.ratio_C - 1.0)

    def as_good_as(self, best: _Trial) -> bool:
        """Whether it errs more than the best by no more than one standard error of the difference."""
        more_C = self.error_C - best.error_C
        return float(more_C.mean()) <= float(more_C.std()) / np.sqrt(more_C.size)

    def score(self) -> FormScore:
        """The errors in numbers."""
        error_C = self.error_C
        return FormScore(
            form=self.form.name,
            parameters=int(self.known_F.sum()),
            median_error=float(np.median(error_C)),
            p90_error=float(np.quantile(error_C, 0.9)),
            mean_error=float(error_C.mean()),
            standard_error=float(error_C.std() / np.sqrt(error_C.size)),
        )


def _fit_algorithm(algorithm: str, cases: Sequence[_Case], bootstrap: int, seed: int) -> AlgorithmFit:
    us_C = np.array([case.us for case in cases])
    fold_C, sharing = _folds([case.group for case in cases], seed)
    trials = []
    for form in FORMS.values():
        problem = Problem.build([case.terms for case in cases], form)
        known_F = _determined(problem)
        if len(cases) < _CASES_PER_TERM * int(known_F.sum()):
            continue
        ratio_C = np.empty(len(cases))
        for fold in np.unique(fold_C):
            out = np.flatnonzero(fold_C == fold)
            fitted_F = _fit(problem.take(np.flatnonzero(fold_C != fold)), us_C[fold_C != fold], known_F)
            predicted = np.maximum(predict_all(problem.take(out), fitted_F), 1e-9)
            ratio_C[out] = us_C[out] / predicted
        trials.append(_Trial(form=form, problem=problem, known_F=known_F, ratio_C=ratio_C))
    if not trials:
        raise BenchmarkError(
            f"{len(cases)} matrices of algorithm {algorithm} are too few to fit; "
            "benchmark more sizes and patterns (observatory bench alltoall)"
        )
    best = min(trials, key=lambda trial: trial.error_C.mean())
    chosen = min(
        (trial for trial in trials if trial.as_good_as(best)),
        key=lambda trial: (int(trial.known_F.sum()), float(trial.error_C.mean())),
    )
    value_F = _fit(chosen.problem, us_C, chosen.known_F)
    samples_BF = _bootstrap(chosen, us_C, value_F, bootstrap, seed)
    return AlgorithmFit(
        algorithm=algorithm,
        form=chosen.form.name,
        coefficients=tuple(_coefficients(chosen, value_F, samples_BF)),
        samples_BF=tuple(map(tuple, samples_BF.tolist())),
        ratio_Q=tuple(np.quantile(chosen.ratio_C, _RATIO_QUANTILES).tolist()),
        scores=tuple(trial.score() for trial in trials),
        domain=_domain(cases),
        cases=len(cases),
        sharing=sharing,
    )


def _folds(groups: Sequence[tuple[object, ...]], seed: int) -> tuple[NDArray[np.int64], str]:
    """Fold of every case, groups dealt out whole; and in words."""
    distinct = list(dict.fromkeys(groups))
    whole = len(distinct) >= _FOLDS
    count = len(distinct) if whole else len(groups)
    order = np.random.default_rng(seed).permutation(count)
    fold_of = np.empty(count, dtype=np.int64)
    fold_of[order] = np.arange(count) % min(_FOLDS, count)
    if whole:
        index_of = {group: index for index, group in enumerate(distinct)}
        fold_C = np.array([fold_of[index_of[group]] for group in groups])
        return fold_C, f"{min(_FOLDS, count)} folds of whole patterns, all sizes of one together"
    return (
        fold_of,
        f"{min(_FOLDS, count)} folds of matrices; other sizes of a held-out pattern are in the fit",
    )


def _determined(problem: Problem) -> NDArray[np.bool_]:
    """Terms that the cases can tell apart, earlier ones first, (F,)."""
    scale_F = problem.terms_NF.max(axis=0)
    scale_F[scale_F == 0] = 1.0
    design_CF = problem.slowest(1.0 / scale_F) / scale_F
    known_F = np.zeros(len(scale_F), dtype=bool)
    for term in range(len(scale_F)):
        if not design_CF[:, term].any():
            continue
        known_F[term] = True
        if np.linalg.cond(design_CF[:, known_F]) > _MAX_CONDITION:
            known_F[term] = False
    return known_F


def _fit(
    problem: Problem,
    us_C: NDArray[np.float64],
    known_F: NDArray[np.bool_],
    start_F: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Coefficients of all terms, 0 where not determined."""
    narrow = Problem(
        terms_NF=problem.terms_NF[:, known_F],
        start_G=problem.start_G,
        case_G=problem.case_G,
        cases=problem.cases,
    )
    value_F = np.zeros(len(known_F))
    value_F[known_F] = solve(narrow, us_C, None if start_F is None else start_F[known_F])
    return value_F


def _bootstrap(
    trial: _Trial, us_C: NDArray[np.float64], value_F: NDArray[np.float64], samples: int, seed: int
) -> NDArray[np.float64]:
    """Coefficients fitted to resampled cases, (B, F)."""
    generator = np.random.default_rng(seed)
    drawn_BF = np.empty((samples, len(value_F)))
    for sample in range(samples):
        case_C = generator.integers(len(us_C), size=len(us_C))
        drawn_BF[sample] = _fit(trial.problem.take(case_C), us_C[case_C], trial.known_F, value_F)
    return drawn_BF


def _coefficients(
    trial: _Trial, value_F: NDArray[np.float64], samples_BF: NDArray[np.float64]
) -> list[Coefficient]:
    found = []
    for index, term in enumerate(trial.form.terms):
        if not trial.known_F[index]:
            absent = not trial.problem.terms_NF[:, index].any()
            reason = "never measured" if absent else "not told apart from the terms before it"
            found.append(Coefficient.model_validate({"term": term, "us_per_unit": None, "reason": reason}))
            continue
        value = float(value_F[index])
        low, high = (
            np.quantile(samples_BF[:, index], [0.05, 0.95]).tolist() if len(samples_BF) else (None, None)
        )
        per_byte = "bytes" in term or term.startswith("both") or term == "shared_self"
        found.append(
            Coefficient(
                term=term,
                us_per_unit=value,
                low_us=low,
                high_us=high,
                gb_per_s=1e-3 / value if per_byte and value > 0 else None,
            )
        )
    return found


def _domain(cases: Sequence[_Case]) -> Domain:
    busiest_C = np.array(
        [int(max(case.bytes_PP.sum(axis=1).max(), case.bytes_PP.sum(axis=0).max())) for case in cases]
    )
    some = busiest_C[busiest_C > 0]
    on_node = {max(case.node_of_P.count(node) for node in set(case.node_of_P)) for case in cases}
    return Domain(
        ranks=tuple(sorted({len(case.node_of_P) for case in cases})),
        nodes=tuple(sorted({len(set(case.node_of_P)) for case in cases})),
        ranks_on_node=tuple(sorted(on_node)),
        rank_bytes=(int(some.min()), int(some.max())) if some.size else (0, 0),
        empty=bool((busiest_C == 0).any()),
    )
