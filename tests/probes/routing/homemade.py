"""MoE layers as people write them outside transformers, and doubles of two frameworks' routers.

The doubles repeat the interface, not the code: attribute names, arguments and the shapes and dtypes of what
comes back (Megatron-Core 0.16 ``TopKRouter``, DeepSpeed 0.19 ``TopKGate``), for machines that lack the
real ones.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

HIDDEN = 8


class Stack(nn.Module):
    """Decoder blocks around the given MoE layers: ``layers.<i>.mlp``."""

    def __init__(self, *moes: nn.Module, **configuration: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(moe) for moe in moes)
        self.config = SimpleNamespace(**configuration)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class Block(nn.Module):
    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.mlp = moe

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output = self.mlp(hidden)
        return output[0] if isinstance(output, tuple) else output


class ListMoe(nn.Module):
    """A linear gate beside a list of expert modules, softmax and top-k in the block (first Mixtral code)."""

    def __init__(self, experts: int = 4, top_k: int = 2, gate: nn.Module | None = None) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = gate or nn.Linear(HIDDEN, experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(experts))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        scored = self.gate(hidden)
        if isinstance(scored, tuple):
            ids, weights = scored[:2]
        else:
            weights, ids = scored.softmax(-1).topk(self.top_k)
        output = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(ids == number)
            output[token] += expert(hidden[token]) * weights[token, place, None]
        return output


class ChoosingGate(nn.Module):
    """A gate that returns (ids, weights, auxiliary loss), as DeepSeek's first code does."""

    def __init__(self, experts: int = 4, top_k: int = 2) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.randn(experts, HIDDEN))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        weights, ids = (-(hidden @ self.weight.T)).softmax(-1).topk(self.top_k)  # not the top of any output
        return ids, weights, None


class SecretiveMoe(nn.Module):
    """Nothing here has a usual name; the choice is only in the output."""

    def __init__(self, committee: int = 6, members: int = 3) -> None:
        super().__init__()
        self.judge = nn.Linear(HIDDEN, committee)
        self.members = members

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden, self.judge(hidden).topk(self.members).indices


class MegatronRouterDouble(nn.Module):
    """Returns (probs (T, E), routing_map (T, E) bool) for hidden states (sequence, batch, H)."""

    def __init__(self, experts: int = 8, top_k: int = 2) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_moe_experts=experts, moe_router_topk=top_k)
        self.num_experts, self.topk = experts, top_k
        self.weight = nn.Parameter(torch.randn(experts, HIDDEN))

    def routing(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits.reshape(-1, self.num_experts)
        scores, ids = logits.softmax(-1).topk(self.topk)
        empty = torch.zeros_like(logits)
        return empty.scatter(1, ids, scores), empty.int().scatter(1, ids, 1).bool()

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.routing(input @ self.weight.T)


class DeepSpeedGateDouble(nn.Module):
    """Returns DeepSpeed's dense tuple, or with ``sparse_routes`` its sparse one; drops over capacity."""

    def __init__(self, experts: int = 4, k: int = 2, capacity: int = 3) -> None:
        super().__init__()
        self.wg = nn.Linear(HIDDEN, experts, bias=False)
        self.k, self.capacity_factor, self.capacity = k, 1.0, capacity

    def forward(
        self, input: torch.Tensor, _used_token: Any = None, sparse_routes: bool = False
    ) -> tuple[Any, ...]:
        gates_TE = self.wg(input).softmax(-1)
        ids_TK = gates_TE.topk(self.k).indices
        chosen_TE = torch.zeros_like(gates_TE).scatter(1, ids_TK, 1).bool()
        place_TE = chosen_TE.cumsum(0) - 1
        kept_TE = chosen_TE & (place_TE < self.capacity)
        counts_E = chosen_TE.sum(0)
        if sparse_routes:
            kept_TK = kept_TE.gather(1, ids_TK)
            ids_KT = torch.where(kept_TK, ids_TK, -1).T.int()
            gates_KT = (gates_TE.gather(1, ids_TK) * kept_TK).T
            places_KT = place_TE.gather(1, ids_TK).T.int()
            return torch.tensor(0.0), self.capacity, gates_TE.shape[1], ids_KT, places_KT, gates_KT, counts_E
        slots_TEC = nn.functional.one_hot(place_TE.clamp(0, self.capacity - 1), self.capacity)
        weights_TEC = (gates_TE * kept_TE)[:, :, None] * slots_TEC
        return torch.tensor(0.0), weights_TEC, weights_TEC.bool(), counts_E


class GateMoe(nn.Module):
    """A block that holds a router of some framework beside its experts."""

    def __init__(self, name: str, router: nn.Module, experts: int) -> None:
        super().__init__()
        self.add_module(name, router)
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(experts))


class StackedExperts(nn.Module):
    """Experts with their part of a stack each, which is gathered for every assignment."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.num_experts = experts
        self.weight = nn.Parameter(torch.randn(experts, HIDDEN, HIDDEN))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        mixed = torch.einsum("th,tkhg->tkg", hidden_states, self.weight[top_k_index])
        return (mixed * top_k_weights.unsqueeze(-1)).sum(1)
