"""Predicted times of traffic matrices, with intervals and with what is an extrapolation.

Shapes: P ranks, B bootstrap samples, Q quantiles, M matrices, F terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from observatory.analysis.network.features import FORMS, stage_terms, terms_of
from observatory.analysis.network.network import AlgorithmFit, NetworkModel
from observatory.analysis.network.parts import Part, factors_of
from observatory.analysis.network.solving import Problem, predict_all
from observatory.analysis.network.words import NetworkCode
from observatory.errors import BenchmarkError
from observatory.reasons import Reason

_MANY_SAMPLES = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Predicted time of one exchange.

    Attributes:
        us: microseconds from the last start to the last end.
        low_us, high_us: 90 % interval: bootstrap of the coefficients times what the fit got wrong on matrices
            it had not seen; for another number of ranks than was measured, on numbers of ranks it had not
            seen. It does not cover what is named in ``extrapolated``.
        extrapolated: why this is outside what was measured; empty when it is inside.
        misfits: places in the fit's ``misfits``, all of them, where this exchange has bytes and is of another
            set of ranks than was measured: it is not known which rank is the slow one there.
    """

    us: float
    low_us: float
    high_us: float
    extrapolated: tuple[Reason, ...] = ()
    misfits: tuple[int, ...] = ()


def predict_us(
    model: NetworkModel,
    bytes_PP: ArrayLike,
    node_of_P: Sequence[int],
    *,
    algorithm: str = "flat",
    role: str | None = None,
) -> Prediction:
    """Predict the time of one exchange.

    Args:
        model: a fitted model.
        bytes_PP: bytes from rank i to rank j.
        node_of_P: node of each rank.
        algorithm: as in the benchmark.
        role: ``combine`` when the matrix is the way back of a dispatch, which some algorithms take in another
            order.

    Raises:
        BenchmarkError: the model lacks the algorithm, or measured nothing of a kind that this exchange has.
        ExchangeError: the matrix does not fit the ranks, or the algorithm the nodes.
    """
    fit = model.of(algorithm)
    form = FORMS[fit.form]
    matrix_PP = np.asarray(bytes_PP, dtype=np.int64)
    factors = factors_of(_parts(fit), tuple(node_of_P))
    terms = stage_terms(matrix_PP, node_of_P, algorithm, role=role, factors=factors)
    problem = Problem.build([terms], form)
    _refuse_never_measured(fit, problem.terms_NF, node_of_P)
    value_F = np.array([item.us_per_unit or 0.0 for item in fit.coefficients])
    us = float(predict_all(problem, value_F)[0])
    samples_BF = np.array(fit.samples_BF[:_MANY_SAMPLES])
    spread_B = _of_samples(problem, samples_BF) if samples_BF.size else np.array([us])
    other_ranks = len(node_of_P) not in fit.domain.ranks
    ratio_Q = fit.other_ranks_ratio_Q if other_ranks and fit.other_ranks_ratio_Q else fit.ratio_Q
    low, high = np.quantile(np.outer(spread_B, ratio_Q), [0.05, 0.95])
    return Prediction(
        us=us,
        low_us=float(max(low, 0.0)),
        high_us=float(max(high, 0.0)),
        extrapolated=tuple(_outside(fit, matrix_PP, node_of_P)),
        misfits=_unplaced(fit, matrix_PP, node_of_P),
    )


def predict_stages_us(
    model: NetworkModel,
    stage_MPP: Sequence[NDArray[np.int64]],
    node_of_P: Sequence[int],
    *,
    algorithm: str = "flat",
) -> NDArray[np.float64]:
    """Predict the times of many exchanges at once, without intervals, (M,).

    Args:
        model: a fitted model.
        stage_MPP: bytes from rank i to rank j in each stage that the algorithm makes of an exchange; see
            `observatory.run.exchange_algorithms.stages`.
        node_of_P: node of each rank.
        algorithm: as in the benchmark.

    Raises:
        BenchmarkError: the model lacks the algorithm, or measured nothing of a kind that an exchange has.
    """
    fit = model.of(algorithm)
    form = FORMS[fit.form]
    value_F = np.array([item.us_per_unit or 0.0 for item in fit.coefficients])
    factors = factors_of(_parts(fit), tuple(node_of_P))
    us_M = np.zeros(len(stage_MPP[0]))
    for bytes_MPP in stage_MPP:
        terms_MPF = terms_of(bytes_MPP, node_of_P, factors)[..., form.columns]
        _refuse_never_measured(fit, terms_MPF, node_of_P)
        sums_XF = form.sums_XF * value_F
        us_M += (terms_MPF @ sums_XF.T).max(axis=(1, 2))
    return us_M


