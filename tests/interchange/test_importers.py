"""Files of other tools become runs and results, with the values that were worked out by hand."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import save_file

from observatory.cli import main
from observatory.interchange.importers.sources import Source
from observatory.run import Run, open_run
from observatory.run.documents.bench import BenchResult, load_bench

LOG = """> mpirun -np 4 ./alltoall_perf -b 1M
# nThread 1 nGpus 1 minBytes 1048576 maxBytes 2097152 step: 2(factor) warmup iters: 5 iters: 20 validation: 1
#
# Using devices
#   Rank  0 Pid  77 on node-a device  0 [0x1b] A100
#   Rank  1 Pid  78 on node-a device  1 [0x43] A100
#   Rank  2 Pid  79 on node-b device  0 [0x1b] A100
#   Rank  3 Pid  80 on node-b device  1 [0x43] A100
#
#                                                       out-of-place                       in-place
#       size         count      type   redop     time   algbw   busbw  error     time   algbw   busbw  error
#        (B)    (elements)                       (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
     1048576         65536     float            100.5   10.43    7.83  0e+00    99.00   10.59    7.94    N/A
     2097152        131072     float              151   13.89   10.42  0e+00   149.00   14.07   10.55    N/A
# Out of bounds values : 0 OK
# Avg bus bandwidth    : 9.1
"""


NOT_NAMED = LOG.replace("./alltoall_perf", "x")


def imported(tmp_path: Path, *arguments: str | Path, name: str = "run") -> Path:
    out = tmp_path / name
    assert main(["import", *map(str, arguments), "--out", str(out)]) == 0
    return out


def refusal(tmp_path: Path, capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capfd.readouterr()
    assert main(["import", *map(str, arguments), "--out", str(tmp_path / "none")]) == 1
    assert not (tmp_path / "none").exists()
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    return error


def written(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def loads_of(run: Run) -> dict[tuple[int, int, int], list[int]]:
    frame = run.expert_load()
    rows: dict[tuple[int, int, int], list[int]] = {}
    for row in frame.itertuples():
        rows.setdefault((row.source_rank, row.step, row.layer), []).append(int(row.load))
    return rows


def only_result(folder: Path) -> BenchResult:
    (path,) = folder.iterdir()
    return load_bench(path)


def test_a_log_that_does_not_name_its_test_is_read_by_the_command_above_it(tmp_path: Path) -> None:
    result = only_result(imported(tmp_path, "auto", written(tmp_path, "a.log", LOG)))
    assert (result.node_of_P, result.warmup, result.iterations) == ((0, 0, 1, 1), 5, 20)
    assert [case.send_bytes_PP[0] for case in result.cases] == [(262144,) * 4, (524288,) * 4]
    assert [case.median_us for case in result.cases] == [100.5, 151.0]
    assert round(result.cases[0].algbw_gb_per_s, 2) == 10.43  # as the log states
    assert round(result.cases[0].busbw_gb_per_s, 2) == 7.83
    assert all(case.correct for case in result.cases)


@pytest.mark.parametrize("before", ["", "[1,0]<stdout>:", "[prterun-n1-4@1,0]<stdout>: ", " 0: ", "12: "])
def test_logs_keep_their_rows_behind_launchers_and_debug_lines(tmp_path: Path, before: str) -> None:
    lines = LOG.splitlines()
    lines.insert(-3, "n1:7:9 [0] NCCL INFO comm 0x55 rank 0 nranks 4")
    log = "".join(f"{before}{line}\n" for line in lines)
    result = only_result(imported(tmp_path, "auto", written(tmp_path, "a.log", log)))
    assert [case.median_us for case in result.cases] == [100.5, 151.0]


def test_a_log_that_names_no_test_is_of_all_to_all_by_its_numbers(tmp_path: Path) -> None:
    result = only_result(imported(tmp_path, "auto", written(tmp_path, "a.log", NOT_NAMED)))
    assert [case.median_us for case in result.cases] == [100.5, 151.0]
    assert any("the test is not named" in note for note in result.notes)


@pytest.mark.parametrize("end", ["  15", "151", "13.89", "10.42", "n1:7:9 [0] NCCL WARN timeout"])
def test_a_row_that_is_cut_is_left_out(tmp_path: Path, end: str) -> None:
    cut = (
        LOG[: LOG.rindex("0e+00")] + end
        if "WARN" in end
        else LOG[: LOG.index(end, LOG.index(" 2097152    ")) + len(end)]
    )
    result = only_result(imported(tmp_path, "auto", written(tmp_path, "a.log", cut)))
    assert [case.median_us for case in result.cases] == [100.5]
    assert any("1 row left out that cannot be read" in note for note in result.notes)


def test_what_is_imported_names_its_file_tool_and_version(tmp_path: Path) -> None:
    log = written(tmp_path, "a.log", "# nccl-tests version 2.17.6 nccl-headers=1 nccl-library=22807\n" + LOG)
    out = imported(tmp_path, "nccl-tests", log)
    document = json.loads((out / "alltoall-0.json").read_text())
    digest = hashlib.sha256(log.read_bytes()).hexdigest()
    assert document["import"] == {
        "format": "nccl-tests",
        "version": "2.17.6",
        "files": [{"name": "a.log", "bytes": log.stat().st_size, "sha256": digest}],
    }
    assert document["software"] == {"nccl": "22807"}


def test_several_tests_of_one_log_are_told_apart(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start = "# Collective test starting: {}_perf\n"
    reduce = start.format("all_reduce") + LOG.replace("> mpirun", "# ")
    log = written(tmp_path, "a.log", reduce + start.format("alltoall") + LOG.replace("100.5", "200.5"))
    result = only_result(imported(tmp_path, "auto", log))
    assert [case.median_us for case in result.cases] == [200.5, 151.0]
    assert "no all-to-all: all_reduce" in capfd.readouterr().err


def test_wrong_bytes_are_stated(tmp_path: Path) -> None:
    log = written(tmp_path, "a.log", LOG.replace("7.83  0e+00", "7.83      3"))
    assert [case.correct for case in only_result(imported(tmp_path, "auto", log)).cases] == [False, True]


def json_result(**changes: object) -> dict[str, object]:
    per_iteration = {
        "skipped_iterations": 1,
        "times_us": [90.0, 10.0, 12.0],
        "per_process_max_times_us": [[80.0, 10.0, 11.0], [90.0, 9.0, 12.0]],
    }
    return {
        "size": 4096,
        "count": 512,
        "type": "float",
        "redop": "none",
        "root": "    -1",
        "out_of_place": {"time": 11.0, "alg_bw": 1.0, "bus_bw": 1.0, "nwrong": 0.0},
        "out_of_place_per_iter": per_iteration,
        "in_place": {"time": 9.0, "alg_bw": 1.0, "bus_bw": 1.0, "nwrong": None},
        "actual_iterations": 3,
        "experiment_name": "AlltoAll",
        **changes,
    }


def json_log(*results: dict[str, object], version: int = 3) -> str:
    device = {"group": 0, "pid": 1, "device": 0, "device_hex": "0000:1b:00", "device_info": "H100"}
    devices = [{"rank": rank, "hostname": f"n{rank}", **device} for rank in (0, 1)]
    config = {"warmup_iters": 5, "iterations": 3, "per_iter_timing": "true", "devices": devices}
    secret = "TOKEN=sesame"
    return json.dumps(
        {
            "version": version,
            "args": ["alltoall_perf"],
            "env": [secret],
            "nccl_version": 22902,
            "config": config,
            "results": results,
        }
    )


def test_json_gives_each_iteration_and_process(tmp_path: Path) -> None:
    out = imported(tmp_path, "auto", written(tmp_path, "a.json", json_log(json_result())))
    result = only_result(out)
    assert result.cases[0].rank_us_RP == ((10.0, 9.0), (11.0, 12.0))
    assert result.cases[0].send_bytes_PP == ((2048, 2048), (2048, 2048))
    assert (result.iterations, result.repeats, result.node_of_P) == (1, 2, (0, 1))
    assert "sesame" not in (out / "alltoall-0.json").read_text()


def test_times_of_processes_that_are_cut_are_not_taken(tmp_path: Path) -> None:
    cut = {"times_us": [11.0, 12.0], "per_process_max_times_us": [[10.0, 11.0], [9.0]]}
    path = written(tmp_path, "a.json", json_log(json_result(out_of_place_per_iter=cut)))
    result = only_result(imported(tmp_path, "auto", path))
    assert result.cases[0].rank_us_RP == ((11.0, 11.0), (12.0, 12.0))


def test_gpus_that_share_a_process_are_on_its_host(tmp_path: Path) -> None:
    four = json_result(size=8192, out_of_place_per_iter=None)
    result = only_result(imported(tmp_path, "auto", written(tmp_path, "a.json", json_log(four))))
    assert result.node_of_P == (
        0,
        1,
        1,
        1,
    )  # four ranks by size over count; JSON names the first of a process
    assert result.cases[0].rank_us_RP == ((11.0,) * 4,)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            LOG.split("#  ", maxsplit=1)[0] + "#   Rank  0 Pid 1 on n device 0 [0x1b] A\n",
            "of 1 rank that ended before its first",
        ),
        (LOG.replace("alltoall_perf", "all_reduce_perf"), "holds no all-to-all test, but all_reduce"),
        (NOT_NAMED.replace("0e+00", "  N/A"), "does not say which test it holds"),
        (NOT_NAMED.replace("7.83", "10.43").replace("10.42", "13.89"), "does not say which test it holds"),
        (LOG.replace("100.5", "fast").replace("  151", "slow"), "rows that are not understood"),
        (LOG.replace("100.5", "-1.0"), "times or sizes that cannot be"),
        (LOG.replace("  65536", "  65537"), "sizes and counts do not fit"),
        (LOG.replace("Rank  3", "Rank  9"), "sizes and counts do not fit"),
        (json_log(json_result(), version=9), "has version 9"),
        (json_log(json_result(count=0)), "sizes and counts do not fit"),
        (json_log(json_result(count="many")), "lacks what results of nccl-tests have"),
        ('{"version": 3, "nccl_version": 1}', "has no `config`"),
        ("hello\n", "no format that is recognised"),
        ("", "no format that is recognised"),
        (gzip.compress(LOG.encode(), mtime=0)[:-20], "ends in the middle of its compression"),
        (gzip.compress(b"# nccl-tests version" + b" " * (40 << 20), mtime=0), "grows over 200-fold"),
        (b"# nccl-tests version \xff\xfe\n", "is no text: line 1 is no UTF-8"),
    ],
)
def test_a_log_without_times_is_refused_in_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: str | bytes, expected: str
) -> None:
    assert expected in refusal(tmp_path, capfd, "auto", written(tmp_path, "x", content))


def test_compressed_files_are_read_like_others(tmp_path: Path) -> None:
    twice = gzip.compress(LOG[:700].encode()) + gzip.compress(LOG[700:].encode())
    result = only_result(imported(tmp_path, "auto", written(tmp_path, "a.log.gz", twice)))
    assert [case.median_us for case in result.cases] == [100.5, 151.0]


def test_lines_are_those_of_the_text(tmp_path: Path) -> None:
    source = Source(written(tmp_path, "t", b"\xef\xbb\xbfa\r\n\nb\xc3\xa4"))
    assert list(source.lines()) == ["a", "", "bä"]


def counts_npz(tmp_path: Path, **arrays: np.ndarray) -> Path:
    path = tmp_path / "c.npz"
    np.savez_compressed(path, **arrays)
    return path


LOAD_SLE = np.array([[[2, 0, 2], [0, 0, 0]], [[1, 1, 3], [0, 0, 0]]])


def test_counts_are_routing_rows(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = counts_npz(tmp_path, load=LOAD_SLE, step=np.array([7, 3]), layer=np.array([4, 1]))
    run = open_run(imported(tmp_path, "auto", path, "--top-k", "2", "--phase", "decode"))
    assert loads_of(run) == {(0, 7, 4): [2, 0, 2], (0, 3, 4): [1, 1, 3]}
    tokens = [int(block.tokens_SP.sum()) for block in run.iter_loads()]
    assert sum(tokens) == 2 + 3
    notes = capfd.readouterr().err
    assert "dense or not recorded: layers 1" in notes
    assert "assignments of 1 row are no multiple of 2" in notes
    assert {block.phase for block in run.iter_loads()} == {"decode"}


def test_each_file_of_arrays_is_a_rank(tmp_path: Path) -> None:
    for number in (0, 1):
        np.save(tmp_path / f"{number}.npy", LOAD_SLE + number)
    run = open_run(imported(tmp_path, "counts", tmp_path / "0.npy", tmp_path / "1.npy", "--top-k", "1"))
    assert loads_of(run)[(1, 1, 1)] == [1, 1, 1]
    assert run.manifest.topology.ranks == 2
    assert run.problems == ()


def test_a_table_of_counts_names_ranks_and_phases(tmp_path: Path) -> None:
    rows = [
        "step,layer,expert,count,rank,phase",
        "5,1,0,3,0,prefill",
        "5,1,2,1,0,prefill",
        "6,1,1,4,1,decode",
    ]
    run = open_run(imported(tmp_path, "auto", written(tmp_path, "c.csv", "\n".join(rows)), "--top-k", "2"))
    assert loads_of(run) == {(0, 5, 1): [3, 0, 1], (1, 6, 1): [0, 4, 0]}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("step,layer,expert,count\n", "has no rows"),
        ("step,layer,expert\n0,0,0\n", "has no column count"),
        ("step,layer,expert,count\n0,0,0,-1\n", "a count of -1"),
        ("step,layer,expert,count\n0,0,-1,1\n", "numbers of its experts outside 0 to 65535"),
        ("step,layer,expert,count\n0,0,0,x\n", "no table of counts"),
        ("step,layer,expert,count\n0,0,0,1\n0,0,0,2\n", "a step, layer and expert twice"),
        ("step,layer,expert,count,phase\n0,0,0,1,lunch\n", "a phase 'lunch'"),
        ("step,layer,expert,count\n0,0,0,1\n9,9,65535,1\n8,8,1,1\n" * 1, ""),
    ],
)
def test_tables_that_hold_no_counts_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: str, expected: str
) -> None:
    path = written(tmp_path, "c.csv", content)
    if expected:
        assert expected in refusal(tmp_path, capfd, "counts", path, "--top-k", "1")
    else:
        imported(tmp_path, "counts", path, "--top-k", "1")


def test_arrays_that_are_no_counts_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def said(path: Path, *options: str) -> str:
        return refusal(tmp_path, capfd, "counts", path, *(options or ("--top-k", "1")))

    assert "how many experts" in refusal(tmp_path, capfd, "counts", counts_npz(tmp_path, load=LOAD_SLE))
    assert "float64 values" in said(counts_npz(tmp_path, load=LOAD_SLE * 0.5))
    assert "2 x 3 counts" in said(counts_npz(tmp_path, load=LOAD_SLE[:, 0]))
    assert "a count of -1" in said(counts_npz(tmp_path, load=-LOAD_SLE.clip(0, 1)))
    assert "one named load" in said(counts_npz(tmp_path, a=LOAD_SLE, b=LOAD_SLE))
    assert "numbers of its steps" in said(counts_npz(tmp_path, load=LOAD_SLE, step=np.array([1, 1])))
    objects = tmp_path / "o.npy"
    np.save(objects, np.array([print]), allow_pickle=True)
    assert "cannot be read" in said(objects)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("load.npy", bytes(300 << 20))
    assert "holds over 256 MiB" in said(tmp_path / "bomb.npz")
    assert "no archive of arrays" in said(written(tmp_path, "z.npz", b"PK\x03\x04load.npy"))
    broken = (tmp_path / "c.npz").read_bytes().replace(b"PK\x01\x02", b"PK\xff\xff")
    assert "no archive of arrays" in said(written(tmp_path, "y.npz", broken))
    header = (tmp_path / "o.npy").read_bytes().replace(b"'fortran_order'", b"(fortran_order'")
    assert "cannot be read" in said(written(tmp_path, "h.npy", header))
    assert "byte 1 is no UTF-8" in said(written(tmp_path, "u.csv", b"s\xd3\xd3,layer,expert,count\n"))


def saved(tmp_path: Path, name: str, content: object) -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


def test_sglang_statistics_are_logical_loads_without_a_time_order(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    count = torch.zeros(3, 2, 4, dtype=torch.int32)
    count[0, 1] = torch.tensor([1, 2, 3, 0])
    count[2, 1] = torch.tensor([0, 0, 2, 2])
    path = saved(
        tmp_path, "s.pt", {"rank": 0, "logical_count": count, "average_utilization_rate_over_window": None}
    )
    run = open_run(imported(tmp_path, "auto", path, "--top-k", "2"))
    assert loads_of(run) == {(0, 0, 1): [1, 2, 3, 0], (0, 2, 1): [0, 0, 2, 2]}
    assert [layer.layer for layer in run.manifest.model.moe_layers] == [1]
    notes = " ".join(run.manifest.notes)
    assert "not that of time" in notes
    assert "summed over ranks" in notes
    assert "layers 0" in notes
    assert "how many experts" in refusal(tmp_path, capfd, "auto", path)


def record(step: int, rank: int, **content: object) -> dict[str, object]:
    return {"forward_pass_id": step, "rank": rank, "gatherer_key": "primary", **content}


MAP_LQ = torch.tensor([[0, 1, 2, 0], [2, 1, 0, 1]])


def test_sglang_passes_are_mapped_to_logical_experts_and_summed(tmp_path: Path) -> None:
    counts = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]], dtype=torch.int32)
    for rank in (0, 1):
        records = [
            record(9, rank, global_physical_count=counts + rank),
            record(9, rank, global_physical_count=counts),
        ]
        saved(tmp_path, f"{rank}.pt", {"records": records, "last_physical_to_logical_map": MAP_LQ})
    run = open_run(imported(tmp_path, "auto", tmp_path / "0.pt", tmp_path / "1.pt", "--top-k", "2"))
    assert loads_of(run) == {
        (0, 9, 0): [10, 4, 6], (0, 9, 1): [14, 28, 10],
        (1, 9, 0): [12, 5, 7], (1, 9, 1): [15, 30, 11],
    }  # fmt: skip


def test_sglang_tokens_state_their_top_k_and_lose_their_ids(tmp_path: Path) -> None:
    ids = torch.tensor([[[0, 3], [2, -1]], [[1, 3], [0, 1]]], dtype=torch.int32)  # physical, -1 pads
    content = record(4, 0, topk_ids_of_layer=ids, input_ids=[987654321, 5], positions=[0, 1], forward_mode=1)
    path = saved(tmp_path, "t.pt", {"records": [content], "last_physical_to_logical_map": MAP_LQ})
    out = imported(tmp_path, "auto", path)
    assert loads_of(open_run(out)) == {(0, 4, 0): [2, 0, 1], (0, 4, 1): [0, 3, 1]}
    assert open_run(out).manifest.model.moe_layers[0].top_k == 2
    assert not any(b"987654321" in file.read_bytes() for file in out.rglob("*") if file.is_file())


class Hostile:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("executed",))


def test_sglang_files_that_say_too_little_or_run_code_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def said(content: object) -> str:
        error = refusal(tmp_path, capfd, "sglang", saved(tmp_path, "x.pt", content), "--top-k", "2")
        assert "executed" not in error
        return error

    counts = {"global_physical_count": torch.ones(2, 4, dtype=torch.int32)}
    assert "cannot be read as tensors" in said({"logical_count": Hostile()})
    assert "holds no loads" in said({"rank": 0})
    assert "is none" in said(
        {"records": [record(0, 0, **counts)], "last_physical_to_logical_map": MAP_LQ - 1}
    )
    assert "without forward_pass_id" in said({"records": [counts], "last_physical_to_logical_map": MAP_LQ})
    assert "no map" in said({"records": [record(0, 0, **counts)]})
    assert "do not fit" in said(
        {"records": [record(0, 0, **counts)], "last_physical_to_logical_map": MAP_LQ[:1]}
    )
    endless = torch.zeros(1, dtype=torch.int32).expand(1 << 20, 1 << 10, 1 << 10)
    assert "over 256 MiB" in said({"logical_count": endless})
    placed = written(tmp_path, "p.json", json.dumps({"physical_to_logical_map": [[0, 1]]}))
    assert "a placement of experts, and no loads" in refusal(tmp_path, capfd, "auto", placed)
    ragged = written(tmp_path, "r.json", json.dumps({"logical_count": [[[0, 1], [2]]]}))
    assert "several lengths" in refusal(tmp_path, capfd, "auto", ragged, "--top-k", "1")


SMI = [
    "timestamp, name, uuid, power.draw.instant [W], power.draw.average [W], clocks.current.sm [MHz], "
    "temperature.gpu, clocks_event_reasons.active, enforced.power.limit [W]",
    "2024/05/01 12:00:00.100, H100, GPU-1, 73.49 W, 70.00 W, 345 MHz, 40, 0x0000000000000004, 700.00 W",
    "2024/05/01 12:00:00.100, H100, GPU-2, 80,5 W, [N/A], 1980 MHz, N/A, Not Active, 700.00 W",
    "2024/05/01 12:00:00.150, NVIDIA H1",
    "2024/05/01 12:00:00.200, H100, GPU-1, [Unknown Error], None, [N/A], 41, 0x8000000000000000, [N/A]",
    "2024/05/01 12:00:00.050, H100, GPU-1, 99.00 W, 70.00 W, 345 MHz, 40, 0x0, 700.00 W",
]


def test_nvidia_smi_readings_keep_their_units_and_gaps(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, "s.csv", "\n".join(SMI))
    run = open_run(imported(tmp_path, "auto", path, "--utc-offset", "+02:00"))
    frame = run.power()
    noon = 1714557600  # 2024-05-01 10:00:00 UTC
    assert [int(ns) - noon * 10**9 for ns in frame.time_ns] == [100_000_000, 100_000_000, 200_000_000]
    assert list(frame.device_uuid) == ["GPU-1", "GPU-2", "GPU-1"]
    assert frame.power_mw.fillna(-1).tolist() == [73490, 80500, -1]
    assert frame.average_power_mw.fillna(-1).tolist() == [70000, -1, -1]
    assert frame.sm_clock_mhz.fillna(-1).tolist() == [345, 1980, -1]
    assert frame.temperature_c.fillna(-1).tolist() == [40, -1, 41]
    assert frame.event_reasons.fillna(-1).tolist() == [4, -1, -1]
    assert run.manifest.ranks[0].power.own_devices == ("GPU-1", "GPU-2")
    notes = capfd.readouterr().err
    assert "1 line left out that is torn or repeats the header" in notes
    assert "1 reading left out" in notes


def test_nvidia_smi_without_units_or_names_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = [
        "timestamp,power.draw,clocks.sm",
        "2024/05/01 12:00:00.100,73.49,345",
        "2024/05/01 12:00:00.2,80.0,1980",
    ]
    frame = open_run(imported(tmp_path, "auto", written(tmp_path, "s.csv", "\n".join(lines)))).power()
    assert frame.power_mw.tolist() == [73490, 80000]
    notes = capfd.readouterr().err
    assert "of a zone that is not stated" in notes
    assert "instant power or an average" in notes
    assert "no column names the device" in notes


@pytest.mark.parametrize(
    "lines",
    [
        [
            "index, timestamp, power.draw.instant [W], power.draw [W]",
            "0, 2024/05/01 12:00:00.100, [N/A], 73.49 W",
        ],
        ["Loading modules", "", "timestamp, index, power.draw [W]", "2024/05/01 12:00:00.100, 0, 73,49 W"],
        ["timestamp;index;power.draw [W]", "2024/05/01 12:00:00.100;0;73,49"],
    ],
    ids=["time not first, instant power not known", "lines before, decimal comma", "semicolons"],
)
def test_nvidia_smi_is_read_in_its_spellings(tmp_path: Path, lines: list[str]) -> None:
    path = written(tmp_path, "s.csv", "\r\n".join(lines))
    frame = open_run(imported(tmp_path, "auto", path)).power()
    assert frame.power_mw.tolist() == [73490]
    assert frame.device_uuid.tolist() == ["0"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("timestamp, gpu_uuid, pid, used_gpu_memory [MiB]\n", "lists processes"),
        ("index, power.draw [W]\n0, 1 W\n", "has no header with the column timestamp"),
        ("2024/05/01 12:00:00.100, 0, 73.49 W\n", "leave noheader out"),
        ("timestamp, uuid, fan.speed [%]\n", "has no power, clock or temperature"),
        ("timestamp, power.draw [W]\n", "holds no rows"),
        ("timestamp, power.draw [W]\nnever, 1 W\n", "holds no rows"),
    ],
)
def test_nvidia_smi_logs_without_samples_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: str, expected: str
) -> None:
    assert expected in refusal(tmp_path, capfd, "nvidia-smi", written(tmp_path, "s.csv", content))


OSU = """mpirun -np 4 ./osu_alltoallv -f

