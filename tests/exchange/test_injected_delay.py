"""A known delay on a chosen rank: found on those that waited, blamed on it, and not in the transfer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from observatory.exchange import layer_waits, rank_waits, run_waits
from observatory.records import ClockSpec
from observatory.store import open_run

RANKS, DELAYED, DELAY_MS, ROUNDS = 4, 2, 60, 16
_LIMIT_S = 90


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of four gloo processes, made once."""
    folder = tmp_path_factory.mktemp("delay")
    program = Path(__file__).with_name("ranks.py")
    arguments = [str(number) for number in (RANKS, DELAYED, DELAY_MS, ROUNDS)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(program), str(folder), str(rank), *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for rank in range(RANKS)
    ]
    try:
        assert [process.wait(timeout=_LIMIT_S) for process in processes] == [0] * RANKS
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return folder


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
