"""The quickstart's benchmarks: made once, kept when good, made again when not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from observatory.analysis.network import load_network
from observatory.campaign import quickstart as simulated
from observatory.campaign import quickstart_network as quickstart
from observatory.devices.simulated import SIMULATED_UUID
from observatory.reports import write_report
from observatory.reports.frames.collect import collect
from observatory.reports.outline import build_sections
from observatory.reports.page import FigureBlock
from observatory.reports.sections import verdicts
from observatory.run import open_run
from observatory.run.documents.bench import load_bench
from observatory.run.documents.route_fetch import load_route_fetch
from tests.collectives.bench.runs import write_captured_run


@pytest.mark.slow
def test_benchmark_replay_and_model_are_made_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "_SIZES_BYTES", (64, 4096))
    monkeypatch.setattr(quickstart, "_REPEATS", 2)
    run = write_captured_run(tmp_path / "run")
    reported: list[str] = []
    files = quickstart.quickstart_network([run], tmp_path, report=reported.append)
    assert reported == [
        "benchmark of 2 ranks and replay of the run's traffic: measuring",
        "network model: fitting",
    ]
    (bench,) = (load_bench(path) for path in files.bench)
    replay = load_bench(files.replay)
    assert (bench.kind, bench.run_id, bench.node_of_P) == ("alltoall", None, (0, 0))
    assert {"uniform", "skewed", "random", "local", "empty"} <= {case.pattern for case in bench.cases}
    assert all(case.role is None for case in bench.cases)
    assert (replay.kind, replay.run_id, replay.notes) == ("replay", "run-1", ("source ranks: captured",))
    assert {(case.step, case.role, case.pattern) for case in replay.cases} == {
        (step, role, pattern)
        for step in (0, 1)
        for role in ("dispatch", "combine")
        for pattern in ("captured", "uniform")
    }
    assert load_network(files.model).sources[0] == files.bench[0].name

    before = {path: path.read_bytes() for path in (*files.bench, files.replay, files.model)}
    reported.clear()
    assert quickstart.quickstart_network([run], tmp_path, report=reported.append) == files
    assert [line.rpartition(": ")[2] for line in reported] == ["kept", "kept"]
    assert {path: path.read_bytes() for path in before} == before

    files.model.write_text("{")
    reported.clear()
    quickstart.quickstart_network([run], tmp_path, report=reported.append)
    assert [line.rpartition(": ")[2] for line in reported] == ["kept", "fitting"]
    load_network(files.model)

    whole = json.loads(files.replay.read_text())
    assert quickstart._usable(files.replay, ranks=2, run_id="run-1")
    assert not quickstart._usable(files.replay, ranks=2, run_id="run-2"), "of another run"
    assert not quickstart._usable(files.replay, ranks=4, run_id="run-1"), "of other ranks"
    whole["cases"][0]["correct"] = False
    files.replay.write_text(json.dumps(whole))
    assert not quickstart._usable(files.replay, ranks=2, run_id="run-1"), "with wrong bytes"
    files.replay.write_bytes(before[files.replay][:-10])
    assert not quickstart._usable(files.replay, ranks=2, run_id="run-1"), "cut off"
    files.replay.unlink()
    assert not quickstart._usable(files.replay, ranks=2, run_id="run-1"), "not there"


@pytest.mark.slow
def test_routes_and_fetches_are_measured_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "_POINTS", 8)
    monkeypatch.setattr(quickstart, "_REPEATS", 1)
    reported: list[str] = []
    path = quickstart.quickstart_route_fetch(tmp_path, report=reported.append)
    before = path.read_bytes()
    assert all(case.correct for case in load_route_fetch(path).cases)
    assert quickstart.quickstart_route_fetch(tmp_path, report=reported.append).read_bytes() == before
    path.write_text("{")
    quickstart.quickstart_route_fetch(tmp_path, report=reported.append)
    assert [line.rpartition(": ")[2] for line in reported] == ["measuring", "kept", "measuring"]


@pytest.mark.slow
def test_all_that_is_of_a_simulated_device_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulated, "_SIMULATED_STEPS", 40)
    out = tmp_path / "simulated-device"
    (run,) = simulated.quickstart_simulated(out, report=lambda _: None)
    assert simulated.quickstart_simulated(out, report=lambda _: None) == [run], "kept"
    frames = collect([open_run(run)], ep_degrees=(4,), gpus_per_node=4)
    assert list(frames.runs["label"]) == [f"tiny-gqa ({SIMULATED_UUID})"]
    for verdict in verdicts(frames):
        if verdict.part in ("Energy", "Clocks"):
            assert all("simulated device" in text.lower() for text in verdict.sentences)
    figures = [
        block
        for section in build_sections(frames, gpus_per_node=4)
        if section.id in ("power", "energy")
        for block in section.blocks
        if isinstance(block, FigureBlock)
    ]
    assert figures
    for figure in figures:
        for variant in figure.variants:
            assert SIMULATED_UUID in variant.note
            assert SIMULATED_UUID in variant.keys["model"]
            assert SIMULATED_UUID in variant.numbers.caption or figure.id == "power-timeline"
    page = write_report([run], tmp_path / "report.html", ep_degrees=(4,)).read_text(encoding="utf-8")
    drawn = page.split('id="power-timeline"')[1].split("</figure>")[0]
    assert f">{SIMULATED_UUID}</text>" in drawn
    assert all("simulated-device" in str(path) for path in out.rglob("*"))


def test_a_place_that_cannot_name_a_device_has_no_simulated_run(tmp_path: Path) -> None:
    said: list[str] = []
    assert simulated.quickstart_simulated(tmp_path / "a,b", report=said.append) == []
    assert "comma" in said[0]