# OSU MPI All-to-Allv Personalized Exchange Latency Test v5.6.3
# Size       Avg Latency(us)   Min Latency(us)   Max Latency(us)  Iterations
1                       9.50              8.25             10.75        1000
1048576              3000.00           2900.50           3100.25         100
"""


def test_osu_all_to_alls_take_as_long_as_their_slowest_rank(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = only_result(imported(tmp_path, "auto", written(tmp_path, "o.txt", OSU)))
    assert (result.backend, len(result.node_of_P), result.iterations) == ("mpi", 4, 100)
    assert [case.median_us for case in result.cases] == [10.75, 3100.25]
    assert result.cases[1].send_bytes_PP[3] == (1048576,) * 4
    assert "5.6.3" in (tmp_path / "run/alltoall-0.json").read_text()
    assert "which ranks share a node is not stated" in capfd.readouterr().err


def test_osu_logs_without_a_command_need_the_number_of_ranks(tmp_path: Path) -> None:
    text = (
        "# OSU MPI-CUDA All-to-All Personalized Exchange Latency Test v7.3\n# Datatype: MPI_CHAR.\n"
        "# Size       Avg Latency(us)\n8    12.5\n16   14\n32   1"
    )
    log = written(tmp_path, "o.txt", text[:-3])
    result = only_result(imported(tmp_path, "osu", log, "--ranks", "2"))
    assert [case.median_us for case in result.cases] == [12.5, 14.0], "the row that is cut has no time"
    assert any("mean over ranks" in note for note in result.notes)


def test_osu_logs_of_other_numbers_of_ranks_than_given_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    error = refusal(tmp_path, capfd, "osu", written(tmp_path, "o.txt", OSU), "--ranks", "2")
    assert "is of 4 ranks by its command, and --ranks is 2" in error


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("o.txt", OSU.replace("-np 4", "-x A"), "does not state how many ranks ran; give it with --ranks"),
        ("o.txt", OSU.replace("-np 4", "-np 1"), "is of 1 rank;"),
        ("o.txt", OSU.replace("All-to-Allv Pers", "Non-blocking All-to-Allv Pers"), "no blocking all-to-all"),
        ("o.txt", OSU.replace("All-to-Allv Personalized Exchange", "Allreduce"), "but Allreduce"),
        ("o.txt", OSU.split("1  ", maxsplit=1)[0], "ended before its first row"),
        ("o.txt", OSU.replace("3100.25", "-1"), "times or sizes that cannot be"),
        ("o.txt", OSU + "# Size       Avg Latency(us)\n2    3.5\n", "holds two tables in one test"),
        ("o.txt", OSU.replace("# Size  ", "# Size x"), "ended before its first row"),
        ("o.txt", OSU.replace("mpirun -np 4", "nice -n 10"), "does not state how many ranks ran"),
        (
            "o.txt",
            "mpirun -np 8 ./osu_allreduce\n" + OSU.replace("mpirun -np 4 ", ""),
            "does not state how many ranks ran",
        ),
        (
            "emissions.csv",
            "timestamp,project_name,run_id,duration\n1,a,b,2\n",
            "no power or energy over time",
        ),
        ("r.json", '{"card0": {"Average Graphics Package Power (W)": "35.0"}}', "without the time"),
        ("a.json", '[{"gpu": 0, "usage": {"gfx_activity": 3}}]', "without the time"),
        ("nccl_trace_rank_0", b"\x80\x04\x95\x10\x00}\x94(\x8c\x07version", "a pickle, which may run any"),
    ],
)
def test_what_has_no_ranks_or_no_times_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, content: str | bytes, expected: str
) -> None:
    assert expected in refusal(tmp_path, capfd, "auto", written(tmp_path, name, content))


def lines(*records: dict[str, object]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_router_traces_of_megatron_are_counted_by_rank(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def record(rank: int, top_indices: list[list[int]], **more: object) -> dict[str, object]:
        common = {
            "step": 3,
            "stage": "fwd",
            "block": 0,
            "layer": 2,
            "num_tokens": len(top_indices),
            "topk": 2,
        }
        return {**common, "rank": rank, "top_indices": top_indices, **more}

    first = written(
        tmp_path,
        "router_trace_rank0.jsonl",
        lines(record(0, [[0, 1], [3, 1]]), record(0, [[1, 2]]), record(0, [[0, 1]], mtp_idx=0)),
    )
    second = written(tmp_path, "router_trace_rank1.jsonl", lines(record(1, [[0, 1]], layer=5)))
    run = open_run(imported(tmp_path, "auto", first, second))
    assert loads_of(run) == {(0, 3, 2): [1, 3, 1, 1], (1, 3, 5): [1, 1, 0, 0]}
    assert run.manifest.model.moe_layers[0].top_k == 2
    assert "the number of experts is not stated: 4" in capfd.readouterr().err
    more = open_run(imported(tmp_path, "auto", first, "--experts", "6", name="more"))
    assert loads_of(more) == {(0, 3, 2): [1, 3, 1, 1, 0, 0]}


def test_tokens_per_expert_of_megatron_are_summed_over_micro_batches(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = lines({"iter": 7, "block": 0, "layer": 1, "tpe": [[1, 2, 0], [3, 0, 0]]})
    path = written(tmp_path, "rank2.jsonl", text)
    assert loads_of(open_run(imported(tmp_path, "auto", path, "--top-k", "3"))) == {(2, 7, 1): [4, 2, 0]}
    assert "how many experts" in refusal(tmp_path, capfd, "auto", path)
    assert "does not name its rank" in refusal(tmp_path, capfd, "auto", written(tmp_path, "x.jsonl", text))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"iter": 1, "layer": 0, "tpe": [[1], [1, 2]]}', "lists of several lengths"),
        ('{"iter": 1, "layer": 0, "tpe": [[-1]]}', "tpe outside 0 to"),
        ('{"iter": 1, "layer": 0, "tpe": [[0.5]]}', "no lists of whole numbers"),
        ('{"iter": -1, "layer": 0, "tpe": [[1]]}', "whose iter is none"),
        ('{"iter": 1, "layer": true, "tpe": [[1]]}', "whose layer is none"),
        ('{"iter": 1, "layer": 0}', "without top_indices or tpe"),
        ('{"iter": 1, "layer": 0, "tpe": [[1', "is cut or no JSON on line 1"),
        ("[1]", "no JSON object on line 1"),
        ("\n", "holds no routing"),
    ],
)
def test_lines_that_are_no_routing_of_megatron_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: str, expected: str
) -> None:
    path = written(tmp_path, "rank0.jsonl", content)
    assert expected in refusal(tmp_path, capfd, "megatron", path, "--top-k", "1")


ROUTED_TLK = np.array([[[0, 0], [5, 1]], [[0, 0], [1, 3]], [[0, 0], [5, 0]]], dtype=np.uint8)


def encoded(array: np.ndarray) -> str:
    content = io.BytesIO()
    np.save(content, array)
    return base64.b64encode(content.getvalue()).decode()


def test_routes_of_vllm_are_counted_without_dense_layers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    choice = {"index": 0, "token_ids": [987654321], "text": "secret", "routed_experts": encoded(ROUTED_TLK)}
    path = written(
        tmp_path, "answer.json", json.dumps({"id": "x", "choices": [choice, {**choice, "index": 1}]})
    )
    out = imported(tmp_path, "auto", path, "--experts", "8")
    assert loads_of(open_run(out)) == {(0, step, 1): [1, 2, 0, 1, 0, 2, 0, 0] for step in (0, 1)}
    assert open_run(out).manifest.model.moe_layers[0].top_k == 2
    assert not any(b"987654321" in file.read_bytes() for file in out.rglob("*") if file.is_file())
    assert "dense or not recorded: layers 0" in capfd.readouterr().err
    np.save(tmp_path / "routes.npy", ROUTED_TLK)
    alone = open_run(imported(tmp_path, "vllm", tmp_path / "routes.npy", name="alone"))
    assert loads_of(alone) == {(0, 0, 1): [1, 2, 0, 1, 0, 2]}
    assert "the number of experts is not stated: 6" in capfd.readouterr().err
    assert "has an expert 5" in refusal(tmp_path, capfd, "auto", path, "--experts", "4")


def test_loads_of_vllm_s_balancer_are_mapped_to_logical_experts(tmp_path: Path) -> None:
    stats = {"step": 9, "expert_load": [[5, 1, 2], [0, 4, 4]], "p2l_map": [[0, 1, 0], [1, 0, 1]]}
    text = lines({"eplb_load_meta": {"version": 1}}, {"eplb_load_stats": stats}, {"eplb_load_stats": stats})
    run = open_run(imported(tmp_path, "vllm", written(tmp_path, "e.jsonl", text), "--top-k", "1"))
    assert loads_of(run) == {(0, 9, 0): [14, 2], (0, 9, 1): [8, 8]}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"choices": [{"text": "x"}]}, "holds no routed_experts"),
        ({"choices": 3}, "holds no routed_experts"),
        ({"choices": [{"routed_experts": "%%%"}]}, "no base64"),
        ({"choices": [{"routed_experts": "aGVsbG8="}]}, "an array that cannot be read"),
        ({"routed_experts": encoded(ROUTED_TLK[0])}, "holds no experts of tokens"),
        ({"routed_experts": encoded(ROUTED_TLK * 0.5)}, "holds no experts of tokens"),
        ({"eplb_load_stats": {"step": 0, "expert_load": [[1]]}}, "without step or p2l_map"),
        (
            {"eplb_load_stats": {"step": 0, "expert_load": [[1]], "p2l_map": [[0, 1]]}},
            "do not fit their p2l_map",
        ),
        ({"eplb_load_stats": {"step": 0, "expert_load": [[-1]], "p2l_map": [[0]]}}, "that cannot be"),
        ({"eplb_load_stats": {"step": 0, "expert_load": [[1]], "p2l_map": [[7]]}}, "more logical than"),
    ],
)
def test_what_states_no_routes_of_vllm_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: dict[str, object], expected: str
) -> None:
    path = written(tmp_path, "v.json", json.dumps(content))
    assert expected in refusal(tmp_path, capfd, "vllm", path, "--top-k", "1")


def test_counts_of_tensorrt_llm_are_those_of_each_rank(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    meta = written(tmp_path, "meta_info.json", json.dumps({"num_experts": 3, "num_experts_per_token": 2}))
    for rank in (0, 1):
        arrays = {
            "4_3": np.array([1, 2, 3 + rank], dtype=np.int64),
            "4_5": np.array([2, 2, 2], dtype=np.int64),
        }
        save_file(arrays, tmp_path / f"rank{rank}.safetensors")
    files = [tmp_path / f"rank{rank}.safetensors" for rank in (0, 1)]
    run = open_run(imported(tmp_path, "auto", meta, *files))
    assert loads_of(run) == {
        (0, 4, 3): [1, 2, 3], (0, 4, 5): [2, 2, 2], (1, 4, 3): [1, 2, 4], (1, 4, 5): [2, 2, 2],
    }  # fmt: skip
    assert run.manifest.model.moe_layers[0].top_k == 2
    assert "how many experts" in refusal(tmp_path, capfd, "auto", files[0])
    assert "holds no counts" in refusal(tmp_path, capfd, "auto", meta)
    other = written(tmp_path, "other.json", meta.read_bytes().replace(b"3", b"4", 1))
    assert "have 3 and 4 experts" in refusal(tmp_path, capfd, "tensorrt-llm", other, files[0])
    save_file({"weights": np.zeros(3, dtype=np.int64)}, tmp_path / "rank7.safetensors")
    assert "an array 'weights'" in refusal(tmp_path, capfd, "tensorrt-llm", tmp_path / "rank7.safetensors")
    torn = written(tmp_path, "rank8.safetensors", files[0].read_bytes()[:40])
    assert "no safetensors file" in refusal(tmp_path, capfd, "tensorrt-llm", torn)
    renamed = written(tmp_path, "weights.safetensors", files[0].read_bytes())
    assert "a name such as rank0.safetensors" in refusal(tmp_path, capfd, "auto", renamed)


def inspected(rank: int, coll: str = "AllToAll", version: str = "v4.1", **more: object) -> dict[str, object]:
    return {
        "header": {"id": "0x1", "rank": rank, "n_ranks": 4, "nnodes": 1},
        "metadata": {"inspector_output_format_version": version, "dump_timestamp_us": 1749490229087081},
        "coll_perf": {"coll": coll, "coll_sn": 5, "coll_exec_time_us": 110, **more},
    }


def test_all_to_alls_of_nccl_inspector_have_durations(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, "i.jsonl", lines(inspected(2), inspected(2, "AllReduce")))
    run = open_run(imported(tmp_path, "auto", path))
    (row,) = run.exchanges().to_dict("records")
    assert (row["source_rank"], row["sequence"]) == (2, 5)
    assert (row["start_ns"], row["end_ns"]) == (1749490229086971000, 1749490229087081000)
    assert run.manifest.topology.ranks == 4
    assert "1 record of AllReduce" in capfd.readouterr().err
    for record, expected in (
        (inspected(2, version="v5.0"), "has format 'v5.0'"),
        (inspected(2, coll_sn="one"), "whose coll_sn is none"),
        (inspected(9999), "whose rank is none"),
        ({"metadata": {"inspector_output_format_version": "v4.0"}}, "without header"),
    ):
        assert expected in refusal(tmp_path, capfd, "auto", written(tmp_path, "w.jsonl", lines(record)))


def power_rows(path: Path) -> list[dict[str, object]]:
    frame = open_run(path).power().drop(columns="source_rank")
    return [{key: value for key, value in row.items() if pd.notna(value)} for row in frame.to_dict("records")]


def test_metrics_of_clustercockpit_are_gathered_into_samples(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tags = "hostname=n1,type=accelerator,type-id=00000000:0F:00.0"
    lines = [
        f"nv_power_usage,{tags} value=251.5 1714557600",
        f"nv_sm_clock_report,{tags} value=1410i 1714557600",
        f"acc_power,{tags.replace('n1', 'n2')} value=99 1714557600",
        "cpu_load,hostname=n1,type=node value=3.5 1714557600",
        f"nv_fan,{tags} value=30 1714557600",
        f"nv_temp,{tags} value=nan 1714557601",
        f"nv_power_usage,{tags} value=300 1714557602500",
    ]
    rows = power_rows(imported(tmp_path, "auto", written(tmp_path, "m.txt", "\n".join(lines) + "\n")))
    first, second = "n1 00000000:0F:00.0", "n2 00000000:0F:00.0"
    at = 1714557600 * 10**9
    assert sorted(rows, key=lambda row: (row["device_uuid"], row["time_ns"])) == [
        {"time_ns": at, "device_uuid": first, "power_mw": 251500.0, "sm_clock_mhz": 1410.0},
        {"time_ns": at + 2_500_000_000, "device_uuid": first, "power_mw": 300000.0},
        {"time_ns": at, "device_uuid": second, "power_mw": 99000.0},
    ]
    assert "left out: nv_fan" in capfd.readouterr().err
    for wrong, expected in (
        ("value=1", "a value without a time"),
        ("value=1 12", "none between 2001 and 2043"),
    ):
        path = written(tmp_path, "w.txt", f"nv_temp,{tags} {wrong}\n")
        assert expected in refusal(tmp_path, capfd, "clustercockpit", path)
    assert "none of the line protocol" in refusal(
        tmp_path, capfd, "clustercockpit", written(tmp_path, "w.txt", "hello\n")
    )


def test_metrics_of_dcgm_need_times_and_leave_blanks_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    labels = '{gpu="0", UUID="GPU-1",modelName="A100",pod=""}'
    text = f"""# TYPE DCGM_FI_DEV_SM_CLOCK gauge
