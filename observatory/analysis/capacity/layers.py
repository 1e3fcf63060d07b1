"""MoE layers of a step from measured experts and a fitted network.

Shapes: seconds have three values, (3,): fast, likely, slow. S draws, L layers, P ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.capacity.rates import Grade
from observatory.analysis.capacity.step import Part
from observatory.analysis.experts.cost import ExpertCost
from observatory.analysis.experts.step_time import LayerWork, StepTimes, work_times
from observatory.errors import PlanError

if TYPE_CHECKING:
    from observatory.analysis.network.network import NetworkModel

Float64 = NDArray[np.float64]

#: What the dispatchers of this package announce to each rank: rows, layer and call.
_ANNOUNCED = 24


def layer_times(
    busy_SLP: Float64,
    activated_SLP: Float64,
    experts: ExpertCost,
    network: NetworkModel | None,
    *,
    gpus_per_node: int,
    cores: float | None = None,
) -> StepTimes:
    """Times of layer-steps in which every rank sends as many rows as any other.

    Args:
        busy_SLP: assignments of each rank.
        activated_SLP: its activated experts.
        experts: what they cost.
        network: of exchanges; None for one rank.
        gpus_per_node: ranks of a node.
        cores: that all ranks have together; None for enough of them.
    """
    ranks = busy_SLP.shape[2]
    return work_times(
        LayerWork(
            rows_SLRP=np.broadcast_to(busy_SLP[:, :, None, :] / ranks, (*busy_SLP.shape[:2], ranks, ranks)),
            activated_SLP=activated_SLP,
        ),
        experts,
        network=network if ranks > 1 else None,
        node_of_P=tuple(rank // gpus_per_node for rank in range(ranks)),
        shared_cores=cores,
        count_bytes=_ANNOUNCED,
        shared_experts=None if experts.shared_F else 0,
    )


def experts_part(times: StepTimes, experts: ExpertCost) -> Part:
    """The busiest rank of each layer, within the error that the cost had on held-out points."""
    error = experts.p90_error or 0.0
    grade: Grade = experts.grade
    return Part(
        "experts",
        total_s(times.experts_s) * np.array([1 / (1 + error), 1.0, 1 + error]),
        grade,
        is_extrapolated=grade == "measured" and bool((times.beyond_SL > 1.0).any()),
    )


def exchange_part(times: StepTimes, network: NetworkModel) -> Part:
    """Announcements, dispatch and combine, within the spread of held-out exchanges.

    Raises:
        PlanError: the model cannot predict them.
    """
    if times.dispatch_s is None or times.combine_s is None or times.counts_s is None:
        raise PlanError("exchanges between these ranks cannot be predicted from the network model")
    likely = sum(total_s(part) for part in (times.counts_s, times.dispatch_s, times.combine_s))
    ratio_Q = network.of("flat").ratio_Q
    low, high = ratio_Q[len(ratio_Q) // 20], ratio_Q[-1 - len(ratio_Q) // 20]
    return Part(
        "exchange",
        likely * np.array([min(low, 1.0), 1.0, max(high, 1.0)]),
        "fitted",
        is_extrapolated="extrapolated" in times.reasons,
    )


def total_s(part_SL: Float64) -> float:
    """Seconds of all layers, mean over draws."""
    return float(part_SL.sum(axis=1).mean())
