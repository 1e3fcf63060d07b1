"""Architectures and hyperparameters of the five bundled checkpoints.

All have the same size of everything that routing statistics depend on: 32 experts, top-4, four MoE layers,
hidden size 96, the same texts and batches. The number of steps fits minutes on a small machine and is given
with every result. What differs otherwise is what the family differs in: the sequence mixer, shared experts,
the first dense layer, the gate (softmax or sigmoid with a correction bias) and hence the way loads are
balanced.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from observatory.errors import ModelError
from observatory.zoo.tokenizer import VOCABULARY_SIZE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPERTS = 32
TOP_K = 4
MOE_LAYERS = 4
HIDDEN_SIZE = 96

Balancing = Literal["auxiliary_loss", "bias_update"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one checkpoint is made.

    Attributes:
        name: of the checkpoint and of its folder.
        mixer: sequence mixer, as reports show it.
        family: whose model class and routing it has.
        config_class: of transformers.
        architecture: arguments of the configuration.
        balancing: `auxiliary_loss` adds coefficient * Switch loss per MoE layer (arXiv 2101.03961);
            `bias_update` moves the score-correction bias by the sign of the load error after each step
            (arXiv 2408.15664).
        auxiliary_loss_coefficient: weight of that loss; 0 with `bias_update`.
        bias_update_rate: step of that bias; 0 with `auxiliary_loss`.
        steps: optimizer steps.
        batch_size: sequences in a step.
        sequence_length: tokens in a sequence.
        learning_rate: peak; warmed up over `warmup_steps`, then linearly down to 0.
        warmup_steps: see there.
        weight_decay: of matrices.
        gradient_clip: largest gradient norm.
    """

    name: str
    mixer: str
    family: str
    config_class: str
    architecture: Mapping[str, Any] = field(default_factory=dict)
    balancing: Balancing
    auxiliary_loss_coefficient: float = 0.0
    bias_update_rate: float = 0.0
    steps: int = 3000
    batch_size: int = 4
    sequence_length: int = 256
    learning_rate: float = 6e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    gradient_clip: float = 1.0


_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 4096,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_ATTENTION: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 4}
_HEAD_SIZE = 24

_MLA = Recipe(
    name="tiny-mla",
    mixer="MLA",
    family="DeepSeek-V3",
    config_class="DeepseekV3Config",
    architecture={
        **_SHARED,
        **_ATTENTION,
        "num_hidden_layers": MOE_LAYERS + 1,
        "first_k_dense_replace": 1,
        "intermediate_size": 256,
        "moe_intermediate_size": 16,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "q_lora_rank": None,
        "kv_lora_rank": 48,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 24,
        "num_nextn_predict_layers": 0,
    },
    balancing="bias_update",
    bias_update_rate=2e-3,
)
_MHA = Recipe(
    name="tiny-mha",
    mixer="MHA",
    family="OLMoE",
    config_class="OlmoeConfig",
    architecture={
        **_SHARED,
        **_ATTENTION,
        "num_hidden_layers": MOE_LAYERS,
        "intermediate_size": 24,
        "num_experts": EXPERTS,
        "norm_topk_prob": False,
    },
    steps=2000,
    balancing="auxiliary_loss",
    auxiliary_loss_coefficient=0.01,
)
_GQA = Recipe(
    name="tiny-gqa",
    mixer="GQA",
    family="Qwen3-MoE",
    config_class="Qwen3MoeConfig",
    architecture={
        **_SHARED,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": _HEAD_SIZE,
        "num_hidden_layers": MOE_LAYERS,
        "intermediate_size": 256,
        "moe_intermediate_size": 24,
        "num_experts": EXPERTS,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
    },
    steps=2000,
    balancing="auxiliary_loss",
    auxiliary_loss_coefficient=0.01,
)
_MAMBA2 = Recipe(
    name="tiny-mamba2",
    mixer="Mamba-2",
    family="Nemotron-H",
    config_class="NemotronHConfig",
    architecture={
        **_SHARED,
        "layers_block_type": [
            *("linear_attention", "moe"),
            *("linear_attention", "moe"),
            *("full_attention", "moe"),
            *("linear_attention", "moe"),
        ],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": _HEAD_SIZE,
        "intermediate_size": 256,
        "n_routed_experts": EXPERTS,
        "moe_intermediate_size": 16,
        "tie_word_embeddings": False,  # the class has two tables, whatever the configuration says
        "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": 64,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "ssm_state_size": 16,
        "mamba_num_heads": 6,
        "mamba_head_dim": 32,
        "n_groups": 1,
        "expand": 2,
        "conv_kernel": 4,
        "chunk_size": 32,
    },
    steps=2000,
    balancing="bias_update",
    bias_update_rate=2e-3,
)
_GDN = Recipe(
    name="tiny-gdn",
    mixer="GDN",
    family="Qwen3.5-MoE",
    config_class="Qwen3_5MoeTextConfig",
    architecture={
        **_SHARED,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": _HEAD_SIZE,
        "num_hidden_layers": MOE_LAYERS,
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 24,
        "linear_value_head_dim": 24,
        "linear_conv_kernel_dim": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 32,
        "num_experts": EXPERTS,
    },
    balancing="auxiliary_loss",
    auxiliary_loss_coefficient=0.01,
)

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {recipe.name: recipe for recipe in (_MLA, _MHA, _GQA, _MAMBA2, _GDN)}
)


def recipe_named(name: str) -> Recipe:
    """The recipe of a bundled checkpoint.

    Raises:
        ModelError: there is none of that name.
    """
    if name not in RECIPES:
        raise ModelError(f"no recipe {ascii(name)[:80]}; expected one of {', '.join(RECIPES)}")
    return RECIPES[name]


def build_model(recipe: Recipe) -> "PreTrainedModel":
    """The untrained model of a recipe, float32, initialised from torch's current random state."""
    import transformers as library

    transformers: Any = library  # it is typed in parts only
    config = getattr(transformers, recipe.config_class)(**recipe.architecture)
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config, dtype="float32")
    return model
