"""Weights and caches from configurations, against what the models are known to have."""

from __future__ import annotations

import json
import struct

import pytest

from observatory.analysis.capacity.model_shape import load_config, model_shape
from observatory.errors import PlanError
from observatory.zoo.models import bundled_models
from tests.analysis.capacity.configs import (
    ARCTIC,
    DBRX,
    DEEPSEEK_V3,
    DEEPSEEK_V32,
    GPT_OSS_120B,
    LLAMA4_SCOUT,
    MIXTRAL_8X7B,
    QWEN3_30B,
    QWEN3_NEXT_80B,
)


@pytest.mark.parametrize(
    ("config", "billions", "active"),
    [
        (DEEPSEEK_V3, 671.0, 37.0),
        (QWEN3_30B, 30.5, 3.3),
        (MIXTRAL_8X7B, 46.7, 12.9),
        (GPT_OSS_120B, 116.8, 5.1),
        (QWEN3_NEXT_80B, 79.7, 3.6),
        (LLAMA4_SCOUT, 107.8, 17.0),
        (DBRX, 131.6, 36.0),
    ],
)
def test_published_models_have_their_parameters(config, billions, active):
    shape = model_shape(config)
    assert shape.values / 1e9 == pytest.approx(billions, rel=0.002)
    # Published counts of active weights differ in whether the embedding is one of them.
    assert shape.active_values / 1e9 == pytest.approx(active, rel=0.1)


def test_the_dense_residual_of_arctic_counts():
    """480 B in all: 128 experts of 3.66 B, and a dense transformer of 10 B (its model card); 17 B active."""
    shape = model_shape(ARCTIC)
    assert shape.values / 1e9 == pytest.approx(128 * 3.66 + 10, rel=0.002)
    assert shape.outside_values / 1e9 == pytest.approx(10, rel=0.03)
    assert shape.active_values / 1e9 == pytest.approx(17, rel=0.02)


def test_an_indexer_bounds_what_a_query_attends_to():
    """DeepSeek-V3.2: 2,048 tokens of the cache, for which 128 more values of every token are read."""
    full, sparse = (model_shape(config) for config in (DEEPSEEK_V3, DEEPSEEK_V32))
    assert [one.moe.attended(1e5) for one in (full, sparse)] == [1e5, 2048]
    assert sparse.moe.attended(100.0) == 100.0
    assert (sparse.moe.cache_values - full.moe.cache_values, sparse.moe.index_values) == (128, 128)
    indexer = 1536 * 64 * 128 + 7168 * (128 + 64)
    assert sparse.values - full.values == 61 * indexer
    assert sparse.moe.index_flops == 2 * 64 * 128


def weights_in(path) -> int:
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    total = 0
    for name, tensor in header.items():
        if name != "__metadata__":
            size = 1
            for length in tensor["shape"]:
                size *= length
            total += size
    return total


@pytest.mark.parametrize("model", bundled_models(), ids=lambda model: model.name)
def test_bundled_models_have_the_weights_of_their_files(model):
    shape = model_shape(load_config(model.directory))
    stored = sum(weights_in(path) for path in model.directory.glob("*.safetensors"))
    assert shape.values == pytest.approx(stored, rel=0.02)


def test_caches():
    deepseek, qwen = model_shape(DEEPSEEK_V3), model_shape(QWEN3_30B)
    assert {layer.cache_values for _, layer in deepseek.layers} == {576}
    assert {layer.cache_parts for _, layer in deepseek.layers} == {1}
    assert {layer.cache_values for _, layer in qwen.layers} == {2 * 4 * 128}
    local, whole = (layer for _, layer in model_shape(GPT_OSS_120B).layers)
    assert (local.attended(4096), whole.attended(4096)) == (128, 4096)


