"""However a watch ends, what was captured is kept and the model is itself again."""

# ruff: noqa: PT012, PT031  # what is raised or warned about is that the whole block ends so

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import nn

import observatory
from observatory.errors import CaptureError, ModelError, RunError
from observatory.probes.routing import counting
from observatory.probes.routing.counters import DeviceCounters, HostCopy
from observatory.probes.routing.probe import RoutingProbe
from observatory.run import RunWriter
from tests.probes.tiny import ScriptedModel, assert_untouched, ids, loads, scripted_adapter

ADAPTERS = [scripted_adapter(2)]


def test_an_error_in_the_body_is_passed_on_and_the_run_is_marked_failed(tmp_path: Path) -> None:
    model = ScriptedModel()
    watch = observatory.watch(model, tmp_path / "r", adapters=ADAPTERS)
    with pytest.raises(ZeroDivisionError), watch, watch.phase("decode"):
        model([ids([0])])
        watch.step()
        model([ids([1])])
        raise ZeroDivisionError("body")
    assert_untouched(model)
    run = observatory.open_run(tmp_path / "r")
    assert (run.manifest.state, run.manifest.ranks[0].error) == ("failed", "ZeroDivisionError: body")
    assert loads(tmp_path / "r", experts=2) == {(0, "decode", 0): [1, 0], (1, "decode", 0): [0, 1]}


def test_ctrl_c_keeps_what_was_captured(tmp_path: Path) -> None:
    model = ScriptedModel()
    watch = observatory.watch(model, tmp_path / "r", adapters=ADAPTERS)
    with pytest.raises(KeyboardInterrupt), watch:
        model([ids([1])])
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert observatory.open_run(tmp_path / "r").manifest.state == "failed"
    assert loads(tmp_path / "r", experts=2) == {(0, "unknown", 0): [0, 1]}


def test_ctrl_c_inside_our_hook_leaves_no_layer_that_was_called_without_a_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, watched = ScriptedModel(layers=2), 0
    count = counting.count_bins

    def interrupted_in_the_second_step(*arguments: Any) -> None:
        nonlocal watched
        watched += 1
        if watched == 4:
            raise KeyboardInterrupt
        count(*arguments)

    monkeypatch.setattr(counting, "count_bins", interrupted_in_the_second_step)
    watch = observatory.watch(model, tmp_path / "run", adapters=[scripted_adapter(3)])
    with pytest.raises(KeyboardInterrupt), watch:
        for _ in range(3):
            model([ids([0], [1]), ids([2], [2])])
            watch.step()
    assert loads(tmp_path / "run", experts=3) == {
        (0, "unknown", 0): [1, 1, 0],
        (0, "unknown", 1): [0, 0, 2],
        (1, "unknown", 0): [1, 1, 0],
    }


