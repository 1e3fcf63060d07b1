"""What layouts score under the rules that a placement is chosen by, with intervals over steps.

Shapes: S steps, L layers, E experts, P ranks, K slots of each rank, B resamples.

A score is what the busiest rank has, added up over steps and layers, over what it has on perfectly balanced
ranks: every layer of every step waits for its busiest rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.parallel.balancing import Float64, Int64, rank_loads
from observatory.analysis.parallel.dispatch_rules import DispatchRule, slot_loads
from observatory.analysis.statistics import (
    Interval,
    block_count,
    block_weights,
    few_blocks_widening,
    sample_interval,
)
from observatory.errors import PlacementError

Objectives = Literal["load", "activated", "nodes", "time"]
Dispatch = Literal["equal", "weighted", "per-step"]

_RESAMPLES = 1000
#: Layer-steps whose splits are solved for one by one; of more, steps are left out evenly.
_MOST_SPLITS = 1024


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacementRules:
    """What a placement is chosen for, apart from ranks and replicas.

    Attributes:
        objective: what the busiest rank is to have little of: assignments, or activated experts; or nodes per
            token, at about as even ranks; or the time of a step.
        dispatch: how the copies of an expert share its assignments in the layout that is chosen.
        nodes: nodes, contiguous blocks of equally many ranks.
        groups: contiguous groups of experts that each stay on one node; 1: there are none.
        speed_P: speeds of the ranks; None: all alike.
        max_moves: copies that ranks may receive, per layer; -1: any number.
        move_cost: charged for each layer that changes, in units of the ratio of busiest to mean rank.
    """

    objective: Objectives = "load"
    dispatch: Dispatch = "equal"
    nodes: int = 1
    groups: int = 1
    speed_P: Float64 | None = None
    max_moves: int = -1
    move_cost: float = 0.0


def placement_rules(
    ranks: int,
    *,
    objective: str,
    dispatch: str,
    gpus_per_node: int | None = None,
    groups: int = 1,
    speed_P: Float64 | None = None,
    max_moves: int | None = None,
    move_cost: float = 0.0,
) -> PlacementRules:
    """Rules from what a user gives.

    Raises:
        PlacementError: a name is not known, ranks do not fill nodes, or there are groups but no nodes.
    """
    for name, value, choices in (
        ("objective", objective, get_args(Objectives)),
        ("dispatch", dispatch, get_args(Dispatch)),
    ):
        if value not in choices:
            raise PlacementError(f"{name} {value!r} is not known; expected one of {', '.join(choices)}")
    if gpus_per_node is not None and ranks % gpus_per_node:
        raise PlacementError(f"{ranks} ranks do not fill nodes of {gpus_per_node}; expected a divisor")
    if groups > 1 and gpus_per_node is None:
        raise PlacementError(
            f"{groups} groups of experts stay on nodes, of which none are given; expected --gpus-per-node"
        )
    return PlacementRules(
        objective=cast(Objectives, objective),
        dispatch=cast(Dispatch, dispatch),
        nodes=1 if gpus_per_node is None else ranks // gpus_per_node,
        groups=groups,
        speed_P=speed_P,
        max_moves=-1 if max_moves is None else max_moves,
        move_cost=move_cost,
    )


class Scorer:
    """Scores layouts on some steps."""

    def __init__(self, load_SLE: Float64, rules: PlacementRules, *, seed: int = 0) -> None:
        self.load_SLE, self.rules, self.seed = load_SLE, rules, seed
        self.resamples: dict[int, tuple[Float64, float]] = {}

    def score(
        self, slot_LPK: Int64, *, rule: DispatchRule = "equal", share_LPK: Float64 | None = None
    ) -> float:
        """The score of a layout."""
        busiest_S, mean_S = self._busiest_and_mean(slot_LPK, rule, share_LPK)
        return float(busiest_S.sum() / max(mean_S.sum(), 1e-300))

    def scored(
        self, slot_LPK: Int64, *, rule: DispatchRule = "equal", share_LPK: Float64 | None = None
    ) -> Interval:
        """The score with its interval over steps."""
        busiest_S, mean_S = self._busiest_and_mean(slot_LPK, rule, share_LPK)
        return self.ratio(busiest_S, mean_S)

    def gain(
        self,
        today_LPK: Int64,
        slot_LPK: Int64,
        *,
        rule: DispatchRule = "equal",
        share_LPK: Float64 | None = None,
        today_share_LPK: Float64 | None = None,
    ) -> Interval:
        """Share of what the busiest ranks have today that the layout removes; steps are paired."""
        after_S, _ = self._busiest_and_mean(slot_LPK, rule, share_LPK)
        today_rule: DispatchRule = "equal" if today_share_LPK is None else "weighted"
        before_S, _ = self._busiest_and_mean(today_LPK, today_rule, today_share_LPK, like=rule)
        left = self.ratio(after_S, before_S)
        assert left.low is not None
        assert left.high is not None
        return Interval(value=1 - left.value, low=1 - left.high, high=1 - left.low)

    def ratio(self, above_S: Float64, below_S: Float64) -> Interval:
        """Ratio of two sums over steps, with its interval; steps are paired."""
        steps = len(above_S)
        if steps not in self.resamples:
            widening = few_blocks_widening(block_count(steps))
            self.resamples[steps] = block_weights(steps, _RESAMPLES, self.seed), widening
        weight_BS, widening = self.resamples[steps]
        value = float(above_S.sum() / max(below_S.sum(), 1e-300))
        sample_B = (weight_BS @ above_S) / np.maximum(weight_BS @ below_S, 1e-300)
        return sample_interval(value, value + widening * (sample_B - value))

    def _busiest_and_mean(
        self,
        slot_LPK: Int64,
        rule: DispatchRule,
        share_LPK: Float64 | None,
        *,
        like: DispatchRule | None = None,
    ) -> tuple[Float64, Float64]:
        """What the busiest and the mean rank have, added up over layers, (S,) each."""
        load_SLE = self.load_SLE[self._steps(like or rule)]
        if self.rules.objective == "activated":
            got_SLPK = slot_loads(
                load_SLE, slot_LPK, rule=rule, share_LPK=share_LPK, speed_P=self.rules.speed_P
            )
            rank_SLP = (got_SLPK > 0).sum(axis=3).astype(np.float64)
            mean_SL = (load_SLE > 0).sum(axis=2) / slot_LPK.shape[1]
        else:
            rank_SLP = (
                rank_loads(load_SLE, slot_LPK)
                if rule == "equal"
                else slot_loads(
                    load_SLE, slot_LPK, rule=rule, share_LPK=share_LPK, speed_P=self.rules.speed_P
                ).sum(axis=3)
            )
            mean_SL = load_SLE.sum(axis=2) / slot_LPK.shape[1]
        if self.rules.speed_P is not None:
            rank_SLP = rank_SLP / (self.rules.speed_P / self.rules.speed_P.mean())
        return rank_SLP.max(axis=2).sum(axis=1), mean_SL.sum(axis=1)

    def _steps(self, rule: DispatchRule) -> NDArray[np.intp]:
        steps, layers = self.load_SLE.shape[:2]
        stride = -(-steps * layers // _MOST_SPLITS) if rule == "per-step" else 1
        return np.arange(0, steps, min(stride, max(1, steps // 8)))