def outside_domain(fit: AlgorithmFit, bytes_MPP: NDArray[np.int64], node_of_P: Sequence[int]) -> list[Reason]:
    """What of many exchanges lies outside the measurements: of the one with most and the one with least."""
    busiest_M = np.maximum(bytes_MPP.sum(axis=2).max(axis=1), bytes_MPP.sum(axis=1).max(axis=1))
    ends = dict.fromkeys((int(busiest_M.argmax()), int(busiest_M.argmin())))
    reasons = [reason for end in ends for reason in _outside(fit, bytes_MPP[end], node_of_P)]
    return list({(reason.code, str(reason.values)): reason for reason in reasons}.values())


def _refuse_never_measured(
    fit: AlgorithmFit, terms_NF: NDArray[np.float64], node_of_P: Sequence[int]
) -> None:
    form = FORMS[fit.form]
    for term in fit.never_measured:
        if terms_NF[..., form.terms.index(term)].any():
            raise BenchmarkError(
                f"the network model never measured {term}, which this exchange over {len(set(node_of_P))} "
                "nodes has; benchmark across nodes (ranks on several hosts, --ranks-per-node) and fit again"
            )


def _parts(fit: AlgorithmFit) -> list[Part]:
    return [
        Part(code=item.code, who=item.who, node_of_P=item.node_of_P, factor=item.factor)
        for item in fit.misfits
    ]


def _unplaced(fit: AlgorithmFit, bytes_PP: NDArray[np.int64], node_of_P: Sequence[int]) -> tuple[int, ...]:
    """Slower parts of other sets of ranks, where none is known of these."""
    measured = tuple(node_of_P) in {misfit.node_of_P for misfit in fit.misfits}
    measured = measured or len(node_of_P) in fit.domain.ranks
    return () if measured or not bytes_PP.any() else tuple(range(len(fit.misfits)))


def _of_samples(problem: Problem, samples_BF: NDArray[np.float64]) -> NDArray[np.float64]:
    """Time of the one case of a problem under each sample of the coefficients, (B,)."""
    slowest_GB = np.maximum.reduceat(problem.terms_NF @ samples_BF.T, problem.start_G, axis=0)
    us_B: NDArray[np.float64] = slowest_GB.sum(axis=0)
    return us_B


def _outside(fit: AlgorithmFit, bytes_PP: NDArray[np.int64], node_of_P: Sequence[int]) -> list[Reason]:
    """What of an exchange lies outside the measurements."""
    reasons, domain = [], fit.domain
    on_node = max(list(node_of_P).count(node) for node in set(node_of_P))
    for code, name, value, measured in (
        (NetworkCode.RANKS_OUTSIDE, "ranks", len(node_of_P), domain.ranks),
        (NetworkCode.NODES_OUTSIDE, "nodes", len(set(node_of_P)), domain.nodes),
        (NetworkCode.RANKS_ON_NODE_OUTSIDE, "ranks", on_node, domain.ranks_on_node),
    ):
        if not min(measured) <= value <= max(measured):
            reasons.append(Reason(code, {name: value, "measured": _span(min(measured), max(measured))}))
    ranks = len(node_of_P)
    between = min(domain.ranks) < ranks < max(domain.ranks) and ranks not in domain.ranks
    if between and fit.other_ranks_ratio_Q is None:
        several = " and ".join(map(str, domain.ranks))
        reasons.append(Reason(NetworkCode.RANKS_BETWEEN, {"ranks": ranks, "measured": several}))
    busiest = int(max(bytes_PP.sum(axis=1).max(), bytes_PP.sum(axis=0).max()))
    low, high = domain.rank_bytes
    if busiest > high:
        reasons.append(Reason(NetworkCode.BYTES_ABOVE, {"bytes": busiest, "most_bytes": high}))
    elif 0 < busiest < low and not domain.empty:
        reasons.append(Reason(NetworkCode.BYTES_BELOW, {"bytes": busiest, "least_bytes": low}))
    elif busiest == 0 and not domain.empty:
        reasons.append(Reason(NetworkCode.EMPTY_EXCHANGE))
    return reasons


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"
