"""The parts of a capture: attached in order, taken off and closed in reverse, whatever one of them does."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import create_autospec

import pytest
from pydantic import JsonValue

import observatory
from observatory.errors import CaptureError
from observatory.probes.part import Boundary, Part
from observatory.probes.power.watched import WatchedPower
from observatory.probes.routing.flushing import Flusher
from observatory.probes.routing.part import RoutingPart
from observatory.probes.self_measurement import SelfMeasurement
from observatory.probes.session import CaptureSession
from observatory.run import RunWriter
from observatory.run.manifest import SelfMeasured
from tests.probes.tiny import ScriptedModel, ids, scripted_adapter


def calls_of_parts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of parts and methods, as they are called."""
    calls: list[str] = []

    def noted(kind: type[Part], method: str) -> None:
        original = getattr(kind, method)

        def call(part: Part, *args: object, **kwargs: object) -> object:
            calls.append(f"{kind.__name__}.{method}")
            return original(part, *args, **kwargs)

        monkeypatch.setattr(kind, method, call)

    for kind in (WatchedPower, RoutingPart, Flusher):
        for method in ("attach", "detach", "close"):
            noted(kind, method)
    return calls


def test_parts_are_taken_off_and_closed_in_reverse_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = calls_of_parts(monkeypatch)
    model = ScriptedModel()
    with observatory.watch(model, tmp_path / "r", adapters=[scripted_adapter(3)]) as watch:
        model([ids([0, 1])])
        watch.step()
    parts = ["WatchedPower", "RoutingPart", "Flusher"]
    assert calls == [
        *(f"{part}.attach" for part in parts),
        *(f"{part}.detach" for part in reversed(parts)),
        *(f"{part}.close" for part in reversed(parts)),
    ]


def test_a_part_that_cannot_be_attached_leaves_nothing_of_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(_part: Flusher) -> None:
        raise CaptureError("no room")

    model = ScriptedModel()
    monkeypatch.setattr(Flusher, "attach", refuse)
    with (
        pytest.raises(CaptureError, match="no room"),
        observatory.watch(model, tmp_path / "r", adapters=[scripted_adapter(3)]),
    ):
        pass
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert observatory.open_run(tmp_path / "r").manifest.state == "failed"


def test_a_new_probe_is_one_entry_in_the_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class StepCount(Part):
        steps = 0

        def boundary(self, boundary: Boundary) -> None:
            self.steps += boundary.ends_step and not boundary.is_last

        def config(self) -> dict[str, object]:  # type: ignore[override]
            return {"steps_counted": self.steps}

    original = CaptureSession.__init__

    def with_entry(session: CaptureSession, *args: object, **kwargs: object) -> None:
        original(session, *args, **kwargs)  # type: ignore[arg-type]
        session._attach(StepCount())

    monkeypatch.setattr(CaptureSession, "__init__", with_entry)
    model = ScriptedModel()
    with observatory.watch(model, tmp_path / "r", adapters=[scripted_adapter(3)]) as watch:
        for _ in range(3):
            model([ids([0, 1])])
            watch.step()
    assert observatory.open_run(tmp_path / "r").manifest.config["steps_counted"] == 3


class CostlyPart(Part):
    thread_cpu_s = 2.0

    def cost(self) -> dict[str, JsonValue]:
        return {"eager_layer_calls": 1000, "host_us_per_layer_call": 50.0, "exchanges": 0,
                "host_us_per_exchange": None}  # fmt: skip


def test_the_cost_of_watching_leaves_pauses_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0]
    monkeypatch.setattr("time.perf_counter_ns", lambda: now_s[0] * 10**9)
    writer = create_autospec(RunWriter, instance=True, bytes_written=7)
    cost = SelfMeasurement([CostlyPart(), Part()], writer)
    for ends_step in (True, False):
        now_s[0] += 3
        with cost.step_end(ends_step=ends_step):
            now_s[0] += 1
    cost.pause()
    now_s[0] += 100
    with cost.step_end(ends_step=True):
        now_s[0] += 100
    cost.resume()
    now_s[0] += 2
    measured = cost.now()
    assert measured == SelfMeasured(
        captured_s=10.0, steps=1, hook_s=0.05, step_end_s=2.0, thread_cpu_s=2.0, bytes_written=7
    )
    assert measured.share == pytest.approx(0.205)


def test_a_rank_states_what_watching_cost_it(tmp_path: Path) -> None:
    model = ScriptedModel()
    with observatory.watch(model, tmp_path / "r", adapters=[scripted_adapter(3)]) as watch:
        for _ in range(3):
            model([ids([0, 1])])
            watch.step()
    run = observatory.open_run(tmp_path / "r")
    measured = run.manifest.ranks[0].self_measured
    assert measured is not None
    assert measured.steps == 3
    assert min(measured.hook_s, measured.step_end_s, measured.thread_cpu_s) > 0
    # Each table was flushed once, and no file was written again.
    files = (tmp_path / "r").glob("*/rank-00000/*.parquet")
    assert measured.bytes_written == sum(path.stat().st_size for path in files)
