"""Tiny random models of every MoE family in the installed transformers, made from configurations alone.

``moe_families`` computes the list from the installed package. ``tiny_model`` shrinks a family's own default
configuration by field names that families share; ``OVERRIDES`` holds what one family needs besides.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import nn

EXPERTS = 8
TOP_K = 2
VOCABULARY = 96

#: families that have no learned routing to read, and why
NOT_ROUTED = {
    "granite_docling": "its DensityRouter predicts how many tokens an image tile keeps; there are no experts",
    "vitpose_backbone": "its experts are picked by the data set that the caller names; find_sites refuses it",
}

_MOE_CODE = re.compile(
    r"^class \w*(Experts|Router|MoE|Moe|MoA|CDMoE)\(|self\.(num_experts|experts)\b", re.MULTILINE
)
_EXPERT_FIELDS = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "ffn_config"}
_MODEL_ENDINGS = ("ForCausalLM", "ForConditionalGeneration", "TextModel", "Model", "")


def _each(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


#: field of a configuration -> tiny value; a field that a family does not have is not set
SIZES: dict[str, Any] = {
    **_each("num_experts num_local_experts n_routed_experts moe_num_experts", EXPERTS),
    **_each("num_experts_per_tok num_experts_per_token moe_top_k moe_k top_k_experts", TOP_K),
    **_each("hidden_size d_model", 32),
    **_each("intermediate_size moe_intermediate_size shared_expert_intermediate_size", 16),
    **_each("shared_intermediate_size expert_ffn_hidden_size ffn_hidden_size", 16),
    **_each("encoder_ffn_dim decoder_ffn_dim d_ff q_lora_rank kv_lora_rank router_hidden_size", 16),
    **_each("num_hidden_layers num_layers num_decoder_layers encoder_layers decoder_layers n_layers", 2),
    **_each("num_attention_heads num_heads n_heads encoder_attention_heads decoder_attention_heads", 4),
    **_each("head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim d_kv kv_channels", 8),
    **_each("n_group topk_group first_k_dense_replace bos_token_id", 1),
    **_each("linear_head_dim linear_key_head_dim linear_value_head_dim mamba_head_dim index_head_dim", 16),
    **_each("linear_num_heads linear_num_key_heads linear_num_value_heads mamba_num_heads index_n_heads", 2),
    **_each("moe_shared_expert_intermediate_size share_expert_dim", 16),
    "moe_hidden_size": 32,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 2,
}

_DENSE_THEN_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}

OVERRIDES: dict[str, dict[str, Any]] = {
    "beam": {**_DENSE_THEN_SPARSE, "n_group": 2, "topk_group": 1},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {
            "hidden_size": 32,
            "ffn_hidden_size": 16,
            "moe_num_experts": EXPERTS,
            "moe_top_k": TOP_K,
        },
    },
    "deepseek_ocr2": _DENSE_THEN_SPARSE,
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "doge": {"is_moe": True, "num_experts": 16},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {**_DENSE_THEN_SPARSE, "index_head_dim": 16, "index_n_heads": 2},
    "ernie4_5_vl_moe": {
        **_DENSE_THEN_SPARSE,
        "moe_intermediate_size": [16, 16],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "flint": {"mlp_only_layers": [0]},
    "gemma4": {"enable_moe_block": True},
    "glm4v_moe": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}},
    "glm5_next": {**_DENSE_THEN_SPARSE, "num_key_value_heads": 4, "qk_rope_head_dim": 0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 16},
    "hunyuan_v1_moe": {"moe_topk": TOP_K},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"moe_topk": TOP_K, "zero_expert_num": 4},
    "nemotron_h": {"n_groups": 2, "ssm_state_size": 8, "chunk_size": 16},
    "nllb_moe": {"encoder_sparse_step": 1, "decoder_sparse_step": 2},
    "step3p7": {**_DENSE_THEN_SPARSE, "sliding_window": 8},
    "switch_transformers": {"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 1},
    "zaya": {"num_experts_per_tok": 1},
}


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiny matrices: threads that wait for each other on a busy machine cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def moe_families() -> tuple[str, ...]:
    """Model directories of transformers whose modeling file has experts, a router or an MoE class."""
    models = Path(transformers.__file__).parent / "models"
    files = sorted(models.glob("*/modeling_*.py"))
    return tuple(dict.fromkeys(f.parent.name for f in files if _MOE_CODE.search(f.read_text("utf-8"))))


def tiny_model(family: str, **settings: Any) -> nn.Module:
    """A tiny random model of the family's text tower, in evaluation mode.

    Args:
        family: directory name in ``transformers.models``.
        settings: configuration fields that replace the tiny ones.
    """
    config_class, model_class = _text_classes(family)
    known = {f.name for f in fields(config_class)}
    sizes = {name: value for name, value in SIZES.items() if name in known}
    if "kv_lora_rank" in known:  # latent attention has as many key heads as query heads
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    config = config_class(**{**sizes, **OVERRIDES.get(family, {}), **settings})
    torch.manual_seed(0)
    model: nn.Module = model_class(config)
    for parameter in model.parameters():  # stacked experts are left uninitialised or zero by some families
        nn.init.normal_(parameter, std=0.2)
    for name, table in model.named_buffers():  # hash routing looks experts up by token id
        if name.endswith("tid2eid"):
            table.copy_(torch.rand(table.shape[0], EXPERTS).topk(table.shape[1]).indices)
    return model.eval()


def tiny_inputs(model: nn.Module, *, batch: int = 2, length: int = 12) -> dict[str, Any]:
    """Random token ids for a tiny model; the decoder of an encoder-decoder gets a shorter sequence."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids[:, : length // 2]
    return inputs


def _text_classes(family: str) -> tuple[Any, Any]:
    """The configuration with a vocabulary and experts, and the fullest model class that takes it."""
    configuration = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    for config_class in _own(configuration, transformers.PreTrainedConfig):
        names = {f.name for f in fields(config_class)}
        if "vocab_size" in names and names & _EXPERT_FIELDS:
            takers = [
                c for c in _own(modeling, transformers.PreTrainedModel) if c.config_class is config_class
            ]
            for ending in _MODEL_ENDINGS:
                for taker in takers:
                    if taker.__name__.endswith(ending) and "PreTrained" not in taker.__name__:
                        return config_class, taker
    raise LookupError(f"{family} has no text configuration with experts")


def _own(module: ModuleType, base: type) -> list[Any]:
    """Classes below ``base`` that the module itself defines."""
    found = vars(module).values()
    return [
        c for c in found if inspect.isclass(c) and issubclass(c, base) and c.__module__ == module.__name__
    ]
