"""Benchmarks and replays on real local ranks over gloo."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from observatory.campaign.benchmark import run_benchmark
from observatory.cli import main
from observatory.collectives.bench import rank
from observatory.collectives.bench.measure import alltoall_plan, run_plan
from observatory.collectives.transport.base import AloneTransport
from observatory.errors import ExchangeError
from observatory.run.documents.bench import NODES_AS_STATED, BenchPlan, Traffic, load_bench
from tests.collectives.bench.runs import write_captured_run

pytestmark = pytest.mark.slow

LINUX = hasattr(os, "sched_setaffinity")


@pytest.fixture
def captured_run(tmp_path: Path) -> Path:
    return write_captured_run(tmp_path / "run")


def test_every_algorithm_delivers_every_byte_of_every_pattern() -> None:
    plan = alltoall_plan(
        ranks=4,
        sizes_bytes=[16, 4096],
        patterns=["random", "sparse", "one-sided", "empty"],
        algorithms=["flat", "hierarchical", "gather"],
        warmup=0,
        repeats=2,
        iterations=1,
    )
    back = [item.model_copy(update={"role": "combine"}) for item in plan.traffic]
    plan = plan.model_copy(update={"traffic": (*plan.traffic, *back)})
    result = run_benchmark(plan, ranks=4, backend="gloo", ranks_per_node=2)
    assert result is not None
    assert result.node_of_P == (0, 0, 1, 1)
    assert result.notes == (NODES_AS_STATED,)
    assert (result.backend, result.ranks) == ("gloo", 4)
    assert len(result.cases) == 3 * len(plan.traffic)
    assert all(case.correct for case in result.cases)
    assert all(np.shape(case.rank_us_RP) == (2, 4) for case in result.cases)


@pytest.fixture
def one_core() -> Iterator[None]:
    """This process and what it starts run on one core, where the system can do that."""
    if not LINUX:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.usefixtures("one_core")
def test_the_command_starts_its_own_ranks_keeps_raw_times_and_says_that_cores_are_too_few(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    argv = ["bench", "alltoall", "--ranks", "2", "--sizes", "1KiB,2KiB", "--patterns", "uniform"]
    argv += ["--repeats", "3", "--iterations", "1", "--out", str(out)]
    assert main([*argv, "--json"]) == 0
    said = capfd.readouterr()
    document = json.loads(said.out)
    assert [row["mean_send_bytes"] for row in document["rows"]] == [1024, 2048]
    result = load_bench(out)
    if LINUX:
        assert "note: 2 ranks on 1 usable core of host" in said.err
        (share,) = document["short_of_cores"]
        assert (share["ranks"], share["cores"], share["short"]) == (2, 1.0, "ranks")
        assert result.cores_P is not None
    assert np.shape(result.cases[0].rank_us_RP) == (3, 2)
    row = document["rows"][0]
    assert row["busbw_gb_per_s"] == pytest.approx(row["algbw_gb_per_s"] / 2)
    assert main(argv) == 1, "a result is not replaced without --force"
    assert "--force" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--patterns", ""], 1, "no pattern was named"),
        (["--ranks", "4", "--ranks-per-node", "3"], 1, "expected a divisor of 4"),
        (["--ranks", "5000"], 2, "--ranks"),
        (["--repeats", "1000000"], 2, "--repeats"),
    ],
)
def test_a_benchmark_that_cannot_be_is_refused_before_ranks_are_started(
    argv: list[str], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    assert main(["bench", "alltoall", *argv, "--out", str(out)]) == code
    err = capsys.readouterr().err
    assert said in err
    assert code == 2 or len(err.strip().splitlines()) == 1


def test_only_a_plain_file_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        argv = ["bench", "alltoall", "--ranks", "1", "--force", "--out", str(tmp_path / name)]
        assert main(argv) == 1
        assert "no plain file" in capsys.readouterr().err
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"], "nothing is left behind"


def test_a_rank_without_memory_says_so_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = BenchPlan(
        kind="alltoall",
        algorithms=("flat",),
        warmup=0,
        repeats=1,
        iterations=1,
        traffic=(Traffic(pattern="local", send_bytes_PP=((1 << 50,),)),),  # beyond any address space
    )
    job = rank.RankJob(plan=plan, backend="alone", ranks_per_node=None, timeout_s=5, out="nowhere")
    (tmp_path / "job.json").write_text(job.model_dump_json())
    assert rank.main([str(tmp_path / "job.json")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "allocate memory" in line


def test_the_bandwidth_of_a_small_exchange_is_not_shown_as_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["bench", "alltoall", "--ranks", "1", "--sizes", "16", "--patterns", "uniform,skewed"]
    assert main([*argv, "--repeats", "2", "--out", str(tmp_path / "bench.json")]) == 0
    shown = capsys.readouterr()
    algbw = next(line for line in shown.out.splitlines() if line.startswith("flat ")).split()[5]
    case = load_bench(tmp_path / "bench.json").cases[0]
    assert float(algbw) == pytest.approx(case.algbw_gb_per_s, rel=0.01)
    assert "note: skewed is the same traffic" in shown.err


def test_a_replay_compares_captured_with_uniform_traffic_of_equal_volume(
    captured_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "replay.json"
    argv = [
        "replay",
        str(captured_run),  # of two ranks, which are the degree where none is given
        "--repeats",
        "2",
        "--iterations",
        "1",
        "--out",
        str(out),
    ]
    assert main([*argv, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    whole = rows[0]
    assert (whole["phase"], whole["exchanges"]) == (None, 4)
    assert whole["ratio"] == pytest.approx(whole["captured_us"] / whole["uniform_us"])
    assert whole["ratio_low"] <= whole["ratio"] <= whole["ratio_high"]
    assert {(row["phase"], row["layer"], row["role"]) for row in rows[1:]} == {
        ("decode", None, None),
        ("decode", None, "dispatch"),
        ("decode", None, "combine"),
        ("decode", 5, "dispatch"),
        ("decode", 5, "combine"),
    }
    result = load_bench(out)
    assert result.run_id == "run-1"
    sent = {(case.step, case.role): case.send_bytes_PP for case in result.cases if case.pattern == "captured"}
    # Rows of 32 bytes; experts 0 and 1 on rank 0. Step 0: rank 0 keeps 8, rank 1 sends 4 and keeps 4.
    assert sent[0, "dispatch"] == ((256, 0), (128, 128))
    assert sent[0, "combine"] == ((256, 128), (0, 128))
    assert sent[1, "dispatch"] == ((64, 64), (160, 96))
    volumes = {(case.step, case.pattern): sum(map(sum, case.send_bytes_PP)) for case in result.cases}
    assert volumes[0, "captured"] == volumes[0, "uniform"] == 512
    assert all(case.correct for case in result.cases)


@pytest.mark.parametrize(
    ("change", "argv", "said"),
    [
        ({}, ["--ep", "3"], "EP 3 does not divide 4 experts; degrees that fit: 1, 2, 4"),
        ({"hidden_size": None}, ["--ep", "2"], "does not say its hidden size"),
        ({"dtype": "int3"}, ["--ep", "2"], "dtype 'int3', whose size is not known"),
        ({}, ["--ep", "2", "--phase", "prefill"], "nothing to replay"),
        ({}, ["--ep", "2", "--algorithm", "ring"], "algorithm 'ring' is unknown"),
        ({}, ["--ep", "2", "--backend", "pigeon"], "pigeon"),
        ({}, ["--ep", "2", "--backend", "mpi"], "mpiexec -n 2"),
    ],
)
def test_a_replay_that_cannot_be_says_why_in_one_line(
    change: dict[str, object],
    argv: list[str],
    said: str,
    captured_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    manifest = json.loads((captured_run / "run.json").read_text())
    manifest["model"] |= change
    (captured_run / "run.json").write_text(json.dumps(manifest))
    out = tmp_path / "replay.json"
    assert main(["replay", str(captured_run), *argv, "--out", str(out)]) == 1
    err = capsys.readouterr().err
    assert said in err
    assert not out.exists()


def test_bytes_that_arrive_wrong_are_found_and_reported(tmp_path: Path) -> None:
    class Flipping(AloneTransport):
        """A fabric that flips one bit of one byte."""

        def _all_to_all(self, rows, send_G, receive_G, group):  # type: ignore[no-untyped-def]
            received = super()._all_to_all(rows, send_G, receive_G, group)
            if received.numel() > 100:
                received.view(-1)[77] ^= 1
            return received

    plan = alltoall_plan(
        ranks=1, sizes_bytes=[64, 256], patterns=["uniform"], algorithms=["flat"], repeats=1, iterations=1
    )
    result = run_plan(Flipping(), plan)
    assert result is not None
    assert [case.correct for case in result.cases] == [True, False]
    from observatory.campaign.benchmark import write_result

    with pytest.raises(ExchangeError, match="1 of 2 exchanges went wrong, first flat with uniform"):
        write_result(result, tmp_path / "bench.json")
    assert load_bench(tmp_path / "bench.json") == result, "the raw result is kept as evidence"


def test_results_of_an_earlier_round_are_not_taken_for_new_ones() -> None:
    class Stale(AloneTransport):
        """A fabric that delivers the first round's bytes for ever."""

        def __init__(self) -> None:
            super().__init__()
            self.first: torch.Tensor | None = None

        def _all_to_all(self, rows, send_G, receive_G, group):  # type: ignore[no-untyped-def]
            del send_G, receive_G, group
            if rows.shape[1] == 1:
                return rows.clone()  # what ranks tell each other is not what is tested here
            self.first = rows.clone() if self.first is None else self.first
            return self.first

    plan = alltoall_plan(ranks=1, sizes_bytes=[256], patterns=["uniform"], algorithms=["flat"], repeats=2)
    result = run_plan(Stale(), plan)
    assert result is not None
    assert not result.cases[0].correct


def test_the_clock_is_read_around_the_exchanges_only() -> None:
    ticks = iter(range(0, 10**9, 5000))
    plan = alltoall_plan(
        ranks=1,
        sizes_bytes=[64],
        patterns=["uniform"],
        algorithms=["flat"],
        warmup=1,
        repeats=3,
        iterations=5,
    )
    result = run_plan(AloneTransport(), plan, clock_ns=lambda: next(ticks))
    assert result is not None
    assert result.cases[0].rank_us_RP == ((1.0,), (1.0,), (1.0,)), "5 us for 5 exchanges, warm-up left out"
    assert next(ticks) == 5000 * 2 * 4


def test_a_plan_of_another_size_is_refused() -> None:
    plan = alltoall_plan(ranks=2, sizes_bytes=[64], patterns=["uniform"], algorithms=["flat"])
    with pytest.raises(ExchangeError, match="matrix of 2 ranks on 1"):
        run_plan(AloneTransport(), plan)
