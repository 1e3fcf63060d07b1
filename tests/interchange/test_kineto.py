"""Traces of PyTorch's profiler: what an exchange is, its bytes, its step, and clocks of several ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from observatory.interchange.importers.alignment import Exchange, align_ranks
from observatory.interchange.importers.json_stream import stream_json
from observatory.interchange.importers.sources import Source
from observatory.run import open_run
from tests.interchange.test_importers import imported, refusal, written

BASE_NS = 1_700_000_000_000_000_000


def event(category: str, name: str, at: float, long: float, **arguments: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "tid": 7, "ts": at, "dur": long, "args": arguments}


def stated(**changes: Any) -> dict[str, Any]:
    return {
        "Collective name": "all_to_allv",
        "In msg nelems": 80,
        "Out msg nelems": 100,
        "In split size": "[3, 5]",
        "Out split size": "[5, 5]",
        "dtype": "BFloat16",
        "Process Group Ranks": "[0, 1]",
        "Group size": 2,
        **changes,
    }


def trace(tmp_path: Path, *events: dict[str, Any], rank: int = 0, ranks: int = 2, **more: Any) -> Path:
    facts = {"backend": "nccl", "rank": rank, "world_size": ranks}
    document = {"schemaVersion": 1, "distributedInfo": facts, "baseTimeNanoseconds": BASE_NS}
    return written(
        tmp_path,
        f"{rank}.json",
        json.dumps({**document, "traceEvents": list(events), **more}, allow_nan=True),
    )


def rows_of(path: Path) -> list[dict[str, Any]]:
    frame = open_run(path).exchanges()
    return [
        {key: list(value) if isinstance(value, np.ndarray | list) else value for key, value in row.items()}
        for row in frame.to_dict("records")
    ]


def test_a_kernel_that_states_its_collective_has_bytes_of_each_rank(tmp_path: Path) -> None:
    path = trace(
        tmp_path,
        event("user_annotation", "ProfilerStep#41", 0, 50),
        event("user_annotation", "ProfilerStep#42", 50, 50),
        event("cuda_runtime", "cudaLaunchKernel", 49, 1, correlation=5),
        event("kernel", "ncclDevKernel_SendRecv", 60, 12.5, correlation=5, **stated()),
        event(
            "kernel",
            "ncclDevKernel_AllReduce",
            80,
            5,
            correlation=6,
            **stated(**{"Collective name": "allreduce"}),
        ),
        event("kernel", "ncclDevKernel_SendRecv", 90, 5, correlation=9, **stated(**{"In split size": "[]"})),
    )
    first, second = rows_of(imported(tmp_path, "auto", path, "--phase", "decode"))
    assert first["send_bytes"] == [60, 100]  # 80 elements of 2 bytes in 8 rows
    assert first["receive_bytes"] == [100, 100]
    assert (first["start_ns"], first["end_ns"]) == (BASE_NS + 60_000, BASE_NS + 72_500)
    assert (first["step"], first["group"], first["phase"]) == (41, "0-1", "decode")  # launched in step 41
    assert second["send_bytes"] == [80, 80]
    assert (second["step"], second["sequence"]) == (42, 1)


def test_what_is_cut_or_not_stated_stays_unknown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cut = {"In split size": "[1, 2, ...]", "Process Group Ranks": "[0, 1, ...]", "Group size": 64}
    path = trace(tmp_path, event("kernel", "k", 1, 1, **stated(**cut)), ranks=128)
    (row,) = rows_of(imported(tmp_path, "auto", path))
    assert row["send_bytes"] is None
    assert row["group"] == "world"
    notes = capfd.readouterr().err
    assert "not stated for 1 exchange" in notes
    assert "cut or not stated, taken as all 128" in notes
    assert "no steps are marked" in notes


@pytest.mark.parametrize(
    "changes",
    [
        {"In split size": "[3, 5, 7]"},
        {"In split size": "[0, 0]"},
        {"In split size": "[3, 4]"},
        {"In msg nelems": -8},
        {"In msg nelems": 1 << 61},
        {"In split size": [3, 5]},
    ],
)
def test_bytes_that_do_not_fit_are_not_made_up(tmp_path: Path, changes: dict[str, Any]) -> None:
    (row,) = rows_of(
        imported(tmp_path, "auto", trace(tmp_path, event("kernel", "k", 1, 1, **stated(**changes))))
    )
    assert row["send_bytes"] is None
    assert row["receive_bytes"] == [100, 100]


def test_elements_of_a_type_that_is_not_known_have_no_bytes(tmp_path: Path) -> None:
    kernel = event("kernel", "k", 1, 1, **stated(dtype="Quaternion"))
    (row,) = rows_of(imported(tmp_path, "auto", trace(tmp_path, kernel)))
    assert (row["send_bytes"], row["receive_bytes"]) == (None, None)


def test_a_kernel_without_arguments_is_known_by_the_annotation_that_launched_it(tmp_path: Path) -> None:
    call = {"Input Dims": [[10, 4], [8, 4]], "Input type": ["float", "float"], "Concrete Inputs": [""] * 3}
    call["Concrete Inputs"] += ["[4, 6]", "[3, 5]"]
    path = trace(
        tmp_path,
        event("cpu_op", "c10d::alltoall_base_", 10, 5, **call),
        event("user_annotation", "nccl:all_to_all", 11, 3),
        event("cuda_runtime", "cudaLaunchKernel", 12, 1, correlation=1),
        event("kernel", "ncclKernel_SendRecv", 20, 4, correlation=1),
        event("user_annotation", "nccl:all_reduce", 31, 3),
        event("cuda_runtime", "cudaLaunchKernel", 32, 1, correlation=2),
        event("kernel", "ncclKernel_SendRecv", 40, 4, correlation=2),
        event("kernel", "ncclKernel_SendRecv", 50, 4, correlation=3),
    )
    (row,) = rows_of(imported(tmp_path, "auto", path))
    assert (row["start_ns"] - BASE_NS, row["end_ns"] - BASE_NS) == (20_000, 24_000)
    assert (row["send_bytes"], row["receive_bytes"]) == ([48, 80], [64, 96])


def shared_exchange(rank: int, ahead_us: float) -> list[dict[str, Any]]:
    """Three exchanges in which rank 1 arrives later, then earlier; its clock is ahead."""
    arrivals = [(0.0, 30.0), (100.0, 90.0), (200.0, 201.0)]
    return [
        event("kernel", "k", start[rank] + ahead_us * rank, max(start) + 2 - start[rank], **stated())
        for start in arrivals
    ]


def test_clocks_are_aligned_by_what_ranks_exchange(tmp_path: Path) -> None:
    files = [trace(tmp_path, *shared_exchange(rank, 5000.0), rank=rank) for rank in (1, 0)]
    run = open_run(imported(tmp_path, "auto", *files))
    clock = run.manifest.ranks[1].clock
    assert clock is not None
    # Ends are 2 us after the last arrival: rank 1's clock is ahead by 5000 us, known to 3 and 2 us.
    assert clock.offset_ns == -5_000_000 + (2_000 - 3_000 + 1_000) // 2
    assert clock.uncertainty_ns == 2_500 - 500
    assert run.manifest.ranks[0].clock.unix_minus_monotonic_ns == 0
    assert run.manifest.ranks[1].host is None
    assert run.manifest.ranks[1].cores is None


def exchange(start: int, end: int, send: list[int] | None = None) -> Exchange:
    return Exchange(step=0, group="0-1", sequence=0, start_ns=start, end_ns=end, send_bytes=send)


def test_exchanges_bound_the_offset_from_both_sides() -> None:
    clocks, problem = align_ranks({0: [exchange(0, 100)], 1: [exchange(1050, 1080)]})
    assert problem is None
    # -1080 <= offset <= 100 - 1050
    assert (clocks[1].offset_ns, clocks[1].uncertainty_ns) == (-1015, 65)


def test_exchanges_that_bound_nothing_or_contradict_align_nothing() -> None:
    clocks, problem = align_ranks({0: [exchange(0, 100)], 1: [exchange(0, 100, send=[0, 5])]})
    assert set(clocks) == {0}
    assert problem is not None
    assert "shares no exchange" in problem
    first = [exchange(0, 10), Exchange(step=0, group="0-1", sequence=1, start_ns=100, end_ns=110)]
    second = [exchange(0, 10), Exchange(step=0, group="0-1", sequence=1, start_ns=500, end_ns=510)]
    clocks, problem = align_ranks({0: first, 1: second})
    assert set(clocks) == {0}
    assert problem is not None
    assert "contradict" in problem


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"traceEvents": []}', "holds no traceEvents"),
        (
            '{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "nccl", "ts": "soon"}]}',
            "event without a time",
        ),
        (
            '{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "nccl", "ts": 1e300}]}',
            "time that cannot be",
        ),
        ('{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "nccl", "ts": NaN}]}', "no JSON document"),
        ('{"traceEvents": [' + "[" * 100_000, "nested too deeply"),
        ('{"traceEvents": {"ph": "X"}} ', "holds no all-to-all"),
        ('{"traceEvents" []}', "stands where ':' should"),
        ('{"traceEvents": []', "ends in the middle of its JSON"),
        ('{"traceEvents": [{"name": "nccl', "ends in the middle of its JSON"),
        ("[]", "stands where '{' should"),
        ('{"a": 1, 2: 3}', "a key is no text"),
        ('{"traceEvents": [{"ph": "X"', "ends in the middle of its JSON"),
        ('{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "gemm", "ts": 1}]}', "holds no all-to-all"),
        ('{"traceEvents": [1, null, {"ph": 3}]}', "holds no all-to-all"),
    ],
)
def test_files_that_are_no_traces_of_exchanges_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: str, expected: str
) -> None:
    assert expected in refusal(tmp_path, capfd, "kineto", written(tmp_path, "t.json", content))


def test_items_are_the_same_wherever_blocks_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [1234567, -1.5e3, 'ä[{\\"', {"a": [1, {"b": None}]}, [], True]
    document = {"first": "x", "long": items, "last": {"y": 987654}}
    path = written(tmp_path, "j", json.dumps(document, ensure_ascii=False, indent=1))
    for size in range(1, 40):
        monkeypatch.setattr("observatory.interchange.importers.sources._BLOCK_BYTES", size)
        found = list(stream_json(Source(path), "long"))
        assert found == [("first", "x"), *(("long", item) for item in items), ("last", {"y": 987654})]


def test_two_files_of_one_rank_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = trace(tmp_path, event("kernel", "k", 1, 1, **stated()))
    copy = written(tmp_path, "copy.json", path.read_bytes())
    assert "are of rank 0" in refusal(tmp_path, capfd, "auto", path, copy)
