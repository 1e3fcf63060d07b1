"""Phases of a model that is called by parts, with foreign caches, adapted, compiled, or in another model."""

# ruff: noqa: ARG002  # the names of arguments are the interface

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    MixtralConfig,
)

import observatory
from probes.routing.carriers import find_carriers
from tests.probes.families import tiny_inputs, tiny_model
from tests.probes.tiny import HIDDEN, MoeLayer, RoutedModel, assert_untouched, routed_adapter

PROMPT = torch.arange(1, 6).reshape(1, 5)
ONE = PROMPT[:, :1]
EOS = 31

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # raised inside torch's compiler
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # raised inside peft
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def config(**settings: Any) -> MixtralConfig:
    return MixtralConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=1,
        vocab_size=32,
        pad_token_id=0,
        eos_token_id=EOS,
        **settings,
    )


def mixtral(**settings: Any) -> Any:
    return AutoModelForCausalLM.from_config(config(**settings)).eval()


class Watched:
    """Tokens per (layer, phase) and notes about phases of ``calls`` while ``model`` is watched."""

    def __init__(self, path: Path, model: nn.Module, calls: Callable[[], Any], **options: Any) -> None:
        with torch.no_grad(), observatory.watch(model, path, **options) as watch:
            calls()
            watch.step()
        run = observatory.open_run(path)
        self.tokens: Counter[tuple[int, str]] = Counter()
        for block in run.iter_loads():
            self.tokens[block.layer, block.phase] += int(block.tokens_SP.sum())
        self.notes = [note for note in run.manifest.notes if "phase unknown" in note]


def then_decode(call: Callable[..., Any]) -> None:
    """A prompt, and one token with the cache that its call made."""
    cache = call(PROMPT, use_cache=True).past_key_values
    call(ONE, past_key_values=cache)


def generate(model: Any, prompt: torch.Tensor = PROMPT, tokens: int = 4) -> None:
    model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
    )


def part(name: str) -> tuple[Any, Callable[..., Any]]:
    """A model to watch and what of it is called."""
    if name == "reward":
        model = AutoModelForSequenceClassification.from_config(config()).eval()
        return model, model.model
    model = mixtral()
    return model, {"outer": model, "inner": model.model, "forward": model.forward}[name]


@pytest.mark.parametrize("name", ["outer", "inner", "forward", "reward"])
def test_the_part_that_is_called_shows_the_phase(tmp_path: Path, name: str) -> None:
    model, call = part(name)
    seen = Watched(tmp_path / "r", model, lambda: then_decode(call))
    assert seen.tokens == {(0, "prefill"): 5, (0, "decode"): 1}
    assert not seen.notes
    assert_untouched(model)


def test_layers_reached_without_any_call_of_a_model_are_counted_in_a_note(tmp_path: Path) -> None:
    model = mixtral()
    block = model.model.layers[0].mlp
    seen = Watched(tmp_path / "block", model, lambda: [block(torch.randn(1, 4, 16)) for _ in range(3)])
    assert seen.tokens == {(0, "unknown"): 12}
    assert seen.notes == [
        "phase unknown in calls of watched layers (3): made outside of any call of the model"
    ]


def test_layers_outside_are_counted_apart_from_calls_of_the_model(tmp_path: Path) -> None:
    model = RoutedModel(1, top_k=1).eval()

    def calls() -> None:
        model(torch.randn(2, HIDDEN))
        model.layers[0](torch.randn(3, HIDDEN))

    seen = Watched(tmp_path / "r", model, calls, adapters=[routed_adapter(top_k=1)])
    assert seen.notes == [
        "phase unknown in calls of watched layers (1): made outside of any call of the model",
        "phase unknown in calls of the model (1): the model takes no cache",
    ]


@pytest.mark.parametrize("compiled", [True, False])
def test_a_block_called_alone_leaves_a_note_however_it_runs(tmp_path: Path, compiled: bool) -> None:
    model = RoutedModel(2).eval()
    if compiled:
        model.layers[0].compile(backend="eager", fullgraph=True)  # type: ignore[operator]

    def calls() -> None:
        for _ in range(2):
            model.layers[0](torch.randn(3, HIDDEN))

    with pytest.warns(UserWarning, match="never called"):
        seen = Watched(tmp_path / "r", model, calls, adapters=[routed_adapter()])
    assert seen.notes == [
        "phase unknown in calls of watched layers (2): made outside of any call of the model"
    ]


