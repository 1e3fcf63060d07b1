"""Metrics of a run from what its shards add up to.

Shapes: S steps, E experts, R ranks of expert parallelism.

Each value is defined where the single-run analyses define it, and agrees with them: Gini, entropy and idle
experts with `routing` (means over layers of whole-run values), the busiest rank with `scan` (the same mean),
times with `compare` (trimmed means over steps).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.compare.collect import own_degrees
from observatory.analysis.compare.series import mean_series
from observatory.analysis.parallel.placement import Placement
from observatory.analysis.parallel.scan import place, placement_rule
from observatory.analysis.parallel.traffic import load_by_rank
from observatory.analysis.reduction.partial import STEP_COLUMNS, Partial, check_unsaturated
from observatory.analysis.routing.imbalance import entropy_bits, gini, idle_experts, max_over_mean
from observatory.errors import PlacementError, RunFormatError
from observatory.run.coverage import Coverage
from observatory.run.gaps import gap_document, sentence
from observatory.run.head import RunHead
from observatory.run.manifest import PHASES

Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReducedRow:
    """Metrics of one phase of one run; None where a value is not known.

    Attributes:
        run: path of the run as it was found.
        run_id, model, mixer, data: of its manifest; None of all where it cannot be opened.
        ranks, ep: ranks of the run, and its expert-parallel degree.
        shards: ranks whose shard was read.
        phase: None where the run holds no phase, or cannot be opened; then no metric is known.
        layers: MoE layers with rows.
        steps: steps that rows of loads cover.
        tokens: of all ranks, the most of any layer.
        gini, entropy_bits: of whole-run expert loads, means over layers; entropy in bits.
        idle_experts: experts without an assignment in the whole run, all layers.
        rank_max_over_mean: load of the busiest rank over the mean, of whole-run loads, mean over layers.
        rank_degree: degree that it is about: the run's own, else the first usual one that fits.
        ms: time of a step on the rank that takes longest, mean without the fastest and slowest tenth.
        ms_p50, ms_p95: quantiles over steps.
        exchange_ms: time in exchanges of a step, mean over ranks, trimmed likewise.
        exchange_share: of the time of steps, over all steps that have both times.
        sent_bytes: bytes that all ranks hand to exchanges in a step, what stays on a rank included, mean over
            steps.
        mj_per_token: energy per token, all devices.
        gaps: what the run lacks, as codes and values; the same in every row of a run.
        problems: the same and all other problems as sentences; likewise.
    """

    run: str
    run_id: str | None = None
    model: str | None = None
    mixer: str | None = None
    data: str | None = None
    ranks: int | None = None
    ep: int | None = None
    shards: int = 0
    phase: str | None = None
    layers: int | None = None
    steps: int | None = None
    tokens: int | None = None
    gini: float | None = None
    entropy_bits: float | None = None
    idle_experts: int | None = None
    rank_max_over_mean: float | None = None
    rank_degree: int | None = None
    ms: float | None = None
    ms_p50: float | None = None
    ms_p95: float | None = None
    exchange_ms: float | None = None
    exchange_share: float | None = None
    sent_bytes: float | None = None
    mj_per_token: float | None = None
    gaps: tuple[Mapping[str, Any], ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy:
    """Energy per token of a run.

    Attributes:
        mj_per_token: all devices, by phase.
        problem: why there is none; None where there is, or where no power was captured.
    """

    mj_per_token: Mapping[str, float] = field(default_factory=dict)
    problem: str | None = None


def row_document(row: ReducedRow) -> dict[str, Any]:
    """A row for a JSON document."""
    return asdict(row)


def row_of(document: Mapping[str, Any]) -> ReducedRow:
    """What `row_document` made, also after a way through JSON."""
    kept = {**document, "gaps": tuple(document["gaps"]), "problems": tuple(document["problems"])}
    return ReducedRow(**kept)


def unreadable_row(run: str, why: str) -> ReducedRow:
    """The row of a run that cannot be opened."""
    return ReducedRow(run=run, problems=(why,))


def reduced_rows(head: RunHead, partial: Partial, energy: Energy) -> list[ReducedRow]:
    """The metrics of a run, a row for each phase; one without a phase where nothing was captured.

    Args:
        head: of the run.
        partial: of all its shards.
        energy: of its ordinary energy analysis.

    Raises:
        RunFormatError: shards contradict each other, or their sums are too large.
        LoadError: loads are inconsistent.
    """
    check_unsaturated(partial)
    experts = _experts_of_layers(partial)
    codes = {phase for phase, _, _ in partial.loads} | set(partial.step_SX[:, 0].tolist())
    found = Coverage(np.array(sorted(partial.routed | set(partial.coverage_CX[:, 2].tolist())), np.int64))
    _cover(found, partial)
    contradicting = set(head.layers.contradictions)
    gaps = [
        *head.gaps(partial.routed | contradicting.intersection(head.ranks_of["routing"])),
        *found.gaps(head.joined_manifest, head.layers.holds),
    ]
    problems = [
        *head.layers.contradictions.values(),
        *map(sentence, gaps),
        *head.problems,
        *(text for rank in sorted(partial.problems) for text in partial.problems[rank]),
        *(f"rank {rank} is left out: {partial.left_out[rank]}" for rank in sorted(partial.left_out)),
        *filter(None, (energy.problem,)),
    ]
    manifest = head.manifest
    common: dict[str, Any] = {
        "run": str(head.path),
        "run_id": manifest.run_id,
        "model": manifest.model.name,
        "mixer": manifest.model.mixer,
        "data": manifest.data.condition if manifest.data else None,
        "ranks": manifest.topology.ranks,
        "ep": manifest.topology.ep,
        "shards": partial.shards,
        "gaps": tuple(map(gap_document, gaps)),
        "problems": tuple(dict.fromkeys(problems)),
    }
    degree = next(iter(own_degrees(head.joined_manifest)), None)
    rows = [
        ReducedRow(
            **common,
            phase=PHASES[code],
            **_routing(head, partial, experts, code, degree),
            **_times(partial, code),
            mj_per_token=energy.mj_per_token.get(PHASES[code]),
        )
        for code in sorted(codes)
    ]
    if not rows:
        common["problems"] = (*common["problems"], "it holds neither routing rows nor steps")
    return rows or [ReducedRow(**common)]


def _experts_of_layers(partial: Partial) -> dict[int, int]:
    experts: dict[int, int] = {}
    for _, layer, count in sorted(partial.loads):
        if experts.setdefault(layer, count) != count:
            raise RunFormatError(
                f"layer {layer} has {experts[layer]} experts on some ranks and {count} on others",
                expected="one number of experts per layer",
                remedy="capture it again",
            )
    return experts


def _cover(coverage: Coverage, partial: Partial) -> None:
    for code, step, length in partial.step_SX[:, :3].tolist():
        if length:
            coverage.add_steps(PHASES[code], {step: length})
    for code, layer, rank, covered, rows, some, first, last in partial.coverage_CX.tolist():
        coverage.add_rank(
            PHASES[code], layer, rank,
            covered=covered, rows=rows, partial=some, partial_steps=(first, last) if some else (),
        )  # fmt: skip


def _routing(
    head: RunHead, partial: Partial, experts: Mapping[int, int], code: int, degree: int | None
) -> dict[str, Any]:
    layers = [(layer, partial.loads[code, layer, experts[layer]]) for layer in sorted(experts)
              if (code, layer, experts[layer]) in partial.loads]  # fmt: skip
    if not layers:
        return {}
    rule = placement_rule("auto", head.manifest.topology)
    ratios: list[float | None] = []
    for layer, load in layers:
        try:
            if degree is not None:
                placement = place(rule, layer=layer, experts=len(load) - 1, ep=degree)
                ratios.append(_busiest(load[1:], placement))
        except PlacementError:
            degree = None
    return {
        "layers": len(layers),
        "steps": int(partial.step_SX[partial.step_SX[:, 0] == code, STEP_COLUMNS.index("window")].sum()),
        "tokens": max(int(load[0]) for _, load in layers),
        "gini": _mean([gini(load[1:]) for _, load in layers]),
        "entropy_bits": _mean([entropy_bits(load[1:]) for _, load in layers]),
        "idle_experts": sum(idle_experts(load[1:]) for _, load in layers),
        "rank_max_over_mean": None if degree is None else _mean(ratios),
        "rank_degree": degree,
    }


def _busiest(load_E: Int64, placement: Placement) -> float | None:
    return max_over_mean(load_by_rank(load_E, placement))


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean of what is known, in the order given."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _times(partial: Partial, code: int) -> dict[str, Any]:
    rows = partial.step_SX[partial.step_SX[:, 0] == code]
    column = {name: rows[:, at] for at, name in enumerate(STEP_COLUMNS)}
    step_S, step_ns_S = column["step"], column["step_ns"]
    timed_S, exchanged_S = step_ns_S > 0, column["exchanges"] > 0
    ms_S = step_ns_S[timed_S] * 1e-6
    ranks = max(len(partial.exchanging), 1)
    exchange_ms_S = column["exchange_ns"] * 1e-6 / ranks
    both_S = timed_S & exchanged_S
    known = bool(exchanged_S.any()) and not column["unsaid"].any()
    return {
        "ms": _trimmed(ms_S, step_S[timed_S]),
        "ms_p50": float(np.quantile(ms_S, 0.5)) if len(ms_S) else None,
        "ms_p95": float(np.quantile(ms_S, 0.95)) if len(ms_S) else None,
        "exchange_ms": _trimmed(exchange_ms_S[exchanged_S], step_S[exchanged_S]),
        "exchange_share": _share(column["exchange_ns"][both_S], step_ns_S[both_S], ranks),
        "sent_bytes": float(np.mean(column["sent_bytes"][exchanged_S])) if known else None,
    }


def _trimmed(value_S: NDArray[np.float64], step_S: Int64) -> float | None:
    series = mean_series(value_S, step_S, trimmed=True)
    return None if series is None else series.value


def _share(exchange_ns_S: Int64, step_ns_S: Int64, ranks: int) -> float | None:
    """Time in exchanges, mean over ranks, as a share of the time of the same steps."""
    if not len(step_ns_S):
        return None
    inside, total = sum(map(int, exchange_ns_S)), sum(map(int, step_ns_S))
    return inside / (ranks * total)
