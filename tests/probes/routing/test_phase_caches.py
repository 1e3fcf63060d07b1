"""Caches that are foreign, missing, or filled by an adapter."""

# ruff: noqa: ARG002  # the names of arguments are the interface

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig

from tests.probes.routing.families import tiny_model
from tests.probes.routing.phase_cases import EOS, ONE, PROMPT, Paged, Watched, generate, mixtral
from tests.probes.tiny import HIDDEN, MoeLayer, RoutedModel, routed_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # raised inside peft
]


def test_continuous_batching_is_unknown_and_the_note_names_its_cache(tmp_path: Path) -> None:
    model = mixtral()
    settings = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=EOS, pad_token_id=0)

    def calls() -> None:
        prompts = [[1, 2, 3], [4, 5, 6, 7]]
        made = model.generate_batch(prompts, settings, ContinuousBatchingConfig(num_blocks=8), warmup=False)
        assert [len(result.generated_tokens) for result in made.values()] == [3, 3]

    with pytest.warns(UserWarning, match=r"\(\d\): the cache given as cache does not report how full it is"):
        seen = Watched(tmp_path / "r", model, calls)
    assert {phase for _, phase in seen.tokens} == {"unknown"}
    assert len(seen.notes) == 1


class Rude:
    """A cache whose length cannot be had."""

    def get_seq_length(self) -> int:
        raise RuntimeError("sequence 17 is not scheduled")


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("cache", Paged()),
        ("cache", Rude()),
        ("kv_cache", [(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))]),
        ("kv_caches", torch.zeros(2, 8)),
        ("paged_cache", Paged()),
        ("block_table", torch.zeros(1, 2, dtype=torch.int32)),
        ("block_tables", {}),
        ("slot_mapping", torch.zeros(5, dtype=torch.int64)),
        ("attn_metadata", Paged()),
        ("inference_params", Paged()),
    ],
)
@pytest.mark.parametrize("inner", [True, False])
def test_a_cache_of_unknown_fill_is_never_taken_for_an_empty_one(
    tmp_path: Path, name: str, cache: Any, inner: bool
) -> None:
    model = mixtral()
    call = model.model if inner else model
    with pytest.warns(UserWarning, match=rf"\(1\): the cache given as {name} does not report"):
        seen = Watched(tmp_path / "r", model, lambda: call(PROMPT, **{name: cache}))
    assert seen.tokens == {(0, "unknown"): 5}
    assert len(seen.notes) == 1


def test_an_empty_cache_next_to_a_block_table_is_unknown_and_a_full_one_is_decode(tmp_path: Path) -> None:
    model, table = mixtral(), torch.zeros(1, 2, dtype=torch.int32)
    cache = DynamicCache(config=model.config)

    def calls() -> None:
        model(PROMPT, past_key_values=cache, block_tables=table)
        model(ONE, past_key_values=cache, block_tables=table)

    with pytest.warns(UserWarning, match=r"\(1\): the cache given as block_tables"):
        seen = Watched(tmp_path / "r", model, calls)
    assert seen.tokens == {(0, "unknown"): 5, (0, "decode"): 1}


def test_what_only_sounds_like_a_cache_is_none(tmp_path: Path) -> None:
    model = mixtral()
    harmless = {
        "cache_position": torch.arange(5),
        "reset_cache": True,
        "kind_of_cache": "paged",
        "kv_cache": None,
    }
    seen = Watched(tmp_path / "r", model, lambda: model(PROMPT, **harmless))
    assert seen.tokens == {(0, "prefill"): 5}


class Homemade(nn.Module):
    """A serving model that takes tokens and a cache by position."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([MoeLayer(4, 1)])

    def forward(self, tokens: torch.Tensor, kv_cache: Any = None) -> torch.Tensor:
        return self.layers[0](tokens)


def test_a_cache_by_position_is_found_and_one_of_transformers_is_understood_under_any_name(
    tmp_path: Path,
) -> None:
    model, tokens = Homemade().eval(), torch.randn(3, HIDDEN)
    full = DynamicCache()
    full.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)

    def calls() -> None:
        model(tokens, Paged())
        model(tokens[:1], full)
        model(tokens[:2], DynamicCache())

    with pytest.warns(UserWarning, match=r"\(1\): the cache given as kv_cache"):
        seen = Watched(tmp_path / "r", model, calls, adapters=[routed_adapter(top_k=1)])
    assert seen.tokens == {(0, "unknown"): 3, (0, "decode"): 1, (0, "prefill"): 2}


def test_models_without_a_cache_are_unknown_unless_the_caller_sets_the_phase(tmp_path: Path) -> None:
    model, tokens = RoutedModel(1, top_k=1).eval(), torch.randn(3, HIDDEN)
    adapters = [routed_adapter(top_k=1)]
    plain = Watched(tmp_path / "r", model, lambda: model(tokens), adapters=adapters)
    assert plain.notes == ["phase unknown in calls of the model (1): the model takes no cache"]
    with_phase = Watched(tmp_path / "t", model, lambda: model(tokens), adapters=adapters, phase="decode")
    assert with_phase.tokens == {(0, "decode"): 3}
    assert not with_phase.notes


def prefixed(model: Any, kind: str = "PrefixTuningConfig", **settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3, **settings}
    return peft.get_peft_model(model, getattr(peft, kind)(**options)).eval()


def test_virtual_tokens_of_a_prefix_are_no_tokens_in_the_cache(tmp_path: Path) -> None:
    model = prefixed(mixtral())
    forward = Watched(tmp_path / "f", model, lambda: model(input_ids=PROMPT))
    assert forward.tokens == {(0, "prefill"): 5}
    generation = Watched(tmp_path / "g", model, lambda: generate(model))
    assert generation.tokens == {(0, "prefill"): 5, (0, "decode"): 3}
    single = Watched(tmp_path / "s", model, lambda: generate(model, ONE))
    assert single.tokens == {(0, "prefill"): 1, (0, "decode"): 3}


def test_without_its_adapter_a_cache_as_long_as_the_prefix_is_decode(tmp_path: Path) -> None:
    model = prefixed(mixtral())

    def calls() -> None:
        with model.disable_adapter():
            generate(model, PROMPT[:, :3])

    assert Watched(tmp_path / "r", model, calls).tokens == {(0, "prefill"): 3, (0, "decode"): 3}


def test_a_prompt_that_is_tuned_counts_its_virtual_tokens_as_prefill(tmp_path: Path) -> None:
    model = prefixed(mixtral(), "PromptTuningConfig")
    assert Watched(tmp_path / "r", model, lambda: generate(model)).tokens == {
        (0, "prefill"): 8,
        (0, "decode"): 3,
    }
    tuned_cache = DynamicCache()
    tuned_cache.update(torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3, 8), 0)
    base = model.base_model
    inside = Watched(tmp_path / "b", model, lambda: base(ONE, past_key_values=tuned_cache))
    assert inside.tokens == {(0, "decode"): 1}, "only prefixes are in the cache before the first call"


def test_a_prefix_of_an_encoder_decoder_model_is_no_token_either(tmp_path: Path) -> None:
    sizes = {"num_layers": 2, "num_attention_heads": 4, "token_dim": 32}
    model = prefixed(tiny_model("switch_transformers"), task_type="SEQ_2_SEQ_LM", **sizes)
    seen = Watched(tmp_path / "r", model, lambda: generate(model, PROMPT + 3))
    assert seen.tokens == {(0, "prefill"): 5, (1, "prefill"): 5, (3, "prefill"): 1, (3, "decode"): 3}
