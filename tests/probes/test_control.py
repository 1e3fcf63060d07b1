"""Which steps are captured: asked for at the start, by commands, the same on all ranks; holes are stated."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import HashStore

import observatory
from observatory.errors import RunError
from observatory.host.ranks import RankOf
from observatory.probes import control
from observatory.probes.control import CaptureControl
from observatory.probes.options import RoutingOptions, StepOptions, WatchOptions
from observatory.probes.step_schedule import StepSchedule
from observatory.probes.watch import Watch
from observatory.run import RunWriter
from observatory.run.control import Action, ask, read_answer
from observatory.run.manifest import CapturedSteps, Manifest, ModelSpec, Topology
from tests.probes.tiny import HIDDEN, RoutedModel, routed_adapter, tokens

ALONE = RankOf(rank=0, world=1)
PATIENCE_S = 400.0


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "not within a minute"
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_PERIOD_S", 0.005)


def watch_of(model: nn.Module, path: Path, steps: StepOptions) -> Watch:
    routing = RoutingOptions(adapters=(routed_adapter(),))
    return Watch(model, path, WatchOptions(where=ALONE, steps=steps, routing=routing))


def forward(model: nn.Module, watch: Watch, steps: int = 1) -> None:
    for _ in range(steps):
        with torch.no_grad():
            model(torch.randn(3, HIDDEN))
        watch.step()


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def captured_steps(path: Path) -> list[int]:
    return sorted({step for step, *_ in tokens(path)})


def command(run: Path, action: Action, name: str | None = None) -> Any:
    request = ask(run, action, name)

    def is_handled() -> bool:
        answer = read_answer(run, 0)
        return answer is not None and request.id in answer.handled

    until(is_handled)
    return read_answer(run, 0)


def test_every_nth_step_from_the_first_on_is_captured_under_its_own_number(tmp_path: Path) -> None:
    model = RoutedModel().eval()
    with watch_of(model, tmp_path / "r", StepOptions(first=2, end=12, every=4)) as watch:
        seen = []
        for _ in range(14):
            seen.append(hooks(model) > 0)
            forward(model, watch)
    assert captured_steps(tmp_path / "r") == [2, 6, 10] == [i for i, on in enumerate(seen) if on]
    assert set(tokens(tmp_path / "r").values()) == {3}
    run = observatory.open_run(tmp_path / "r")
    assert run.problems == ()
    (rank,) = run.manifest.ranks
    assert rank.captured == (CapturedSteps(first_step=2, end_step=12, every=4),)
    assert (rank.state, rank.steps) == ("complete", 14)
    assert (
        "captured were steps 2 to 11, one in 4, as was asked for; no other step is in this run"
        in run.manifest.notes
    )


def test_commands_open_and_close_stretches_and_marks_have_their_step(tmp_path: Path) -> None:
    model, path = RoutedModel().eval(), tmp_path / "r"
    with watch_of(model, path, StepOptions(stopped=True, listens=True)) as watch:
        forward(model, watch, 3)
        assert hooks(model) == 0
        answer = command(path, "start")
        assert (answer.state, answer.next_action, answer.next_step) == ("stopped", "start", 4)
        forward(model, watch, 3)
        assert command(path, "mark", "warm").marks == 1
        command(path, "stop")
        forward(model, watch, 4)
        assert hooks(model) == 0
        command(path, "flush")
        assert observatory.open_run(path).row_count("routing") == 2 * 3
        assert command(path, "status").rows == 2 * 3
        command(path, "start")
        forward(model, watch, 2)
    assert captured_steps(path) == [4, 5, 6, 11]
    (rank,) = observatory.open_run(path).manifest.ranks
    assert rank.captured == (
        CapturedSteps(first_step=4, end_step=7),
        CapturedSteps(first_step=11, end_step=12),
    )
    (mark,) = rank.marks
    assert (mark.name, mark.step) == ("warm", 6)
    assert abs(mark.unix_s - time.time()) < 60
    last = read_answer(path, 0)
    assert last is not None
    assert (last.state, last.steps) == ("ended", 12)


def test_the_time_without_capture_is_in_no_span(tmp_path: Path) -> None:
    model, path = RoutedModel().eval(), tmp_path / "r"
    options = WatchOptions(
        where=ALONE,
        phase="prefill",
        steps=StepOptions(first=1, end=2),
        routing=RoutingOptions(adapters=(routed_adapter(),)),
    )
    with Watch(model, path, options) as watch:
        time.sleep(0.2)
        for _ in range(3):
            forward(model, watch)
        time.sleep(0.2)
    spans = observatory.open_run(path).spans()
    assert spans.step.tolist() == [1]
    assert (spans.end_ns - spans.start_ns).max() < 0.2e9


def test_a_layer_that_was_replaced_without_capture_is_counted_and_no_gap(tmp_path: Path) -> None:
    model, path = RoutedModel().eval(), tmp_path / "r"
    with watch_of(model, path, StepOptions(stopped=True, listens=True)) as watch:
        model.layers[1] = RoutedModel(layers=1).layers[0].eval()
        command(path, "start")
        forward(model, watch, 2)
    run = observatory.open_run(path)
    assert run.problems == ()
    assert {layer for _, _, layer in tokens(path)} == {0, 1}


def test_the_time_limit_ends_the_capture_and_not_the_program(tmp_path: Path) -> None:
    model, path = RoutedModel().eval(), tmp_path / "r"
    with watch_of(model, path, StepOptions(most_s=0.01)) as watch:
        end = time.monotonic() + PATIENCE_S
        while not watch.is_over:
            forward(model, watch)
            assert time.monotonic() < end
        last = watch.steps
        forward(model, watch, 2)
    assert captured_steps(path) == list(range(last))


def test_a_capture_that_takes_too_much_time_ends_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hooks and ends of steps take far more than a thousandth of a program that does nothing else."""
    monkeypatch.setattr(control, "_WINDOW_S", 0.01)
    model, path = RoutedModel().eval(), tmp_path / "r"
    with watch_of(model, path, StepOptions(budget=0.001)) as watch:
        end = time.monotonic() + PATIENCE_S
        while not watch.is_over:
            forward(model, watch)
            assert time.monotonic() < end
        last = watch.steps
        forward(model, watch, 2)
    assert captured_steps(path) == list(range(last))
    over = watch.over_budget
    assert over is not None
    assert over.share > over.budget
    (rank,) = observatory.open_run(path).manifest.ranks
    assert rank.state == "complete"
    assert any("more than the budget of 0.1%" in note for note in rank.notes)


