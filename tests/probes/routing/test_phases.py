"""Phases are stated or derived from the cache, never guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import observatory
from observatory.errors import CaptureError
from observatory.probes.routing.counters import SLOTS
from observatory.probes.routing.phases import Carrier, find_carriers, phase_of_call
from tests.probes.routing.phase_cases import config
from tests.probes.tiny import ScriptedModel, ids, loads, scripted_adapter


@pytest.fixture(scope="module")
def mixtral() -> Any:
    return AutoModelForCausalLM.from_config(config(top_k=2)).eval()


def assignments(path: Path) -> dict[tuple[int, str], int]:
    """(step, phase) -> assignments of layer 0."""
    return {(step, phase): sum(load) for (step, phase, _), load in loads(path, experts=4).items()}


def test_the_phase_of_a_call_is_known_from_its_cache(mixtral: Any, tmp_path: Path) -> None:
    prompt = torch.arange(6).reshape(1, 6)
    with observatory.watch(mixtral, tmp_path / "r") as watch, torch.no_grad():
        cache = mixtral(prompt, use_cache=True).past_key_values
        mixtral(prompt[:, :1], past_key_values=cache)
        watch.step()
        mixtral(prompt, past_key_values=DynamicCache(config=mixtral.config))
        mixtral(prompt, use_cache=False)
        watch.step()
        mixtral.train()(prompt, use_cache=True)
        mixtral.eval()
        watch.step()
    assert assignments(tmp_path / "r") == {
        (0, "prefill"): 12,
        (0, "decode"): 2,
        (1, "prefill"): 12,
        (1, "unknown"): 12,
        (2, "prefill"): 12,
    }


def test_generation_is_one_prefill_and_then_decode(mixtral: Any, tmp_path: Path) -> None:
    with observatory.watch(mixtral, tmp_path / "r") as watch:
        mixtral.generate(torch.arange(5).reshape(1, 5), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        watch.step()
    assert assignments(tmp_path / "r") == {
        (0, "prefill"): 10, (1, "decode"): 2, (2, "decode"): 2, (3, "decode"): 2,
    }  # fmt: skip


def test_training_with_gradients_is_train_forward(mixtral: Any, tmp_path: Path) -> None:
    with observatory.watch(mixtral, tmp_path / "r") as watch:
        mixtral.train()(torch.arange(3).reshape(1, 3)).logits.sum().backward()
        watch.step()
    mixtral.eval().zero_grad()
    assert assignments(tmp_path / "r") == {(0, "train_forward"): 6}


def known(carrier: Carrier, *args: Any, **kwargs: Any) -> tuple[str, str]:
    """(phase, code of the reason why it is unknown) of a call."""
    phase = phase_of_call(carrier, carrier.module, args, kwargs)
    return SLOTS[phase.slot], "" if phase.reason is None else phase.reason.code


def test_a_static_cache_on_the_host_shows_its_length(mixtral: Any) -> None:
    carrier = find_carriers(mixtral)[0]
    cache = StaticCache(config=mixtral.config, max_cache_len=8)
    seen = []
    for _ in range(2):
        seen.append(known(carrier, past_key_values=cache))
        with torch.no_grad():
            mixtral(torch.arange(2).reshape(1, 2), past_key_values=cache)
    assert seen == [("prefill", ""), ("decode", "")]


def test_a_cache_whose_length_lies_on_a_device_is_not_asked(mixtral: Any) -> None:
    class OnDevice:
        def get_seq_length(self) -> torch.Tensor:
            return torch.zeros((), device="meta")

    carrier = find_carriers(mixtral)[0]
    assert known(carrier, past_key_values=OnDevice()) == ("unknown", "length_not_read")


def test_the_model_inside_a_wrapper_is_found_and_positional_caches_are_understood(mixtral: Any) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = mixtral

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inside(*args, **kwargs)

    wrapper = Wrapper()
    carriers = find_carriers(wrapper)
    assert [carrier.module for carrier in carriers] == [wrapper, mixtral, mixtral.model]
    position = carriers[1].names.index("past_key_values")
    arguments = (*[None] * position, DynamicCache(config=mixtral.config))
    assert known(carriers[1], *arguments) == ("prefill", "")


def test_what_the_caller_says_goes_before_what_the_cache_says(mixtral: Any, tmp_path: Path) -> None:
    prompt = torch.arange(4).reshape(1, 4)
    with observatory.watch(mixtral, tmp_path / "r", phase="train_backward") as watch, torch.no_grad():
        mixtral(prompt, use_cache=True)
        with watch.phase("decode"):
            mixtral(prompt, use_cache=True)
            with watch.phase("prefill"):
                mixtral(prompt[:, :1], use_cache=False)
            mixtral(prompt, use_cache=True)
        watch.step()
    assert assignments(tmp_path / "r") == {(0, "train_backward"): 8, (0, "decode"): 16, (0, "prefill"): 2}


def test_a_step_inside_a_phase_keeps_the_phase(tmp_path: Path) -> None:
    model = ScriptedModel()
    with observatory.watch(model, tmp_path / "r", adapters=[scripted_adapter(2)]) as watch:
        with watch.phase("decode"):
            model([ids([0])])
            watch.step()
            model([ids([1])])
        watch.step()
    assert loads(tmp_path / "r", experts=2) == {(0, "decode", 0): [1, 0], (1, "decode", 0): [0, 1]}


def test_a_phase_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"'warmup' does not exist; expected one of prefill, decode"):
        observatory.watch(ScriptedModel(), tmp_path / "r", phase="warmup")  # type: ignore[arg-type]
    with (
        observatory.watch(ScriptedModel(), tmp_path / "r", adapters=[scripted_adapter(2)]) as watch,
        pytest.raises(CaptureError, match="'x' does not exist"),
        watch.phase("x"),  # type: ignore[arg-type]
    ):
        pass
