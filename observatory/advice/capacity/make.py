"""A plan from a request: under the routing that is asked for, and under what others assume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from observatory.advice.capacity.document import Assumption, plan_document
from observatory.advice.capacity.plan import Mode, Planner
from observatory.advice.capacity.routing import captured_routing, routed
from observatory.advice.capacity.site import Prices, Site
from observatory.advice.capacity.targets import Targets
from observatory.advice.conclusions.plans import conclude_plan
from observatory.advice.conclusions.reasons import conclusion_document
from observatory.advice.frequency import recommend_clocks
from observatory.advice.mitigations.models import exchange_model, expert_cost
from observatory.analysis.capacity.loads import ROUTING_KINDS, RoutingKind
from observatory.analysis.capacity.measured import MeasuredServer
from observatory.analysis.capacity.model_shape import ModelShape
from observatory.analysis.capacity.power import measured_power
from observatory.analysis.capacity.serving import Server
from observatory.analysis.capacity.step import Host
from observatory.analysis.experts.cost import ExpertCost, fit_experts
from observatory.analysis.frequency.model_file import load_clock_model
from observatory.analysis.frequency.views import ClockChoice
from observatory.analysis.hardware import load_profile
from observatory.analysis.network.network import load_network
from observatory.errors import PlanError
from observatory.run.documents.expert_bench import load_expert_bench

if TYPE_CHECKING:
    from observatory.run import Run

#: Where loads come from without a run.
_ASSUMED: tuple[RoutingKind, ...] = ("balanced", "power-law")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is planned.

    Attributes:
        model: its shape.
        runs: of it; none for assumed routing.
        targets: to reach.
        hardware: names or files of devices.
        modes: of serving.
        site: what a site overrides.
        routing: where loads come from; None for captured ones where there are runs, else a power law.
        overlap: exchanges run under the computation of another micro-batch.
        gpus_per_node: devices that fast links join; None for those of the site or the profile.
        prices: what devices cost.
        experts: result of an expert benchmark on such devices; without devices that are named, by default
            the expert times of the first run.
        network: fitted network of such devices; likewise.
        clocks: fitted clocks of such a device; None for no lock.
    """

    model: ModelShape
    runs: Sequence[Run]
    targets: Targets
    hardware: Sequence[str]
    modes: Sequence[Mode]
    site: Site
    routing: RoutingKind | None = None
    overlap: bool = False
    gpus_per_node: int | None = None
    prices: Prices | None = None
    experts: Path | None = None
    network: Path | None = None
    clocks: Path | None = None


def make_plan(request: Request) -> dict[str, Any]:
    """The plan as ``plan --json`` prints it (docs/json.md).

    Raises:
        PlanError: the request cannot be planned at all.
    """
    servers = _servers(request)
    if request.prices is not None and not request.prices.gpu_hour.keys() & servers.keys():
        raise PlanError(
            f"the price list has no price of {', '.join(servers)}",
            expected="gpu_hour by the names that --hardware takes",
        )
    captured = captured_routing(request.runs, request.model) if request.runs else None
    wanted: RoutingKind = request.routing or ("captured" if captured else "power-law")
    if wanted == "captured" and captured is None:
        raise PlanError("captured routing needs a run", remedy="give a run of the model")
    clocks = () if request.clocks is None else _clocks(request, request.clocks)
    power = {
        name: measured_power(request.runs, server.profile.name if isinstance(server, Server) else None)
        for name, server in servers.items()
    }
    planners = {
        kind: Planner(
            servers,
            routed(kind, request.model, captured),
            request.targets,
            modes=request.modes,
            gpus_per_node=request.gpus_per_node or request.site.gpus_per_node,
            can_replicate=kind == "captured",
            site=request.site,
            clocks=clocks,
            power=power,
        )
        for kind in (ROUTING_KINDS if captured else _ASSUMED)
    }
    plans = {kind: planner.search() for kind, planner in planners.items()}
    assumptions = [
        Assumption(
            routing=kind,
            plan=plan,
            judged=planners["captured"].judged(plan.candidates[0]) if captured and plan.candidates else None,
        )
        for kind, plan in plans.items()
    ]
    document = plan_document(
        plans[wanted],
        model=request.model,
        targets=request.targets,
        routing=wanted,
        assumptions=assumptions,
        captured=captured,
        prices=request.prices,
        site=request.site,
        sources={
            "runs": [str(run.path) for run in request.runs],
            "phases": list(captured.phases) if captured else [],
            "hardware": list(request.hardware),
        },
    )
    document["conclusion"] = conclusion_document(conclude_plan(document))
    return document


def _servers(request: Request) -> dict[str, Host]:
    """The model on each kind of device: those that are named, else this machine as its runs measured it.

    Raises:
        PlanError: no devices are named and nothing was measured.
    """
    experts = None if request.experts is None else _experts(request, request.experts)
    if request.hardware:
        network = None if request.network is None else load_network(request.network)
        return {
            name: Server(
                request.model,
                request.site.applied(load_profile(name)),
                overlap=request.overlap,
                experts=experts,
                network=network,
            )
            for name in request.hardware
        }
    if not request.runs:
        raise PlanError(
            "no devices are named, and there is no run that was measured",
            remedy="give --hardware, such as --hardware h200-sxm, or a run of this machine",
        )
    first = next((run for run in request.runs if run.manifest.topology.ep > 1), request.runs[0])
    network, _ = exchange_model(first, request.network)
    cost = experts or expert_cost(first, None, None)
    return {MeasuredServer.name: MeasuredServer(request.model, request.runs, cost, network)}


def _clocks(request: Request, path: Path) -> tuple[tuple[int | None, ClockChoice | None], ...]:
    """Recommended clocks of decode by batch.

    Raises:
        ClockError: the file is none.
        PlanError: several devices are compared, or decode was not swept.
    """
    if len(set(request.hardware)) > 1:
        raise PlanError("clocks are those of one device", expected="one --hardware with --clocks")
    model = load_clock_model(path)
    clocks = tuple(
        (model.series[advice.index].batch_size, advice.choice)
        for advice in recommend_clocks(model).series
        if model.series[advice.index].phase in ("decode", "unknown")
    )
    if not clocks:
        raise PlanError(f"clock model {path} has no series of decode", remedy="sweep decode, too")
    return clocks


def _experts(request: Request, path: Path) -> ExpertCost:
    """Measured expert times, of the model that is planned.

    Raises:
        PlanError: they are of other experts.
    """
    cost = fit_experts(load_expert_bench(path), source=path.name)
    moe, model = request.model.moe, request.model
    ours = (model.hidden, moe.experts, moe.top_k)
    theirs = (cost.shape.hidden, cost.shape.experts, cost.shape.top_k)
    if ours != theirs:
        raise PlanError(
            f"expert times of {path.name} are of (hidden, experts, top_k) {theirs}, the model has {ours}",
            remedy="measure them with `observatory bench experts`",
        )
    return cost
