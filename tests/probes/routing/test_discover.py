"""Finding MoE layers outside the ordinary: adapters, refusals, old styles, numbers, sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from observatory.errors import ModelError
from observatory.probes.routing.adapters import Adapter
from observatory.probes.routing.describe import describe_model
from observatory.probes.routing.discover import find_sites
from observatory.probes.routing.numbering import layer_numbers
from observatory.probes.routing.sites import RoutingDecision
from tests.probes.routing.counting import read_loads
from tests.probes.routing.families import EXPERTS, TOP_K, tiny_inputs, tiny_model
from tests.probes.routing.homemade import HIDDEN, ChoosingGate, ListMoe, SecretiveMoe, Stack
from tests.probes.routing.references import ComputedLoads, RecomputedLoads, best_with_skip


def read_output(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> RoutingDecision:
    return RoutingDecision(expert_ids=output[1], tokens=output[1].shape[0])


SECRETIVE = Adapter(
    match=lambda _name, module: isinstance(module, SecretiveMoe),
    read=read_output,
    experts=lambda module: module.judge.out_features,
    top_k=lambda module: module.members,
    how="output of SecretiveMoe",
)


def test_an_adapter_reads_a_layer_that_nothing_else_recognises() -> None:
    model = Stack(SecretiveMoe(), SecretiveMoe(committee=5))
    sites = find_sites(model, adapters=[SECRETIVE])
    hidden = torch.randn(10, HIDDEN)
    with read_loads(sites) as read:
        model(hidden)
    assert [(s.spec.layer, s.spec.experts, s.spec.top_k, s.how) for s in sites] == [
        (0, 6, 3, "output of SecretiveMoe"),
        (1, 5, 3, "output of SecretiveMoe"),
    ]
    expected = [0] * 6
    for row in model.layers[0].mlp.judge(hidden).tolist():
        for expert in sorted(range(6), key=lambda e: -row[e])[:3]:
            expected[expert] += 1
    assert read[0] == (expected, 10)


def test_an_adapter_comes_before_the_rules_for_the_whole_block() -> None:
    adapter = Adapter(
        match=lambda name, _module: name.endswith("mlp.gate"),
        read=lambda _m, _a, _k, out: RoutingDecision(
            expert_ids=out.argmax(-1, keepdim=True), tokens=len(out)
        ),
        experts=4,
    )
    model = Stack(ListMoe(), ListMoe())
    assert [(s.spec.module, s.how) for s in find_sites(model, adapters=[adapter])] == [
        ("layers.0.mlp.gate", "adapter"),
        ("layers.1.mlp.gate", "adapter"),
    ]


def test_an_adapter_for_one_layer_leaves_the_others_to_the_rules() -> None:
    sites = find_sites(Stack(SecretiveMoe(), ListMoe()), adapters=[SECRETIVE])
    assert [s.spec.module for s in sites] == ["layers.0.mlp", "layers.1.mlp.gate"]


def test_a_model_without_experts_is_refused_with_what_was_looked_for() -> None:
    with pytest.raises(ModelError, match=r"Sequential has no MoE layer.*top_k_index.*Adapter\(match="):
        find_sites(nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize("family", ["llama", "bamba", "t5", "clip"])
def test_dense_architectures_have_no_sites(family: str) -> None:
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"), pytest.raises(ModelError, match="looks dense: it has no MoE layer"):
        find_sites(AutoModel.from_config(AutoConfig.for_model(family)))


def test_a_linear_layer_called_gate_is_not_a_router() -> None:
    gated = nn.ModuleDict(
        {"gate": nn.Linear(HIDDEN, 4), "up": nn.Linear(HIDDEN, 4), "down": nn.Linear(4, HIDDEN)}
    )
    with pytest.raises(ModelError, match="no MoE layer"):
        find_sites(Stack(gated))


def test_experts_promised_by_the_configuration_and_not_found_are_named() -> None:
    with pytest.raises(ModelError, match="configuration says num_local_experts=16"):
        find_sites(Stack(nn.Linear(HIDDEN, HIDDEN), num_local_experts=16))


def test_a_model_understood_only_in_part_is_refused_and_the_module_named() -> None:
    orphan = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(3))})
    with pytest.raises(
        ModelError, match=r"1 MoE layers understood, but not layers\.1\.mlp\.experts.*one router"
    ):
        find_sites(Stack(ListMoe(), orphan))


def test_a_gate_whose_choice_takes_a_bias_is_refused_rather_than_guessed() -> None:
    biased = ListMoe()
    biased.register_buffer("e_score_correction_bias", torch.zeros(4))
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.experts.*a bias or group limit"):
        find_sites(Stack(biased))


def test_a_block_that_does_not_tell_its_top_k_is_refused() -> None:
    silent = ListMoe()
    del silent.top_k
    with pytest.raises(ModelError, match="how many experts gate picks per token is not stated"):
        find_sites(Stack(silent))


@pytest.mark.parametrize("gate", [None, ChoosingGate()], ids=["logits", "ids"])
def test_a_router_next_to_a_list_of_experts_is_read_from_its_output(gate: nn.Module | None) -> None:
    model = Stack(ListMoe(gate=gate))
    sites = find_sites(model)
    with torch.no_grad(), read_loads(sites) as read, ComputedLoads(model) as computed:
        model(torch.randn(30, HIDDEN))
    assert read[0] == (computed.of(sites[0]), 30)
    assert sum(read[0][0]) == 60


def test_a_router_that_returns_something_else_fails_with_its_shapes() -> None:
    sites = find_sites(Stack(ListMoe()))
    with pytest.raises(
        ModelError, match=r"Linear returned \[\(3, 7\)\].*last dimension is the number of experts, 4"
    ):
        sites[0].read(sites[0].module, (), {}, torch.zeros(3, 7))


def test_tokens_over_capacity_are_not_counted() -> None:
    model = tiny_model("switch_transformers", expert_capacity=1)
    sites = find_sites(model)
    with torch.no_grad(), read_loads(sites) as read, ComputedLoads(model) as computed:
        model(**tiny_inputs(model))
    for site in sites:
        assert read[site.spec.layer][0] == computed.of(site)
        assert max(computed.of(site)) <= 2  # two sequences, one place each
    assert sum(read[0][0]) < read[0][1] == 24


def test_zero_computation_experts_are_null_experts() -> None:
    model = tiny_model("longcat_flash", zero_expert_num=24)
    sites = find_sites(model)
    with torch.no_grad(), read_loads(sites) as read, ComputedLoads(model) as computed:
        model(**tiny_inputs(model))
    assert [(s.spec.experts, s.spec.null_experts) for s in sites] == [(EXPERTS, 24)] * 2
    for site in sites:
        loads, tokens = read[site.spec.layer]
        assert loads == computed.of(site)
        assert sum(loads) < tokens * TOP_K


def test_a_skipped_token_counts_for_no_expert_though_expert_zero_computes_it() -> None:
    model = tiny_model("zaya")
    for name, bias in model.named_buffers():
        if name.endswith("balancing_biases"):
            bias[-1] = 0.1
    sites = find_sites(model)
    scored = RecomputedLoads(model, sites, "gate.router_mlp", best_with_skip)
    with torch.no_grad(), read_loads(sites) as read, scored, ComputedLoads(model) as computed:
        model(**tiny_inputs(model))
    loads, tokens = read[0]
    skipped = tokens - sum(loads)
    assert loads == scored.of(sites[0])
    assert skipped > 0
    assert computed.of(sites[0]) == [loads[0] + skipped, *loads[1:]]


def test_text_and_vision_experts_of_one_block_get_their_own_tokens() -> None:
    model = tiny_model("ernie4_5_vl_moe")
    sites = find_sites(model)
    kinds = torch.zeros(2, 12, dtype=torch.int)
    kinds[:, :5] = 1
    with torch.no_grad(), read_loads(sites) as read, ComputedLoads(model) as computed:
        model(**tiny_inputs(model), moe_mm_token_type_ids=kinds)
    assert [(s.spec.layer, s.spec.module) for s in sites] == [
        (1, "layers.1.mlp.text_moe.experts"),
        (3, "layers.1.mlp.vision_moe.experts"),
    ]
    assert [read[s.spec.layer] for s in sites] == [(computed.of(sites[0]), 14), (computed.of(sites[1]), 10)]


def test_hash_routing_is_read_like_learned_routing() -> None:
    model = tiny_model("deepseek_v4")
    sites = find_sites(model)
    inputs = tiny_inputs(model)
    with torch.no_grad(), read_loads(sites) as read:
        model(**inputs)
    table = model.model.layers[0].mlp.gate.tid2eid
    assert read[0][0] == torch.bincount(table[inputs["input_ids"]].flatten(), minlength=EXPERTS).tolist()


@pytest.mark.parametrize(
    ("family", "shared"),
    [
        ("mixtral", 0),
        ("qwen2_moe", 1),
        ("deepseek_v2", 2),
        ("granitemoeshared", 1),
        ("ernie4_5_vl_moe", 2),
        ("llama4", 1),
    ],
)
def test_shared_experts_are_described_and_not_counted(family: str, shared: int) -> None:
    assert {site.spec.shared_experts for site in find_sites(tiny_model(family))} == {shared}


def test_keyword_arguments_are_read_like_positional_ones() -> None:
    site = find_sites(tiny_model("mixtral"))[0]
    hidden, ids, weights = torch.randn(3, 32), torch.tensor([[0, 1], [2, -1], [7, 8]]), torch.rand(3, 2)
    positional = site.read(site.module, (hidden, ids, weights), {}, None)
    named = site.read(site.module, (hidden,), {"top_k_weights": weights, "top_k_index": ids}, None)
    assert positional == named == RoutingDecision(expert_ids=ids, weights=weights, tokens=3)


def test_experts_sharded_over_ranks_keep_their_global_number() -> None:
    model = tiny_model("mixtral")
    for layer in model.model.layers:  # what transformers' expert parallelism does to an experts module
        experts, original = layer.mlp.experts, layer.mlp.experts.forward
        experts.num_experts = EXPERTS // 2
        experts.forward = lambda *args, _call=original, **kwargs: _call(*args, **kwargs)
    assert [site.spec.experts for site in find_sites(model)] == [EXPERTS, EXPERTS]


class Wrapper(nn.Module):
    """Hands calls on to experts under the experts' own interface, as quantisers and profilers do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.num_experts = inner, inner.num_experts

    def forward(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        return self.inner(hidden_states, top_k_index, top_k_weights)


def test_wrapped_experts_are_counted_once() -> None:
    model = tiny_model("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts = Wrapper(layer.mlp.experts)
    assert [s.spec.module for s in find_sites(model)] == [f"model.layers.{i}.mlp.experts" for i in (0, 1)]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_batched_execution_is_read_like_eager_execution(family: str) -> None:
    model = tiny_model(family)
    loads = []
    for implementation in ("eager", "batched_mm"):
        model.set_experts_implementation(implementation)
        with torch.no_grad(), read_loads(find_sites(model)) as read:
            model(**tiny_inputs(model))
        loads.append(read)
    assert loads[0] == loads[1]
    assert all(sum(counts) == 24 * TOP_K for counts, _ in loads[0].values())


def test_the_language_model_inside_a_vision_language_model_is_found() -> None:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    text = tiny_model("qwen3_vl_moe").config.to_dict()
    model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision))
    specs = [site.spec for site in find_sites(model)]
    assert [s.module for s in specs] == [f"model.language_model.layers.{i}.mlp.experts" for i in (0, 1)]
    assert [(s.layer, s.experts, s.top_k) for s in specs] == [(0, EXPERTS, TOP_K), (1, EXPERTS, TOP_K)]