def test_a_capture_within_its_budget_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_WINDOW_S", 0.01)
    model, path, looks = RoutedModel().eval(), tmp_path / "r", []
    spent = CaptureControl._keep_budget
    monkeypatch.setattr(
        CaptureControl, "_keep_budget", lambda self, steps: (looks.append(steps), spent(self, steps))
    )
    with watch_of(model, path, StepOptions(budget=1e9)) as watch:
        until(lambda: (forward(model, watch), len(looks) > 5)[1])
        assert watch.over_budget is None
        assert watch.is_capturing


def test_a_watch_that_leaves_nothing_out_says_nothing_of_it(tmp_path: Path) -> None:
    model, path = RoutedModel().eval(), tmp_path / "r"
    with watch_of(model, path, StepOptions(listens=True)) as watch:
        forward(model, watch, 2)
        command(path, "start")
        forward(model, watch, 1)
    (rank,) = observatory.open_run(path).manifest.ranks
    assert rank.captured is None
    assert captured_steps(path) == [0, 1, 2]


@pytest.mark.parametrize("has_store", [True, False])
def test_all_ranks_obey_at_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_store: bool) -> None:
    store = HashStore() if has_store else None
    monkeypatch.setattr(control, "default_store", lambda: store)
    manifest = Manifest(run_id="r", created_unix_s=1.0, model=ModelSpec(name="m"), topology=Topology(ranks=3))
    writers = [RunWriter.create(tmp_path / "r", manifest)]
    writers += [RunWriter.join(tmp_path / "r", rank=rank) for rank in (1, 2)]
    step = [0]
    controls = [
        CaptureControl(
            StepOptions(stopped=True, listens=True),
            RankOf(rank=rank, world=3),
            writer,
            steps=lambda: step[0],
            rows=lambda: 0,
            flush=lambda: None,
            cost=lambda: pytest.fail("no budget is to be kept"),
        )
        for rank, writer in enumerate(writers)
    ]
    for one in controls:
        one.open()
    path = tmp_path / "r"
    request = ask(path, "start")
    first: dict[int, int] = {}
    until(lambda: all(request.id in getattr(read_answer(path, rank), "handled", ()) for rank in range(3)))
    while len(first) < 3 and step[0] < 100:
        for rank, one in enumerate(controls):
            if one.wants(step[0]):
                first.setdefault(rank, step[0])
        step[0] += 1
    for one, writer in zip(controls, writers, strict=True):
        one.close(step[0])
        writer.close(steps=step[0])
    assert len(set(first.values())) == 1
    run = observatory.open_run(path)
    assert {rank.captured for rank in run.manifest.ranks} == {
        (CapturedSteps(first_step=first[0], end_step=step[0]),)
    }


def test_commands_that_nobody_reads_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "control" / "requests").mkdir(parents=True)
    monkeypatch.setattr("observatory.run.control._MOST_REQUESTS", 2)
    ask(tmp_path, "start")
    ask(tmp_path, "stop")
    with pytest.raises(RunError, match="2 commands wait"):
        ask(tmp_path, "start")


def schedule(**options: Any) -> StepSchedule:
    return StepSchedule(StepOptions(**options))


def wanted(steps: StepSchedule, end: int = 12) -> list[int]:
    return [step for step in range(end) if steps.is_wanted(step)]


def test_a_command_replaces_what_was_planned() -> None:
    planned = schedule(first=4, end=8)
    assert (wanted(planned), planned.is_over(7), planned.is_over(8)) == ([4, 5, 6, 7], False, True)
    early = schedule(first=4, end=8)
    early.start(2)
    assert (wanted(early), early.is_over(100)) == (list(range(2, 12)), False)
    never = schedule(first=4, end=8)
    never.stop(3)
    assert (wanted(never), never.is_over(100), never.captured()) == ([], False, ())
    longer = schedule(first=4, end=8)
    longer.start(6)
    assert (wanted(longer), longer.captured(10)) == (
        list(range(4, 12)),
        (CapturedSteps(first_step=4, end_step=10),),
    )
    ended = schedule()
    ended.end(5)
    ended.start(6)
    assert not ended.is_over(100)


def test_steps_that_begin_at_another_number_keep_it() -> None:
    resumed = schedule(at=7)
    assert (resumed.captured(), resumed.captured(9)) == (None, None)
    assert replace(StepOptions(at=7)) == StepOptions(at=7)
    assert schedule(at=7, first=2).captured() is None
    assert schedule(at=7, every=2).captured(12) == (CapturedSteps(first_step=7, end_step=12, every=2),)
