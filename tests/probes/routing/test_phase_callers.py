"""Phases of a model that is called by parts, compiled, by threads, or in another model."""

# ruff: noqa: ARG002  # the names of arguments are the interface

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn
from transformers import AutoModelForSequenceClassification, DynamicCache

import observatory
from observatory.probes.routing.phases import find_carriers
from tests.probes.routing.families import tiny_inputs, tiny_model
from tests.probes.routing.phase_cases import (
    ONE,
    PROMPT,
    Paged,
    Watched,
    config,
    generate,
    mixtral,
    then_decode,
)
from tests.probes.tiny import HIDDEN, MoeLayer, RoutedModel, assert_untouched, routed_adapter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # raised inside torch's compiler,
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


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


@pytest.mark.filterwarnings("ignore:run .*the experts compute other tokens")
@pytest.mark.parametrize("family", ["switch_transformers", "nllb_moe"])
def test_encoders_are_prefill_when_a_generation_calls_them_alone(tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    seen = Watched(tmp_path / "r", model, lambda: generate(model, PROMPT + 3))
    assert seen.tokens == {(0, "prefill"): 5, (1, "prefill"): 5, (3, "prefill"): 1, (3, "decode"): 3}
    assert not [note for note in seen.notes if "phase" in note]


def test_encoders_have_the_phase_of_the_call_that_they_are_in(tmp_path: Path) -> None:
    model = tiny_model("switch_transformers")
    inputs = tiny_inputs(model)
    seen = Watched(tmp_path / "r", model, lambda: model(**inputs))
    assert {phase for _, phase in seen.tokens} == {"unknown"}
    assert seen.notes == ["phase unknown in calls of the model (1): no cache was given or made"]
    with pytest.warns(UserWarning, match="never called, so without rows: decoder"):
        alone = Watched(tmp_path / "e", model.train(), lambda: model.get_encoder()(PROMPT))
    assert {phase for _, phase in alone.tokens} == {"prefill"}, "no gradients, so no training"


def test_an_encoder_that_runs_again_next_to_a_decode_step_is_prefill(tmp_path: Path) -> None:
    model = tiny_model("switch_transformers")
    call: Any = model
    with torch.no_grad():
        cache = call(PROMPT, decoder_input_ids=ONE).past_key_values
    seen = Watched(tmp_path / "r", model, lambda: call(PROMPT, decoder_input_ids=ONE, past_key_values=cache))
    assert seen.tokens == {(0, "prefill"): 5, (1, "prefill"): 5, (3, "decode"): 1}


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


def test_layers_next_to_a_known_inner_model_leave_a_note(tmp_path: Path) -> None:
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
    model, together = mixtral(), threading.Barrier(2, timeout=400)
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
