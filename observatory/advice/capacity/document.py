"""The document and the tables of ``observatory plan``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from observatory.advice.capacity.plan import Candidate, Plan, Rejected
from observatory.advice.capacity.routing import CapturedRouting
from observatory.advice.capacity.site import Prices, Site
from observatory.advice.capacity.targets import Targets
from observatory.advice.capacity.words import SHORT, PlanCode, excess, sentence
from observatory.analysis.capacity.loads import RoutingKind
from observatory.analysis.capacity.model_shape import ModelShape
from observatory.analysis.columns import Column, Table
from observatory.run.documents.printed import printed_document

#: Candidates that are listed; all are in the document.
_LISTED = 10

CANDIDATE_COLUMNS = (
    Column(name="gpus", title="devices", key=True, interval=("gpus_low", "gpus_high")),
    Column(name="hardware", title="device", text=True),
    Column(
        name="set_up",
        title="set-up",
        text=True,
        legend="instances x ranks (EP), /tp, /r: redundant experts; +: only prompts",
    ),
    Column(name="sequences", title="batch", legend="sequences of a data-parallel group"),
    Column(name="tokens_per_s", title="tokens/s", digits=0),
    Column(name="tokens_per_s_low", title="tokens/s at least", digits=0, wide=True),
    Column(name="tokens_per_s_high", title="tokens/s at most", digits=0, wide=True),
    Column(
        name="ms_per_token",
        title="per token",
        unit="ms",
        digits=1,
        interval=("ms_per_token_low", "ms_per_token_high"),
    ),
    Column(
        name="ttft_ms", title="first token", unit="ms", digits=0, interval=("ttft_ms_low", "ttft_ms_high")
    ),
    Column(name="pareto", title="Pareto", text=True, legend="none has more per device and per user"),
    Column(name="tokens_per_s_gpu", title="tokens/s/device", digits=0, wide=True),
    Column(name="tokens_per_s_user", title="tokens/s/user", digits=1, wide=True),
    Column(
        name="joules_per_token",
        title="J/token",
        digits=2,
        wide=True,
        interval=("joules_per_token_low", "joules_per_token_high"),
        legend="from measured power",
    ),
    Column(name="joules_grade", title="power", text=True, wide=True),
    Column(name="joules_per_token_most", title="J/token at most", digits=2, wide=True),
    Column(name="clock", title="clock", text=True, wide=True),
    Column(name="rack_w", title="W/rack at most", digits=0, wide=True),
    Column(name="per_million", title="per million tokens", digits=2, wide=True),
    Column(name="limit", title="batch limited by", text=True, wide=True),
)
REJECTED_COLUMNS = (
    Column(name="constraint", title="ruled out by", text=True, key=True),
    Column(name="set_ups", title="set-ups"),
    Column(name="nearest", title="the nearest", text=True),
)
ROUTING_COLUMNS = (
    Column(name="routing", title="routing", text=True, key=True),
    Column(name="gpus", title="devices"),
    Column(name="set_up", title="set-up", text=True),
    Column(name="gpus_with_captured", title="needs", legend="devices of that set-up under captured routing"),
    Column(name="ms_per_token_with_captured", title="takes per token", unit="ms", digits=1),
    Column(name="ttft_ms_with_captured", title="first token", unit="ms", digits=0, legend="likewise"),
)
ALPHA_COLUMNS = (
    Column(name="phase", title="phase", text=True, key=True),
    Column(name="layer", title="MoE layer", key=True),
    Column(name="alpha", title="alpha", digits=2),
    Column(name="fitted_to", title="fitted to", text=True),
    Column(name="distance", title="misfit", unit="%", digits=1, legend="of the assignments"),
    Column(name="busiest_captured", title="busiest, captured", digits=2, legend="expert over the mean"),
    Column(name="busiest_fitted", title="fitted", digits=2),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumption:
    """What a routing would have led to.

    Attributes:
        routing: what was assumed.
        plan: the plan under it.
        judged: its best set-up under the captured routing, whatever the limits; None without one.
    """

    routing: RoutingKind
    plan: Plan
    judged: Candidate | None


def plan_document(
    plan: Plan,
    *,
    model: ModelShape,
    targets: Targets,
    routing: RoutingKind,
    assumptions: Sequence[Assumption],
    captured: CapturedRouting | None,
    prices: Prices | None,
    site: Site,
    sources: Mapping[str, Any],
) -> dict[str, Any]:
    """The plan as ``plan --json`` prints it (docs/json.md)."""
    return printed_document(
        "plan",
        {
            "model": {
                "name": model.name,
                "parameters": model.values,
                "active_parameters": model.active_values,
                "dtype": model.dtype,
                "expert_dtype": model.expert_dtype,
                "moe_layers": model.moe_layers,
                "experts": model.moe.experts,
                "top_k": model.moe.top_k,
                "longest": model.longest,
            },
            "targets": targets.model_dump(),
            "routing": routing,
            "sources": dict(sources),
            "candidates": [_candidate(one, model, targets, prices, site) for one in plan.candidates],
            "rejected": [_rejected(one) for one in plan.rejected],
            "rejected_by": _grouped(plan.rejected),
            "assumptions": [_assumption(item, model) for item in assumptions],
            "alphas": _alphas(captured),
        },
    )


def _assumption(item: Assumption, model: ModelShape) -> dict[str, Any]:
    best = item.plan.candidates[0] if item.plan.candidates else None
    judged = item.judged
    return {
        "routing": item.routing,
        "gpus": None if best is None else best.gpus,
        "set_up": None if best is None else _set_up(best, model),
        "gpus_with_captured": None if judged is None else judged.gpus,
        "ms_per_token_with_captured": None if judged is None else float(judged.ms_per_token_3[1]),
        "ttft_ms_with_captured": None if judged is None else float(judged.ttft_ms_3[1]),
    }


def plan_tables(document: Mapping[str, Any]) -> list[Table]:
    """Candidates, what ruled others out, and what routing assumptions would have cost."""
    of_set_up: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for row in document["candidates"]:
        of_set_up.setdefault((row["hardware"], row["mode"], row["ranks"], row["tp"]), row)
    candidates = list(of_set_up.values())[:_LISTED]
    more = len(document["candidates"]) - len(candidates)
    title = "set-ups that meet every target, each with its best batch, the fewest devices first"
    is_one = len({row["hardware"] for row in candidates}) < 2
    changes: dict[str, dict[str, Any]] = {"hardware": {"wide": is_one}}
    if any(currencies := [row["currency"] for row in candidates]):
        changes["per_million"] = {"wide": False, "unit": next(filter(None, currencies))}
    tables = [
        Table(
            name="candidates",
            columns=tuple(replace(column, **changes.get(column.name, {})) for column in CANDIDATE_COLUMNS),
            rows=[{**row, "pareto": "yes" if row["is_pareto"] else ""} for row in candidates],
            title=title + (f"; {more} more in --json" if more > 0 else ""),
        )
    ]
    if document["rejected_by"]:
        tables.append(Table(name="rejected", columns=REJECTED_COLUMNS, rows=document["rejected_by"]))
    if any(row["gpus"] is not None for row in document["assumptions"]):
        tables.append(
            Table(
                name="routing",
                columns=ROUTING_COLUMNS if document["sources"]["runs"] else ROUTING_COLUMNS[:3],
                rows=document["assumptions"],
                title="what other assumptions about routing lead to",
            )
        )
    if document["alphas"]:
        tables.append(
            Table(
                name="alphas",
                columns=ALPHA_COLUMNS,
                rows=document["alphas"],
                title="power laws nearest to captured loads (the sampler of aiconfigurator)",
            )
        )
    return tables


def _candidate(
    one: Candidate, model: ModelShape, targets: Targets, prices: Prices | None, site: Site
) -> dict[str, Any]:
    tokens_per_s = float(one.tokens_per_s_3[1])
    watts = one.watts_per_gpu
    price = None if prices is None else prices.gpu_hour.get(one.hardware)
    per_rack = site.gpus_per_rack
    return {
        "hardware": one.hardware,
        "mode": one.mode,
        "set_up": _set_up(one, model),
        "gpus": one.gpus,
        "gpus_low": min(one.gpus_3),
        "gpus_high": max(one.gpus_3),
        "nodes": -(-one.gpus // one.parallel.gpus_per_node),
        "ranks": one.parallel.ranks,
        "tp": one.parallel.tp,
        "dp": one.parallel.groups,
        "slots": one.parallel.slots,
        "instances": one.instances,
        "prefill_ranks": None if one.prefill_parallel is None else one.prefill_parallel.ranks,
        "prefill_tp": None if one.prefill_parallel is None else one.prefill_parallel.tp,
        "prefill_instances": one.prefill_instances,
        "prefill_chunk": one.prefill_chunk,
        "sequences": one.sequences,
        **_three("tokens_per_s", one.tokens_per_s_3),
        **_three("ms_per_token", one.ms_per_token_3),
        **_three("ttft_ms", one.ttft_ms_3),
        "longest_step_ms": float(one.prefill.s_3[1]) * 1e3 if one.mode == "together" else None,
        "tokens_per_s_gpu": one.tokens_per_s_gpu,
        "tokens_per_s_user": one.tokens_per_s_user,
        **_energy(one),
        "joules_per_token_most": one.joules_per_token_most,
        "rack_w": None if watts is None or per_rack is None else watts * min(per_rack, one.gpus),
        "currency": None if prices is None or price is None else prices.currency,
        "per_million": None if price is None else price * one.gpus / tokens_per_s / 3600 * 1e6,
        "clock": "unlocked" if one.lock is None else f"decode at {one.lock.sm_clock_mhz:.0f} MHz",
        "is_pareto": one.is_pareto,
        "extrapolated": list(one.extrapolated),
        "limited_by": None if one.limit is None else one.limit.document(),
        "limit": "largest tried" if one.limit is None else SHORT[PlanCode(one.limit.code)],
        "grades": one.graded,
        "memory_gb": {
            "weights": one.memory.weights / 1e9,
            "experts": one.memory.experts / 1e9,
            "workspace": one.memory.workspace / 1e9,
            "program": one.memory.program / 1e9,
            "cache": one.sequences * one.memory.of_sequence(targets.context + targets.output) / 1e9,
            "usable": one.memory.usable / 1e9,
        },
        "decode_ms": {part.name: float(part.s_3[1]) * 1e3 for part in one.decode.parts},
        "prefill_ms": {part.name: float(part.s_3[1]) * 1e3 for part in one.prefill.parts},
    }


def _energy(one: Candidate) -> dict[str, Any]:
    energy = one.energy
    if energy is None:
        names = ("", "_low", "_high")
        return {f"joules_per_token{name}": None for name in names} | {
            "joules_grade": None,
            "is_simulated": False,
        }
    return {
        **_three("joules_per_token", energy.joules_3),
        "joules_grade": energy.grade,
        "is_simulated": energy.is_simulated,
    }


def _three(name: str, values_3: Any) -> dict[str, float]:
    values = np.sort(np.asarray(values_3, dtype=np.float64))
    return {name: float(values_3[1]), f"{name}_low": float(values[0]), f"{name}_high": float(values[2])}


def _set_up(one: Candidate, model: ModelShape) -> str:
    decode = _instances(one.instances, one.parallel.ranks, one.parallel.tp)
    experts, slots, ranks = model.moe.experts, one.parallel.slots, one.parallel.ranks
    if slots > -(-experts // ranks):
        decode += f"/r {ranks * slots - experts}"
    apart = one.prefill_parallel
    if apart is None:
        return decode
    return f"{decode} + {_instances(one.prefill_instances, apart.ranks, apart.tp)}"


def _instances(count: int, ranks: int, tp: int) -> str:
    return f"{count} x EP {ranks}" + (f"/tp {tp}" if tp > 1 else "")


def _rejected(one: Rejected) -> dict[str, Any]:
    return {
        "hardware": one.hardware,
        "mode": one.mode,
        "ranks": one.parallel.ranks,
        "tp": one.parallel.tp,
        "slots": one.parallel.slots,
        "reason": one.reason.document(),
        "why": sentence(one.reason),
    }


def _grouped(rejected: Sequence[Rejected]) -> list[dict[str, Any]]:
    """Constraints with the set-up that each ruled out most narrowly."""
    counts = Counter((one.hardware, one.reason.code) for one in rejected)
    rows = []
    for (hardware, code), count in counts.most_common():
        assert isinstance(code, PlanCode)
        nearest = min(
            (one for one in rejected if (one.hardware, one.reason.code) == (hardware, code)),
            key=lambda one: excess(one.reason),
        )
        where = f"{hardware}, {nearest.mode}, {_instances(1, nearest.parallel.ranks, nearest.parallel.tp)}"
        rows.append(
            {
                "constraint": SHORT[code],
                "code": code.value,
                "set_ups": count,
                "nearest": f"{where}: {sentence(nearest.reason)}",
            }
        )
    return rows


def _alphas(captured: CapturedRouting | None) -> list[dict[str, Any]]:
    if captured is None:
        return []
    return [
        {
            "phase": phase,
            "layer": layer,
            "alpha": fit.alpha,
            "fitted_to": "busiest expert" if fit.is_by_busiest else "loads",
            "distance": fit.distance,
            "busiest_captured": fit.busiest_captured,
            "busiest_fitted": fit.busiest_fitted,
        }
        for phase, fits in captured.fits.items()
        for layer, fit in enumerate(fits)
    ]