def test_wrapped_models_and_several_models_keep_their_own_sites() -> None:
    first, second = tiny_model("mixtral"), tiny_model("olmoe")
    together = nn.ModuleDict({"draft": first, "target": second})
    paths = [site.spec.module for site in find_sites(together)]
    assert paths[0].startswith("draft.")
    assert paths[-1].startswith("target.")
    assert {id(s.module) for s in find_sites(first)}.isdisjoint(id(s.module) for s in find_sites(second))
    assert [s.spec.layer for s in find_sites(together)] == [0, 1, 2, 3]


def test_readers_compile_without_a_graph_break() -> None:
    site, tensors = (
        find_sites(tiny_model("zaya"))[0],
        (torch.randn(3, 32), torch.zeros(3, 1).long(), torch.rand(3, 1)),
    )

    def ids(*args: torch.Tensor) -> torch.Tensor | None:
        decision = site.read(site.module, args, {}, None)
        return None if decision is None else decision.expert_ids

    compiled = torch.compile(ids, fullgraph=True, backend="eager")
    expected = ids(*tensors)
    assert expected is not None
    assert torch.equal(compiled(*tensors), expected)


def test_layers_are_numbered_by_block_then_by_stack() -> None:
    model = nn.ModuleDict(
        {
            "vision": nn.ModuleList(nn.Identity() for _ in range(5)),
            "encoder": nn.ModuleList(nn.Identity() for _ in range(3)),
            "decoder": nn.ModuleList(nn.Identity() for _ in range(4)),
        }
    )
    paths = [
        "vision.4.experts",
        "encoder.1.experts",
        "decoder.0.attention.experts",
        "decoder.0.mlp",
        "decoder.3.mlp",
    ]
    # encoder blocks 0..2, decoder blocks 3..6, their attention experts 7..10, then vision
    assert layer_numbers(model, paths) == [15, 1, 7, 3, 6]


