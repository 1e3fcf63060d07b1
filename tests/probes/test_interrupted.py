"""Calls that end in the middle: the step says so, the exception is the user's own, the next step is whole."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import observatory
from observatory.analysis.routing import layer_metrics
from observatory.run import Run
from tests.probes.tiny import HIDDEN, RoutedModel

TOKENS, TOP_K, LAYERS = 7, 2, 3
WHOLE = TOKENS * TOP_K


class OutOfMemoryError(Exception):
    """The program's own error."""


def x() -> torch.Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0))


def model_of(**options: Any) -> Any:
    torch.manual_seed(0)
    return RoutedModel(layers=LAYERS, **options)


@contextmanager
def raising(module: nn.Module, error: BaseException) -> Iterator[None]:
    """The module's forward raises."""

    def forward(*_args: object, **_kwargs: object) -> None:
        raise error

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def rows(run: Run) -> dict[tuple[int, int], tuple[int, bool]]:
    """(step, layer) -> assignments, and whether the row is partial."""
    return {
        (step, block.layer): (
            int(block.assignments_SP[s].sum()),
            block.partial_SP is not None and bool(block.partial_SP[s].any()),
        )
        for block in run.iter_loads()
        for s, step in enumerate(block.step_S.tolist())
    }


def whole(steps: int, *, but: int) -> dict[tuple[int, int], tuple[int, bool]]:
    return {(s, layer): (WHOLE, False) for s in range(steps) for layer in range(LAYERS) if s != but}


def only(run: Run, step: int) -> dict[int, tuple[int, bool]]:
    return {layer: row for (s, layer), row in rows(run).items() if s == step}


def codes(run: Run) -> list[tuple[str, int, int]]:
    return [(gap.code, gap.first_step, gap.steps) for gap in run.manifest.ranks[0].gaps]


def inside_layer(model: Any) -> nn.Module:
    return model.layers[1]  # type: ignore[no-any-return]


def inside_experts(model: Any) -> nn.Module:
    return model.layers[1].experts  # type: ignore[no-any-return]


@pytest.mark.parametrize("where", [inside_layer, inside_experts])
@pytest.mark.parametrize(
    "error", [OutOfMemoryError("boom"), KeyboardInterrupt(), SystemExit(3), GeneratorExit()]
)
def test_a_call_that_raises_marks_its_step_and_no_other(
    tmp_path: Path, where: Callable[[Any], nn.Module], error: BaseException
) -> None:
    model = model_of()
    with observatory.watch(model, tmp_path / "r", phase="prefill") as watch:
        for step in range(4):
            if step == 1:
                with raising(where(model), error), pytest.raises(type(error)) as caught:
                    model(x())
                assert caught.value is error
                assert not getattr(error, "__notes__", [])
            else:
                model(x())
            watch.step()
    run = observatory.open_run(tmp_path / "r")
    expected_of_step = {0: (WHOLE, True)}
    if where is inside_experts:  # the router ran, and its choice was made
        expected_of_step[1] = (WHOLE, True)
    assert {k: v for k, v in rows(run).items() if k[0] != 1} == whole(4, but=1)
    assert {layer: n for layer, n in only(run, 1).items() if layer != 1 or n[0]} == expected_of_step
    assert (codes(run), run.manifest.state) == ([("interrupted", 1, 1)], "complete")
    assert any("a call ended in the middle in step 1" in problem for problem in run.problems)
    assert "1 of 4 rows are partial" in layer_metrics(run, bootstrap=0).iloc[0]["notes"]


def test_the_rest_of_the_step_after_an_error_is_counted_and_the_step_stays_partial(tmp_path: Path) -> None:
    model = model_of()
    with observatory.watch(model, tmp_path / "r", phase="prefill") as watch:
        with raising(model.layers[1], OutOfMemoryError()), pytest.raises(OutOfMemoryError):
            model(x())
        model(x()[:3])  # a smaller batch instead
        watch.step()
        model(x())
        watch.step()
    run = observatory.open_run(tmp_path / "r")
    assert only(run, 0) == {0: (WHOLE + 6, True), 1: (6, True), 2: (6, True)}
    assert only(run, 1) == dict.fromkeys(range(LAYERS), (WHOLE, False))


@pytest.mark.parametrize("is_hook_of_model", [False, True])
def test_a_hook_of_another_library_that_raises_after_ours_marks_the_step(
    tmp_path: Path, is_hook_of_model: bool
) -> None:
    model = model_of()

    def broken(*_args: object) -> None:
        raise OutOfMemoryError

    with observatory.watch(model, tmp_path / "r", phase="prefill") as watch:
        handle = (model if is_hook_of_model else model.layers[1].experts).register_forward_hook(broken)
        with pytest.raises(OutOfMemoryError):
            model(x())
        handle.remove()
        watch.step()
        model(x())
        watch.step()
    run = observatory.open_run(tmp_path / "r")
    if is_hook_of_model:  # all layers had been called, and their calls had ended
        assert rows(run) == {**whole(2, but=-1)}
    else:
        assert only(run, 0) == {0: (WHOLE, True), 1: (WHOLE, True)}
        assert codes(run) == [("interrupted", 0, 1)]


