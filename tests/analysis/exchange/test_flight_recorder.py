"""Flight recorder dumps, and what they say of exchanges.

``gloo-flight-recorder.json`` was written by the recorder of torch 2.13 (``_dump_fr_trace_json``) on rank 0 of
two gloo ranks: all-to-all, send, all-reduce, all-to-all in a second group, all-gather, reduce-scatter,
all-to-all of lists, barrier, and an all-to-all that the other rank has not begun. Dumps of NCCL are made of
it by hand, with the fields that torch's ``FlightRecorder.hpp`` names: no NCCL was at hand.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from observatory.analysis.exchange import recorder_agreement, recorder_gaps, with_recorder_dumps
from observatory.cli import main
from observatory.errors import RunFormatError
from observatory.run import flight_recorder
from observatory.run.flight_recorder import (
    RecorderDump,
    RecorderIndex,
    parse_recorder_dump,
    read_recorder_dump,
)
from observatory.run.manifest import ClockSpec
from tests.analysis.exchange.tables import collective
from tests.analysis.exchange.test_exchange_report import write

REAL = Path(__file__).with_name("gloo-flight-recorder.json")
SENT = 6 * 4 * 2  # bfloat16


def dump(change: Callable[[dict[str, Any]], object] = lambda _entry: None) -> RecorderDump:
    """The real dump with its entries changed."""
    document = json.loads(REAL.read_text(encoding="utf-8"))
    for entry in document["entries"]:
        change(entry)
    return parse_recorder_dump(json.dumps(document).encode(), name="x")


def nccl(entry: dict[str, Any]) -> None:
    """As NCCL's process group writes it, with timing."""
    entry["profiling_name"] = entry["profiling_name"].replace("gloo", "nccl")
    if entry["retired"]:
        entry |= {"state": "completed", "duration_ms": 0.25}


def ask(index: RecorderIndex, number: int, sent: list[int] | None, **others: Any) -> Any:
    return index.match(
        **{
            "backend": "gloo",
            "group": "0",
            "number": number,
            "send_bytes": sent,
            "receive_bytes": sent,
            **others,
        }
    )


def test_a_dump_of_the_real_recorder_is_read_without_its_sends() -> None:
    read = read_recorder_dump(REAL)
    assert read.version == "2.10"
    assert [(entry.backend, entry.process_group[0], entry.number) for entry in read.entries] == [
        ("gloo", "0", 1), ("gloo", "0", 3), ("gloo", "1", 1), ("gloo", "0", 4), ("gloo", "0", 5),
        ("gloo", "0", 6), ("gloo", "0", 7), ("gloo", "0", 8),
    ]  # fmt: skip
    assert [entry.collective_seq_id for entry in read.entries] == [1, 2, 1, 3, 4, 5, 6, 7]


def test_gloo_s_entries_tell_the_start_and_no_duration() -> None:
    ahead_ns = 1_000_000_000_000_000_000
    index = RecorderIndex(dump().entries, unix_minus_monotonic_ns=ahead_ns)
    outcome = ask(index, 1, [16, 32])
    assert outcome.start_ns == dump().entries[0].time_created_ns - ahead_ns
    assert (outcome.duration_ns, outcome.problem, outcome.final) == (
        None,
        "no duration: gloo did not time it",
        True,
    )
    in_flight = ask(index, 8, [16, 32])
    assert in_flight.problem == "no duration: it was not over when the recorder was read"
    assert not in_flight.final
    assert ask(RecorderIndex(dump().entries), 1, [16, 32]).start_ns is None


def test_nccl_s_entries_are_numbered_otherwise_and_tell_the_duration() -> None:
    index = RecorderIndex(dump(nccl).entries)
    outcome = ask(index, 5, [8, 8], backend="nccl")
    assert (outcome.duration_ns, outcome.problem) == (250_000, None)
    untimed = RecorderIndex(entry.model_copy(update={"duration_ms": None}) for entry in dump(nccl).entries)
    assert ask(untimed, 5, [8, 8], backend="nccl").problem.endswith("set TORCH_NCCL_ENABLE_TIMING=1")


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({"number": 3, "sent": [40, 8]}, "is another: 12 bytes sent, not 48"),  # the all-reduce
        ({"number": 2, "sent": [16, 32]}, "no entry of it"),  # the send
        ({"number": 99, "sent": [16, 32]}, "no entry of it"),
        ({"number": 1, "sent": [16, 32], "group": "7"}, "no entry of it"),
        ({"number": 1, "sent": [16, 32], "backend": "nccl"}, "no entry of it"),
        ({"number": None, "sent": [16, 32]}, "no number"),
        ({"number": 1, "sent": [16, 32], "group": None}, "no number"),
    ],
)
def test_what_does_not_belong_together_is_not_put_together(asked: dict[str, Any], problem: str) -> None:
    outcome = ask(RecorderIndex(dump().entries, unix_minus_monotonic_ns=0), **asked)
    assert problem in outcome.problem
    assert (outcome.start_ns, outcome.duration_ns) == (None, None)


