"""Fits the network model to benchmark results.

Shapes: C cases (a matrix under one algorithm), F terms, B bootstrap samples, K folds.

1. The time of a case is the median over its repeats of the slowest rank's time: one scheduling accident does
   not move it. How far repeats scatter says how much that median is worth.
2. Each form is fitted with whole groups of matrices left out, and judged by |predicted - measured| /
   measured on those. A group is one pattern and seed at all its sizes, or, where there are fewer than five
   of these, one matrix: so no held-out matrix has a scaled copy of itself in the fit where this can be
   avoided.
3. The form with the smallest error, cases weighted by what they are worth, is the best. Of the forms that err
   at most a tenth more than it, the one with the fewest parameters is chosen.
4. Intervals: matrices are drawn again with replacement and the chosen form is fitted to each draw.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from observatory.cost.features import BYTE_TERMS, FORMS, Form, StageTerms, stage_terms
from observatory.cost.network import AlgorithmFit, Coefficient, Domain, FormScore, NetworkModel
from observatory.cost.solving import Problem, predict_all, solve
from observatory.errors import BenchmarkError
from observatory.records_bench import NODES_AS_TOLD, BenchResult

__all__ = ["fit_network"]

_FOLDS = 5
_RATIO_QUANTILES = np.arange(1, 40, 2) / 40
#: A form needs this many cases per coefficient.
_CASES_PER_TERM = 2
_MAX_CONDITION = 1e8
#: Relative error that a good form leaves where the measurement is quiet. It bounds how much more a quiet
#: long exchange counts than a noisy short one, from which alone latencies can be told.
_LEAST_NOISE = 0.1
#: A simpler form may err by this factor more.
_AS_GOOD = 1.1


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
    if any(result in results[:index] for index, result in enumerate(results)):
        raise BenchmarkError("a result was given twice, which would halve the intervals; give each once")
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
                    noise=_noise(case.slowest_us_R),
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
        notes=(NODES_AS_TOLD,) if any(NODES_AS_TOLD in result.notes for result in results) else (),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Case:
    """One measured matrix; ``group`` is what is held out together, ``noise`` the expected relative error."""

    group: tuple[object, ...]
    bytes_PP: NDArray[np.int64]
    node_of_P: tuple[int, ...]
    terms: StageTerms
    us: float
    noise: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Trial:
    """One form with what it got wrong on held-out matrices; ``added`` has latencies and bytes in one sum."""

    form: Form
    problem: Problem
    added: Problem
    known_F: NDArray[np.bool_]
    ratio_C: NDArray[np.float64]
    noise_C: NDArray[np.float64]

    @property
    def error_C(self) -> NDArray[np.float64]:
        """|predicted - measured| / measured, (C,)."""
        return np.abs(1.0 / self.ratio_C - 1.0)

    @property
    def weighted_error(self) -> float:
        """Mean error, a case counting the less the more its repeats scatter."""
        return float(np.average(self.error_C, weights=1.0 / self.noise_C))

    def score(self) -> FormScore:
        """The errors in numbers."""
        error_C = self.error_C
        return FormScore(
            form=self.form.name,
            parameters=int(self.known_F.sum()),
            median_error=float(np.median(error_C)),
            p90_error=float(np.quantile(error_C, 0.9)),
            weighted_error=self.weighted_error,
        )


def _fit_algorithm(algorithm: str, cases: Sequence[_Case], bootstrap: int, seed: int) -> AlgorithmFit:
    us_C = np.array([case.us for case in cases])
    noise_C = np.array([case.noise for case in cases])
    fold_C, sharing = _folds([case.group for case in cases], seed)
    trials = []
    for form in FORMS.values():
        problem = Problem.build([case.terms for case in cases], form)
        added = Problem.build([case.terms for case in cases], replace(form, overlap=False))
        known_F = _determined(added)
        if len(cases) < _CASES_PER_TERM * int(known_F.sum()):
            continue
        ratio_C = np.empty(len(cases))
        for fold in np.unique(fold_C):
            out = np.flatnonzero(fold_C == fold)
            kept = np.flatnonzero(fold_C != fold)
            fitted_F = _fit(problem.take(kept), added.take(kept), us_C[kept], noise_C[kept], known_F)
            predicted = np.maximum(predict_all(problem.take(out), fitted_F), 1e-9)
            ratio_C[out] = us_C[out] / predicted
        trials.append(
            _Trial(form=form, problem=problem, added=added, known_F=known_F, ratio_C=ratio_C, noise_C=noise_C)
        )
    if not trials:
        raise BenchmarkError(
            f"{len(cases)} matrices of algorithm {algorithm} are too few to fit; "
            "benchmark more sizes and patterns (observatory bench alltoall)"
        )
    allowed = _AS_GOOD * min(trial.weighted_error for trial in trials)
    chosen = min(
        (trial for trial in trials if trial.weighted_error <= allowed),
        key=lambda trial: (int(trial.known_F.sum()), trial.weighted_error),
    )
    value_F = _fit(chosen.problem, chosen.added, us_C, noise_C, chosen.known_F)
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


def _noise(us_R: NDArray[np.float64]) -> float:
    """Relative standard error of a median, from the quartiles of the repeats, and what is always left."""
    low, middle, high = np.quantile(us_R, [0.25, 0.5, 0.75])
    scatter = 1.2533 * (high - low) / 1.349 / middle / np.sqrt(us_R.size)
    return float(np.hypot(_LEAST_NOISE, scatter))


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
    added: Problem,
    us_C: NDArray[np.float64],
    noise_C: NDArray[np.float64],
    known_F: NDArray[np.bool_],
    start_F: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Coefficients of all terms, 0 where not determined.

    Without a start, from the fit of the plain sum: which of its halves counts where must be guessed first.
    """
    narrow, narrow_added = _only(problem, known_F), _only(added, known_F)
    if start_F is None:
        most_F = np.maximum(narrow_added.terms_NF.max(axis=0), 1.0)
        start = np.maximum(solve(narrow_added, us_C, noise_C), 0.5 * us_C.min() / most_F)
    else:
        start = start_F[known_F]
    value_F = np.zeros(len(known_F))
    value_F[known_F] = solve(narrow, us_C, noise_C, start)
    return value_F


def _only(problem: Problem, known_F: NDArray[np.bool_]) -> Problem:
    """The problem with some of its terms."""
    return replace(problem, terms_NF=problem.terms_NF[:, known_F])


def _bootstrap(
    trial: _Trial, us_C: NDArray[np.float64], value_F: NDArray[np.float64], samples: int, seed: int
) -> NDArray[np.float64]:
    """Coefficients fitted to resampled cases, (B, F)."""
    generator = np.random.default_rng(seed)
    drawn_BF = np.empty((samples, len(value_F)))
    for sample in range(samples):
        case_C = generator.integers(len(us_C), size=len(us_C))
        drawn_BF[sample] = _fit(
            trial.problem.take(case_C),
            trial.added.take(case_C),
            us_C[case_C],
            trial.noise_C[case_C],
            trial.known_F,
            value_F,
        )
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
        found.append(
            Coefficient(
                term=term,
                us_per_unit=value,
                low_us=low,
                high_us=high,
                gb_per_s=1e-3 / value if term in BYTE_TERMS and value > 0 else None,
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
