"""Times of an exchange from what the ranks read off their clocks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from observatory.collectives.bench.times import case_times, rank_times
from observatory.hpc.launch import meeting_point, rank_environment
from observatory.probes.alignment import TimeBaseAlignment
from observatory.run.documents.bench import BenchCase, BenchResult, load_bench
from tests.collectives.bench.late_rank import LATE_S, RANKS

pytestmark = [pytest.mark.slow, pytest.mark.timing]

_ANOTHER_CLOCK = ("unshare", "--time", "--monotonic", "1000", "--fork", "--kill-child")


def clock(offset_ns: int | None, uncertainty_ns: int | None = 0) -> TimeBaseAlignment:
    return TimeBaseAlignment(
        reference_rank=0,
        method="none" if offset_ns is None else "ping-pong",
        offset_ns=offset_ns,
        uncertainty_ns=None if offset_ns is None else uncertainty_ns,
        measured_ns=0,
    )


def test_waiting_is_counted_on_the_reference_clock() -> None:
    # Rank 1's clock is 1000 ns behind: it starts at 1500 there, 500 ns after rank 0, and ends last at 3500.
    outcome = [
        rank_times([[(1000, 3000)]], clock(0)),
        rank_times([[(500, 2500)]], clock(1000)),
    ]
    found = case_times(outcome, 0, iterations=2)
    assert found.rank_us_RP == ((1.0, 1.0),)
    assert found.wait_us_RP == ((0.25, 0.0),)


def test_without_a_common_clock_no_waiting_is_known() -> None:
    outcome = [rank_times([[(1000, 3000)]], clock(0)), rank_times([[(500, 2500)]], clock(None))]
    found = case_times(outcome, 0, iterations=1)
    assert found.rank_us_RP == ((2.0, 2.0),)
    assert found.wait_us_RP is None


def measure(out: Path, *, elsewhere: int | None = None) -> BenchResult:
    """Three ranks, the last late out of every barrier; rank ``elsewhere`` has a clock 1000 s ahead."""
    program = str(Path(__file__).with_name("late_rank.py"))
    path = os.pathsep.join(sys.path)
    processes: list[subprocess.Popen[bytes]] = []
    with meeting_point() as port:
        try:
            for rank in range(RANKS):
                own = rank_environment(rank, RANKS, port=port, run_id="late")
                processes.append(
                    subprocess.Popen(
                        [*(_ANOTHER_CLOCK if rank == elsewhere else ()), sys.executable, program, str(out)],
                        env={**os.environ, **own, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
                    )
                )
            assert [process.wait(timeout=400) for process in processes] == [0] * RANKS
        finally:
            for process in processes:
                process.kill()
                process.wait()
    return load_bench(out)


def waits_us(case: BenchCase) -> list[float]:
    """Median waiting of each rank."""
    assert case.wait_us_RP is not None
    waited: list[float] = np.median(case.wait_us_RP, axis=0).tolist()
    return waited


def test_a_rank_that_leaves_the_barrier_late_does_not_lengthen_the_exchange(tmp_path: Path) -> None:
    result = measure(tmp_path / "bench.json")
    (case,) = result.cases
    assert result.clock_uncertainty_us == 0.0
    assert waits_us(case) == pytest.approx([LATE_S * 1e6, LATE_S * 1e6, 0.0], rel=0.2)
    assert min(min(repeat[:2]) for repeat in case.rank_us_RP) > 0.8 * LATE_S * 1e6, (
        "raw times hold the waiting"
    )
    assert case.median_us < 0.3 * LATE_S * 1e6


def test_waiting_is_found_across_clocks_that_are_a_thousand_seconds_apart(tmp_path: Path) -> None:
    if shutil.which("unshare") is None or subprocess.run([*_ANOTHER_CLOCK, "true"], check=False).returncode:
        pytest.skip("needs the right to make a time namespace (root, Linux 5.6)")
    result = measure(tmp_path / "bench.json", elsewhere=1)
    (case,) = result.cases
    assert result.clock_uncertainty_us is not None
    assert 0.0 < result.clock_uncertainty_us < 5_000
    assert waits_us(case) == pytest.approx([LATE_S * 1e6, LATE_S * 1e6, 0.0], rel=0.2)
    assert case.median_us < 0.3 * LATE_S * 1e6
