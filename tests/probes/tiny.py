"""Tiny models for the probe's tests: one that routes as its input says, one that routes by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import observatory
from observatory.probes.routing.adapters import Adapter
from observatory.probes.routing.sites import RoutingDecision

HIDDEN = 8


class ScriptedExperts(nn.Module):
    """Experts whose routing is an argument of the model's call."""

    def forward(self, hidden: torch.Tensor, routing: RoutingDecision) -> torch.Tensor:
        return hidden if routing.weights is None else hidden * 1.0


class ScriptedModel(nn.Module):
    """Layers whose routing is given: ``model([decision of layer 0, decision of layer 1])``."""

    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ScriptedExperts() for _ in range(layers))
        self.scale = nn.Parameter(torch.ones(1))
        self.eval()

    def forward(self, decisions: Sequence[RoutingDecision]) -> torch.Tensor:
        hidden = torch.ones(1, HIDDEN) * self.scale
        for layer, decision in zip(self.layers, decisions, strict=False):
            hidden = layer(hidden, decision)
        return hidden


def scripted_adapter(experts: int, top_k: int | None = None) -> Adapter:
    return Adapter(
        match=lambda _name, module: isinstance(module, ScriptedExperts),
        read=lambda _module, args, _kwargs, _output: args[1],
        experts=experts,
        top_k=top_k,
        when="before",
    )


class ChosenExperts(nn.Module):
    """Experts as transformers calls them, dense inside so that nothing depends on the device."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.weight_EHH = nn.Parameter(torch.randn(experts, HIDDEN, HIDDEN) / HIDDEN)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        mixed = torch.einsum("th,tkhg->tkg", hidden_states, self.weight_EHH[top_k_index])
        return (mixed * top_k_weights.unsqueeze(-1)).sum(1)


class MoeLayer(nn.Module):
    """Router and experts."""

    def __init__(self, experts: int, top_k: int) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, experts)
        self.experts = ChosenExperts(experts)
        self.top_k = top_k

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weights, index = self.router(hidden).softmax(-1).topk(self.top_k)
        return hidden + self.experts(hidden, index, weights)


class RoutedModel(nn.Module):
    """A stack of MoE layers on (T, HIDDEN) inputs; ``reentrant`` checkpoints each layer."""

    def __init__(
        self, layers: int = 2, experts: int = 4, top_k: int = 2, reentrant: bool | None = None
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MoeLayer(experts, top_k) for _ in range(layers))
        self.reentrant = reentrant

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if self.reentrant is None:
                hidden = layer(hidden)
            else:
                hidden = checkpoint(layer, hidden, use_reentrant=self.reentrant)
        return hidden


def routed_adapter(experts: int = 4, top_k: int = 2) -> Adapter:
    return Adapter(
        match=lambda _name, module: isinstance(module, ChosenExperts),
        read=_read_chosen,
        experts=experts,
        top_k=top_k,
        when="before",
    )


def _read_chosen(_module: nn.Module, args: tuple[Any, ...], _kwargs: Any, _output: Any) -> RoutingDecision:
    return RoutingDecision(expert_ids=args[1], weights=args[2], tokens=args[1].shape[0])


def ids(*rows: Sequence[int], dtype: torch.dtype = torch.int64) -> RoutingDecision:
    """Decision of tokens with these experts."""
    tensor = torch.tensor(rows, dtype=dtype)
    return RoutingDecision(expert_ids=tensor, tokens=len(rows))


def loads(path: Path, *, experts: int) -> dict[tuple[int, str, int], list[int]]:
    """(step, phase, layer) -> load of a run of one rank."""
    frame = observatory.open_run(path).expert_load()
    found: dict[tuple[int, str, int], list[int]] = {}
    for (step, phase, layer), rows in frame.groupby(["step", "phase", "layer"], observed=True):
        load = np.zeros(experts, dtype=int)
        load[rows.expert] = rows.load
        found[int(step), str(phase), int(layer)] = load.tolist()
    return found


def tokens(path: Path) -> dict[tuple[int, str, int], int]:
    """(step, phase, layer) -> tokens of a run of one rank."""
    found: dict[tuple[int, str, int], int] = {}
    for block in observatory.open_run(path).iter_loads():
        for step, count in zip(block.step_S.tolist(), block.tokens_SP[:, 0].tolist(), strict=True):
            found[step, block.phase, block.layer] = count
    return found


def assert_untouched(model: nn.Module) -> None:
    """No hook, no changed class, no attribute of ours."""
    for name, module in model.named_modules():
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
        assert not module._forward_hooks_always_called, name
        assert "_observatory_base" not in dir(module), name
        assert not [key for key in vars(module) if "observatory" in key], name