def test_sizes_are_compared_as_far_as_an_operation_tells_them() -> None:
    index = RecorderIndex(dump().entries)
    # the gather's row says what it gets from everybody, its entry sends what one rank gives
    assert ask(index, 4, [48, 48]).problem == "no duration: gloo did not time it"
    assert "96 bytes received, not 100" in ask(index, 4, [50, 50]).problem
    # gloo scatters by an all-reduce of the whole
    assert ask(index, 5, [48, 48]).problem == "no duration: gloo did not time it"
    assert ask(index, 1, None).problem == "no duration: gloo did not time it"
    strange = RecorderIndex(dump(lambda entry: entry.update(input_dtypes=["Odd"])).entries)
    assert ask(strange, 1, [1, 1], receive_bytes=[16, 32]).problem == "no duration: gloo did not time it"


def test_parts_of_a_coalesced_collective_are_not_distinguished() -> None:
    twice = dump(nccl).entries[0]
    index = RecorderIndex([twice, twice.model_copy(update={"op_id": 2})])
    assert (
        ask(index, 1, [16, 32], backend="nccl").problem == "the recorder holds several entries of its number"
    )
    sends = RecorderIndex([twice.model_copy(update={"is_p2p": True})])
    assert "no entry" in ask(sends, 1, [16, 32], backend="nccl").problem


def test_a_group_that_has_the_name_of_an_earlier_one_is_not_taken_for_it() -> None:
    earlier = [entry.model_copy(update={"time_created_ns": 1}) for entry in dump().entries]
    later = dump().entries[:2]
    index = RecorderIndex([*earlier, *later], unix_minus_monotonic_ns=0)
    assert ask(index, 1, [16, 32]).start_ns == later[0].time_created_ns
    assert "no entry" in ask(index, 6, [8, 8]).problem


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x80\x04\x95", "is a pickle, which could run code"),
        (b"", "is no flight recorder dump"),
        (b"[]", "is no flight recorder dump"),
        (b"[" * 100_000, "is no flight recorder dump"),
        (b'{"version": "3.0"}', "of version 3.0; expected 2.x"),
        (b'{"version": "2.10", "entries": 7}', "entries: "),
        (REAL.read_bytes()[:-200], "is no flight recorder dump"),
        (
            REAL.read_bytes().replace(b'"retired": true', b'"duration_ms": NaN, "retired": true', 1),
            "no flight",
        ),
        (
            REAL.read_bytes().replace(b'"retired": true', b'"duration_ms": -1, "retired": true', 1),
            "duration_ms",
        ),
        (REAL.read_bytes().replace(b"[6, 4]", b"[6, -4]", 1), "input_sizes"),
        (REAL.read_bytes().replace(b"[6, 4]", b"[6, 99999999999999999999]", 1), "input_sizes"),
        (REAL.read_bytes().replace(b"[6, 4]", b"[" + b"1," * 70 + b"1]", 1), "input_sizes"),
        (REAL.read_bytes().replace(b"default_pg", b"x" * 5000, 1), "process_group"),
        (REAL.read_bytes().replace(b"default_pg", b"\xff\xfe", 1), "no flight"),
    ],
)
def test_what_is_no_dump_is_refused_in_one_sentence(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "dump.json").write_bytes(content)
    with pytest.raises(RunFormatError) as caught:
        read_recorder_dump(tmp_path / "dump.json")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_files_that_are_none_or_too_large_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "pipe"):
        with pytest.raises(RunFormatError, match="cannot be read"):
            read_recorder_dump(path)
    monkeypatch.setattr(flight_recorder, "MAX_DOCUMENT_BYTES", 100)
    with pytest.raises(RunFormatError, match="is over"):
        read_recorder_dump(REAL)


def nccl_rows(duration_us: tuple[int, int] = (300, 250)) -> pd.DataFrame:
    """Rank 0's all-to-all of lists and its late all-to-all, beside rank 1's."""
    first = collective([0, 40], [duration_us[0], 40 + duration_us[1]], [[8, 8], [8, 8]])
    last = collective([900, 900], [None, None], [[16, 32], [32, 16]], sequence=1)
    rows = pd.concat([first, last], ignore_index=True)
    return rows.assign(backend_group="0", backend_sequence=pd.array([5, 5, 7, 7], "Int64"))


