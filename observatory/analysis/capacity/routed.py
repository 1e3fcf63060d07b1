"""What each rank gets of steps with any number of tokens, under the layout that a plan would use.

Shapes: S steps or draws, L layers, E experts, P ranks, K slots.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.capacity.loads import CapturedLoads, Loads
from observatory.analysis.parallel.balancing import (
    balanced_layout,
    copies,
    linear_layout,
    rank_loads,
)

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

_DRAWS = 6


class Routed:
    """Loads of ranks, kept for the numbers of tokens that were asked for.

    Args:
        decode, prefill: where loads of each phase come from; not what layouts are chosen on.
        chosen_on_LE: mean loads that layouts are chosen on; None for loads that say nothing about single
            experts, whose layout is contiguous.
        layers: L.
        experts: E.
        seed: of the draws.
    """

    def __init__(
        self,
        decode: Loads,
        prefill: Loads,
        *,
        chosen_on_LE: Float64 | None,
        layers: int,
        experts: int,
        seed: int = 0,
    ) -> None:
        self.decode, self.prefill = decode, prefill
        self._chosen_on_LE, self._layers, self._experts, self._seed = chosen_on_LE, layers, experts, seed
        self._layouts: dict[tuple[int, int], Int64] = {}
        self._drawn: dict[tuple[bool, int], Int64] = {}
        self._work: dict[tuple[int, int, int, int], tuple[Float64, Float64]] = {}

    @property
    def is_balanced(self) -> bool:
        """Whether layouts are chosen by the loads of experts."""
        return self._chosen_on_LE is not None

    def layout(self, ranks: int, slots: int) -> Int64:
        """Expert in each slot, (L, P, K)."""
        key = ranks, slots
        if key not in self._layouts:
            self._layouts[key] = self._chosen(ranks, slots)
        return self._layouts[key]

    def _chosen(self, ranks: int, slots: int) -> Int64:
        replicas = ranks * slots - self._experts
        if ranks == 1 or (self._chosen_on_LE is None and not replicas):
            return linear_layout(self._layers, self._experts, ranks)
        if self._chosen_on_LE is None:
            even_LE = np.ones((1, self._experts))
            one_1PK = balanced_layout(even_LE, ranks, replicas)
            return np.repeat(one_1PK, self._layers, axis=0)
        return balanced_layout(self._chosen_on_LE, ranks, replicas)

    def rank_work(self, ranks: int, slots: int, *, decode: int, prefill: int) -> tuple[Float64, Float64]:
        """Assignments and activated experts of every rank in steps of so many tokens, (S, L, P) each."""
        key = ranks, slots, decode, prefill
        if key not in self._work:
            drawn = [
                self._draws(tokens, is_prefill=is_prefill)
                for tokens, is_prefill in ((decode, False), (prefill, True))
                if tokens
            ]
            self._work[key] = self._counted(self.layout(ranks, slots), np.sum(drawn, axis=0))
        return self._work[key]

    def covers(self, *, decode: int, prefill: int) -> bool:
        """Whether as many different tokens of each phase were captured; always with assumed loads."""
        return all(
            not isinstance(loads, CapturedLoads) or tokens <= loads.tokens
            for loads, tokens in ((self.decode, decode), (self.prefill, prefill))
        )

    def _draws(self, tokens: int, *, is_prefill: bool) -> Int64:
        key = is_prefill, tokens
        if key not in self._drawn:
            loads = self.prefill if is_prefill else self.decode
            generator = np.random.default_rng((self._seed, tokens, is_prefill))
            self._drawn[key] = loads.draw(tokens, _DRAWS, generator)
        return self._drawn[key]

    def _counted(self, layout_LPK: Int64, load_SLE: Int64) -> tuple[Float64, Float64]:
        # Copies share alike; a copy has work with the probability that one of few assignments is its own.
        copies_LE = np.maximum(copies(layout_LPK, self._experts), 1)
        active_SLE = np.minimum(load_SLE / copies_LE, 1.0)
        layers, ranks, slots = layout_LPK.shape
        of_slot_SLQ = np.take_along_axis(active_SLE, layout_LPK.reshape(1, layers, ranks * slots), axis=2)
        activated_SLP = of_slot_SLQ.reshape(-1, layers, ranks, slots).sum(axis=3)
        return rank_loads(load_SLE, layout_LPK), activated_SLP
