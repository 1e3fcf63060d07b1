"""A run in TensorBoard: read by its own reader, and by itself in a browser with PyTorch's plugin."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from selenium import webdriver

from observatory.cli import main
from observatory.errors import RunError
from observatory.interchange.exporters.tensorboard.write import write_tensorboard
from observatory.run import RunWriter, open_run, routing_rows
from observatory.run.manifest import ClockSpec
from tests.analysis.exchange.tables import collective
from tests.conftest import MakeRun
from tests.interchange.test_chrome_trace import check
from tests.reports.browsing import revive, wait
from tests.reports.conftest import browser  # noqa: F401 - a fixture
from tests.reports.sample_power import UUID, a_power_run
from tests.reports.sample_runs import manifest

HERE = ClockSpec(offset_ns=0, uncertainty_ns=0, method="shared clock")


def two_ranks(path: Path) -> Path:
    """Two steps of two ranks with a dispatch of 300 us each; rank 1 comes 100 us late to the first."""
    start = 10_000_000_000
    rows = pd.concat(
        [
            collective(
                start_us=[
                    start // 1000 + step * 1000,
                    start // 1000 + step * 1000 + (100 if step == 0 else 0),
                ],
                end_us=[start // 1000 + step * 1000 + 300] * 2,
                send=[[10, 20], [30, 40]],
                step=step,
                sequence=step,
            )
            for step in range(2)
        ]
    )
    writers = [RunWriter.create(path, manifest(ranks=2, layers=1, experts=4, top_k=1))]
    writers.append(RunWriter.join(path, rank=1))
    for writer in reversed(writers):
        own = rows[rows["source_rank"] == writer.rank].astype({"source_rank": "int32", "layer": "int32"})
        writer.append("exchange", pa.Table.from_pandas(own, preserve_index=False))
        spans = [(step, "phase", None, step * 1_000_000, 900_000) for step in range(2)]
        spans += [(step, "experts", 0, step * 1_000_000 + 400_000, 100_000) for step in range(2)]
        writer.append(
            "spans",
            pa.table(
                {
                    "step": pa.array([step for step, *_ in spans], pa.int64()),
                    "phase": ["prefill"] * 4,
                    "layer": pa.array([layer for _, _, layer, _, _ in spans], pa.int32()),
                    "source_rank": pa.array([writer.rank] * 4, pa.int32()),
                    "name": [name for _, name, *_ in spans],
                    "start_ns": pa.array([start + after for *_, after, _ in spans], pa.int64()),
                    "end_ns": pa.array([start + after + took for *_, after, took in spans], pa.int64()),
                }
            ),
        )
        writer.append(
            "routing",
            routing_rows(
                step_N=np.arange(2), phase_N="prefill", layer_N=np.zeros(2, np.int64),
                source_rank=writer.rank, tokens_N=np.array([8, 8]),
                load_NE=np.array([[5, 3, 0, 0], [2, 2, 2, 2]]),
            ),
        )  # fmt: skip
        writer.set_clock(HERE)
        writer.close(steps=2)
    return path


def events_of(folder: Path) -> Any:
    """TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), {"scalars": 0, "histograms": 0}).Reload()


def scalars(folder: Path, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in events_of(folder).Scalars(tag)}


def test_tensorboards_own_reader_finds_the_values(tmp_path: Path) -> None:
    run = two_ranks(tmp_path / "my run")
    written = write_tensorboard(open_run(run), tmp_path / "logs")
    home = tmp_path / "logs" / "my_run" / "prefill"
    assert {path.parent for path in written.files} == {home}
    # Loads 10, 6, 0, 0: sum of (2 i - E - 1) x_(i) = 6 + 30 of E times 16.
    assert scalars(home, "gini/layer 0") == pytest.approx({0: 36 / 64, 1: 0.0})
    assert scalars(home, "max over mean/layer 0") == pytest.approx({0: 2.5, 1: 1.0})
    assert scalars(home, "step/ms") == pytest.approx({0: 0.9, 1: 0.9})
    assert scalars(home, "step/tokens") == {0: 16, 1: 16}
    assert scalars(home, "waiting ms/rank 0") == pytest.approx({0: 0.1, 1: 0.0})
    assert scalars(home, "transfer ms/rank 1") == pytest.approx({0: 0.2, 1: 0.3})
    first = events_of(home).Histograms("loads/layer 0")[0].histogram_value
    assert dict(zip(first.bucket_limit, first.bucket, strict=True)) == {0.5: 10, 1.5: 6, 2.5: 0, 3.5: 0}
    assert (first.min, first.max) == (-0.5, 1.5), "bars of one width, empty ones at the ends dropped"
    assert written.points == 2 * 5 + 2 * 4


def test_a_trace_has_the_words_that_the_plugin_looks_for(tmp_path: Path) -> None:
    write_tensorboard(open_run(two_ranks(tmp_path / "run")), tmp_path / "logs")
    traces = sorted((tmp_path / "logs" / "run" / "prefill").glob("*.pt.trace.json"))
    assert [path.name.split(".")[0] for path in traces] == ["rank_00000", "rank_00001"]
    for rank, path in enumerate(traces):
        document = json.loads(path.read_text())
        check(document)
        assert document["distributedInfo"] == {"rank": rank, "world_size": 2}
        slices = [event for event in document["traceEvents"] if event["ph"] == "X"]
        assert [event["name"] for event in slices if event["cat"] == "cpu_op"] == ["experts"] * 2
        named = [event["name"] for event in slices if event["cat"] == "user_annotation"]
        assert sorted(named) == ["ProfilerStep#0", "ProfilerStep#1"] + ["nccl:all_gather"] * 2
        one = next(event for event in slices if event["name"] == "nccl:all_gather")
        assert one["args"]["stands for"] == "dispatch, an all-to-all"
        assert one["args"]["Input Dims"] == [[30 if rank == 0 else 70]]


