"""Fits the network model to benchmark results.

Shapes: C cases (a matrix under one algorithm), F terms, B bootstrap samples.

1. The time of a case is the median over its repeats of the exchange's time
(`observatory.collectives.bench.measure`): one
   scheduling accident does not move it. How far repeats scatter says how much that median is worth.
2. Each form is fitted with whole patterns left out and, where three or more numbers of ranks were measured,
   with each of these left out, and judged by |predicted - measured| / measured on those
   (`observatory.analysis.network.trials`).
3. Of the forms whose error, cases weighted by what they are worth, is not distinguishable from the smallest,
   the one with the fewest parameters is chosen.
4. Intervals: matrices are drawn again with replacement and the chosen form is fitted to each draw.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.network.features import BYTE_TERMS
from observatory.analysis.network.judging import paired_ratios, repeat_noise, verdict_of
from observatory.analysis.network.network import (
    AlgorithmFit,
    Coefficient,
    Domain,
    Misfit,
    NetworkModel,
    RanksScore,
)
from observatory.analysis.network.parts import Part
from observatory.analysis.network.trials import Case, Cases, Trial, choose, try_forms
from observatory.analysis.network.words import NetworkCode, sentence
from observatory.analysis.statistics import sample_ends
from observatory.errors import BenchmarkError
from observatory.reasons import Reason
from observatory.run.documents.bench import NODES_AS_STATED, BenchCase, BenchResult
from observatory.run.exchange_algorithms import stages
from observatory.run.usable_cores import short_of_cores

_RATIO_QUANTILES = np.arange(1, 40, 2) / 40
#: Matrices of one algorithm that are fitted: more make a fit slower and hardly surer.
_MOST_CASES = 2048


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
    by_algorithm: dict[str, list[tuple[BenchCase, BenchResult]]] = {}
    for result in results:
        for case in result.cases:
            if not case.correct:
                raise BenchmarkError(
                    f"{case.algorithm} over {result.backend} delivered wrong bytes of {case.pattern} "
                    f"on {result.ranks} ranks; its times mean nothing: mend the fabric and measure again"
                )
            by_algorithm.setdefault(case.algorithm, []).append((case, result))
    notes = [
        Reason(
            NetworkCode.MATRICES_DRAWN,
            {"algorithm": algorithm, "fitted": _MOST_CASES, "measured": len(measured)},
        )
        for algorithm, measured in sorted(by_algorithm.items())
        if len(measured) > _MOST_CASES
    ]
    if any(NODES_AS_STATED in result.notes for result in results):
        notes.insert(0, Reason(NetworkCode.NODES_AS_STATED))
    from observatory.host.provenance import find_git_sha

    hosts = sorted({host.name for result in results for host in result.hosts})
    return NetworkModel(
        created_unix_s=time.time(),
        argv=tuple(argv),
        backend=backends[0],
        fits=tuple(
            _fit_algorithm(algorithm, _drawn(measured, seed), bootstrap, seed)
            for algorithm, measured in sorted(by_algorithm.items())
        ),
        sources=(*sources, *(f"host {host}" for host in hosts)),
        hosts=tuple(hosts),
        git_sha=find_git_sha(),
        notes=tuple(map(sentence, notes)),
        note_codes=tuple(note.code.value for note in notes),
        short_of_cores=tuple(
            dict.fromkeys(share for result in results for share in short_of_cores(result.cores_P or ()))
        ),
    )


def _drawn(measured: Sequence[tuple[BenchCase, BenchResult]], seed: int) -> list[Case]:
    """The cases to fit: all, or so many of them that a fit takes seconds."""
    chosen = np.arange(len(measured))
    if len(chosen) > _MOST_CASES:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, _MOST_CASES, replace=False))
    return [
        Case(
            group=(case.pattern, case.seed, case.step, case.layer, case.role, result.ranks),
            bytes_PP=case.bytes_PP,
            node_of_P=result.node_of_P,
            host_of_P=None if result.cores_P is None else tuple(cores.host for cores in result.cores_P),
            algorithm=case.algorithm,
            role=case.role,
            us=case.mean_us,
            scatter=repeat_noise(case.exchange_us_R),
        )
        for case, result in (measured[i] for i in chosen.tolist())
    ]


def _fit_algorithm(algorithm: str, measured: Sequence[Case], bootstrap: int, seed: int) -> AlgorithmFit:
    cases = Cases(measured)
    trials, sharing = try_forms(cases, seed)
    if not trials:
        raise BenchmarkError(
            f"{len(measured)} matrices of algorithm {algorithm} are too few to fit; "
            "benchmark more sizes and patterns (observatory bench alltoall)"
        )
    chosen = choose(trials)
    value_F = chosen.fit(np.arange(len(measured)))
    samples_BF = _bootstrap(chosen, value_F, bootstrap, seed)
    other = chosen.ranks_ratio_C
    node_of_P_C = [case.node_of_P for case in measured]
    staged_C = [_over_stages(case) for case in measured]
    scatter = [case.scatter for case in measured if case.scatter is not None]
    paired, other_paired = (
        None if ratio_C is None else paired_ratios(ratio_C, node_of_P_C, staged_C, cases.group_C)
        for ratio_C in (chosen.ratio_C, other)
    )
    return AlgorithmFit(
        algorithm=algorithm,
        form=chosen.form.name,
        coefficients=tuple(_coefficients(chosen, value_F, samples_BF)),
        samples_BF=tuple(map(tuple, samples_BF.tolist())),
        ratio_Q=_quantiles(chosen.ratio_C),
        other_ranks_ratio_Q=None if other is None else _quantiles(other),
        held_out_ranks=_held_out_ranks(chosen),
        paired_ratio_Q=None if paired is None or not paired.size else _quantiles(paired),
        other_ranks_paired_ratio_Q=(
            None if other_paired is None or not other_paired.size else _quantiles(other_paired)
        ),
        misfits=tuple(_misfit(part, measured) for part in chosen.parts),
        verdict=verdict_of(
            chosen.score(),
            noise=float(np.median(scatter)) if scatter else None,
            other_ranks_p90=None if other is None else float(np.quantile(np.abs(1.0 / other - 1.0), 0.9)),
        ),
        scores=tuple(trial.score() for trial in trials),
        domain=_domain(measured),
        cases=len(measured),
        sharing=sharing,
    )


def _over_stages(case: Case) -> NDArray[np.int64]:
    summed: NDArray[np.int64] = np.sum(
        stages(case.bytes_PP, case.node_of_P, case.algorithm, role=case.role), axis=0
    )
    return summed


def _misfit(part: Part, measured: Sequence[Case]) -> Misfit:
    hosts = next(case.host_of_P for case in measured if case.node_of_P == part.node_of_P)
    of = part.node_of_P if part.code.startswith("node") else range(len(part.node_of_P))
    return Misfit(
        code=part.code,
        who=part.who,
        ranks=len(part.node_of_P),
        node_of_P=part.node_of_P,
        hosts=tuple(
            dict.fromkeys(
                host for host, own in zip(hosts or (), of, strict=hosts is not None) if own in part.who
            )
        ),
        factor=part.factor,
    )


def _quantiles(ratio_C: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(np.quantile(ratio_C, _RATIO_QUANTILES).tolist())


def _held_out_ranks(trial: Trial) -> tuple[RanksScore, ...]:
    """What the form got wrong on each number of ranks that its fit did not see."""
    if trial.ranks_ratio_C is None:
        return ()
    errors = []
    for ranks in trial.cases.ranks_held_out:
        predicted_per_measured = 1.0 / trial.ranks_ratio_C[trial.cases.ranks_C == ranks]
        error = np.abs(predicted_per_measured - 1.0)
        errors.append(
            RanksScore(
                ranks=ranks,
                median_error=float(np.median(error)),
                p90_error=float(np.quantile(error, 0.9)),
                median_ratio=float(np.median(predicted_per_measured)),
            )
        )
    return tuple(errors)


def _bootstrap(trial: Trial, value_F: NDArray[np.float64], samples: int, seed: int) -> NDArray[np.float64]:
    """Coefficients fitted to resampled cases, (B, F)."""
    generator = np.random.default_rng(seed)
    cases = len(trial.cases.us_C)
    drawn_BF = np.empty((samples, len(value_F)))
    for sample in range(samples):
        drawn_BF[sample] = trial.fit(generator.integers(cases, size=cases), value_F)
    return drawn_BF


def _coefficients(
    trial: Trial, value_F: NDArray[np.float64], samples_BF: NDArray[np.float64]
) -> list[Coefficient]:
    coefficients = []
    for index, term in enumerate(trial.form.terms):
        if not trial.determined_F[index]:
            absent = not trial.problem.terms_NF[:, index].any()
            reason = "never measured" if absent else "not told apart from the terms before it"
            coefficients.append(
                Coefficient.model_validate({"term": term, "us_per_unit": None, "reason": reason})
            )
            continue
        value = float(value_F[index])
        low, high = sample_ends(samples_BF[:, index])
        coefficients.append(
            Coefficient(
                term=term,
                us_per_unit=value,
                low_us=low,
                high_us=high,
                gb_per_s=1e-3 / value if term in BYTE_TERMS and value > 0 else None,
            )
        )
    return coefficients


def _domain(cases: Sequence[Case]) -> Domain:
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