@pytest.mark.parametrize("family", ["switch_transformers", "nllb_moe"])
def test_encoders_are_prefill_when_a_generation_calls_them_alone(tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    seen = Watched(tmp_path / "r", model, lambda: generate(model, PROMPT + 3))
    assert seen.tokens == {(0, "prefill"): 5, (1, "prefill"): 5, (3, "prefill"): 1, (3, "decode"): 3}
    assert not seen.notes


def test_encoders_have_the_phase_of_the_call_that_they_are_in(tmp_path: Path) -> None:
    model = tiny_model("switch_transformers")
    inputs = tiny_inputs(model)
    seen = Watched(tmp_path / "r", model, lambda: model(**inputs))
    assert {phase for _, phase in seen.tokens} == {"unknown"}
    assert seen.notes == ["phase unknown in calls of the model (1): no cache was given or made"]
    with pytest.warns(UserWarning, match="never called, so without rows: decoder"):
        alone = Watched(tmp_path / "e", model.train(), lambda: model.get_encoder()(PROMPT))
    assert {phase for _, phase in alone.tokens} == {"prefill"}, "no gradients, so no training"


def test_an_encoder_that_runs_again_beside_a_decode_step_is_prefill(tmp_path: Path) -> None:
    model = tiny_model("switch_transformers")
    call: Any = model
    with torch.no_grad():
        cache = call(PROMPT, decoder_input_ids=ONE).past_key_values
    seen = Watched(tmp_path / "r", model, lambda: call(PROMPT, decoder_input_ids=ONE, past_key_values=cache))
    assert seen.tokens == {(0, "prefill"): 5, (1, "prefill"): 5, (3, "decode"): 1}


def test_continuous_batching_is_unknown_and_the_note_names_its_cache(tmp_path: Path) -> None:
    model = mixtral()
    settings = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=EOS, pad_token_id=0)

    def calls() -> None:
        prompts = [[1, 2, 3], [4, 5, 6, 7]]
        made = model.generate_batch(prompts, settings, ContinuousBatchingConfig(num_blocks=8), warmup=False)
        assert [len(result.generated_tokens) for result in made.values()] == [3, 3]

    with pytest.warns(
        UserWarning, match=r"\([345]\): the cache given as cache does not report how full it is"
    ):
        seen = Watched(tmp_path / "r", model, calls)
    assert {phase for _, phase in seen.tokens} == {"unknown"}
    assert len(seen.notes) == 1


class Paged:
    """A cache that says nothing."""


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


@pytest.mark.parametrize("compiled", [True, False])
def test_a_model_inside_does_not_guess_what_the_call_around_it_does_not_know(
    tmp_path: Path, compiled: bool
) -> None:
    class Serving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = mixtral()

        def forward(self, input_ids: torch.Tensor, kv_cache: Any = None) -> Any:
            return self.inside(input_ids)

    model = Serving()
    if compiled:
        model.inside.compile(backend="eager")
    with pytest.warns(UserWarning, match="the cache given as kv_cache"):
        seen = Watched(tmp_path / "r", model, lambda: model(PROMPT, Paged()))
    assert seen.tokens == {(0, "unknown"): 5}
    assert len(seen.notes) == 1


def test_an_empty_cache_beside_a_block_table_is_unknown_and_a_full_one_is_decode(tmp_path: Path) -> None:
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


