"""What every dispatcher does: phases, each a method and a span, around an algorithm's own exchanges.

Shapes: T tokens of this rank, K assignments per token, H hidden size, N rows received, M slots in a row.

One call of one MoE layer::

    route -> count_exchange -> pack -> dispatch -> experts -> combine -> unpack

An algorithm that exchanges in two steps runs ``count_exchange``, ``pack`` and ``dispatch`` once for each, and
``combine`` and ``unpack`` likewise on the way back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

import torch

from observatory.collectives.autograd import Exchanger
from observatory.collectives.dispatch.plan import ExpertMap
from observatory.probes.exchange.labels import Label, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalExperts:
    """The experts that this rank holds.

    Attributes:
        run: (hidden (N, H), local expert ids (N, 1), gate weights (N, 1)) -> weighted outputs (N, H).
        parameters: what the outputs depend on, so that a call without rows keeps its place in the graph.
    """

    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    parameters: tuple[torch.Tensor, ...] = ()


class Dispatcher(ABC):
    """Sends tokens to the ranks of their experts and brings the weighted outputs back.

    Attributes:
        name: the algorithm.
        layer: number of the MoE layer, for spans and labels.
    """

    name: ClassVar[str]

    def __init__(
        self,
        exchanger: Exchanger,
        experts: ExpertMap,
        local: LocalExperts,
        *,
        layer: int | None = None,
        deduplicate: bool = False,
    ) -> None:
        self.layer = layer
        self._exchanger = exchanger
        self._transport = exchanger.transport
        self._map = experts
        self._local = local
        self._deduplicate = deduplicate

    @abstractmethod
    def __call__(
        self, hidden_TH: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """Outputs of the experts, weighted and summed over the assignments of each token, (T, H).

        Args:
            hidden_TH: hidden states of this rank's tokens.
            expert_ids_TK: expert of each assignment; ids outside 0..E-1 add nothing.
            weights_TK: gate weight of each assignment.

        Raises:
            ExchangeError: a rank does not answer, or is in another layer or call.
        """

    def route(self, expert_ids_TK: torch.Tensor) -> torch.Tensor:
        """Phase: the slot of each assignment, (T, K)."""
        with self._span("route"):
            return self._map.slots(expert_ids_TK)

    def experts(
        self, hidden_NH: torch.Tensor, slots_NM: torch.Tensor, weights_NM: torch.Tensor
    ) -> torch.Tensor:
        """Phase: outputs of this rank's experts, weighted and summed over the slots of each row, (N, H).

        Slots of other ranks, and ``NO_SLOT``, add nothing.
        """
        with self._span("experts"):
            first, end = (int(self._map.first_slot_P[self._transport.rank + i]) for i in (0, 1))
            mine_NM = (slots_NM >= first) & (slots_NM < end)
            rows, places = mine_NM.nonzero(as_tuple=True)
            if not len(rows):
                return self._nothing(hidden_NH, weights_NM)
            outputs = self._local.run(
                hidden_NH[rows],
                (slots_NM[rows, places] - first).unsqueeze(1),
                weights_NM[rows, places].unsqueeze(1),
            )
            return torch.zeros_like(hidden_NH).index_add(0, rows, outputs.to(hidden_NH.dtype))

    def _nothing(self, hidden_NH: torch.Tensor, weights_NM: torch.Tensor) -> torch.Tensor:
        """Zeros that still depend on everything, so that this rank takes part in the backward exchanges."""
        zeros_NH = torch.zeros_like(hidden_NH)
        if torch.is_grad_enabled():
            for tensor in (hidden_NH, weights_NM, *self._local.parameters):
                zeros_NH = zeros_NH + tensor.reshape(-1)[:0].sum().to(zeros_NH.dtype)
        return zeros_NH

    def _label(self, role: Role) -> Label:
        return Label(role=role, layer=self.layer, algorithm=self.name)

    def _span(self, name: str) -> AbstractContextManager[None]:
        return self._exchanger.sink.span(name, self.layer)