def test_only_some_layers_of_hybrids_keep_a_cache():
    """Qwen3-Next: each fourth layer attends; Llama 4: each fourth attends to more than a chunk."""
    counts = {layer.mixer: count for count, layer in model_shape(QWEN3_NEXT_80B).layers}
    assert counts == {"linear attention": 36, "attention": 12}
    windows = {layer.window: count for count, layer in model_shape(LLAMA4_SCOUT).layers}
    assert windows == {8192: 36, None: 12}


@pytest.mark.parametrize(
    "change",
    [
        {"num_dense_layers": 2},
        {"first_k_dense_replace": 2},
        {"is_moe_layer": [False] * 2 + [True] * 46},
        {"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 46},
        {"moe_layer_freq": [0] * 2 + [1] * 46},
    ],
)
def test_families_name_their_dense_layers_differently(change):
    assert model_shape({**QWEN3_30B, **change}).moe_layers == 46


def test_data_types():
    assert model_shape(DEEPSEEK_V3).expert_weight_bytes == 1.0
    oss = model_shape(GPT_OSS_120B)
    assert (oss.dtype, oss.expert_dtype, oss.weight_bytes) == ("bfloat16", "float4", 2.0)
    assert oss.expert_weight_bytes == pytest.approx(0.53125)


def test_packed_integers_have_their_scales_and_spare_what_is_ignored():
    # As of Kimi-K2-Thinking: experts of 4 bits, 32 of them with one scale of 16.
    weights = {"num_bits": 4, "type": "int", "group_size": 32}
    packed = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": weights}},
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
    }
    spared = model_shape({**MIXTRAL_8X7B, "quantization_config": packed})
    assert (spared.weight_bytes, spared.expert_weight_bytes) == (2.0, 4.5 / 8)
    assert spared.expert_dtype == "bfloat16"
    everything = model_shape({**MIXTRAL_8X7B, "quantization_config": {**packed, "ignore": ["lm_head"]}})
    assert everything.weight_bytes == everything.expert_weight_bytes == 4.5 / 8
    for other in ({"num_bits": 4, "type": "float"}, {"num_bits": 40, "type": "int"}, {}, None):
        groups = {"group_0": {"weights": other}}
        with pytest.raises(PlanError, match="quantized by 'compressed-tensors', which is not known"):
            model_shape({**MIXTRAL_8X7B, "quantization_config": {**packed, "config_groups": groups}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": None}, "no layers with routed experts"),
        ({"hidden_size": "2048"}, "hidden_size is '2048'"),
        ({"hidden_size": -1}, "no size"),
        ({"vocab_size": None}, "has no vocab_size"),
        ({"num_experts_per_tok": 200}, "routes to 200 of 128"),
        ({"num_hidden_layers": 10**9}, "at most 4096"),
        ({"num_hidden_layers": 4000, "num_experts": 65536}, "262144000 experts"),
        ({"head_dim": None, "num_attention_heads": 4096}, "4096 attention heads"),
        ({"attn_layer_period": 8}, "differ by attn_layer_period"),
        ({"layer_group_size": 5}, "differ by layer_group_size"),
        ({"layer_types": ["full_attention"] * 48, "expert_layer_period": 2}, "has expert_layer_period"),
        ({"moe_layers_enum": "4,5,6"}, "has moe_layers_enum"),
        ({"attn_type_list": [0, 1] * 24}, "differ by attn_type_list"),
        ({"layer_types": ["full_attention"]}, "names 1 layer types for 48"),
        ({"layer_types": ["odd"] * 48}, "type 'odd'"),
        ({"torch_dtype": "int3"}, "type 'int3'"),
        ({"quantization_config": {"quant_method": "secret"}}, "quantized by 'secret'"),
    ],
)
def test_what_is_no_model_is_refused(change, message):
    with pytest.raises(PlanError, match=message):
        model_shape({**QWEN3_30B, **change})


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": NaN', "\x00"])
def test_what_is_no_configuration_is_refused(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(PlanError, match="configuration"):
        load_config(path)
