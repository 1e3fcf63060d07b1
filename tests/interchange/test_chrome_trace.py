"""A run as a trace: well formed, every value a row of the run, all times on one axis."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from observatory.cli import main
from observatory.errors import RunError
from observatory.interchange.exporters.chrome_trace.lanes import MOST_LANES, Lanes
from observatory.interchange.exporters.chrome_trace.trace import write_chrome_trace
from observatory.run import RunWriter, open_run
from observatory.run.manifest import ClockSpec, DeviceSpec, StepMark
from tests.analysis.exchange.tables import collective
from tests.reports.sample_power import UUID, a_load, a_power_run, samples_of
from tests.reports.sample_runs import manifest
from tests.reports.test_report import HOSTILE

COUNTERS = {
    "power_mw": ("power", "W", 1000),
    "sm_clock_mhz": ("SM clock", "MHz", 1),
    "memory_clock_mhz": ("memory clock", "MHz", 1),
    "temperature_c": ("temperature", "degrees C", 1),
    "enforced_limit_mw": ("power limit", "W", 1000),
}


def read(path: Path) -> dict[str, Any]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    document: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return document


def traced(run: Path, out: Path, **options: Any) -> list[dict[str, Any]]:
    write_chrome_trace(open_run(run), out, **options)
    document = read(out)
    check(document)
    events: list[dict[str, Any]] = document["traceEvents"]
    return events


def check(document: dict[str, Any]) -> None:
    """What the Trace Event Format asks of a file, and viewers of slices on one thread."""
    slices: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    named = set()
    for event in document["traceEvents"]:
        assert {"ph", "name", "pid", "tid", "args"} <= event.keys()
        assert isinstance(event["pid"], int)
        assert event["ph"] in ("X", "C", "i", "M")
        if event["ph"] == "M":
            named.add((event["name"], event["pid"], event["tid"]))
            continue
        assert event["ts"] >= 0
        assert ("process_name", event["pid"], 0) in named, "a process is named before it is used"
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert ("thread_name", event["pid"], event["tid"]) in named
            slices[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        if event["ph"] == "C":
            assert len(event["args"]) == 1
            assert all(isinstance(value, int | float) for value in event["args"].values())
    for own in slices.values():
        own.sort()
        for (_, end), (start, _) in pairwise(own):
            assert start >= end - 1e-6, "slices of one thread lie apart"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_power_run(tmp_path_factory.mktemp("run") / "run")


def ranked(path: Path, rows: pd.DataFrame, clocks: list[ClockSpec | None]) -> Path:
    """A run whose ranks have clocks of their own."""
    writers = [RunWriter.create(path, manifest(ranks=len(clocks)))]
    writers += [RunWriter.join(path, rank=rank) for rank in range(1, len(clocks))]
    for writer, clock in reversed(list(zip(writers, clocks, strict=True))):
        own = rows[rows["source_rank"] == writer.rank].astype({"source_rank": "int32", "layer": "int32"})
        writer.append("exchange", pa.Table.from_pandas(own, preserve_index=False))
        if clock is not None:
            writer.set_clock(clock)
        writer.close(steps=1)
    return path


def held(events: list[dict[str, Any]], name: str, unit: str, at_us: list[float]) -> list[float]:
    """What a viewer shows of a counter at these times: the value last written."""
    own = sorted(
        (event["ts"], event["args"][unit]) for event in events if event["ph"] == "C" and event["name"] == name
    )
    times = [ts for ts, _ in own]
    return [own[int(np.searchsorted(times, at + 1e-3, side="right")) - 1][1] for at in at_us]


def test_counters_show_every_sample_at_its_time(run: Path, tmp_path: Path) -> None:
    events = traced(run, tmp_path / "trace.json")
    opened = open_run(run)
    rows = opened.power()
    base_ns = min(rows["time_ns"].min(), opened.spans()["start_ns"].min())
    at_us = ((rows["time_ns"] - base_ns) / 1e3).tolist()
    for column, (name, unit, factor) in COUNTERS.items():
        shown = [round(value * factor) for value in held(events, name, unit, at_us)]
        assert shown == rows[column].tolist(), column
    last = max(event["ts"] for event in events if event["ph"] == "C" and event["name"] == "memory clock")
    assert last == pytest.approx(at_us[-1]), "a counter that never changes ends where its samples do"


def test_spans_and_samples_have_one_axis(run: Path, tmp_path: Path) -> None:
    events = traced(run, tmp_path / "trace.json")
    spans = open_run(run).spans()
    base_ns = min(open_run(run).power()["time_ns"].min(), spans["start_ns"].min())
    drawn = [event for event in events if event["ph"] == "X" and event["cat"] == "span"]
    assert [event["ts"] for event in drawn] == pytest.approx(((spans["start_ns"] - base_ns) / 1e3).tolist())
    assert [event["dur"] for event in drawn] == pytest.approx(
        ((spans["end_ns"] - spans["start_ns"]) / 1e3).tolist()
    )
    assert [event["name"] for event in drawn] == spans["phase"].tolist()
    prefill = [event for event in drawn if event["name"] == "prefill"]
    caps = [event for event in events if event["name"] == "power cap"]
    assert caps[0]["ts"] == pytest.approx(prefill[0]["ts"], abs=60e3)
    assert caps[-1]["ts"] + caps[-1]["dur"] == pytest.approx(prefill[-1]["ts"] + prefill[-1]["dur"], abs=60e3)


def test_what_a_counter_cannot_show_is_marked(tmp_path: Path) -> None:
    power = samples_of(a_load())
    power.loc[20:29, "power_mw"] = np.nan
    power = power.drop(index=range(60, 80))
    events = traced(a_power_run(tmp_path / "run", power=power), tmp_path / "trace.json")
    marks = [event["name"] for event in events if event["ph"] == "i"]
    assert marks == ["power not reported from here", "no samples from here", "last sample"]
    hole = next(event for event in events if event["name"] == "no samples from here")
    assert hole["args"]["seconds"] == pytest.approx(1.05, abs=0.01)


def test_exchanges_of_all_ranks_lie_on_the_reference_clock(tmp_path: Path) -> None:
    """Rank 1 reads a clock that is a second behind; its exchange is at the same moment."""
    rows = collective([2_000_000, 1_000_000], [2_000_400, 1_000_400], [[1, 2], [3, 4]])
    clocks = [
        ClockSpec(offset_ns=0, uncertainty_ns=0, method="ping-pong"),
        ClockSpec(offset_ns=10**9, uncertainty_ns=100, method="ping-pong"),
    ]
    path = ranked(tmp_path / "run", rows, clocks)
    events = traced(path, tmp_path / "trace.json")
    drawn = [event for event in events if event["ph"] == "X"]
    assert [(event["pid"], event["ts"], event["dur"]) for event in drawn] == [
        (1, 0.0, 400.0),
        (2, 0.0, 400.0),
    ]
    assert drawn[0]["args"]["send_bytes_total"] == 3
    clock = open_run(path).manifest.ranks[0].clock
    assert clock is not None
    assert clock.unix_minus_monotonic_ns is not None
    unix_ns = read(tmp_path / "trace.json")["baseTimeNanoseconds"]
    assert unix_ns == 2_000_000_000 + clock.unix_minus_monotonic_ns


def test_a_rank_whose_clock_is_not_aligned_begins_at_zero_and_is_named(tmp_path: Path) -> None:
    rows = collective([2_000_000, 77_000_000], [2_000_400, 77_000_400], [[1, 2], [3, 4]])
    clocks = [ClockSpec(offset_ns=0, uncertainty_ns=0, method="ping-pong"), None]
    path = ranked(tmp_path / "run", rows, clocks)
    outcome = write_chrome_trace(open_run(path), tmp_path / "trace.json")
    document = read(tmp_path / "trace.json")
    assert max(event["ts"] for event in document["traceEvents"] if event["ph"] == "X") == 0.0
    names = [event["args"]["name"] for event in document["traceEvents"] if event["name"] == "process_name"]
    assert names == ["rank 0", "rank 1 (clock not aligned)"]
    assert "its first event is put at 0" in outcome.notes[0]
    assert outcome.notes[0] in document["otherData"]["notes"]


def test_exchanges_at_the_same_time_get_lanes(tmp_path: Path) -> None:
    rows = pd.concat(
        [
            collective([start], [start + 300], [[7]], sequence=sequence)
            for sequence, start in enumerate((1000, 1100, 1200, 1300, 1600))
        ]
    )
    path = ranked(tmp_path / "run", rows, [None])
    events = traced(path, tmp_path / "trace.json")
    tids = [event["tid"] for event in events if event["ph"] == "X"]
    assert tids == [1000, 1001, 1002, 1000, 1000]
    names = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == {"exchanges", "exchanges 2", "exchanges 3"}


def test_lanes_are_bounded_and_what_does_not_fit_is_counted() -> None:
    lanes = Lanes("x", pid=1, tid=10)
    tids = [lanes.place(index, 10**6)[0] for index in range(MOST_LANES + 5)]
    assert max(tids) == 10 + MOST_LANES - 1
    assert lanes.crowded == 5
    assert lanes.place(10**6, 10**6 + 1)[0] == 10, "a lane that is over is taken again"


def test_a_span_without_an_end_is_a_mark(tmp_path: Path) -> None:
    with RunWriter.create(tmp_path / "run", manifest()) as writer:
        spans = pd.DataFrame(
            {"step": [0, 1], "phase": ["prefill"] * 2, "source_rank": pd.array([0, 0], "int32"),
             "name": ["phase", "phase"], "start_ns": [1000, 2000], "end_ns": pd.array([1500, None], "Int64")}
        )  # fmt: skip
        writer.append("spans", pa.Table.from_pandas(spans, preserve_index=False))
    events = traced(tmp_path / "run", tmp_path / "trace.json")
    assert [event["ph"] for event in events if event["ph"] != "M"] == ["X", "i"]
    assert "1 spans or exchanges have no end" in read(tmp_path / "trace.json")["otherData"]["notes"][0]


def test_moments_that_were_named_stand_at_their_time(tmp_path: Path) -> None:
    rows = collective([1], [3], [[8]])
    writer = RunWriter.create(tmp_path / "run", manifest())
    own = rows.astype({"source_rank": "int32", "layer": "int32"})
    writer.append("exchange", pa.Table.from_pandas(own, preserve_index=False))
    for name, time_ns in (("before the capture", 500), (HOSTILE[:200], 2_000)):
        writer.add_mark(StepMark(name=name, step=7, time_ns=time_ns, unix_s=1.0))
    writer.close(steps=1)
    events = traced(tmp_path / "run", tmp_path / "trace.json")
    (mark,) = (event for event in events if event.get("cat") == "mark")
    assert (mark["ph"], mark["name"], mark["ts"], mark["args"]) == ("i", HOSTILE[:200], 1.0, {"step": 7})


def test_a_folder_has_one_file_per_rank_and_gzip_the_same_events(run: Path, tmp_path: Path) -> None:
    outcome = write_chrome_trace(open_run(run), tmp_path / "folder")
    assert [path.name for path in outcome.files] == ["rank-00000.json"]
    write_chrome_trace(open_run(run), tmp_path / "trace.json.gz")
    plain, packed = read(outcome.files[0]), read(tmp_path / "trace.json.gz")
    assert plain["traceEvents"] == packed["traceEvents"]
    assert len(plain["traceEvents"]) == outcome.events
    assert plain["distributedInfo"] == {"rank": 0, "world_size": 1}


def test_phase_and_steps_choose_and_samples_follow(run: Path, tmp_path: Path) -> None:
    events = traced(run, tmp_path / "trace.json", phase="decode", steps=5)
    drawn = [event for event in events if event["ph"] == "X" and event["cat"] == "span"]
    assert [event["name"] for event in drawn] == ["decode"] * 5
    decode = open_run(run).spans()
    steps = sorted(decode.loc[decode["phase"] == "decode", "step"])
    assert [drawn[0]["args"]["step"], drawn[-1]["args"]["step"]] == [steps[0], steps[-1]]
    samples = [event["ts"] for event in events if event["ph"] == "C"]
    assert max(samples) <= drawn[-1]["ts"] + drawn[-1]["dur"] + 1e6


def test_hostile_text_is_escaped_and_bounded(tmp_path: Path) -> None:
    uuid = HOSTILE[:100] + "\u2028\x00"
    power = samples_of(a_load()).assign(device_uuid=uuid)
    spec = DeviceSpec(kind="gpu", name=HOSTILE * 20, uuid=uuid)
    traced(a_power_run(tmp_path / "run", power=power, devices=(spec,)), tmp_path / "trace.json")
    raw = (tmp_path / "trace.json").read_bytes()
    assert raw.isascii()
    names = [event["args"]["name"] for event in read(tmp_path / "trace.json")["traceEvents"]
             if event["name"] == "process_name"]  # fmt: skip
    assert all(len(name) < 300 for name in names)


def test_nothing_is_replaced_and_nothing_is_left_when_there_is_nothing(run: Path, tmp_path: Path) -> None:
    (tmp_path / "there.json").write_text("mine")
    with pytest.raises(RunError, match="is there already"):
        write_chrome_trace(open_run(run), tmp_path / "there.json")
    with RunWriter.create(tmp_path / "empty", manifest()):
        pass
    with pytest.raises(RunError, match="holds no spans, exchanges or power samples"):
        write_chrome_trace(open_run(tmp_path / "empty"), tmp_path / "none.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "there.json"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_run(tmp_path: Path) -> None:
    peaks = []
    for index, steps in enumerate((10_000, 40_000)):
        path = tmp_path / f"run-{index}"
        with RunWriter.create(path, manifest()) as writer:
            for first in range(0, steps, 5_000):
                start = (first + np.arange(5_000, dtype=np.int64)) * 1000
                spans = {"step": first + np.arange(5_000), "phase": ["decode"] * 5_000,
                         "source_rank": np.zeros(5_000, np.int32), "name": ["experts"] * 5_000,
                         "start_ns": start, "end_ns": start + 500}  # fmt: skip
                writer.append("spans", pa.table(spans))
                writer.flush()
        opened = open_run(path)
        tracemalloc.start()
        write_chrome_trace(opened, tmp_path / f"{index}.json")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_the_command_writes_a_trace_and_matrices_still_need_their_degree(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "trace.json"
    assert main(["export", str(run), "chrome-trace", "--out", str(out), "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["files"] == [str(out)]
    assert outcome["events"] == len(read(out)["traceEvents"])
    assert main(["export", str(run), "ucc", "--out", str(tmp_path / "ucc")]) == 1
    assert "give it with --ep" in capsys.readouterr().err
    assert UUID in out.read_text()
