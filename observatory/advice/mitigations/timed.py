"""The trace and the models that changes are compared on, and predicted times of steps.

Shapes: S judged steps, L layers, R captured source ranks, E experts, P ranks, K slots of each rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from observatory.advice.mitigations.verdict import MitigationCode
from observatory.analysis.experts.cost import ExpertCost
from observatory.analysis.experts.step_energy import COVERED, step_energy
from observatory.analysis.experts.step_time import StepTimes
from observatory.analysis.experts.words import StepCode
from observatory.analysis.network.network import NetworkModel
from observatory.analysis.network.words import NetworkCode
from observatory.analysis.parallel.step_loads import StepLoads
from observatory.analysis.parallel.token_samples import LayerTokens
from observatory.reasons import Reason

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

#: What of an exchange lies outside a network model that no interval covers.
_OTHER_FABRIC = (
    NetworkCode.RANKS_OUTSIDE, NetworkCode.NODES_OUTSIDE, NetworkCode.RANKS_ON_NODE_OUTSIDE,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """What is known about one phase of a run.

    Attributes:
        phase: prefill, decode, ...
        loads: of all steps of the phase, by source rank.
        train_steps: the first so many are what layouts are chosen on.
        judged_S: places of the steps after them that are judged.
        today_LPK: today's layout.
        named_today: its name.
        tokens: sampled tokens of each layer; None without samples.
        shared_experts: shared experts of a layer; None where not known.
        sequence_tokens: tokens of a sequence in a prefill step; None where not known.
    """

    phase: str
    loads: StepLoads
    train_steps: int
    judged_S: NDArray[np.intp]
    today_LPK: Int64
    named_today: str
    tokens: list[LayerTokens] | None
    shared_experts: int | None
    sequence_tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Models:
    """What predicts times.

    Attributes:
        experts: time of the experts of one rank.
        network: time of exchanges; None without.
        horizon_steps: steps over which a change has to pay for itself.
        power: energy and power by phase and span of the run (`EnergySummary.phases`); None without.
        power_ranks: ranks whose devices drew it.
    """

    experts: ExpertCost
    network: NetworkModel | None
    horizon_steps: int
    power: pd.DataFrame | None = None
    power_ranks: int = 1

    def power_of(self, ranks: int) -> pd.DataFrame | Reason:
        """Power of the devices of so many ranks, or why it is not known."""
        if self.power is None:
            return Reason(MitigationCode.NO_POWER)
        if ranks != self.power_ranks:
            return Reason(MitigationCode.POWER_OF_OTHERS, {"ranks": ranks, "measured": self.power_ranks})
        return self.power


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Timed:
    """Predicted microseconds of the judged steps, summed over layers, (S,) each.

    Attributes:
        counts_S, dispatch_S, combine_S: exchanges, the first announces numbers of rows; None where they are
            not predicted, as ``reason`` says.
        experts_S: of the mean rank.
        waiting_S: of the mean rank for the busiest, layer by layer.
        alone_S: shared experts and what else ranks do alone; zero where that is not known.
        extrapolated: share of layer-steps whose expert time lies outside what was measured; 1 where exchanges
            do.
        other_fabric: what of the exchanges is of another fabric than the network model: its first reason;
            None where nothing is.
        farthest: how far they lie outside: of each kind of reason the one that is farthest out; empty inside,
            and for times of experts that were not measured at all.
        energy_S: millijoules; None where it is not known, as ``no_energy`` says.
        no_energy: why there is no energy; None when there is.
        covered: share of the time of which power is known; 0 without power samples.
        phase: whose steps they are.
        left_out: parts whose time is not known and not in the total.
        reason: why exchanges are not predicted; None when they are.
    """

    counts_S: Float64 | None
    dispatch_S: Float64 | None
    combine_S: Float64 | None
    experts_S: Float64
    waiting_S: Float64
    alone_S: Float64
    extrapolated: float
    other_fabric: Reason | None = None
    farthest: tuple[Reason, ...] = ()
    energy_S: Float64 | None = None
    no_energy: Reason | None = None
    covered: float = 0.0
    phase: str = ""
    left_out: tuple[str, ...] = ()
    reason: Reason | None = None

    @classmethod
    def of(cls, times: StepTimes, phase: str, power: pd.DataFrame | Reason) -> Timed:
        """Seconds of layer-steps as microseconds of steps."""

        def summed(part_SL: Float64 | None) -> Float64 | None:
            return None if part_SL is None else np.asarray(1e6 * part_SL.sum(axis=1))

        outside = float((times.beyond_SL > 1.0).mean())
        reasons = times.reasons.get("total", ())
        exchanges = times.reasons.get("extrapolated", ())
        outer = [reason for reason in exchanges if reason.code in _OTHER_FABRIC]
        energy = None if isinstance(power, Reason) else step_energy(times, phase, power)
        without = power if isinstance(power, Reason) else None if energy is None else energy.reason
        joules_S = None if energy is None else energy.joules_S
        return cls(
            counts_S=summed(times.counts_s),
            dispatch_S=summed(times.dispatch_s),
            combine_S=summed(times.combine_s),
            experts_S=1e6 * (times.experts_s - times.waiting_s).sum(axis=1),
            waiting_S=1e6 * times.waiting_s.sum(axis=1),
            alone_S=1e6
            * sum(
                (part_SL for part_SL in (times.shared_s, times.local_s) if part_SL is not None),
                start=np.zeros_like(times.experts_s),
            ).sum(axis=1),
            extrapolated=1.0 if "extrapolated" in times.reasons else outside,
            other_fabric=outer[0] if outer else None,
            farthest=tuple(_farthest(times, exchanges)),
            energy_S=None if joules_S is None else 1e3 * joules_S,
            no_energy=without,
            covered=0.0 if energy is None else energy.covered,
            phase=phase,
            left_out=tuple(part for part in ("shared",) if part in times.reasons),
            reason=reasons[0] if reasons else None,
        )

    @property
    def exchange_S(self) -> Float64:
        """All exchanges; zero where they are not known."""
        if self.counts_S is None or self.dispatch_S is None or self.combine_S is None:
            return np.zeros_like(self.experts_S)
        return self.counts_S + self.dispatch_S + self.combine_S

    @property
    def compute_S(self) -> Float64:
        """Experts of the busiest rank, and what ranks do alone."""
        return self.experts_S + self.waiting_S + self.alone_S

    @property
    def total_S(self) -> Float64:
        """The MoE part of each step."""
        return self.exchange_S + self.compute_S

    def energy_of(self, total_S: Float64) -> tuple[Float64 | None, float, Reason | None]:
        """Energy of steps that take longer than this by something of unknown power.

        Args:
            total_S: microseconds of each step in all.

        Returns:
            Millijoules or None, the share of the time of which power is known, and why there is none.
        """
        covered = self.covered * float(self.total_S.sum() / max(total_S.sum(), 1e-300))
        if self.energy_S is None:
            return None, covered, self.no_energy
        if covered < COVERED:
            return None, covered, Reason(StepCode.POWER_COVERS, {"phase": self.phase, "covered": covered})
        return self.energy_S * total_S / np.maximum(self.total_S, 1e-300), covered, None

    def parts(self) -> dict[str, float]:
        """Mean of each part that is known."""
        parts = {
            "counts": self.counts_S,
            "dispatch": self.dispatch_S,
            "experts": self.experts_S,
            "waiting": self.waiting_S,
            "combine": self.combine_S,
            "alone": self.alone_S,
        }
        return {name: float(part_S.mean()) for name, part_S in parts.items() if part_S is not None}


def _farthest(times: StepTimes, exchanges: Sequence[Reason]) -> Iterator[Reason]:
    beyond = float(times.beyond_SL.max())
    if 1.0 < beyond < np.inf:
        yield Reason(MitigationCode.EXPERTS_BEYOND, {"times": beyond})
    of_code: dict[str, Reason] = {}
    for reason in exchanges:
        other = of_code.setdefault(reason.code, reason)
        if _beyond(reason) > _beyond(other):
            of_code[reason.code] = reason
    yield from of_code.values()


def _beyond(reason: Reason) -> float:
    """How many times the most, or the least, that was measured; 1 where that is no number."""
    values: Mapping[str, Any] = reason.values
    match reason.code:
        case NetworkCode.BYTES_ABOVE:
            return float(values["bytes"] / values["most_bytes"])
        case NetworkCode.BYTES_BELOW:
            return float(values["least_bytes"] / values["bytes"])
    return 1.0
