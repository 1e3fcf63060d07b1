"""Loads for a plan: of captured runs, or assumed; and the power law that captured loads have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.capacity.loads import (
    BalancedLoads,
    CapturedLoads,
    Loads,
    PowerLawLoads,
    RoutingKind,
)
from observatory.analysis.capacity.model_shape import ModelShape, model_shape
from observatory.analysis.capacity.power_law import (
    DEEPSEEK_ALPHA,
    USUAL_ALPHA,
    PowerLawFit,
    fit_power_law,
)
from observatory.analysis.capacity.routed import Routed
from observatory.analysis.parallel.step_loads import step_loads
from observatory.errors import PlanError

if TYPE_CHECKING:
    from observatory.run import Run

Int64 = NDArray[np.int64]

_PHASES = ("decode", "prefill")
#: Fewer steps of a phase than these are not split into those that choose and those that judge.
_FEWEST_STEPS = 4
#: Models for which aiconfigurator takes the smaller exponent.
_DEEPSEEK = ("deepseek", "kimi", "nemotron", "minimax", "gemma")


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedRouting:
    """Loads of runs of one model.

    Attributes:
        load_SLE: assignments of the steps of each phase that was captured.
        fits: the power law of each layer, by phase.
    """

    load_SLE: dict[str, Int64]
    fits: dict[str, tuple[PowerLawFit, ...]] = field(default_factory=dict)

    @property
    def phases(self) -> tuple[str, ...]:
        """Phases that were captured."""
        return tuple(self.load_SLE)


def captured_routing(runs: Sequence[Run], model: ModelShape) -> CapturedRouting:
    """Loads of decode and prefill steps of all runs.

    Raises:
        PlanError: a run is of another model, or there are too few steps.
        PlacementError: loads of single steps are not in the run.
    """
    taken: dict[str, list[Int64]] = {}
    moe = model.moe
    for run in runs:
        loads = step_loads(run)
        layers, experts = loads.load_SLE.shape[1:]
        if (layers, experts, loads.top_k) != (model.moe_layers, moe.experts, moe.top_k):
            raise PlanError(
                f"run {run.path} has {layers} MoE layers of {experts} experts, {loads.top_k} per token; the "
                f"model has {model.moe_layers} of {moe.experts}, {moe.top_k} per token",
                expected="runs of the model that is planned",
            )
        if not _is_of(model, run.manifest.model.config):
            raise PlanError(
                f"run {run.path} is of {run.manifest.model.name}, whose layers are not those of the model",
                expected="runs of the model that is planned",
            )
        for phase in _PHASES:
            of_phase = loads.of_phase(phase).load_SLE
            if len(of_phase):
                taken.setdefault(phase, []).append(of_phase)
    load_SLE = {phase: np.concatenate(parts) for phase, parts in taken.items()}
    load_SLE = {phase: loads for phase, loads in load_SLE.items() if len(loads) >= _FEWEST_STEPS}
    if not load_SLE:
        raise PlanError(
            "the runs have too few steps of decode or prefill",
            expected=f"at least {_FEWEST_STEPS} of one phase: half choose a layout, half judge it",
            remedy="profile again with more --steps",
        )
    return CapturedRouting(
        load_SLE=load_SLE,
        fits={phase: fit_power_law(loads, top_k=moe.top_k) for phase, loads in load_SLE.items()},
    )


def _is_of(model: ModelShape, stated: Mapping[str, Any] | None) -> bool:
    """Whether the configuration that a run states has the model's layers; true where it cannot be read."""
    try:
        shape = model_shape(stated or {})
    except PlanError:
        return True
    return (shape.hidden, shape.layers) == (model.hidden, model.layers)


def routed(kind: RoutingKind, model: ModelShape, captured: CapturedRouting | None) -> Routed:
    """What ranks get under a source of loads.

    A phase that was not captured takes the loads of the other. Without captured loads a power law has the
    exponent that aiconfigurator takes for such models, the same in all layers.

    Raises:
        PlanError: captured loads are wanted and there are none.
    """
    moe, layers = model.moe, model.moe_layers
    if kind == "captured":
        if captured is None:
            raise PlanError("no run is given; expected captured routing from at least one run")
        chosen, judged = {}, {}
        for phase, load_SLE in captured.load_SLE.items():
            half = len(load_SLE) // 2
            chosen[phase], judged[phase] = load_SLE[:half], load_SLE[half:]
        sources = {phase: CapturedLoads(loads, moe.top_k) for phase, loads in judged.items()}
        shares = [loads.sum(axis=0) / loads.sum(axis=(0, 2))[:, None] for loads in chosen.values()]
        return Routed(
            _of(sources, "decode"),
            _of(sources, "prefill"),
            chosen_on_LE=np.mean(shares, axis=0),
            layers=layers,
            experts=moe.experts,
        )
    if kind == "balanced":
        even = BalancedLoads(layers, moe.experts, moe.top_k)
        return Routed(even, even, chosen_on_LE=None, layers=layers, experts=moe.experts)
    alphas = {phase: _alphas(model, captured, phase) for phase in _PHASES}
    laws = {phase: PowerLawLoads(alpha_L, moe.experts, moe.top_k) for phase, alpha_L in alphas.items()}
    return Routed(laws["decode"], laws["prefill"], chosen_on_LE=None, layers=layers, experts=moe.experts)


def usual_alpha(model: ModelShape) -> float:
    """The exponent that aiconfigurator takes for models of this family."""
    return DEEPSEEK_ALPHA if model.name.startswith(_DEEPSEEK) else USUAL_ALPHA


def _alphas(model: ModelShape, captured: CapturedRouting | None, phase: str) -> tuple[float, ...]:
    if captured is None:
        return (usual_alpha(model),) * model.moe_layers
    fits = captured.fits.get(phase) or next(iter(captured.fits.values()))
    return tuple(fit.alpha for fit in fits)


def _of(sources: dict[str, CapturedLoads], phase: str) -> Loads:
    return sources.get(phase) or next(iter(sources.values()))