DCGM_FI_DEV_SM_CLOCK{labels} 1410 1714557601000
DCGM_FI_DEV_SM_CLOCK{labels} 210 1714557600000
# TYPE DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION counter
DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{labels} 15152422938 1714557600000
# TYPE DCGM_FI_DEV_MEMORY_TEMP gauge
DCGM_FI_DEV_MEMORY_TEMP{labels} 9223372036854775794 1714557600000
"""
    out = imported(tmp_path, "auto", written(tmp_path, "d.prom", text))
    at = 1714557600 * 10**9
    assert power_rows(out) == [
        {"time_ns": at, "device_uuid": "GPU-1", "energy_mj": 15152422938.0, "sm_clock_mhz": 210},
        {"time_ns": at + 10**9, "device_uuid": "GPU-1", "sm_clock_mhz": 1410},
    ]
    scrape = written(tmp_path, "s.prom", text.replace(" 1714557600000", "").replace(" 1714557601000", ""))
    assert "states no times" in refusal(tmp_path, capfd, "auto", scrape)
    broken = written(tmp_path, "b.prom", "DCGM_FI_DEV_SM_CLOCK{gpu= 3\n")
    assert "no text of Prometheus" in refusal(tmp_path, capfd, "dcgm", broken)


def test_power_of_zeus_is_in_milliwatts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = "Time,Power\n2022-07-13 02:07:36.708783111,32402\n2022-07-13 02:07:36.7,\n2022-07-13 02:07\n"
    rows = power_rows(imported(tmp_path, "auto", written(tmp_path, "z.csv", text), "--utc-offset", "-01:30"))
    assert rows == [{"time_ns": 1657683456708783111, "device_uuid": "gpu 0", "power_mw": 32402}]
    assert "1 line without a time" in capfd.readouterr().err


def test_a_run_is_replaced_only_when_that_is_asked_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, "s.csv", "\n".join(SMI))
    out = imported(tmp_path, "auto", path)
    before = sorted(out.rglob("*"))
    assert main(["import", "auto", str(path), "--out", str(out)]) == 1
    assert "exists and is not empty" in capfd.readouterr().err
    assert sorted(out.rglob("*")) == before
    assert main(["import", "auto", str(path), "--out", str(out), "--force", "--json"]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert (shown["format"], shown["rows"]) == ("nvidia-smi", {"power": 3})


def test_options_and_mixed_files_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log, smi = written(tmp_path, "a.log", LOG), written(tmp_path, "s.csv", "\n".join(SMI))
    assert "several formats" in refusal(tmp_path, capfd, "auto", log, smi)
    assert "'excel' does not exist" in refusal(tmp_path, capfd, "excel", log)
    assert "UTC offset 'CET' is none" in refusal(tmp_path, capfd, "auto", smi, "--utc-offset", "CET")
    assert "phase 'lunch' does not exist" in refusal(tmp_path, capfd, "auto", smi, "--phase", "lunch")
    assert "cannot be read" in refusal(tmp_path, capfd, "auto", tmp_path / "missing")
    assert "cannot be read" in refusal(tmp_path, capfd, "auto", tmp_path)
