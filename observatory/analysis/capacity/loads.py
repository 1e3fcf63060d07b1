"""Loads of steps with any number of tokens: from captured steps, in perfect balance, or from a power law.

Shapes: S draws, L layers, E experts, P ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.capacity.power_law import power_law_loads

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

#: Where loads come from.
RoutingKind = Literal["captured", "balanced", "power-law"]
ROUTING_KINDS: tuple[RoutingKind, ...] = ("captured", "balanced", "power-law")


class Loads(Protocol):
    """A source of loads."""

    @property
    def kind(self) -> RoutingKind:
        """Where they come from."""

    def draw(self, tokens: int, draws: int, generator: np.random.Generator) -> Int64:
        """Assignments of steps of so many tokens, (S, L, E)."""


@dataclass(frozen=True, slots=True, eq=False)
class CapturedLoads:
    """Steps as they were captured; larger ones are sums of several, smaller ones a part of one.

    A sum of steps at different times stands for a batch of other sequences: the steps are taken to be as
    alike as the sequences of one batch.

    Attributes:
        load_SLE: captured assignments.
        top_k: experts of a token.
    """

    load_SLE: Int64
    top_k: int
    kind: RoutingKind = "captured"

    def draw(self, tokens: int, draws: int, generator: np.random.Generator) -> Int64:
        """Assignments of steps of so many tokens, (S, L, E)."""
        tokens_S = self.load_SLE[:, 0].sum(axis=1) / self.top_k
        return np.stack([self._step(tokens, tokens_S, generator) for _ in range(draws)])

    def _step(self, tokens: int, tokens_S: Float64, generator: np.random.Generator) -> Int64:
        whole, taken = np.zeros(self.load_SLE.shape[1:], dtype=np.int64), 0.0
        while True:
            for step in generator.permutation(len(tokens_S)).tolist():
                missing = tokens - taken
                if tokens_S[step] > missing:
                    part = missing / tokens_S[step]
                    return np.asarray(whole + generator.binomial(self.load_SLE[step], part))
                whole += self.load_SLE[step]
                taken += tokens_S[step]

    @property
    def tokens(self) -> int:
        """Different tokens that were captured."""
        return int(self.load_SLE[:, 0].sum()) // self.top_k


@dataclass(frozen=True, slots=True)
class BalancedLoads:
    """Every expert gets as much as any other, to within one assignment: what most planners assume.

    Attributes:
        layers, experts, top_k: of the model.
    """

    layers: int
    experts: int
    top_k: int
    kind: RoutingKind = "balanced"

    def draw(self, tokens: int, draws: int, generator: np.random.Generator) -> Int64:
        """Assignments of steps of so many tokens, (S, L, E); nothing is drawn at random."""
        del generator
        each, rest = divmod(tokens * self.top_k, self.experts)
        load_E = np.full(self.experts, each, dtype=np.int64)
        # Spread over the ranks as evenly as over the experts.
        load_E[np.linspace(0, self.experts, rest, endpoint=False).astype(np.int64)] += 1
        return np.broadcast_to(load_E, (draws, self.layers, self.experts)).copy()


@dataclass(frozen=True, slots=True)
class PowerLawLoads:
    """Loads from a power law, drawn anew for each step.

    Attributes:
        alpha_L: exponent of each layer; 0 for perfect balance.
        experts, top_k: of the model.
    """

    alpha_L: tuple[float, ...]
    experts: int
    top_k: int
    kind: RoutingKind = "power-law"

    def draw(self, tokens: int, draws: int, generator: np.random.Generator) -> Int64:
        """Assignments of steps of so many tokens, (S, L, E)."""
        balanced = BalancedLoads(1, self.experts, self.top_k)
        return np.stack(
            [
                power_law_loads(
                    generator,
                    draws=draws,
                    experts=self.experts,
                    top_k=self.top_k,
                    tokens=tokens,
                    alpha=alpha,
                )
                if alpha
                else balanced.draw(tokens, draws, generator)[:, 0]
                for alpha in self.alpha_L
            ],
            axis=1,
        )
