"""Weights, cache and arithmetic of a model's layers, from its ``config.json``.

Counts are of values; bytes follow from the data types. Norms, biases, rotary tables and the multi-token
prediction heads are left out: together under 1 % of the weights of published models.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from observatory.errors import PlanError
from observatory.run.bounded import read_at_most
from observatory.run.documents.expert_bench import ELEMENT_BYTES

Mixer = Literal["attention", "latent attention", "linear attention", "mamba2", "none"]

_MOST_BYTES = 4 << 20
_MOST_LAYERS = 4096
#: Experts of all layers together; published models have some 25 thousand.
_MOST_EXPERTS = 1 << 18
_MOST = 1 << 40
#: Matrices of a gated feed-forward block (up, gate, down), and of one without a gate.
_GATED, _UNGATED = 3, 2
#: Operations for each weight and token, or for each value of a score.
_OPERATIONS = 2
#: What `layer_types` and its relatives call the kinds of mixers.
_KINDS: dict[str, Mixer] = {
    "full_attention": "attention",
    "sliding_attention": "attention",
    "chunked_attention": "attention",
    "attention": "attention",
    "linear_attention": "linear attention",
    "mamba": "mamba2",
    "mamba2": "mamba2",
}
#: Letters of ``hybrid_override_pattern``.
_LETTERS = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
#: Names of sizes that differ between families.
_HIDDEN = ("hidden_size", "d_model", "n_embd")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "experts_per_token")
#: How some families say that their layers differ, in ways that are not read; `layer_types` says it for all.
_UNREAD = ("attn_layer_period", "layer_group_size", "hybrid_layer_pattern", "linear_attn_config")
#: Where experts or what attention shares are said in ways that are not read, and that no list replaces.
_UNREADABLE = ("expert_layer_period", "moe_layers_enum", "share_q_dim")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """One decoder layer.

    Attributes:
        mixer: what mixes tokens.
        mixer_values: weights of the mixer.
        cache_values: values that each token of context leaves in the cache.
        cache_parts: ranks over which tensor parallelism can split the cache; it is repeated on more.
        window: tokens of context that are attended to at most; None for all.
        state_values: values of the state of one sequence, whatever its length.
        decode_flops, prefill_flops: of one query token for each token of its context.
        chosen: tokens that an indexer chooses for a query to attend to (DeepSeek sparse attention); None
            without one.
        index_values: of ``cache_values`` those that the indexer reads of every token of the context.
        index_flops: of the indexer, of one query token for each token of its context.
        dense_values: weights of the feed-forward parts that every token passes: a dense block, shared
            experts, and the router.
        experts: routed experts; 0 in a layer without.
        expert_values: weights of one.
        top_k: experts of a token.
    """

    mixer: Mixer
    mixer_values: int
    cache_values: int
    cache_parts: int
    window: int | None
    state_values: int
    decode_flops: float
    prefill_flops: float
    dense_values: int
    experts: int
    expert_values: int
    top_k: int
    chosen: int | None = None
    index_values: int = 0
    index_flops: float = 0.0

    def attended(self, context: float) -> float:
        """Tokens of a context that a query sees."""
        limits = [float(limit) for limit in (self.window, self.chosen) if limit is not None]
        return min([context, *limits])


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A model as far as a plan needs it.

    Attributes:
        name: of its family.
        hidden: H.
        layers: each distinct layer with how often it occurs, in order of appearance.
        embedding_values: weights of embedding and head; once if they are one.
        head_values: weights of the head alone.
        dtype: of mixers, head and activations.
        expert_dtype: of routed experts, as torch names it, or ``float4``.
        weight_bytes: bytes of a weight outside routed experts.
        expert_weight_bytes: bytes of a weight of a routed expert, scales included.
        longest: tokens that it was made for; None where it does not say.
        heads: attention heads, over which tensor parallelism splits; 1 without attention.
    """

    name: str
    hidden: int
    layers: tuple[tuple[int, LayerShape], ...]
    embedding_values: int
    head_values: int
    dtype: str
    expert_dtype: str
    weight_bytes: float
    expert_weight_bytes: float
    longest: int | None
    heads: int

    @property
    def moe_layers(self) -> int:
        """Layers with routed experts."""
        return sum(count for count, layer in self.layers if layer.experts)

    @property
    def moe(self) -> LayerShape:
        """A layer with routed experts; all have the same."""
        return next(layer for _, layer in self.layers if layer.experts)

    @property
    def outside_values(self) -> int:
        """All weights but those of routed experts."""
        return self.embedding_values + sum(
            count * (layer.mixer_values + layer.dense_values) for count, layer in self.layers
        )

    @property
    def values(self) -> int:
        """All weights."""
        return self.outside_values + sum(
            count * layer.experts * layer.expert_values for count, layer in self.layers
        )

    @property
    def active_values(self) -> int:
        """Weights that one token passes, without the embedding."""
        return self.head_values + sum(
            count * (layer.mixer_values + layer.dense_values + layer.top_k * layer.expert_values)
            for count, layer in self.layers
        )


