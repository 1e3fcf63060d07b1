"""What a fit is good for: parts of the fabric that it does not describe, noise, errors, and a verdict.

Shapes: C cases, Q quantiles, F terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.network.exceptions import MOST_CASES, Found, World, find_exceptions
from observatory.analysis.network.features import BYTE_TERMS
from observatory.analysis.network.network import FormScore, Misfit, Verdict, VerdictReason
from observatory.analysis.network.solving import predict_all
from observatory.analysis.network.trials import Trial

#: Beyond these a fit is not to be relied on (docs/network-model.md#verdict). Noise is the relative standard
#: error of a case's median, the median over cases; errors are those of held-out matrices.
BOUNDS: dict[str, float] = {
    "repeat_noise": 0.2,
    "held_out_median": 0.25,
    "held_out_p90": 0.5,
    "other_ranks_median": 0.25,
    "other_ranks_p90": 0.5,
}
_SMALLEST_US = 1e-3
_MOST_PAIRS = 20_000
#: Quartiles of fewer repeats say nothing about noise.
_LEAST_REPEATS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Fabric:
    """The ranks of a case: where each is, and the name of its host where that is recorded."""

    node_of_P: tuple[int, ...]
    host_of_P: tuple[str, ...] | None = None


def repeat_noise(us_R: NDArray[np.float64]) -> float | None:
    """Relative standard error of the median of repeats, from their quartiles; None for one or two."""
    if us_R.size < _LEAST_REPEATS:
        return None
    low, middle, high = np.quantile(us_R, [0.25, 0.5, 0.75])
    return float(1.2533 * (high - low) / 1.349 / middle / np.sqrt(us_R.size))


def find_misfits(
    trial: Trial,
    value_F: NDArray[np.float64],
    fabric_C: Sequence[Fabric],
    bytes_C: Sequence[NDArray[np.int64]],
    seed: int,
) -> tuple[Misfit, ...]:
    """Ranks, directions, pairs and nodes whose times are not the model's.

    Args:
        trial: the chosen form with its cases.
        value_F: its coefficients.
        fabric_C: ranks of every case.
        bytes_C: bytes from rank i to rank j over all stages of every case.
        seed: of the permutations.
    """
    in_bytes_F = np.array([term in BYTE_TERMS for term in trial.form.terms])

    def predicted(case_K: NDArray[np.int64], scale: float) -> NDArray[np.float64]:
        scaled_F = np.where(in_bytes_F, scale * value_F, value_F)
        return np.maximum(predict_all(trial.problem.take(case_K), scaled_F), _SMALLEST_US)

    fabrics = list(dict.fromkeys(fabric_C))
    worlds = []
    for fabric in fabrics:
        chosen = [case for case, of_case in enumerate(fabric_C) if of_case == fabric]
        places = np.linspace(0, len(chosen) - 1, min(len(chosen), MOST_CASES)).round().astype(int)
        chosen = [chosen[place] for place in places]
        case_K = np.array(chosen)
        worlds.append(
            World(
                node_of_P=fabric.node_of_P,
                bytes_CPP=np.array([bytes_C[case] for case in chosen]),
                group_C=[trial.cases.group_C[case] for case in chosen],
                us_C=trial.cases.us_C[case_K],
                noise_C=trial.cases.noise_C[case_K],
                latency_us_C=predicted(case_K, 0.0),
                floor=bool(trial.form.floor),
                model_us_SC=np.array([predicted(case_K, scale) for scale in World.scales()]),
            )
        )
    return tuple(
        _misfit(exception, fabrics[next(i for i, world in enumerate(worlds) if world is exception.world)])
        for exception in find_exceptions(worlds, seed=seed)
    )


def _misfit(exception: Found, fabric: Fabric) -> Misfit:
    hosts: tuple[str, ...] = ()
    who, node_of_P = exception.who, fabric.node_of_P
    if fabric.host_of_P is not None:
        of_nodes = exception.kind.startswith("node")
        named = [rank for rank, node in enumerate(node_of_P) if node in who] if of_nodes else who
        hosts = tuple(dict.fromkeys(fabric.host_of_P[rank] for rank in named))
    return Misfit(
        code=exception.kind,
        who=who,
        ranks=len(node_of_P),
        node_of_P=node_of_P,
        hosts=hosts,
        us_per_byte=exception.us_per_byte,
        p_value=exception.p_value,
        cases=exception.cases,
    )


def paired_ratios(
    ratio_C: NDArray[np.float64],
    fabric_C: Sequence[Fabric],
    bytes_C: Sequence[NDArray[np.int64]],
    group_C: Sequence[object],
) -> NDArray[np.float64]:
    """How far measured / predicted of two different matrices of one size and the same ranks lie apart.

    What the model gets wrong about all exchanges of a size alike cancels here. Both orders of every pair;
    empty where there is no pair.
    """
    busiest_C = np.array([int(max(each.sum(axis=0).max(), each.sum(axis=1).max())) for each in bytes_C])
    log_C = np.log(ratio_C)
    apart: list[float] = []
    for i in range(len(log_C)):
        for j in range(i):
            comparable = fabric_C[i] == fabric_C[j] and group_C[i] != group_C[j]
            if comparable and 0.5 * busiest_C[i] <= busiest_C[j] <= 2.0 * busiest_C[i]:
                apart += [log_C[i] - log_C[j], log_C[j] - log_C[i]]
        if len(apart) > _MOST_PAIRS:
            break
    ratios: NDArray[np.float64] = np.exp(np.array(apart, dtype=np.float64))
    return ratios


def verdict_of(
    score: FormScore, *, noise: float | None, other_ranks_p90: float | None, misfits: Sequence[Misfit]
) -> Verdict:
    """Whether a fit may be relied on, and why not.

    Args:
        score: of the chosen form.
        noise: median over cases of ``repeat_noise``; None when not known.
        other_ranks_p90: 90th percentile of the error with each number of ranks held out; None without.
        misfits: parts that it does not describe.
    """
    values = {
        "repeat_noise": noise,
        "held_out_median": score.median_error,
        "held_out_p90": score.p90_error,
        "other_ranks_median": score.other_ranks_error,
        "other_ranks_p90": other_ranks_p90,
    }
    reasons = [
        VerdictReason.model_validate({"code": code, "value": value, "bound": BOUNDS[code]})
        for code, value in values.items()
        if value is not None and value > BOUNDS[code]
    ]
    if misfits:
        reasons.append(VerdictReason(code="misfits", value=float(len(misfits)), bound=0.0))
    noisy = noise is not None and noise > BOUNDS["repeat_noise"]
    return Verdict(
        code="too_noisy" if noisy else "does_not_fit" if reasons else "valid",
        reasons=tuple(reasons),
        repeat_noise=noise,
        median_error=score.median_error,
        p90_error=score.p90_error,
        other_ranks_median_error=score.other_ranks_error,
        other_ranks_p90_error=other_ranks_p90,
    )
