"""A small expert-parallel model of our own making; the caller chooses how its layers exchange.

Shapes: T tokens, H hidden, P ranks. Top-1 routing; rank r owns experts 2r and 2r+1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn
from torch.utils.checkpoint import checkpoint

from observatory.probes.routing.adapters import Adapter
from observatory.probes.routing.sites import RoutingDecision
from tests.probes.tiny import HIDDEN

#: A process group; None for all ranks.
Group = dist.ProcessGroup | None
Exchange = Callable[[torch.Tensor, list[int], list[int], Group], torch.Tensor]


class PlainAutograd(torch.autograd.Function):
    """An all-to-all as training stacks write it."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, receives: list[int], sends: list[int], group: Group
    ) -> torch.Tensor:
        ctx.rest = (sends, receives, group)
        out = rows.new_empty((sum(receives), *rows.shape[1:]))
        dist.all_to_all_single(out, rows.contiguous(), receives, sends, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return (PlainAutograd.apply(gradient, *ctx.rest), None, None, None)


def plain(rows: torch.Tensor, receives: list[int], sends: list[int], group: Group = None) -> torch.Tensor:
    out: torch.Tensor = PlainAutograd.apply(rows, receives, sends, group)  # type: ignore[no-untyped-call]
    return out


def functional_collective(
    rows: torch.Tensor, receives: list[int], sends: list[int], group: Group = None
) -> torch.Tensor:
    out = functional.all_to_all_single_autograd(rows, receives, sends, group or dist.group.WORLD)
    return functional.wait_tensor(out) if isinstance(out, functional.AsyncCollectiveTensor) else out


class ParallelExperts(nn.Module):
    """Sends every token to the rank of its expert, doubles it there, and sends it back."""

    def __init__(self, exchange: Exchange, group: Group = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((), 2.0))
        self.exchange = exchange
        self.group = group

    def forward(self, hidden: torch.Tensor, expert_T: torch.Tensor, gate_T: torch.Tensor) -> torch.Tensor:
        order = expert_T.argsort(stable=True)
        sends = torch.bincount(expert_T // 2, minlength=dist.get_world_size(self.group))
        receives = torch.empty_like(sends)
        dist.all_to_all_single(receives, sends, group=self.group)
        to, back = sends.tolist(), receives.tolist()
        there = self.exchange(hidden[order], back, to, self.group)
        self.exchange(gate_T[order], back, to, self.group)  # goes along, as gate weights do
        home = self.exchange(there * self.scale, to, back, self.group)
        return home[order.argsort()]


class ParallelLayer(nn.Module):
    """Routes a token to the expert that its first element names."""

    def __init__(self, exchange: Exchange, group: Group = None) -> None:
        super().__init__()
        self.experts = ParallelExperts(exchange, group)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        expert_T = hidden.detach()[:, 0].abs().long() % (2 * dist.get_world_size(self.experts.group))
        return hidden + self.experts(hidden, expert_T, hidden.detach()[:, 1])


class ParallelModel(nn.Module):
    """Two such layers."""

    def __init__(
        self, exchange: Exchange = plain, *, reentrant: bool | None = None, group: Group = None
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(ParallelLayer(exchange, group)) for _ in range(2))
        self.reentrant = reentrant

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if self.reentrant is None:
                hidden = layer(hidden)
            else:
                hidden = checkpoint(layer, hidden, use_reentrant=self.reentrant)
        return hidden


def parallel_adapter(world: int) -> Adapter:
    return Adapter(
        match=lambda _name, module: isinstance(module, ParallelExperts),
        read=lambda _module, args, _kwargs, _output: RoutingDecision(
            expert_ids=args[1], tokens=args[1].shape[0]
        ),
        experts=2 * world,
        top_k=1,
        when="before",
    )


def tokens(*experts: int) -> torch.Tensor:
    """Tokens for these experts, one each."""
    hidden = torch.arange(float(len(experts) * HIDDEN)).reshape(-1, HIDDEN) / 64
    hidden[:, 0] = torch.tensor(experts, dtype=torch.float32)
    return hidden.requires_grad_()