def test_an_error_that_leaves_a_phase_marks_the_step(tmp_path: Path) -> None:
    model = model_of()
    with observatory.watch(model, tmp_path / "r") as watch:
        with pytest.raises(OutOfMemoryError), watch.phase("decode"):  # noqa: PT012
            model(x())  # of several that were to come
            raise OutOfMemoryError
        watch.step()
        with watch.phase("decode"):
            model(x())
        watch.step()
    run = observatory.open_run(tmp_path / "r")
    assert only(run, 0) == dict.fromkeys(range(LAYERS), (WHOLE, True))
    assert only(run, 1) == dict.fromkeys(range(LAYERS), (WHOLE, False))


def test_an_error_that_leaves_the_watch_marks_the_step_it_ended(tmp_path: Path) -> None:
    model = model_of()
    watch = observatory.watch(model, tmp_path / "r", phase="prefill")
    with pytest.raises(OutOfMemoryError), watch:  # noqa: PT012  # the whole block ends so
        model(x())
        watch.step()
        model(x())
        raise OutOfMemoryError
    run = observatory.open_run(tmp_path / "r")
    assert only(run, 0) == dict.fromkeys(range(LAYERS), (WHOLE, False))
    assert only(run, 1) == dict.fromkeys(range(LAYERS), (WHOLE, True))


def test_windows_with_such_a_step_are_partial(tmp_path: Path) -> None:
    model = model_of()
    with observatory.watch(model, tmp_path / "r", phase="prefill", window_steps=2) as watch:
        for step in range(6):
            if step == 3:
                with raising(model.layers[2], OutOfMemoryError()), pytest.raises(OutOfMemoryError):
                    model(x())
            else:
                model(x())
            watch.step()
    run = observatory.open_run(tmp_path / "r")
    assert [only(run, first)[0] for first in (0, 2, 4)] == [(28, False), (28, True), (28, False)]


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_that_raises_in_the_backward_pass_takes_nothing_from_the_forward_pass(
    tmp_path: Path, reentrant: bool
) -> None:
    model = model_of(reentrant=reentrant)
    with observatory.watch(model, tmp_path / "r") as watch:
        for step in range(3):
            loss = model(x().requires_grad_()).sum()
            if step == 1:
                with raising(model.layers[1].experts, OutOfMemoryError()), pytest.raises(OutOfMemoryError):
                    loss.backward()
            else:
                loss.backward()
            watch.step()
    run = observatory.open_run(tmp_path / "r")
    assert rows(run) == whole(3, but=-1)
    assert (codes(run), run.problems) == ([], ())


def test_a_checkpointed_model_whose_recomputation_stops_early_is_whole(tmp_path: Path) -> None:
    model = model_of()
    with observatory.watch(model, tmp_path / "r", phase="train_forward") as watch:
        for _ in range(2):
            checkpoint(model, x().requires_grad_(), use_reentrant=False).sum().backward()
            watch.step()
    run = observatory.open_run(tmp_path / "r")
    assert rows(run) == whole(2, but=-1)
    assert run.problems == ()


@pytest.mark.parametrize("error", [OutOfMemoryError, SystemExit, KeyboardInterrupt])
def test_a_call_that_raises_in_one_of_several_threads_marks_the_step(
    tmp_path: Path, error: type[BaseException]
) -> None:
    model = model_of()
    meet = threading.Barrier(2)

    def good() -> None:
        meet.wait()
        model(x())

    def bad() -> None:
        meet.wait()
        local = threading.local()
        local.hook = model.layers[1].register_forward_pre_hook(fail_here(threading.get_ident()))
        try:
            model(x())
        finally:
            local.hook.remove()

    def fail_here(thread: int) -> Callable[..., None]:
        def fail(*_args: object) -> None:
            if threading.get_ident() == thread:
                raise error

        return fail

    with (
        ThreadPoolExecutor(2) as pool,
        observatory.watch(model, tmp_path / "r", phase="prefill") as watch,
    ):
        for step in range(3):
            tasks = [pool.submit(good), pool.submit(bad if step == 1 else good)]
            failures = [task.exception() for task in tasks]
            assert [type(failure) for failure in failures] == [type(None), error if step == 1 else type(None)]
            watch.step()
    run = observatory.open_run(tmp_path / "r")
    assert {s for (s, _), (_, partial) in rows(run).items() if partial} == {1}
    assert only(run, 1) == {0: (2 * WHOLE, True), 1: (WHOLE, True), 2: (WHOLE, True)}
    assert only(run, 2) == dict.fromkeys(range(LAYERS), (2 * WHOLE, False))
    assert codes(run) == [("interrupted", 1, 1)]


