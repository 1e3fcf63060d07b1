"""Real files of other tools, where they lie next to the checkout: imported right, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from observatory.cli import main
from observatory.run import open_run
from observatory.run.documents.bench import load_bench
from tests.interchange.test_importers import imported, loads_of, only_result, refusal
from tests.paths import ROOT

FILES = ROOT.parent / "shared" / "field-files"

pytestmark = pytest.mark.skipif(not FILES.is_dir(), reason="the files of other tools are not here")


def test_two_nodes_of_nccl_tests(tmp_path: Path) -> None:
    path = FILES / "nccl-tests-2.17.6-h100-2nodes-16gpu-alltoall.log"
    result = only_result(imported(tmp_path, "auto", path))
    assert result.node_of_P == (0,) * 8 + (1,) * 8
    assert (result.warmup, result.iterations, result.repeats) == (5, 20, 1)
    assert [case.median_us for case in result.cases][:3] == [1382.27, 2672.87, 5365.57]
    assert result.cases[-1].send_bytes_PP[0][1] == 134217728 * 8  # count of doubles to each peer
    # The log's own bandwidths, GB/s: 33554432 B in 1382.27 us.
    assert round(result.cases[0].algbw_gb_per_s, 2) == 24.27
    assert round(result.cases[0].busbw_gb_per_s, 2) == 22.76


def test_one_of_five_tests_in_a_log_is_the_all_to_all(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = imported(tmp_path, "auto", FILES / "nccl-tests-2.17.8-h100-1node-8gpu-five-tests.log")
    (path,) = out.iterdir()
    result = load_bench(path)
    assert result.node_of_P == (0,) * 8
    assert "all_gather, all_reduce, reduce_scatter and sendrecv" in capfd.readouterr().err
    model = tmp_path / "net.json"
    assert main(["fit", str(path), "--out", str(model)]) in (0, 3)
    assert model.is_file()


def test_a_test_that_died_has_no_times(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = FILES / "nccl-tests-2.17.6-died-before-first-row.log"
    assert "of 8 ranks that ended before its first row" in refusal(tmp_path, capfd, "auto", path)


def test_gloo_traces_of_two_ranks_have_bytes_and_one_clock(tmp_path: Path) -> None:
    files = [FILES / f"kineto-torch2.13-gloo-alltoallv-rank{rank}.json" for rank in (0, 1)]
    run = open_run(imported(tmp_path, "auto", *files))
    rows = run.exchanges().sort_values(["source_rank", "sequence"])
    # Rows of 4 floats: rank 0 sends 3 and 5 rows, rank 1 sends 2 and 6; the even calls 4 and 4.
    assert [list(item) for item in rows.send_bytes] == [[48, 80], [64, 64]] * 2 + [[32, 96], [64, 64]] * 2
    assert [list(item) for item in rows.receive_bytes] == [[48, 32], [64, 64]] * 2 + [[80, 96], [64, 64]] * 2
    assert int(rows.end_ns.iloc[0] - rows.start_ns.iloc[0]) == pytest.approx(2245058, abs=1)
    clock = run.manifest.ranks[1].clock
    assert clock is not None
    assert clock.offset_ns is not None
    assert clock.uncertainty_ns is not None
    assert abs(clock.offset_ns) <= clock.uncertainty_ns  # both ran on one machine


def test_nccl_kernels_of_2023_are_known_by_their_launch(tmp_path: Path) -> None:
    path = FILES / "kineto-2023-dlrm-128ranks-alltoall-rank0.json.gz"
    rows = open_run(imported(tmp_path, "auto", path)).exchanges()
    # Ten kernels are named SendRecv; four were launched in nccl:all_to_all, in two steps of the profiler.
    assert rows.step.tolist() == [551, 551, 552, 552]
    assert [int(ns) // 1000 for ns in rows.end_ns - rows.start_ns] == [30669, 62783, 67827, 21124]
    assert rows.start_ns.iloc[0] == 1682725898094377000
    assert rows.send_bytes.isna().all()


def test_a_trace_of_other_collectives_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = FILES / "kineto-2024-2ranks-record_param_comms.json"
    assert "holds no all-to-all" in refusal(tmp_path, capfd, "auto", path)


def test_statistics_of_sglang(tmp_path: Path) -> None:
    path = FILES / "sglang-stat-made-by-us.pt"
    rows = loads_of(open_run(imported(tmp_path, "auto", path, "--top-k", "4")))
    # Of 8 places of the ring 5 are used; layer 0 is dense.
    assert {(step, layer) for _, step, layer in rows} == {(s, n) for s in range(5) for n in range(1, 6)}
    sums = [[sum(rows[(0, step, layer)]) for layer in range(1, 6)] for step in range(5)]
    assert sums == [
        [324, 306, 275, 281, 292],
        [338, 379, 329, 307, 382],
        [269, 293, 374, 347, 305],
        [350, 258, 344, 323, 291],
        [297, 351, 262, 284, 339],
    ]


def test_passes_of_sglang(tmp_path: Path) -> None:
    path = FILES / "sglang-per_pass-rank0-made-by-us.pt"
    rows = loads_of(open_run(imported(tmp_path, "auto", path, "--top-k", "4")))
    assert {step for _, step, _ in rows} == {3, 4, 7}
    assert [sum(rows[(0, 3, layer)]) for layer in range(6)] == [62, 87, 78, 75, 70, 73]
    assert {len(load) for load in rows.values()} == {16}  # logical; 20 are physical


def test_a_placement_of_sglang_holds_no_loads(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = FILES / "sglang-init-expert-location-made-by-us.json"
    assert "a placement of experts, and no loads" in refusal(tmp_path, capfd, "auto", path, "--top-k", "4")


def test_power_of_zeus(tmp_path: Path) -> None:
    frame = open_run(imported(tmp_path, "auto", FILES / "zeus-monitor-power-mw.csv")).power()
    assert len(frame) == 14
    assert frame.power_mw.iloc[[0, 2, 13]].tolist() == [32402, 32312, 32303]
    assert int(frame.time_ns.iloc[1] - frame.time_ns.iloc[0]) == 52906263


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("zeus-windows-a40-4gpu.csv", "states the energy of whole windows"),
        ("zeus-power-limits-v100.csv", "states no power over time"),
        ("dcgm-exporter-sample.prom", "states no times of its values"),
        ("trtllm-moe_load_balancer-made-by-us.yaml", "holds a placement of experts, and no loads"),
        ("nccl-inspector-documented-v4.0-v4.2.jsonl", "holds no all-to-all, but AllReduce and ReduceScatter"),
    ],
)
def test_what_holds_no_samples_over_time_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, missing: str
) -> None:
    assert missing in refusal(tmp_path, capfd, "auto", FILES / name)


def test_every_file_is_in_a_test() -> None:
    """Names in this module are those of the folder, its description left out."""
    text = Path(__file__).read_text(encoding="utf-8")
    names = {path.name for path in FILES.iterdir()} - {"SOURCES.md"}
    traces = {f"kineto-torch2.13-gloo-alltoallv-rank{rank}.json" for rank in (0, 1)}
    assert {name for name in names - traces if name not in text} == set()
