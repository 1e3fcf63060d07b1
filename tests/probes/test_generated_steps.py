"""Each forward pass of ``generate()`` is a step, and nothing else becomes one by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import observatory
from tests.probes.routing.phase_cases import config
from tests.probes.routing.test_phases import assignments

PROMPT = torch.arange(5).reshape(1, 5)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_config(config(top_k=2)).eval()


def generate(model: Any, new_tokens: int) -> None:
    model.generate(PROMPT, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)


def phases_of_steps(path: Path) -> list[tuple[int, str]]:
    return sorted(assignments(path))


def test_calls_of_generate_follow_each_other_without_a_call_of_step(model: Any, tmp_path: Path) -> None:
    with observatory.watch(model, tmp_path / "r") as watch:
        generate(model, 3)
        generate(model, 2)
    decoded = ["prefill", "decode", "decode", "prefill", "decode"]
    assert phases_of_steps(tmp_path / "r") == list(enumerate(decoded))
    assert watch.steps == 4  # the last ends with the watch
    assert observatory.open_run(tmp_path / "r").manifest.ranks[0].steps == 5


def test_step_after_generate_ends_the_last_of_its_steps(model: Any, tmp_path: Path) -> None:
    with observatory.watch(model, tmp_path / "r") as watch:
        for _ in range(2):
            generate(model, 2)
            watch.step()
    assert watch.steps == 4
    assert phases_of_steps(tmp_path / "r") == list(enumerate(["prefill", "decode"] * 2))


def test_a_forward_pass_of_ones_own_is_a_step_before_generate(model: Any, tmp_path: Path) -> None:
    with observatory.watch(model, tmp_path / "r"), torch.no_grad():
        model(PROMPT)
        generate(model, 1)
    assert assignments(tmp_path / "r") == {(0, "prefill"): 10, (1, "prefill"): 10}


def test_several_forward_passes_of_one_step_stay_together(model: Any, tmp_path: Path) -> None:
    with observatory.watch(model, tmp_path / "r") as watch, torch.no_grad():
        for _ in range(2):
            model(PROMPT)
            model(PROMPT)
            watch.step()
    assert assignments(tmp_path / "r") == {(0, "prefill"): 20, (1, "prefill"): 20}


class Server(nn.Module):
    """Generates by itself, as models outside of transformers do."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def generate(self, tokens: int) -> None:
        with torch.no_grad():
            for _ in range(tokens):
                self.model(PROMPT)


def test_any_module_may_generate_and_a_stated_phase_holds(model: Any, tmp_path: Path) -> None:
    server = Server(model)
    with observatory.watch(model, tmp_path / "r") as watch, watch.phase("decode"):
        server.generate(3)
    assert phases_of_steps(tmp_path / "r") == [(step, "decode") for step in range(3)]


def test_an_error_in_generate_goes_through_and_the_run_keeps_its_steps(model: Any, tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        if len(calls) == 2:
            raise KeyError("stop")
        calls.append(1)

    calls: list[int] = []
    handle = model.lm_head.register_forward_hook(stop)
    try:
        with pytest.raises(KeyError, match="stop"), observatory.watch(model, tmp_path / "r"):
            generate(model, 4)
    finally:
        handle.remove()
    assert phases_of_steps(tmp_path / "r")[:2] == [(0, "prefill"), (1, "decode")]
