"""Times of steps under the layouts of a placement: what `observatory place --objective time` decides by.

Shapes: S steps, L layers, R captured source ranks, E experts, P ranks, K slots of each rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from observatory.advice.placement_scores import PlacementRules
from observatory.analysis.experts.cost import ExpertCost
from observatory.analysis.experts.step_time import layer_step_times
from observatory.analysis.parallel.balancing import Float64, Int64
from observatory.analysis.parallel.dispatch_rules import DispatchRule
from observatory.analysis.parallel.step_loads import StepLoads
from observatory.analysis.parallel.traffic import fold_sources
from observatory.errors import PlacementError

if TYPE_CHECKING:
    from observatory.analysis.network import NetworkModel

#: Layer-steps times source ranks times experts that are timed; of more, steps are left out evenly.
_MOST_LOADS = 1 << 24


class StepTimer:
    """Predicts steps of a run under any layout: exchanges, where a network model is given, and experts."""

    def __init__(
        self,
        loads: StepLoads,
        ranks: int,
        rules: PlacementRules,
        experts: ExpertCost,
        network: NetworkModel | None = None,
    ) -> None:
        """Keep what is timed.

        Args:
            loads: loads of single steps by source rank.
            ranks: P.
            rules: nodes and speeds.
            experts: time of the experts of one rank.
            network: time of exchanges; None leaves them out.

        Raises:
            PlacementError: loads are not known by source rank.
        """
        if loads.load_SLRE is None:
            raise PlacementError("loads are not known by source rank; expected those of a run")
        self.load_SLRE, self.ranks, self.rules = loads.load_SLRE, ranks, rules
        self.experts, self.network = experts, network

    def us_S(  # the letter ends the name of a tensor
        self,
        at_S: NDArray[np.intp],
        slot_LPK: Int64,
        *,
        rule: DispatchRule = "equal",
        share_LPK: Float64 | None = None,
    ) -> Float64:
        """Time of some steps, added up over layers, microseconds; of many steps evenly spread ones."""
        layers, experts = slot_LPK.shape[0], self.load_SLRE.shape[3]
        fit = max(1, _MOST_LOADS // (layers * self.ranks * experts))
        at_S = at_S[:: -(-len(at_S) // fit)]
        folded = [fold_sources(self.load_SLRE[at_S, layer], self.ranks)[0] for layer in range(layers)]
        load_SLRE = np.stack(folded, axis=1).astype(np.float64)
        times = layer_step_times(
            load_SLRE,
            slot_LPK,
            self.experts,
            network=self.network,
            node_of_P=np.repeat(np.arange(self.rules.nodes), self.ranks // self.rules.nodes).tolist(),
            dispatch=rule,
            share_LPK=share_LPK,
            speed_P=None if self.rules.speed_P is None else self.rules.speed_P / self.rules.speed_P.mean(),
        )
        total_SL = times.experts_s if times.total_s is None else times.total_s
        return np.asarray(total_SL.sum(axis=1) * 1e6)