def test_mixture_of_attention_is_numbered_after_the_mixtures_of_mlps() -> None:
    numbers = {site.spec.module: site.spec.layer for site in find_sites(tiny_model("jetmoe"))}
    assert numbers == {
        "model.layers.0.self_attention.experts.router": 2,
        "model.layers.0.mlp.router": 0,
        "model.layers.1.self_attention.experts.router": 3,
        "model.layers.1.mlp.router": 1,
    }


@pytest.mark.parametrize(
    ("family", "matrices"), [("mixtral", 3), ("nemotron_h", 2), ("dbrx", 3), ("llama4", 3)]
)
def test_expert_bytes_are_those_of_one_routed_expert(family: str, matrices: int) -> None:
    model = tiny_model(family).bfloat16()
    spec = describe_model(model, name="tiny", sites=find_sites(model))
    assert spec.expert_bytes == matrices * 32 * 16 * 2
    assert (spec.family, spec.dtype, spec.hidden_size) == (model.config.model_type, "bfloat16", 32)
    assert spec.parameters == sum(p.numel() for p in model.parameters())


def test_experts_of_different_sizes_have_no_common_size() -> None:
    model = Stack(ListMoe(experts=4), SecretiveMoe())
    spec = describe_model(model, name="mixed", sites=find_sites(model, adapters=[SECRETIVE]), mixer="GQA")
    assert spec.expert_bytes is None
    assert (spec.family, spec.mixer, len(spec.moe_layers)) == (None, "GQA", 2)
