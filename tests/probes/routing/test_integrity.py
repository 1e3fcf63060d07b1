"""Hooks that are cleared and modules that are replaced during a watch: stated, and watched again."""

# ruff: noqa: S301  # what is unpickled was pickled by the test itself

from __future__ import annotations

import copy
import io
import pickle
import signal
import subprocess
import sys
import textwrap
import warnings
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import observatory
from observatory.run import Run
from observatory.run.manifest import CaptureGap
from tests.probes.tiny import HIDDEN, MoeLayer, RoutedModel, assert_untouched

TOKENS, TOP_K, LAYERS, STEPS, AT = 7, 2, 3, 4, 2
WHOLE = TOKENS * TOP_K


@dataclass
class Holder:
    """The program's own name for its model."""

    model: nn.Module


Act = Callable[[Holder], None]


def x() -> torch.Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0))


def captured(path: Path, act: Act, *, at: int = AT, steps: int = STEPS, **options: Any) -> Run:
    """A run of several steps; ``act`` is done before the forward pass of one of them."""
    torch.manual_seed(0)
    holder = Holder(RoutedModel(layers=LAYERS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with observatory.watch(holder.model, path, phase="prefill", **options) as watch:
            for step in range(steps):
                if step == at:
                    act(holder)
                holder.model(x())
                watch.step()
    return observatory.open_run(path)


def counts(run: Run) -> dict[tuple[int, int], int]:
    """(step, layer) -> assignments."""
    return {
        (step, block.layer): int(total)
        for block in run.iter_loads()
        for step, total in zip(block.step_S.tolist(), block.assignments_SP.sum(axis=1), strict=True)
    }


def gaps(run: Run) -> list[CaptureGap]:
    return list(run.manifest.ranks[0].gaps)


def lost_only(layers: set[int], *, steps: set[int] = frozenset({AT})) -> dict[tuple[int, int], int]:  # type: ignore[assignment]
    everything = {(step, layer): WHOLE for step in range(STEPS) for layer in range(LAYERS)}
    return {key: n for key, n in everything.items() if not (key[0] in steps and key[1] in layers)}


def clear_all_hooks(holder: Holder) -> None:
    for module in holder.model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()


def clear_hooks_of_layer(holder: Holder) -> None:
    for module in holder.model.layers[1].modules():  # type: ignore[index,union-attr]
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()


def clear_pre_hooks(holder: Holder) -> None:
    holder.model.layers[1].experts._forward_pre_hooks.clear()  # type: ignore[index,union-attr]


def give_new_dictionaries(holder: Holder) -> None:
    experts = holder.model.layers[1].experts  # type: ignore[index,union-attr]
    experts._forward_hooks, experts._forward_pre_hooks = OrderedDict(), OrderedDict()


@pytest.mark.parametrize(
    ("act", "layers"),
    [
        (clear_all_hooks, {0, 1, 2}),
        (clear_hooks_of_layer, {1}),
        (clear_pre_hooks, {1}),
        (give_new_dictionaries, {1}),
    ],
)
def test_cleared_hooks_cost_one_step_and_are_stated(tmp_path: Path, act: Act, layers: set[int]) -> None:
    run = captured(tmp_path / "r", act)
    assert counts(run) == lost_only(layers)
    assert run.manifest.state == run.manifest.ranks[0].state == "failed"
    assert {g.layer for g in gaps(run) if g.code == "hooks_removed"} == layers
    assert {(g.first_step, g.last_step, g.steps) for g in gaps(run)} == {(AT, AT, 1)}
    for layer in layers:
        assert any(
            f"layer {layer} (layers.{layer}.experts)" in line and "in step 2" in line for line in run.problems
        )


def replace_layer(holder: Holder) -> None:
    holder.model.layers[1] = MoeLayer(4, TOP_K)  # type: ignore[index,operator]


def copy_layer_over(holder: Holder) -> None:
    holder.model.layers[1] = copy.deepcopy(holder.model.layers[1])  # type: ignore[index,operator]


def copy_experts_over(holder: Holder) -> None:
    block = holder.model.layers[1]  # type: ignore[index]
    block.experts = copy.deepcopy(block.experts)  # type: ignore[union-attr]


def new_list(holder: Holder) -> None:
    layers = list(holder.model.layers)  # type: ignore[arg-type]
    holder.model.layers = nn.ModuleList([layers[0], MoeLayer(4, TOP_K), layers[2]])


def pickled_over(holder: Holder) -> None:
    holder.model.layers[1] = pickle.loads(pickle.dumps(holder.model.layers[1]))  # type: ignore[index,operator]


def test_hooks_that_cannot_be_put_on_again_are_stated_and_the_model_runs_on(tmp_path: Path) -> None:
    def plain_dictionaries(holder: Holder) -> None:
        experts = holder.model.layers[1].experts  # type: ignore[index,union-attr]
        experts._forward_hooks, experts._forward_pre_hooks = {}, {}  # torch registers nothing there

    run = captured(tmp_path / "r", plain_dictionaries)
    assert counts(run) == lost_only({1}, steps={2, 3})
    assert [(g.code, g.first_step, g.steps) for g in gaps(run)] == [
        ("hooks_removed", 2, 1),
        ("hooks_refused", 2, 2),
    ]
    assert run.manifest.state == "failed"


@pytest.mark.parametrize("act", [replace_layer, copy_layer_over, copy_experts_over, new_list, pickled_over])
def test_a_replaced_layer_costs_one_step_and_is_watched_again(tmp_path: Path, act: Act) -> None:
    run = captured(tmp_path / "r", act)
    assert counts(run) == lost_only({1})
    assert run.manifest.state == "failed"
    assert [(g.code, g.layer, g.first_step, g.steps) for g in gaps(run)] == [("replaced", 1, AT, 1)]
    assert any("layer 1 (layers.1.experts): its module was replaced in step 2" in p for p in run.problems)


def test_a_layer_of_another_kind_is_not_counted_as_the_old_one(tmp_path: Path) -> None:
    def more_experts(holder: Holder) -> None:
        holder.model.layers[1] = MoeLayer(6, TOP_K)  # type: ignore[index,operator]

    run = captured(tmp_path / "r", more_experts)
    assert counts(run) == lost_only({1}, steps={2, 3})
    assert [(g.code, g.layer, g.first_step, g.steps) for g in gaps(run)] == [
        ("replaced_by_unknown", 1, AT, 2)
    ]
    assert run.manifest.state == "failed"


def test_a_layer_that_is_taken_out_is_stated(tmp_path: Path) -> None:
    def skip(holder: Holder) -> None:
        holder.model.layers[1] = nn.Identity()  # type: ignore[index,operator]

    run = captured(tmp_path / "r", skip)
    assert counts(run) == lost_only({1}, steps={2, 3})
    assert [(g.code, g.layer, g.first_step, g.steps) for g in gaps(run)] == [("removed", 1, AT, 2)]


def test_layers_that_change_places_keep_their_numbers_and_say_so(tmp_path: Path) -> None:
    def swap(holder: Holder) -> None:
        layers: Any = holder.model.layers
        layers[0], layers[1] = layers[1], layers[0]

    run = captured(tmp_path / "r", swap)
    assert counts(run) == lost_only(set())
    assert [(g.code, g.layer, g.first_step, g.steps) for g in gaps(run)] == [
        ("moved", 0, AT, 1),
        ("moved", 1, AT, 1),
    ]
    assert run.manifest.state == "complete"


def test_a_layer_that_is_added_is_stated(tmp_path: Path) -> None:
    def add(holder: Holder) -> None:
        holder.model.layers.append(MoeLayer(4, TOP_K))  # type: ignore[operator,union-attr]

    run = captured(tmp_path / "r", add)
    assert counts(run) == lost_only(set())
    assert [(g.code, g.module, g.first_step, g.steps) for g in gaps(run)] == [
        ("added", "layers.3.experts", AT, 2)
    ]
    assert run.manifest.state == "failed"


def test_a_copy_that_runs_in_place_of_the_model_is_stated_and_not_counted(tmp_path: Path) -> None:
    def copy_model(holder: Holder) -> None:
        holder.model = copy.deepcopy(holder.model)

    run = captured(tmp_path / "r", copy_model)
    assert counts(run) == lost_only({0, 1, 2}, steps={2, 3})
    assert [(g.code, g.first_step, g.last_step) for g in gaps(run)] == [("idle", 2, 3)]
    assert run.manifest.state == "failed"


def test_a_block_that_goes_round_what_is_read_is_stated(tmp_path: Path) -> None:
    def bypass(holder: Holder) -> None:
        block: Any = holder.model.layers[1]  # type: ignore[index]

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            weights, index = block.router(hidden).softmax(-1).topk(TOP_K)
            result: torch.Tensor = hidden + block.experts.forward(hidden, index, weights)
            return result

        block.forward = forward

    run = captured(tmp_path / "r", bypass)
    assert counts(run) == lost_only({1}, steps={2, 3})
    assert [(g.code, g.layer, g.first_step, g.steps) for g in gaps(run)] == [("bypassed", 1, AT, 2)]
    assert run.manifest.state == "failed"


def harmless(holder: Holder) -> None:
    model = holder.model
    model.half().double().float()
    model.load_state_dict(model.state_dict(), assign=True)
    model.train().eval().requires_grad_(requires_grad=False)
    model.apply(lambda _module: None)
    copy.deepcopy(model)(x())
    pickle.loads(pickle.dumps(model))(x())
    torch.save(model, io.BytesIO())
    model.layers[0].router.weight = model.layers[1].router.weight  # type: ignore[index,union-attr]
    parametrize.register_parametrization(model.layers[2].router, "weight", nn.Identity())  # type: ignore[index,union-attr,arg-type]
    model.layers[1].experts.forward = torch.no_grad()(model.layers[1].experts.forward)  # type: ignore[index,union-attr]
    model.extra = nn.Linear(2, 2)
    handle = model.layers[1].experts.register_forward_hook(lambda *_: None)  # type: ignore[index,union-attr]
    handle.remove()


def test_what_loses_nothing_raises_no_alarm(tmp_path: Path) -> None:
    run = captured(tmp_path / "r", harmless)
    assert counts(run) == lost_only(set())
    assert (run.manifest.state, gaps(run), run.problems) == ("complete", [], ())


def test_hooks_that_others_save_and_put_back_count_once(tmp_path: Path) -> None:
    def put_back_under_other_numbers(holder: Holder) -> None:
        experts: Any = holder.model.layers[1].experts  # type: ignore[index,union-attr]
        hooks = list(experts._forward_pre_hooks.values())
        experts._forward_pre_hooks.clear()
        for hook in hooks:
            experts.register_forward_pre_hook(hook, with_kwargs=True)

    run = captured(tmp_path / "r", put_back_under_other_numbers)
    assert counts(run) == lost_only(set())
    assert [(g.code, g.layer) for g in gaps(run)] == [("hooks_removed", 1)]


def test_hooks_that_others_put_back_without_keyword_arguments_do_not_harm_the_model(tmp_path: Path) -> None:
    def forget_the_options(holder: Holder) -> None:
        for module in holder.model.modules():
            for name, put in (
                ("_forward_pre_hooks", module.register_forward_pre_hook),
                ("_forward_hooks", module.register_forward_hook),
            ):
                hooks = list(getattr(module, name).values())
                getattr(module, name).clear()
                for hook in hooks:
                    put(hook)

    run = captured(tmp_path / "r", forget_the_options)
    seen = counts(run)
    assert {key: n for key, n in seen.items() if key[0] != AT} == lost_only({0, 1, 2})
    assert {g.layer for g in gaps(run) if g.code == "hooks_removed"} == {0, 1, 2}
    assert {g.steps for g in gaps(run)} == {1}


def test_after_the_watch_nothing_of_it_is_left_on_what_was_replaced_or_cleared(tmp_path: Path) -> None:
    kept: list[nn.Module] = []

    def several(holder: Holder) -> None:
        kept.extend([holder.model, holder.model.layers[1]])  # type: ignore[index]
        replace_layer(holder)
        holder.model.layers[0].experts._forward_pre_hooks.clear()  # type: ignore[index,union-attr]

    captured(tmp_path / "r", several)
    for module in kept:
        assert_untouched(module)


def test_a_change_after_the_last_call_loses_nothing(tmp_path: Path) -> None:
    model = RoutedModel(layers=2)
    with observatory.watch(model, tmp_path / "r", phase="prefill") as watch:
        model(x())
        watch.step()
        model.layers[1] = MoeLayer(4, TOP_K)
    run = observatory.open_run(tmp_path / "r")
    assert (gaps(run), run.problems, run.manifest.state) == ([], (), "complete")


def test_without_steps_the_end_of_the_watch_is_where_it_is_seen(tmp_path: Path) -> None:
    model = RoutedModel(layers=2)
    watch = observatory.watch(model, tmp_path / "r", phase="prefill")

    def two_calls() -> None:
        with watch:
            model(x())
            model.layers[1].experts._forward_pre_hooks.clear()  # type: ignore[union-attr]
            model(x())

    with pytest.warns(UserWarning, match=r"layer 1 \(layers.1.experts\): its hooks were removed in step 0"):
        two_calls()
    run = observatory.open_run(tmp_path / "r")
    assert counts(run) == {(0, 0): 2 * WHOLE, (0, 1): WHOLE}
    (block,) = run.iter_loads(layers=[1])
    assert block.partial_SP is not None
    assert block.partial_SP.all()


def test_hooks_that_show_the_phase_come_back_and_what_was_lost_is_stated(tmp_path: Path) -> None:
    model = RoutedModel(layers=2).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with observatory.watch(model, tmp_path / "r") as watch:
            for step in range(3):
                if step == 1:
                    model._forward_pre_hooks.clear()
                model(x())
                watch.step()
    run = observatory.open_run(tmp_path / "r")
    phases = {step: block.phase for block in run.iter_loads() for step in block.step_S.tolist()}
    assert phases == {0: "train_forward", 1: "unknown", 2: "train_forward"}
    assert [(g.code, g.first_step, g.steps) for g in gaps(run)] == [("phase_hooks_removed", 1, 1)]
    assert run.manifest.state == "failed"


def test_a_layer_reached_past_its_hooks_is_missed_where_its_stack_is_not(tmp_path: Path) -> None:
    def skip(holder: Holder) -> None:
        first, _, last = holder.model.layers  # type: ignore[misc,union-attr]
        holder.model.forward = lambda hidden: last(first(hidden))

    run = captured(tmp_path / "r", skip)
    assert [(g.code, g.layer, g.first_step, g.steps) for g in gaps(run)] == [("not_called", 1, AT, 2)]
    assert run.manifest.state == "failed"


@pytest.mark.slow
def test_gaps_of_a_rank_that_is_killed_are_there(tmp_path: Path) -> None:
    program = f"""
        import os, signal, time, observatory
        from tests.probes.tiny import RoutedModel
        from tests.probes.routing.test_integrity import x
        model = RoutedModel(layers=2)
        with observatory.watch(model, {str(tmp_path / "r")!r}, phase="prefill", flush_s=0.05) as watch:
            for step in range(2):
                if step:
                    model.layers[1].experts._forward_pre_hooks.clear()
                model(x())
                watch.step()
            status = watch.run_path / "ranks" / "rank-00000.json"
            deadline = time.monotonic() + 60
            while "hooks_removed" not in status.read_text() and time.monotonic() < deadline:
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False, cwd=Path.cwd())
    assert done.returncode == -signal.SIGKILL
    run = observatory.open_run(tmp_path / "r")
    assert [(g.code, g.layer, g.first_step) for g in gaps(run)] == [("hooks_removed", 1, 1)]


def test_notes_of_all_ranks_are_in_the_run(tmp_path: Path) -> None:
    def rank(number: int) -> None:
        model = RoutedModel(layers=2).eval()
        with observatory.watch(
            model, tmp_path / "r", rank=number, world=2, run_id="both", align_clocks=False, exchanges=False
        ) as watch:
            if number:
                copy.deepcopy(model)
            model(x())
            watch.step()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(rank, range(2)))
    notes = observatory.open_run(tmp_path / "r").manifest.notes
    assert "phase unknown in calls of the model (1): the model takes no cache" in notes
    assert "rank 1: watched modules were copied or pickled; calls of copies are not counted" in notes


def put_back_within_the_step(holder: Holder) -> None:
    layers = holder.model.layers
    kept, layers[1] = layers[1], MoeLayer(4, TOP_K)  # type: ignore[index,operator]
    holder.model(x())
    layers[1] = kept  # type: ignore[index,operator]


@pytest.mark.parametrize("at", [0, AT, STEPS - 1])
def test_a_layer_that_misses_one_of_the_calls_of_a_step_is_stated(tmp_path: Path, at: int) -> None:
    """As with accumulated gradients, where a step has several calls."""
    run = captured(tmp_path / "r", put_back_within_the_step, at=at)
    assert counts(run)[at, 0] == 2 * WHOLE
    assert counts(run)[at, 1] == WHOLE
    assert [(g.code, g.layer, g.first_step, g.steps) for g in gaps(run)] == [("called_less", 1, at, 1)]
    assert run.manifest.state == "failed"


def test_layers_that_are_called_unequally_in_every_step_are_no_gap(tmp_path: Path) -> None:
    model = RoutedModel(layers=LAYERS)
    with observatory.watch(model, tmp_path / "r", phase="prefill") as watch:
        for calls in (1, 2, 3):
            for _ in range(calls):
                model(x())
                model.layers[1](x())
            watch.step()
    assert gaps(observatory.open_run(tmp_path / "r")) == []


@pytest.mark.parametrize("copied_steps", [1, STEPS])
def test_a_copy_that_runs_in_the_first_steps_is_stated(tmp_path: Path, copied_steps: int) -> None:
    model = RoutedModel(layers=LAYERS)
    copied = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if copied_steps == STEPS else "error")  # then nothing was counted
        with observatory.watch(model, tmp_path / "r", phase="prefill") as watch:
            for step in range(STEPS):
                (copied if step < copied_steps else model)(x())
                watch.step()
    run = observatory.open_run(tmp_path / "r")
    assert [(g.code, g.first_step, g.steps) for g in gaps(run)] == [("idle", 0, copied_steps)]
    assert any("no watched layer was called" in problem for problem in run.problems)
    assert run.manifest.state == "complete"  # as for a program that calls step() before its model


def test_a_copy_that_runs_without_any_step_is_noted(tmp_path: Path) -> None:
    model = RoutedModel(layers=LAYERS)
    with (
        pytest.warns(UserWarning, match="nothing was counted"),
        observatory.watch(model, tmp_path / "r", phase="prefill"),
    ):
        copy.deepcopy(model)(x())