def test_readings_are_means_over_their_step(tmp_path: Path) -> None:
    run = open_run(a_power_run(tmp_path / "run"))
    write_tensorboard(run, tmp_path / "logs", phase="prefill")
    home = tmp_path / "logs" / "run"
    assert [path.name for path in home.iterdir()] == ["prefill"]
    clock = scalars(home / "prefill", f"SM clock MHz/{UUID} (rank 0)")
    assert set(clock.values()) == {1755.0}
    spans, power = run.spans(), run.power()
    watts = scalars(home / "prefill", f"power W/{UUID} (rank 0)")
    step = sorted(watts)[3]
    row = spans[spans["step"] == step].iloc[0]
    inside = power[power["time_ns"].between(row["start_ns"], row["end_ns"])]
    assert watts[step] == pytest.approx(inside["power_mw"].astype(float).mean() / 1e3)


def test_loads_alone_and_fewer_steps(make_run: MakeRun, tmp_path: Path) -> None:
    written = write_tensorboard(open_run(make_run(steps=6)), tmp_path / "logs", steps=3)
    assert len(written.files) == 1, "nothing was timed, so there is no trace"
    assert scalars(written.files[0].parent, "gini/layer 3").keys() == {0, 2, 5}


def test_the_command_refuses_what_it_cannot_write(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = str(make_run()), tmp_path / "logs"
    assert main(["export", run, "tensorboard", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["points"] == 18
    assert main(["export", run, "tensorboard", "--out", str(out)]) == 1
    assert "is there already" in capsys.readouterr().err
    with pytest.raises(RunError, match="no steps"):
        write_tensorboard(open_run(run), tmp_path / "other", phase="decode")
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    assert main(["export", run, "tensorboard", "--out", str(tmp_path / "third")]) == 1
    assert "pip install 'moe-observatory[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "third").exists() or not any((tmp_path / "third").iterdir())


#: Stands in for the charts of Google, which the plugin loads from the internet: each writes out its rows.
CHARTS = """
class Table { constructor() { this.lines = [] }
  addColumn(column) { this.lines.push(column.label) }
  addRows(rows) { this.lines.push(...rows.map(row => row.join(' '))) }
  setProperty() {} }
class Chart { constructor(box) { this.box = box }
  draw(table, options) { this.box.innerText = [options.title, ...table.lines].join('\\n') }
  clearChart() {} getSelection() { return [] } setSelection() {} }
window.google = { charts: { load: async () => {} }, visualization: { DataTable: Table, Table: Chart,
  ColumnChart: Chart, PieChart: Chart, LineChart: Chart, ComboChart: Chart, SteppedAreaChart: Chart,
  arrayToDataTable: rows => { const made = new Table(); made.addRows(rows); return made },
  events: { addListener: () => {} } } };
"""


@pytest.fixture
def board(tmp_path: Path) -> Iterator[str]:
    """Address of a TensorBoard that shows the run of two ranks."""
    pytest.importorskip("torch_tb_profiler")
    write_tensorboard(open_run(two_ranks(tmp_path / "run")), tmp_path / "logs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path / "logs")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--load_fast=false"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}/"
    try:
        end = time.monotonic() + 120
        while not loaded(address):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def loaded(address: str) -> bool:
    """Whether the plugin has read every trace, and TensorBoard the events."""
    try:
        with urllib.request.urlopen(f"{address}data/plugin/pytorch_profiler/runs", timeout=10) as answer:
            traces = json.load(answer)
        with urllib.request.urlopen(f"{address}data/plugin/scalars/tags", timeout=10) as answer:
            return bool(traces["runs"]) and not traces["loading"] and bool(json.load(answer))
    except OSError:
        return False


@pytest.mark.slow
def test_tensorboard_shows_values_and_the_distributed_view(
    browser: webdriver.Chrome,  # noqa: F811 - the fixture
    board: str,
) -> None:
    revive(browser)
    added = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": CHARTS})
    try:
        browser.get(f"{board}#timeseries")
        has = "return arguments[0].every(text => document.body.innerText.includes(text))"
        wait(browser, has, ["run/prefill", "gini", "waiting ms"], seconds=60)
        browser.get("about:blank")
        browser.get(f"{board}#pytorch_profiler")
        wait(browser, "return document.querySelector('iframe') !== null", seconds=60)
        browser.switch_to.frame(browser.find_element("css selector", "iframe"))
        choose(browser, "Overview", "Distributed")
        wait(browser, has, ["run/prefill", "Synchronizing/Communication Overview"], seconds=60)
        # Waiting, by the plugin's rule: what an exchange lasts on this rank beyond the least of all ranks.
        wait(browser, has, ["rank_00000 250 50", "rank_00001 250 0", "nccl:all_gather"], seconds=60)
    finally:
        browser.switch_to.default_content()
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


def choose(driver: webdriver.Chrome, now: str, then: str) -> None:
    """Choose another entry of the list that shows ``now``."""
    button = "[...document.querySelectorAll('[role=button]')].find(e => e.innerText === arguments[0])"
    wait(driver, f"return {button} !== undefined", now, seconds=60)
    found: Any = driver.execute_script(f"return {button}", now)
    found.click()
    entry = "[...document.querySelectorAll('li[role=option]')].find(e => e.innerText === arguments[0])"
    wait(driver, f"return {entry} !== undefined", then, seconds=60)
    driver.execute_script(f"{entry}.click()", then)
