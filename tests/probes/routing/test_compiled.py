"""Compiled models are counted, whenever they were compiled, and are themselves again afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters

import observatory
from tests.probes.tiny import HIDDEN, RoutedModel, assert_untouched, loads, routed_adapter

EXPERTS, TOP_K, TOKENS = 4, 2, 6
EVERY = TOKENS * TOP_K

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # raised inside torch's compiler,
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def routed() -> tuple[RoutedModel, torch.Tensor]:
    torch.manual_seed(0)
    return RoutedModel(2, EXPERTS, TOP_K).eval(), torch.randn(TOKENS, HIDDEN)


def totals(path: Path) -> dict[tuple[int, int], int]:
    return {(step, layer): sum(load) for (step, _, layer), load in loads(path, experts=EXPERTS).items()}


def outside(model: nn.Module) -> Callable[..., Any]:
    return torch.compile(model, backend="eager", fullgraph=True)


def in_place(model: nn.Module) -> Callable[..., Any]:
    model.compile(backend="eager", fullgraph=True)
    return model


def by_layer(model: nn.Module) -> Callable[..., Any]:
    for layer in model.layers:  # type: ignore[union-attr]
        layer.compile(backend="eager", fullgraph=True)  # type: ignore[operator]
    return model


@pytest.mark.parametrize("compiled", [outside, in_place, by_layer])
@pytest.mark.parametrize("early", [True, False])
@torch.no_grad()
def test_a_model_compiled_before_or_during_the_watch_is_counted(
    tmp_path: Path, compiled: Callable[[nn.Module], Callable[..., Any]], early: bool
) -> None:
    model, tokens_TH = routed()
    expected = model(tokens_TH)
    call = compiled(model) if early else None
    if call is not None:
        assert torch.equal(call(tokens_TH), expected)
    with observatory.watch(model, tmp_path / "r", adapters=[routed_adapter()]) as watch:
        call = compiled(model) if call is None else call
        for _ in range(2):
            assert torch.equal(call(tokens_TH), expected)
            watch.step()
    assert totals(tmp_path / "r") == {(0, 0): EVERY, (0, 1): EVERY, (1, 0): EVERY, (1, 1): EVERY}
    assert torch.equal(call(tokens_TH), expected)
    assert_untouched(model)


def test_more_watches_than_recompilations_are_allowed_are_all_counted(tmp_path: Path) -> None:
    model, tokens_TH = routed()
    call = outside(model)
    call(tokens_TH)
    for number in range(10):
        with observatory.watch(model, tmp_path / str(number), adapters=[routed_adapter()]) as watch:
            call(tokens_TH)
            watch.step()
        call(tokens_TH)
        assert totals(tmp_path / str(number)) == {(0, 0): EVERY, (0, 1): EVERY}
    assert counters["stats"]["unique_graphs"] == 2, "one graph without hooks, one with them"


@pytest.mark.parametrize("at", [0, 1])
def test_code_compiled_while_hooks_were_cleared_is_not_used_again(tmp_path: Path, at: int) -> None:
    """Neither in the same watch nor in another one of the same class."""
    for name in ("cleared", "next"):
        model, tokens_TH = routed()
        call = outside(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            with observatory.watch(model, tmp_path / name, adapters=[routed_adapter()]) as watch:
                for step in range(3):
                    if name == "cleared" and step == at:
                        for module in model.modules():
                            module._forward_hooks.clear()
                            module._forward_pre_hooks.clear()
                    call(tokens_TH)
                    watch.step()
        assert_untouched(model)
    everything = {(step, layer): EVERY for step in range(3) for layer in range(2)}
    assert totals(tmp_path / "cleared") == {key: n for key, n in everything.items() if key[0] != at}
    assert totals(tmp_path / "next") == everything


def test_nested_watches_of_compiled_code_each_count_their_own(tmp_path: Path) -> None:
    model, tokens_TH = routed()
    call = outside(model)
    with observatory.watch(model, tmp_path / "outer", adapters=[routed_adapter()]) as outer:
        call(tokens_TH)
        with observatory.watch(model, tmp_path / "inner", adapters=[routed_adapter()]) as inner:
            call(tokens_TH)
            inner.step()
        call(tokens_TH)
        outer.step()
    assert totals(tmp_path / "outer") == {(0, 0): 3 * EVERY, (0, 1): 3 * EVERY}
    assert totals(tmp_path / "inner") == {(0, 0): EVERY, (0, 1): EVERY}


def test_training_through_the_autograd_compiler_counts_once_and_gradients_are_the_same(
    tmp_path: Path,
) -> None:
    model, tokens_TH = routed()
    call = torch.compile(model, backend="aot_eager", fullgraph=True)

    def gradients() -> list[torch.Tensor]:
        call(tokens_TH).square().sum().backward()
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return found

    plain = gradients()
    options: dict[str, Any] = {"gate_mass": True, "sample_tokens": 2}
    with observatory.watch(model, tmp_path / "r", adapters=[routed_adapter()], **options) as watch:
        watched = gradients()
        watch.step()
    assert len(plain) == 6
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert totals(tmp_path / "r") == {(0, 0): EVERY, (0, 1): EVERY}
    mass = next(observatory.open_run(tmp_path / "r").iter_loads()).gate_mass_SPE
    assert mass is not None
    assert 0 < mass.sum() < TOKENS


def test_checkpointed_layers_inside_compiled_code_count_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = RoutedModel(2, EXPERTS, TOP_K, reentrant=False)
    tokens_TH = torch.randn(TOKENS, HIDDEN)
    call = torch.compile(model, backend="aot_eager")
    with observatory.watch(model, tmp_path / "r", adapters=[routed_adapter()]) as watch:
        call(tokens_TH).sum().backward()
        watch.step()
    assert totals(tmp_path / "r") == {(0, 0): EVERY, (0, 1): EVERY}


def test_changing_shapes_are_counted(tmp_path: Path) -> None:
    model, _ = routed()
    call = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    with observatory.watch(model, tmp_path / "r", adapters=[routed_adapter()]) as watch:
        for tokens in (3, 5, 9):
            call(torch.randn(tokens, HIDDEN))
            watch.step()
    assert {step: n for (step, layer), n in totals(tmp_path / "r").items() if layer == 0} == {
        0: 6,
        1: 10,
        2: 18,
    }


def test_a_model_exported_during_the_watch_holds_nothing_of_ours(tmp_path: Path) -> None:
    model, tokens_TH = routed()
    with observatory.watch(model, tmp_path / "r", adapters=[routed_adapter()]) as watch:
        programs = [torch.export.export(model, (tokens_TH,), strict=strict) for strict in (True, False)]
        model(tokens_TH)
        watch.step()
    assert all("observatory" not in str(program.graph) for program in programs)
    assert totals(tmp_path / "r") == {(0, 0): EVERY, (0, 1): EVERY}
    assert torch.equal(programs[0].module()(tokens_TH), model(tokens_TH))