def stored_as(model: ModelShape, dtype: str) -> ModelShape:
    """The model with all weights of another data type.

    Raises:
        PlanError: it is not known.
    """
    if dtype not in ELEMENT_BYTES:
        raise PlanError(f"--dtype {dtype[:40]!r} is not known", expected=f"one of {', '.join(ELEMENT_BYTES)}")
    size = float(ELEMENT_BYTES[dtype])
    return replace(model, dtype=dtype, expert_dtype=dtype, weight_bytes=size, expert_weight_bytes=size)


def load_config(path: Path | str) -> dict[str, Any]:
    """Read a ``config.json``, or that of a model folder.

    Raises:
        PlanError: it is missing, too large, or no JSON object.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    try:
        content = read_at_most(file, _MOST_BYTES)
        if content is None:
            raise ValueError(f"over {_MOST_BYTES >> 20} MiB")
        config = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise PlanError(f"model configuration {file} cannot be read ({reason[:200]})") from error
    if not isinstance(config, dict):
        raise PlanError(f"model configuration {file} is not a JSON object")
    return config


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """Shape of a model from its configuration, as transformers writes it.

    Raises:
        PlanError: no MoE model, a size is missing, or one is not possible.
    """
    return _Reader(config).shape()


class _Reader:
    """Reads one configuration; names of sizes differ between families."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        text = config.get("text_config")
        inner = dict(text if isinstance(text, dict) else config)
        # DBRX keeps sizes of attention and of experts apart.
        parts = [part for name in ("attn_config", "ffn_config") if isinstance(part := inner.get(name), dict)]
        for part in parts:
            inner = part | inner
        self.config: Mapping[str, Any] = inner
        self.outer = config
        self.name = str(self.config.get("model_type") or config.get("model_type") or "unknown")[:64]

    def shape(self) -> ModelShape:
        layers = Counter(self._layers())
        moe = {(layer.experts, layer.expert_values, layer.top_k) for layer in layers if layer.experts}
        if not moe:
            raise PlanError(
                f"model {self.name} has no layers with routed experts",
                expected="the config.json of an MoE model",
            )
        if len(moe) > 1:
            raise PlanError(f"layers of model {self.name} differ in their experts; expected the same in all")
        experts = sum(count * layer.experts for layer, count in layers.items())
        if experts > _MOST_EXPERTS:
            raise PlanError(
                f"layers of model {self.name} have {experts} experts; expected at most {_MOST_EXPERTS}"
            )
        head = self._size(*_HIDDEN) * self._size("vocab_size")
        dtype, expert_dtype, weight_bytes, expert_bytes = self._dtypes()
        return ModelShape(
            name=self.name,
            hidden=self._size(*_HIDDEN),
            layers=tuple((count, layer) for layer, count in layers.items()),
            embedding_values=head * (1 if self._flag("tie_word_embeddings") else 2),
            head_values=head,
            dtype=dtype,
            expert_dtype=expert_dtype,
            weight_bytes=weight_bytes,
            expert_weight_bytes=expert_bytes,
            longest=self._optional("max_position_embeddings"),
            heads=self._optional(*_HEADS) or 1,
        )

    def _layers(self) -> list[LayerShape]:
        blocks = self._blocks()
        if blocks is not None:
            return [self._block(kind) for kind in blocks]
        if strange := next((name for name in _UNREADABLE if self.config.get(name)), None):
            raise PlanError(f"model {self.name} has {strange}, which is not read")
        count = self._size(*_LAYERS)
        if count > _MOST_LAYERS:
            raise PlanError(f"model {self.name} has {count} layers; expected at most {_MOST_LAYERS}")
        kinds = self._list("layer_types") or self._kinds_of(count)
        if len(kinds) != count:
            raise PlanError(f"model {self.name} names {len(kinds)} layer types for {count} layers")
        return [
            self._layer(self._mixer_kind(str(kind)), str(kind), is_moe=self._is_moe(index))
            for index, kind in enumerate(kinds)
        ]

    def _kinds_of(self, count: int) -> list[str]:
        """Kinds of layers of a configuration that does not list them.

        Raises:
            PlanError: it says that layers differ in a way that is not read.
        """
        unread = [name for name in _UNREAD if self.config.get(name)]
        kinds = self._list("attn_type_list") or ()
        unread += ["attn_type_list"] * (len(set(map(str, kinds))) > 1)
        if unread:
            raise PlanError(
                f"layers of model {self.name} differ by {unread[0]}, which is not read",
                remedy="add `layer_types`, a kind for each layer, to a copy of its config.json",
            )
        every = self._optional("full_attention_interval")
        if every:
            return ["linear_attention" if (index + 1) % every else "full_attention" for index in range(count)]
        # Llama 4: layers with rotary positions attend to chunks, where the list has not been left empty.
        rotary = self._list("no_rope_layers") or ()
        if self._optional("attention_chunk_size") and len(rotary) == count:
            return ["chunked_attention" if has_positions else "full_attention" for has_positions in rotary]
        return ["full_attention"] * count

    def _blocks(self) -> list[str] | None:
        """Kinds of blocks of models whose mixers and feed-forward parts are blocks of their own."""
        pattern = self.config.get("hybrid_override_pattern")
        if isinstance(pattern, str):
            blocks = [_LETTERS.get(letter, letter) for letter in pattern]
        else:
            blocks = [str(kind) for kind in self._list("layers_block_type") or ()]
        if not blocks or not any(kind in ("moe", "mlp") for kind in blocks):
            return None
        if len(blocks) > _MOST_LAYERS:
            raise PlanError(f"model {self.name} has {len(blocks)} blocks; expected at most {_MOST_LAYERS}")
        return blocks

    def _block(self, kind: str) -> LayerShape:
        if kind in ("moe", "mlp"):
            return self._layer("none", kind, is_moe=kind == "moe")
        # Mixers called linear attention here have the sizes of Mamba-2.
        mixer = self._mixer_kind(kind)
        return self._layer(mixer, kind, is_moe=None)

    def _layer(self, mixer: Mixer, kind: str, *, is_moe: bool | None) -> LayerShape:
        """A layer; ``is_moe`` None for one without a feed-forward part."""
        mixer_values, cache, parts, state, decode, prefill = self._mixer(mixer)
        window = self._optional("sliding_window", "attention_chunk_size")
        is_local = kind in ("sliding_attention", "chunked_attention")
        experts, expert_values, top_k = self._experts() if is_moe else (0, 0, 0)
        chosen, index_weights, index_values, index_flops = self._indexer(mixer)
        return LayerShape(
            mixer=mixer,
            mixer_values=mixer_values + index_weights,
            cache_values=cache + index_values,
            chosen=chosen,
            index_values=index_values,
            index_flops=index_flops,
            cache_parts=parts,
            window=window if is_local else None,
            state_values=state,
            decode_flops=decode,
            prefill_flops=prefill,
            dense_values=0 if is_moe is None else self._shared() if is_moe else self._dense(),
            experts=experts,
            expert_values=expert_values,
            top_k=top_k,
        )

    def _mixer_kind(self, kind: str) -> Mixer:
        mixer = _KINDS.get(kind)
        if mixer is None:
            raise PlanError(
                f"model {self.name} has layers of type {kind[:40]!r}", expected=f"one of {', '.join(_KINDS)}"
            )
        if mixer == "attention" and self._optional("kv_lora_rank"):
            return "latent attention"
        if mixer == "linear attention" and self._optional("linear_num_key_heads") is None:
            return "mamba2"
        return mixer

    def _mixer(self, mixer: Mixer) -> tuple[int, int, int, int, float, float]:
        """Weights, cache of a token, its parts, state of a sequence, operations per token of context."""
        hidden = self._size(*_HIDDEN)
        if mixer == "none":
            return 0, 0, 1, 0, 0.0, 0.0
        if mixer == "linear attention":
            key = self._size("linear_num_key_heads") * self._size("linear_key_head_dim")
            heads, width = self._size("linear_num_value_heads"), self._size("linear_value_head_dim")
            value = heads * width
            weights = hidden * (2 * key + 2 * value + 2 * heads) + value * hidden
            state = heads * width * self._size("linear_key_head_dim")
            kernel = self._optional("linear_conv_kernel_dim") or 4
            return weights, 0, 1, state + (2 * key + value) * kernel, 0, 0
        if mixer == "mamba2":
            heads = self._size("mamba_num_heads", "mamba_n_heads")
            inner = heads * self._size("mamba_head_dim", "mamba_d_head")
            state = self._size("ssm_state_size", "mamba_d_state")
            groups = self._optional("n_groups", "mamba_n_groups") or 1
            weights = hidden * (2 * inner + 2 * groups * state + heads) + inner * hidden
            kernel = self._optional("conv_kernel", "mamba_d_conv") or 4
            return weights, 0, 1, inner * state + kernel * (inner + 2 * groups * state), 0, 0
        heads = self._size(*_HEADS)
        if mixer == "latent attention":
            latent, rope = self._size("kv_lora_rank"), self._size("qk_rope_head_dim")
            nope, value = self._size("qk_nope_head_dim"), self._size("v_head_dim")
            query = self._optional("q_lora_rank")
            to_query = (
                hidden * heads * (nope + rope) if query is None else query * (hidden + heads * (nope + rope))
            )
            weights = (
                to_query + hidden * (latent + rope) + latent * heads * (nope + value) + heads * value * hidden
            )
            # Decode attends in the latent space, with the projections absorbed into queries and outputs.
            decode = _OPERATIONS * heads * (2 * latent + rope)
            return weights, latent + rope, 1, 0, decode, _OPERATIONS * heads * (nope + rope + value)
        kv_heads = self._optional("num_key_value_heads", "kv_n_heads") or heads
        width = self._optional("head_dim") or hidden // heads
        if not width:
            raise PlanError(f"model {self.name} has {heads} attention heads in a width of {hidden}")
        queries = 2 * heads if self._flag("attn_output_gate") or self.name == "qwen3_next" else heads
        weights = hidden * width * (queries + 2 * kv_heads) + heads * width * hidden
        scores = float(_OPERATIONS * heads * 2 * width)
        return weights, 2 * kv_heads * width, kv_heads, 0, scores, scores

    def _indexer(self, mixer: Mixer) -> tuple[int | None, int, int, float]:
        """Tokens that an indexer chooses, its weights, its cache of a token, operations per token of context.

        DeepSeek-V3.2: queries of its heads from the latent query, one key for all heads, a weight for each.
        """
        chosen = self._optional("index_topk") if mixer == "latent attention" else None
        if chosen is None:
            return None, 0, 0, 0.0
        hidden, heads, width = self._size(*_HIDDEN), self._size("index_n_heads"), self._size("index_head_dim")
        query = self._optional("q_lora_rank") or hidden
        return (
            chosen,
            query * heads * width + hidden * (width + heads),
            width,
            float(_OPERATIONS * heads * width),
        )

    def _experts(self) -> tuple[int, int, int]:
        experts = self._size(*_EXPERTS)
        top_k = self._size(*_TOP_K)
        if top_k > experts:
            raise PlanError(f"model {self.name} routes to {top_k} of {experts} experts")
        width = self._optional("moe_latent_size") or self._size(*_HIDDEN)
        return experts, self._matrices * width * self._expert_width(), top_k

    def _shared(self) -> int:
        """Weights of shared experts, the router, and a dense block that every token passes as well."""
        hidden = self._size(*_HIDDEN)
        experts = self._size(*_EXPERTS)
        stated = self._optional(
            "shared_expert_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "shared_intermediate_size",
        )
        count = self._optional("n_shared_experts", "num_shared_experts", "moe_num_shared_experts") or 0
        if self.name.startswith("llama4"):
            count = 1  # a shared expert in every MoE layer, which its configuration does not state
        inner = count * self._expert_width() if stated is None else stated * max(count, 1)
        # Arctic: a dense block as wide as the model, with a residual path of its own.
        inner += hidden if self._flag("parallel_attn_mlp_res") else 0
        return self._matrices * hidden * inner + hidden * experts

    def _dense(self) -> int:
        inner = self._size("intermediate_size_mlp", "intermediate_size", "ffn_hidden_size")
        return self._matrices * self._size(*_HIDDEN) * inner

    def _expert_width(self) -> int:
        return self._size(
            "moe_intermediate_size", "intermediate_size", "moe_ffn_hidden_size", "ffn_hidden_size"
        )

    @property
    def _matrices(self) -> int:
        activation = str(self.config.get("mlp_hidden_act") or self.config.get("hidden_act") or "silu")
        return _UNGATED if activation.startswith("relu") else _GATED

    def _is_moe(self, layer: int) -> bool:
        if not any(self._optional(name) for name in _EXPERTS):
            return False
        first = self._optional("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers") or 0
        every = self._optional("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_frequency") or 1
        frequency = self._list("is_moe_layer") or self.config.get("moe_layer_freq")
        if kinds := self._list("mlp_layer_types"):
            frequency = [kind == "sparse" for kind in kinds]
        if isinstance(frequency, list):
            return layer < len(frequency) and bool(frequency[layer])
        every = frequency if isinstance(frequency, int) and frequency > 1 else every
        dense = self._list("mlp_only_layers") or []
        shift = 0 if isinstance(frequency, int) and frequency > 1 else 1
        return layer >= first and layer not in dense and (layer + shift) % every == 0

    def _dtypes(self) -> tuple[str, str, float, float]:
        """Data type of mixers and of experts, with the bytes of a weight of each."""
        stated = [source.get(key) for source in (self.config, self.outer) for key in ("dtype", "torch_dtype")]
        dtype = str(next(filter(None, stated), "bfloat16")).removeprefix("torch.")
        if dtype not in ELEMENT_BYTES:
            raise PlanError(f"model {self.name} has weights of type {dtype[:40]!r}")
        size = float(ELEMENT_BYTES[dtype])
        quantization = self.outer.get("quantization_config") or self.config.get("quantization_config")
        if not isinstance(quantization, dict):
            return dtype, dtype, size, size
        method = str(quantization.get("quant_method") or "").lower()
        if "mxfp4" in method:
            return dtype, "float4", size, 4.25 / 8  # 32 values share a scale of 8 bits; mixers keep theirs
        if "nvfp4" in method or "nvfp4" in str(quantization.get("quant_algo") or "").lower():
            return dtype, "float4", size, 4.5 / 8  # 16 values share a scale of 8 bits
        if "fp8" in method or "fp8" in str(quantization.get("quant_algo") or "").lower():
            return "float8_e4m3fn", "float8_e4m3fn", 1.0, 1.0
        if "compressed-tensors" in method and (packed := _packed_weights(quantization)) is not None:
            return dtype, dtype, size if _spares_mixers(quantization) else packed, packed
        bits = quantization.get("bits") or quantization.get("w_bit")
        if isinstance(bits, int) and 2 <= bits <= 8:
            return dtype, dtype, bits / 8, bits / 8  # weights are widened before they are multiplied
        raise PlanError(
            f"model {self.name} is quantized by {method[:40]!r}, which is not known",
            remedy="plan a copy of its config.json without quantization_config, with --dtype",
        )

    def _size(self, *names: str) -> int:
        value = self._optional(*names)
        if value is None:
            raise PlanError(f"configuration of model {self.name} has no {names[0]}")
        return value

    def _optional(self, *names: str) -> int | None:
        for name in names:
            value = self.config.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST:
                raise PlanError(f"configuration of model {self.name}: {name} is {str(value)[:40]!r}, no size")
            if value:
                return value
        return None

    def _flag(self, name: str) -> bool:
        return self.config.get(name, self.outer.get(name)) is True

    def _list(self, name: str) -> list[Any] | None:
        value = self.config.get(name)
        return value if isinstance(value, list) and value else None


def _packed_weights(quantization: Mapping[str, Any]) -> float | None:
    """Bytes of a weight in the first group of a ``compressed-tensors`` configuration; None where unknown.

    Integers of ``num_bits`` with a scale of 16 bits for each ``group_size`` of them; they are widened before
    they are multiplied.
    """
    groups = quantization.get("config_groups")
    group = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict) or weights.get("type") != "int":
        return None
    bits, shared = weights.get("num_bits"), weights.get("group_size")
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        return None
    scale = 16.0 / shared if isinstance(shared, int) and shared > 0 else 0.0
    return (bits + scale) / 8


def _spares_mixers(quantization: Mapping[str, Any]) -> bool:
    """Whether ``ignore`` names attention, so that only experts are packed."""
    ignored = quantization.get("ignore")
    return isinstance(ignored, list) and any("attn" in str(each) for each in ignored)