class DraftAndTarget(nn.Module):
    """Speculative decoding in one module: the draft runs ahead with a cache of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.draft, self.target = mixtral(), mixtral()

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None) -> Any:
        then_decode(self.draft)
        return self.target(input_ids, past_key_values=past_key_values, use_cache=True)


def test_a_draft_model_in_a_model_has_the_phases_of_its_own_cache(tmp_path: Path) -> None:
    model = DraftAndTarget()
    cache = model.target(PROMPT, use_cache=True).past_key_values
    seen = Watched(tmp_path / "r", model, lambda: model(PROMPT[:, :2], past_key_values=cache))
    assert seen.tokens == {(0, "prefill"): 5, (0, "decode"): 1, (1, "decode"): 2}


def test_two_watched_models_that_call_each_other_do_not_mix_their_phases(tmp_path: Path) -> None:
    target, draft = mixtral(), mixtral()
    with (
        observatory.watch(draft, tmp_path / "draft") as inner,
        observatory.watch(target, tmp_path / "target") as outer,
        torch.no_grad(),
    ):
        target.register_forward_pre_hook(lambda *_: then_decode(draft))
        cache = target(PROMPT, use_cache=True).past_key_values
        target(ONE, past_key_values=cache)
        inner.step()
        outer.step()
    found = {}
    for name in ("draft", "target"):
        blocks = observatory.open_run(tmp_path / name).iter_loads()
        found[name] = {block.phase: int(block.tokens_SP.sum()) for block in blocks}
    assert found == {"draft": {"prefill": 10, "decode": 2}, "target": {"prefill": 5, "decode": 1}}


@pytest.mark.parametrize("what", ["layer", "inner", "outer", "wrapper"])
def test_compiled_parts_count_in_the_phase_of_their_call(tmp_path: Path, what: str) -> None:
    model = mixtral()
    watched = call = torch.compile(model, backend="eager") if what == "wrapper" else model
    if what != "wrapper":
        {"layer": model.model.layers[0], "inner": model.model, "outer": model}[what].compile(backend="eager")

    def calls() -> None:
        then_decode(call)
        then_decode(model.model)
        call(PROMPT[:, :3], use_cache=False)

    seen = Watched(tmp_path / "r", watched, calls)
    assert seen.tokens == {(0, "prefill"): 10, (0, "decode"): 2, (0, "unknown"): 3}
    (note,) = seen.notes
    assert note.endswith("no cache was given or made")
    assert_untouched(model)


@pytest.mark.parametrize("compiled", [True, False])
def test_layers_after_an_inner_model_are_in_the_call_around_it(tmp_path: Path, compiled: bool) -> None:
    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.layers = mixtral(), nn.ModuleList([MoeLayer(4, 1)])

        def forward(self, input_ids: torch.Tensor, past_key_values: Any) -> Any:
            self.inside(input_ids, past_key_values=past_key_values)
            return self.layers[0](torch.randn(input_ids.shape[1], HIDDEN))

    model = nn.Sequential(WithHead()).eval()
    call, cache = model[0], DynamicCache()
    if compiled:
        call = torch.compile(model[0], backend="eager")

    def calls() -> None:
        call(PROMPT, cache)
        call(ONE, cache)

    seen = Watched(tmp_path / "r", model, calls)
    assert seen.tokens == {
        (layer, phase): n for layer in (0, 1) for phase, n in (("prefill", 5), ("decode", 1))
    }


def test_layers_beside_a_known_inner_model_leave_a_note(tmp_path: Path) -> None:
    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.layers = mixtral(), nn.ModuleList([MoeLayer(4, 1)])

        def forward(self, prompt: torch.Tensor) -> Any:
            self.layers[0](torch.randn(2, HIDDEN))
            return self.inside(prompt)

    model = WithHead().eval()
    seen = Watched(tmp_path / "r", model, lambda: model(PROMPT))
    assert seen.tokens[0, "prefill"] + seen.tokens[1, "prefill"] == 5
    assert seen.tokens[0, "unknown"] + seen.tokens[1, "unknown"] == 2
    assert seen.notes == ["phase unknown in calls of the model (1): the model takes no cache"]


@pytest.mark.parametrize("positional", [True, False])
def test_a_wrapper_around_a_compiled_model_has_nothing_unknown(tmp_path: Path, positional: bool) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = mixtral()
            self.inside.compile(backend="eager")

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inside(*args, **kwargs)

    model = Wrapper()
    arguments = {} if positional else {"input_ids": PROMPT}
    seen = Watched(tmp_path / "r", model, lambda: model(*([PROMPT] if positional else []), **arguments))
    assert seen.tokens == {(0, "prefill"): 5}
    assert not seen.notes


@pytest.mark.parametrize("compiled", [True, False])
def test_callers_in_threads_keep_their_phases(tmp_path: Path, compiled: bool) -> None:
    """Each thread stops before the MoE layer until the other one is there too, so that calls overlap."""
    model, together = mixtral(), threading.Barrier(2, timeout=60)
    cache = DynamicCache(config=model.config)
    meet: list[bool] = []

    def wait_for_the_other(*_call: Any) -> None:
        if meet:
            together.wait()

    model.model.layers[0].self_attn.register_forward_pre_hook(wait_for_the_other)
    with torch.no_grad():
        model(PROMPT, past_key_values=cache)
        if compiled:
            model.model.layers[0].mlp.compile(backend="eager")

    def calls() -> None:
        model(PROMPT, use_cache=True)  # what is compiled is compiled by one thread
        model(ONE, past_key_values=cache)
        model(PROMPT[:, :2], use_cache=False)
        meet.append(True)
        for _ in range(3):
            threads = [
                threading.Thread(target=torch.no_grad()(model), args=(PROMPT,), kwargs={"use_cache": True}),
                threading.Thread(
                    target=torch.no_grad()(model), args=(ONE,), kwargs={"past_key_values": cache}
                ),
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    seen = Watched(tmp_path / "r", model, calls)
    assert seen.tokens == {(0, "prefill"): 20, (0, "decode"): 4, (0, "unknown"): 2}


def test_training_goes_before_any_cache_and_holds_for_all_parts(tmp_path: Path) -> None:
    model = mixtral()
    cache = model(PROMPT, use_cache=True).past_key_values
    model.train()
    model.model.eval()
    path = tmp_path / "r"
    with observatory.watch(model, path) as watch:
        model(ONE, past_key_values=cache)
        watch.step()
    assert {block.phase for block in observatory.open_run(path).iter_loads()} == {"train_forward"}


def test_layers_that_take_a_cache_show_no_phase() -> None:
    class Layer(nn.Module):
        def forward(self, hidden_states: torch.Tensor, past_key_values: Any = None) -> torch.Tensor:
            return hidden_states

    several, one = nn.Sequential(Layer(), Layer()), nn.Sequential(Layer())
    assert [carrier.module for carrier in find_carriers(several)] == [several]
    assert [carrier.module for carrier in find_carriers(one)] == [one, one[0]]
    model = mixtral()
    assert [carrier.module for carrier in find_carriers(model)] == [model, model.model]
