"""Dispatch without choosing: every rank sees all tokens, and computes what its experts add.

Shapes: T tokens of this rank, P ranks, A tokens of all ranks, K assignments per token, H hidden size.

An all-gather brings the tokens of all ranks to all, a reduce-scatter sums the outputs over ranks at the
tokens' sources. It moves P - 1 copies of every token whatever the routing, and is never unbalanced.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from observatory.collectives.dispatch.base import Dispatcher
from observatory.errors import ExchangeError
from observatory.probes.exchange.labels import labelled


class GatherDispatcher(Dispatcher):
    """All-gather, experts, reduce-scatter; deduplicated by nature."""

    name: ClassVar[str] = "gather"
    _calls = 0

    def __call__(
        self, hidden_TH: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """Outputs of the experts; see :class:`Dispatcher`."""
        self._calls += 1
        slots_TK = self.route(expert_ids_TK)
        rows_P = self.count_exchange(hidden_TH.shape[0])
        packed = self.pack(hidden_TH, weights_TK, slots_TK)
        hidden_AH, weights_AK, slots_AK = self.dispatch(packed, rows_P)
        return self.unpack(self.combine(self.experts(hidden_AH, slots_AK, weights_AK), rows_P))

    def count_exchange(self, tokens: int) -> tuple[int, ...]:
        """Phase: tokens of each rank, (P,)."""
        with self._span("count_exchange"), labelled(self._label("other")):
            head = (-1 if self.layer is None else self.layer, self._calls)
            announced = torch.tensor([[tokens, *head]] * self._transport.size)
            received = self._transport.exchange_counts(announced).tolist()
            for rank, (_, layer, call) in enumerate(received):
                if (layer, call) != head:
                    raise ExchangeError(
                        f"rank {rank} is in call {call} of MoE layer {layer} while rank "
                        f"{self._transport.rank} is in call {head[1]} of layer {head[0]}; all ranks must run "
                        "the same layers and the same number of steps, those without tokens too"
                    )
            return tuple(rows for rows, _, _ in received)

    def pack(
        self, hidden_TH: torch.Tensor, weights_TK: torch.Tensor, slots_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Phase: the rows, with weights and slots."""
        with self._span("pack"):
            return hidden_TH, weights_TK, slots_TK.to(torch.int32)

    def dispatch(
        self, packed: tuple[torch.Tensor, torch.Tensor, torch.Tensor], rows_P: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Phase: rows, weights and slots of all ranks."""
        with self._span("dispatch"):
            rows, weights, slots = self._exchanger.gather(packed, rows_P, label=self._label("dispatch"))
            return rows, weights, slots.long()

    def combine(self, outputs_AH: torch.Tensor, rows_P: tuple[int, ...]) -> torch.Tensor:
        """Phase: outputs summed over ranks, at the tokens' source."""
        with self._span("combine"):
            return self._exchanger.reduce_scatter(outputs_AH, rows_P, label=self._label("combine"))

    def unpack(self, outputs_TH: torch.Tensor) -> torch.Tensor:
        """Phase: nothing is left to do; the span says so."""
        with self._span("unpack"):
            return outputs_TH
