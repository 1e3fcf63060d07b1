"""Interfaces of MoE layers by spelling, mask, shape and wrapper."""

# ruff: noqa: ARG002  # the names of arguments are the interface

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from observatory.probes.routing.discover import find_sites
from observatory.probes.routing.sites import RoutingDecision
from tests.probes.routing.families import tiny_model
from tests.probes.routing.homemade import HIDDEN, ListMoe, Stack


class TopExperts(nn.Module):
    """Experts as MegaBlocks calls them: all scores, then the chosen ones."""

    def __init__(self) -> None:
        super().__init__()
        self.moe_num_experts = 4
        self.w1 = nn.Parameter(torch.randn(4 * HIDDEN, HIDDEN))

    def forward(self, x: Any, weights: Any, top_weights: Any, top_experts: Any) -> Any:
        return x


class MaskedExperts(nn.Module):
    """Experts that leave tokens out which a mask names."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.n_routed_experts, self.name = 4, name
        self.weight = nn.Parameter(torch.randn(4, HIDDEN, HIDDEN))


class TokenMasked(MaskedExperts):
    def forward(self, x: Any, token_mask: Any, weights: Any, indices: Any) -> Any:
        return x


class PaddingMasked(MaskedExperts):
    def forward(self, x: Any, indices: Any, weights: Any, padding_mask: Any) -> Any:
        return x


class HolderOf(nn.Module):
    def __init__(self, experts: nn.Module, gate: nn.Module | None = None) -> None:
        super().__init__()
        self.top_k, self.experts = 2, experts
        if gate is not None:
            self.gate = gate


def test_top_experts_are_ids_and_the_weights_of_their_shape_are_the_gates() -> None:
    (site,) = find_sites(Stack(HolderOf(TopExperts())))
    hidden, scores, gates = torch.randn(3, HIDDEN), torch.rand(3, 4), torch.rand(3, 2)
    chosen = torch.tensor([[0, 1], [2, 3], [0, 3]])
    decision = site.read(site.module, (hidden, scores, gates, chosen), {}, None)
    assert decision == RoutingDecision(expert_ids=chosen, weights=gates, tokens=3)


@pytest.mark.parametrize("kind", [TokenMasked, PaddingMasked])
def test_tokens_that_a_mask_leaves_out_do_not_count(kind: type[MaskedExperts]) -> None:
    (site,) = find_sites(Stack(HolderOf(kind("experts"))))
    keep = torch.tensor([True, False, True])
    arguments = {
        "x": torch.randn(3, HIDDEN),
        "indices": torch.tensor([[0, 1], [2, 3], [0, 3]]),
        "weights": torch.rand(3, 2),
        "token_mask": keep,
        "padding_mask": ~keep,
    }
    decision = site.read(site.module, (), arguments, None)
    assert decision is not None
    assert decision.token_mask is not None
    assert decision.token_mask.tolist() == keep.tolist()


def read_beside_a_list(output: Any, *, tokens: int, experts: int = 4) -> RoutingDecision:
    site = find_sites(Stack(ListMoe(experts=experts)))[0]
    decision = site.read(site.module, (torch.randn(tokens, HIDDEN),), {}, output)
    assert decision is not None
    return decision


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 8])
def test_flat_ids_and_counts_are_never_taken_for_a_map(tokens: int) -> None:
    logits, flat, size = torch.randn(tokens, 4), torch.arange(tokens * 2) % 4, torch.arange(4)
    decision = read_beside_a_list((flat, flat, torch.rand(tokens * 2), size, logits), tokens=tokens)
    assert decision.is_inferred
    assert decision.expert_ids is not None
    assert decision.expert_ids.tolist() == logits.topk(2).indices.tolist()


@pytest.mark.parametrize("capacity", [1, 2, 4, 5])
@pytest.mark.parametrize("as_mask", [True, False])
def test_a_dispatch_mask_over_slots_is_what_is_dispatched(capacity: int, as_mask: bool) -> None:
    dispatch = torch.zeros(6, 4, capacity)
    for token, expert in enumerate([0, 3, 3, 1, 0]):  # the sixth token is dropped
        dispatch[token, expert, token % capacity] = 1
    output = (torch.tensor(0.1), dispatch * 0.5, dispatch.bool() if as_mask else dispatch)
    decision = read_beside_a_list(output, tokens=6)
    assert decision.routing_map is not None
    assert decision.routing_map.sum(0).tolist() == [2, 1, 0, 2]
    assert decision.tokens == 6


def test_experts_of_several_kinds_in_one_list_are_all_experts() -> None:
    mixed = ListMoe(experts=6)
    mixed.experts[4], mixed.experts[5] = nn.Identity(), nn.Dropout()
    assert [s.spec.experts for s in find_sites(Stack(ListMoe(), mixed))] == [4, 6]


def test_adapters_and_parametrizations_change_nothing_of_what_is_found() -> None:
    peft = pytest.importorskip("peft")
    plain = [site.spec for site in find_sites(tiny_model("qwen2_moe"))]
    model = tiny_model("qwen2_moe")
    for layer in model.model.layers:
        nn.utils.parametrize.register_parametrization(layer.mlp.experts, "down_proj", nn.Identity())
    adapted = peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj", "mlp.gate.weight"]),
        tiny_model("qwen2_moe"),
    )
    for wrapped in (model, adapted):
        found = [site.spec for site in find_sites(wrapped)]
        assert [(s.layer, s.experts, s.top_k, s.shared_experts) for s in found] == [
            (s.layer, s.experts, s.top_k, s.shared_experts) for s in plain
        ]


def test_a_packed_gate_states_its_experts_by_its_outputs() -> None:
    packed = ListMoe()
    packed.gate.weight = nn.Parameter(torch.zeros(16, 1, dtype=torch.uint8), requires_grad=False)
    assert [site.spec.experts for site in find_sites(Stack(packed))] == [4]


@pytest.mark.parametrize("name", ["chunks", "layers", "blocks"])
def test_chunks_of_a_virtual_pipeline_are_numbered_one_after_the_other(name: str) -> None:
    chunks = nn.ModuleList([Stack(ListMoe(), ListMoe()), Stack(ListMoe(), ListMoe(), ListMoe())])
    for model in (chunks, nn.ModuleDict({name: chunks})):
        assert [site.spec.layer for site in find_sites(model)] == [0, 1, 2, 3, 4]


def test_the_parts_of_a_block_are_no_blocks_and_a_stated_number_goes_first() -> None:
    blocks = [nn.ModuleDict({"layer": nn.ModuleList([nn.Linear(1, 1), ListMoe()])}) for _ in range(3)]
    model = nn.ModuleDict({"block": nn.ModuleList(blocks)})
    assert [site.spec.layer for site in find_sites(model)] == [0, 1, 2]
    for number, block in zip((8, 9, 12), blocks, strict=True):
        block.layer_number = number
    assert [site.spec.layer for site in find_sites(model)] == [7, 8, 11]
    blocks[2].layer_number = 8
    assert [site.spec.layer for site in find_sites(model)] == [0, 1, 2]