def test_dumps_are_set_next_to_the_rows_of_their_rank() -> None:
    ahead_ns = dump().entries[5].time_created_ns - 30_000
    clocks = {0: ClockSpec(method="none", unix_minus_monotonic_ns=ahead_ns)}
    frame = with_recorder_dumps(nccl_rows(), {0: dump(nccl)}, clocks=clocks)
    assert frame["recorder_duration_ns"].tolist() == [250_000, pd.NA, pd.NA, pd.NA]
    assert frame["recorder_start_ns"].tolist()[:2] == [30_000, pd.NA]
    assert recorder_gaps(frame) == {"no duration: it was not over when the recorder was read": 1}
    without = with_recorder_dumps(nccl_rows(), {0: dump(nccl)}, clocks={})
    assert without["recorder_start_ns"].isna().all()
    assert without["recorder_duration_ns"].tolist()[0] == 250_000


def test_agreement_counts_what_differs_and_what_cannot_be() -> None:
    base = pd.concat(
        [
            collective([0, 0], [100, 100], [[1, 1], [1, 1]], sequence=number, backend="gloo")
            for number in range(4)
        ],
        ignore_index=True,
    )
    mine = base["source_rank"] == 0
    # within 20 us; a tenth apart; no duration; a start after the end
    durations = pd.array([90_000, 175_000, None, 100_000], "Int64")
    starts = pd.array([5_000, 7_000, 9_000, 101_000], "Int64")
    outcome = pd.DataFrame(
        {"recorder_start_ns": starts, "recorder_duration_ns": durations}, index=base.index[mine]
    )
    (own, other) = recorder_agreement(base.join(outcome)).itertuples()
    assert (own.source_rank, own.exchanges, own.found, own.timed, own.outside, own.differ) == (
        0,
        4,
        4,
        3,
        1,
        1,
    )
    assert own.start_p50_s == pytest.approx(8e-6)
    assert own.start_worst_s == pytest.approx(101e-6)
    assert own.duration_p50_s == pytest.approx(100e-6)
    assert own.recorder_duration_p50_s == pytest.approx(100e-6)
    assert own.difference_worst_s == pytest.approx(75e-6)
    assert (other.exchanges, other.found, other.timed, other.differ) == (4, 0, 0, 0)
    on_device = recorder_agreement(base.join(outcome).assign(backend="nccl"))
    assert on_device["outside"].sum() == 0  # there the start of the row is the device's, not the host's


def test_rows_of_older_runs_say_why_no_entry_was_found() -> None:
    old = nccl_rows().drop(columns=["backend_group", "backend_sequence"])
    frame = with_recorder_dumps(old, {0: dump(nccl)}, clocks={})
    assert recorder_gaps(frame) == {"the exchange has no number by which the recorder could know it": 2}


def run_of(tmp_path: Path) -> Path:
    return write(tmp_path / "run", nccl_rows())


def test_the_command_shows_a_dump_next_to_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(REAL.read_text(encoding="utf-8"))
    for entry in document["entries"]:
        nccl(entry)
    (tmp_path / "dump.json").write_text(json.dumps(document), encoding="utf-8")
    run = run_of(tmp_path)
    option = ["--flight-recorder", f"0={tmp_path / 'dump.json'}"]
    assert main(["exchanges", str(run), *option, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["flight_recorder"]
    row = next(row for row in found["agreement"] if row["source_rank"] == 0)
    assert (row["found"], row["timed"], row["differ"]) == (2, 1, 1)
    assert row["difference_p50_s"] == pytest.approx(-50e-6)
    assert found["gaps"] == [{"reason": "no duration: it was not over when the recorder was read", "rows": 1}]
    assert main(["exchanges", str(run), *option]) == 0
    said = capsys.readouterr()
    assert "flight recorder against the probe" in said.out
    assert "flight recorder, 1 of 4 rows: no duration" in said.err
    assert main(["exchanges", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["flight_recorder"] is None


@pytest.mark.parametrize(
    "texts",
    [["dump.json"], ["2=dump.json"], ["-1=dump.json"], ["0="], ["0=dump.json", "0=dump.json"], ["0=nothing"]],
)
def test_the_command_refuses_what_names_no_dump(
    tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = [word for text in texts for word in ("--flight-recorder", text)]
    assert main(["exchanges", str(run_of(tmp_path)), *options]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1


def test_a_rank_s_status_relates_its_wall_clock_to_its_monotonic_one(tmp_path: Path) -> None:
    status = json.loads((run_of(tmp_path) / "ranks/rank-00000.json").read_text(encoding="utf-8"))
    ahead_ns = status["clock"]["unix_minus_monotonic_ns"]
    assert abs(ahead_ns - (time.time_ns() - time.monotonic_ns())) < 10**9