def test_a_killed_process_loses_only_what_was_not_flushed(tmp_path: Path) -> None:
    program = f"""
        import sys, time, observatory
        from tests.probes.tiny import ScriptedModel, ids, scripted_adapter
        model = ScriptedModel()
        out, adapters = {str(tmp_path / "r")!r}, [scripted_adapter(2)]
        with observatory.watch(model, out, adapters=adapters, flush_s=0.1) as w:
            for _ in range(3):
                model([ids([1])])
                w.step()
            deadline = time.monotonic() + 30
            while not list(w.run_path.glob("routing/*/part-*.parquet")) and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(0.5)
            print("flushed", flush=True)
            time.sleep(60)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "flushed\n"
        process.kill()
    run = observatory.open_run(tmp_path / "r")
    assert run.manifest.state == "running"
    assert any("rank 0" in problem for problem in run.problems)
    assert loads(tmp_path / "r", experts=2) == {(step, "unknown", 0): [0, 1] for step in range(3)}


def test_a_disk_that_fills_up_is_one_error_at_the_step_and_the_model_runs_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ScriptedModel()
    flush = RunWriter.flush

    def full(writer: RunWriter) -> None:
        flush(writer)
        raise RunError("rank 0 cannot write routing: No space left on device; 1 rows are lost")

    watch = observatory.watch(model, tmp_path / "r", adapters=ADAPTERS, flush_s=0.01)
    outputs = []
    with watch:
        with pytest.raises(CaptureError, match=r"could not be kept: .*No space left"):
            for number in range(200):
                if number == 5:
                    monkeypatch.setattr(RunWriter, "flush", full)
                outputs.append(model([ids([1])]))
                watch.step()
                time.sleep(0.01)
        monkeypatch.setattr(RunWriter, "flush", flush)
        outputs.append(model([ids([1])]))
        watch.step()
    assert 5 < len(outputs) < 200
    run = observatory.open_run(tmp_path / "r")
    assert run.manifest.state == "failed"
    assert "No space left" in (run.manifest.ranks[0].error or "")
    assert len(loads(tmp_path / "r", experts=2)) == len(outputs)


def test_a_failure_at_the_very_end_is_raised_but_never_instead_of_the_body_s_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_writer: RunWriter, _table: str, _rows: pa.Table | pa.RecordBatch) -> None:
        raise RunError("no more room")

    monkeypatch.setattr(RunWriter, "append", broken)
    model = ScriptedModel()
    with (
        pytest.raises(CaptureError, match="no more room"),
        observatory.watch(model, tmp_path / "a", adapters=ADAPTERS),
    ):
        model([ids([0])])
    watch = observatory.watch(model, tmp_path / "b", adapters=ADAPTERS)
    with pytest.raises(KeyError) as caught, watch:
        model([ids([0])])
        raise KeyError("body")
    assert any("no more room" in note for note in caught.value.__notes__)
    assert_untouched(model)


def test_calls_after_the_last_step_are_a_step_of_their_own_and_an_idle_end_is_none(tmp_path: Path) -> None:
    model = ScriptedModel()
    with observatory.watch(model, tmp_path / "r", adapters=ADAPTERS) as watch:
        model([ids([0])])
        watch.step()
        model([ids([1])])
    assert loads(tmp_path / "r", experts=2) == {(0, "unknown", 0): [1, 0], (1, "unknown", 0): [0, 1]}
    assert observatory.open_run(tmp_path / "r").manifest.ranks[0].steps == 2


def test_a_layer_that_is_never_called_is_named_in_a_warning_and_in_the_run(tmp_path: Path) -> None:
    model = ScriptedModel(layers=2)
    with (
        pytest.warns(UserWarning, match=r"never called, so without rows: layers\.1"),
        observatory.watch(model, tmp_path / "r", adapters=ADAPTERS) as watch,
    ):
        model([ids([0])])
        watch.step()
    assert "layers.1" in observatory.open_run(tmp_path / "r").manifest.notes[0]


def test_a_watch_in_which_nothing_is_counted_says_so(tmp_path: Path) -> None:
    model = ScriptedModel()
    with (
        pytest.warns(UserWarning, match="nothing was counted"),
        observatory.watch(model, tmp_path / "r", adapters=ADAPTERS) as watch,
    ):
        model([])
        watch.step()


def test_a_watch_is_used_once_and_only_inside_its_block(tmp_path: Path) -> None:
    model = ScriptedModel()
    watch = observatory.watch(model, tmp_path / "r", adapters=ADAPTERS)
    with pytest.raises(CaptureError, match="not running"):
        watch.step()
    with watch:
        model([ids([0])])
        watch.step()
    with pytest.raises(CaptureError, match="not running"):
        watch.step()
    with pytest.raises(CaptureError, match="entered before"), watch:
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_tokens": -1}, "sample_tokens is -1; expected 0 or more"),
        ({"window_steps": 0}, "window_steps is 0; expected 1 or more"),
        ({"flush_s": 0}, "flush_s is 0; expected more than 0"),
        ({"rank": 1}, "rank=1 and world=None do not fit"),
        ({"rank": 2, "world": 2}, "rank=2 and world=2 do not fit"),
        ({"rank": 1, "world": 2, "overwrite": True}, "overwrite is requested with 2 ranks"),
        ({"clock_timeout_s": 0}, "clock_timeout_s is 0; expected more than 0"),
        ({"run_id": ""}, "run_id has 0 characters; expected 1 to 200"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        observatory.watch(ScriptedModel(), tmp_path / "r", **options)
    assert not (tmp_path / "r").exists()


def test_nothing_is_made_for_a_model_without_moe_layers_or_over_another_run(tmp_path: Path) -> None:
    with pytest.raises(ModelError), observatory.watch(nn.Linear(2, 2), tmp_path / "none"):
        pass
    assert not (tmp_path / "none").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    model = ScriptedModel()
    for overwrite in (False, True):
        with (
            pytest.raises(RunError, match="full"),
            observatory.watch(model, tmp_path / "full", adapters=ADAPTERS, overwrite=overwrite),
        ):
            pass
    assert [entry.name for entry in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    assert_untouched(model)


def test_a_hook_that_cannot_be_put_on_takes_the_others_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ScriptedModel(layers=2)

    def refuse(*_arguments: object, **_options: object) -> None:
        raise RuntimeError("frozen module")

    monkeypatch.setattr(model.layers[1], "register_forward_pre_hook", refuse)
    with (
        pytest.raises(RuntimeError, match="frozen module"),
        observatory.watch(model, tmp_path / "r", adapters=ADAPTERS),
    ):
        pass
    assert_untouched(model)
    assert observatory.open_run(tmp_path / "r").manifest.state == "failed"


def test_an_error_in_the_model_itself_does_not_disturb_the_next_call(tmp_path: Path) -> None:
    model = ScriptedModel()
    with observatory.watch(model, tmp_path / "r", adapters=ADAPTERS) as watch:
        with pytest.raises(TypeError):
            model(3)
        assert isinstance(model([ids([0])]), torch.Tensor)
        watch.step()
    assert loads(tmp_path / "r", experts=2) == {(0, "unknown", 0): [1, 0]}


def test_a_device_that_fails_never_hides_the_body_s_error_and_the_run_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ScriptedModel()
    watch = observatory.watch(model, tmp_path / "r", adapters=ADAPTERS)

    def fail(*_arguments: Any, **_options: Any) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    with pytest.raises(ZeroDivisionError, match="body") as caught, watch:
        model([ids([0])])
        watch.step()
        monkeypatch.setattr(RoutingProbe, "take", fail)
        raise ZeroDivisionError("body")
    assert "device-side assert" in caught.value.__notes__[0]
    assert_untouched(model)
    assert observatory.open_run(tmp_path / "r").manifest.state == "failed"
    assert loads(tmp_path / "r", experts=2) == {(0, "unknown", 0): [1, 0]}


def test_a_device_that_fails_at_the_very_end_is_an_error_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: Any, **_options: Any) -> None:
        raise RuntimeError("CUDA error: out of memory")

    model = ScriptedModel()
    watch = observatory.watch(model, tmp_path / "r", adapters=ADAPTERS)
    with pytest.raises(CaptureError, match=r"is lost: RuntimeError: CUDA error: out of memory"), watch:
        model([ids([0])])
        monkeypatch.setattr(RoutingProbe, "take", fail)
    rank = observatory.open_run(tmp_path / "r").manifest.ranks[0]
    assert (rank.state, rank.error) == (
        "failed",
        "what was counted since the last boundary is lost: RuntimeError: CUDA error: out of memory",
    )


class Arrival:
    """An event of a device that tells who asks; it has happened after ``after`` questions."""

    def __init__(self, after: int) -> None:
        self.left, self.threads = after, set[threading.Thread]()

    def query(self) -> bool:
        self.threads.add(threading.current_thread())
        self.left -= 1
        return self.left < 0

    def synchronize(self) -> None:
        self.threads.add(threading.current_thread())
        self.left = 0


@pytest.mark.parametrize("questions", [0, 1, 3, 10**6])
def test_only_the_program_s_own_thread_asks_the_device_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, questions: int
) -> None:
    events: list[Arrival] = []

    def on_its_way(counters: DeviceCounters) -> HostCopy:
        events.append(Arrival(questions))
        return replace(snapshot(counters), ready=events[-1])  # type: ignore[arg-type]

    snapshot = DeviceCounters.snapshot
    monkeypatch.setattr(DeviceCounters, "snapshot", on_its_way)
    model = ScriptedModel()
    with observatory.watch(model, tmp_path / "r", adapters=ADAPTERS, flush_s=0.01) as watch:
        for step in range(20):
            model([ids([step % 2])])
            watch.step()
    assert set().union(*(event.threads for event in events)) == {threading.main_thread()}
    assert loads(tmp_path / "r", experts=2) == {
        (step, "unknown", 0): [1 - step % 2, step % 2] for step in range(20)
    }


@pytest.mark.parametrize("leaves", [True, False], ids=["leaves the block", "steps"])
def test_a_forked_child_leaves_the_run_of_its_parent_alone(tmp_path: Path, leaves: bool) -> None:
    model = ScriptedModel()
    watch = observatory.watch(model, tmp_path / "r", adapters=ADAPTERS)
    with watch:
        model([ids([0])])
        watch.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # this process has threads
            child = os.fork()
        if child == 0:
            try:
                if leaves:
                    watch.__exit__(None, None, None)
                    assert_untouched(model)
                else:
                    with pytest.raises(CaptureError, match="forked child"):
                        watch.step()
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert observatory.open_run(tmp_path / "r").manifest.ranks[0].state == "running"
        model([ids([1])])
        watch.step()
    assert loads(tmp_path / "r", experts=2) == {(0, "unknown", 0): [1, 0], (1, "unknown", 0): [0, 1]}