def test_a_thread_that_is_still_in_a_call_when_a_step_ends_is_not_interrupted(tmp_path: Path) -> None:
    model = model_of()
    entered, go_on = threading.Event(), threading.Event()

    def wait(*_args: object) -> None:
        entered.set()
        go_on.wait()

    with observatory.watch(model, tmp_path / "r", phase="prefill") as watch:
        handle = model.layers[1].register_forward_pre_hook(wait)
        thread = threading.Thread(target=model, args=(x(),))
        thread.start()
        entered.wait()
        watch.step()
        go_on.set()
        thread.join()
        handle.remove()
        watch.step()
    run = observatory.open_run(tmp_path / "r")
    assert rows(run) == {(0, 0): (WHOLE, False), (1, 1): (WHOLE, False), (1, 2): (WHOLE, False)}
    assert ("interrupted", 0, 1) not in codes(run)


def test_after_ctrl_c_the_next_call_has_its_own_phase(tmp_path: Path) -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = RoutedModel(layers=1)

        def forward(self, hidden: torch.Tensor, past_key_values: Any = None) -> torch.Tensor:  # noqa: ARG002
            result: torch.Tensor = self.inner(hidden)
            return result

    class Length:
        def __init__(self, length: int) -> None:
            self.length = length

        def get_seq_length(self) -> int:
            return self.length

    model = Cached().eval()
    with observatory.watch(model, tmp_path / "r") as watch:
        with raising(model.inner.layers[0], KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
            model(x(), past_key_values=Length(5))
        model(x(), past_key_values=Length(0))
        watch.step()
    phases = {block.phase for block in observatory.open_run(tmp_path / "r").iter_loads()}
    assert phases == {"prefill"}


def weird(weights: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "one NaN":
        return weights.index_fill(0, torch.tensor([3]), torch.nan)
    if kind == "all NaN":
        return torch.full_like(weights, torch.nan)
    if kind == "infinite":
        return weights.index_fill(0, torch.tensor([2]), torch.inf)
    if kind == "overflow of half precision":
        return (weights.half() * 60000 * 3)[:, :1].expand(-1, TOP_K)
    assert kind == "wrong shape"
    return weights[:, :1]


class Gated(RoutedModel):
    """A model of which one layer's gate weights go wrong."""

    kind: str | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            weights, index = layer.router(hidden).softmax(-1).topk(TOP_K)  # type: ignore[operator,union-attr]
            if number == 1 and self.kind is not None:
                weights = weird(weights, self.kind)
            layer.experts(torch.zeros_like(hidden), index, weights)  # type: ignore[operator,union-attr]
        return hidden


@pytest.mark.parametrize(
    "kind", ["one NaN", "all NaN", "infinite", "overflow of half precision", "wrong shape"]
)
def test_gate_weights_that_are_no_numbers_cost_the_gate_mass_alone(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    model = Gated(layers=LAYERS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with observatory.watch(model, tmp_path / "r", phase="prefill", gate_mass=True) as watch:
            for step in range(3):
                model.kind = kind if step == 1 else None
                model(x())
                watch.step()
    run = observatory.open_run(tmp_path / "r")
    assert rows(run) == whole(3, but=-1)
    for block in run.iter_loads():
        assert block.gate_mass_SPE is not None
        unknown = np.isnan(block.gate_mass_SPE[:, 0]).all(axis=1).tolist()
        assert unknown == [False, block.layer == 1, False]
        assert np.isfinite(block.gate_mass_SPE[:, 0]).all(axis=1).tolist() == [not u for u in unknown]
    assert (codes(run), run.manifest.state) == ([("gate_mass", 1, 1)], "complete")
    assert any("layer 1 (layers.1.experts): no gate mass in step 1" in line for line in run.problems)


def test_a_whole_run_of_nan_gates_keeps_its_loads(tmp_path: Path) -> None:
    model = model_of()
    for layer in model.layers:
        layer.router.weight.data.fill_(torch.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with observatory.watch(model, tmp_path / "r", phase="prefill", gate_mass=True) as watch:
            model(x())
            watch.step()
    run = observatory.open_run(tmp_path / "r")
    assert rows(run) == whole(1, but=-1)
    assert all(block.gate_mass_SPE is None for block in run.iter_loads())


def test_negative_gates_are_summed_as_they_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Gated(layers=1)
    model.forward = lambda hidden: model.layers[0].experts(  # type: ignore[method-assign,operator,union-attr]
        hidden, torch.zeros(TOKENS, 1, dtype=torch.long), torch.full((TOKENS, 1), -0.5)
    )
    with observatory.watch(model, tmp_path / "r", phase="prefill", gate_mass=True, verify="none") as watch:
        model(x())
        watch.step()
    (block,) = observatory.open_run(tmp_path / "r").iter_loads()
    assert block.gate_mass_SPE is not None
    assert block.gate_mass_SPE[0, 0].tolist() == [-0.5 * TOKENS, 0.0, 0.0, 0.0]
