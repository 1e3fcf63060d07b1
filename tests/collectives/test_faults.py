"""What a user of ``profile --ep`` sees when something goes wrong, and what is left of the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import observatory
from tests.paths import ROOT

pytestmark = pytest.mark.slow

_LIMIT_S = 400
_SAYS = "observatory: "
Faults = dict[str, Any]


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    """What the ranks of every case of ``tests.collectives.fault_cases`` returned."""
    out = tmp_path_factory.mktemp("faults") / "outcome.json"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.collectives.fault_cases", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    document: Faults = {**json.loads(out.read_text()), "folder": out.parent}
    return document


def said(rank: dict[str, Any]) -> list[str]:
    """The sentences of one rank, without the command's name."""
    lines = rank["value"]["said"].splitlines()
    return [line.removeprefix(_SAYS) for line in lines if line.startswith(_SAYS)]


def test_a_rank_that_dies_is_named(faults: Faults) -> None:
    first, second = faults["dies"]
    assert second["ended"] == "-9"
    (sentence,) = said(first)
    assert sentence.startswith(
        "rank 0 of 2 timed out in an all-to-all of group world: no answer from rank 1;"
    )


def test_a_rank_that_hangs_is_named(faults: Faults) -> None:
    first, second = faults["hangs"]
    assert second["ended"] == "hung"
    (sentence,) = said(first)
    assert "timed out in an all-to-all of group world: no answer from rank 1;" in sentence


def test_a_rank_that_never_joins_is_named_by_all(faults: Faults) -> None:
    for rank in faults["never joins"][:2]:
        (sentence,) = said(rank)
        assert sentence.startswith("rank 2 of 4 did not join at 127.0.0.1:")
        assert "within 5 s; see what became of" in sentence


def test_a_full_disk_on_one_rank_is_told_by_it_and_passed_on_by_the_others(faults: Faults) -> None:
    first, second = faults["full disk"]
    (own,) = said(second)
    assert "rank 1 cannot write" in own
    assert "File too large" in own
    assert "rows are lost, parts written before are intact; free space or choose another place" in own
    (other,) = said(first)
    assert "timed out in an all-to-all of group world: rank 1 had left (CaptureError: " in other
    assert "File too large" in other


@pytest.mark.parametrize(
    ("how", "gap"),
    [
        ("dies", "rank 1 never closed"),
        ("hangs", "rank 1 never closed"),
        ("full disk", "rank 1 "),
    ],
)
def test_what_was_captured_stays_readable_and_the_gap_is_stated(faults: Faults, how: str, gap: str) -> None:
    run = observatory.open_run(faults["folder"] / how)
    assert run.manifest.state == "failed"
    assert any(problem.startswith(gap) for problem in run.problems), run.problems
    assert any(problem.startswith("rank 0 failed: ") and "rank 1" in problem for problem in run.problems)
    loads = run.expert_load()
    assert 0 in set(loads[loads.source_rank == 0].step) & set(loads[loads.source_rank == 1].step)
    assert set(run.exchanges().source_rank) == {0, 1}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "steps",
            "the ranks disagree on steps: rank 0 has 2, rank 1 has 3; start all ranks with the same model "
            "and options",
        ),
        (
            "model",
            'the ranks disagree on model: rank 0 has "tiny-gqa", rank 1 has "tiny-mha"; start all ranks with '
            "the same model and options",
        ),
        (
            "does not divide",
            "EP 3 does not divide 32 experts; degrees that fit: 1, 2, 4, 8, 16, 32",
        ),
        (
            "wrong ep",
            "--ep 4 was asked for on 2 ranks of torchrun; expected --ep 2, or as many ranks as --ep says",
        ),
    ],
)
def test_what_all_ranks_know_is_said_by_one_of_them(faults: Faults, name: str, sentence: str) -> None:
    first, *others = faults[name]
    assert said(first) == [sentence]
    assert [said(rank) for rank in others] == [[]] * len(others)
    assert {rank["value"]["code"] for rank in faults[name]} == {1}
    assert not (faults["folder"] / name).exists()


def test_a_taken_place_is_refused_by_one_sentence_and_replaced_when_forced(faults: Faults) -> None:
    """A command with the option to replace the run and cannot load its model leaves it alone."""
    out = faults["folder"] / "taken"
    first, second = faults["taken"]
    assert first["value"]["code"] == second["value"]["code"] == [0, 1, 0, 1]
    assert said(first) == [f"{out} exists and is not empty; choose another place, or replace it (--force)"]
    assert said(second) == []
    run = observatory.open_run(out)
    assert run.problems == ()
    assert [status.steps for status in run.manifest.ranks] == [3, 3]


def test_ranks_that_the_command_starts_itself_end_with_the_one_that_is_killed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-W", "ignore", "-m", "observatory", "profile"]
    options = [
        "--ep",
        "2",
        "--data",
        "mock",
        "--batch-size",
        "1",
        "--sequence-length",
        "16",
        "--out",
        str(out),
    ]
    process = subprocess.Popen(
        [*command, "tiny-gqa", *options, "--steps", "2000", "--flush-seconds", "0.3"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + _LIMIT_S
        while len(list(out.glob("routing/*/part-000000.parquet"))) < 2:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        (second,) = [pid for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
        os.kill(int(second), signal.SIGKILL)
        _, err = process.communicate(timeout=_LIMIT_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    *_, rank, launcher = [line for line in err.splitlines() if line.startswith(_SAYS)]
    assert "rank 0 of 2 timed out" in rank
    # Rank 0 has 15 s to end by itself, which a machine that is short of cores may not let it do.
    ends = ("ended with errors after it", "did not end and was killed")
    assert launcher.startswith(f"{_SAYS}rank 1 of 2 was killed by signal 9 (SIGKILL); rank 0 ")
    assert launcher.endswith(ends)
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def test_ranks_that_are_interrupted_write_what_they_have_and_leave_nothing_behind(tmp_path: Path) -> None:
    """The signal comes to the command alone, as a scheduler sends it; no rank has flushed by then."""
    out, scratch = tmp_path / "run", tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-W", "ignore", "-m", "observatory", "profile", "tiny-gqa", "--ep", "2"]
    command += ["--data", "mock", "--batch-size", "1", "--sequence-length", "16", "--steps", "100000"]
    process = subprocess.Popen(
        [*command, "--flush-seconds", "1000", "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(scratch)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + _LIMIT_S
        while len(list(out.glob("ranks/*"))) < 2:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(2.0)  # some steps
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=400)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    said = [line for line in err.splitlines() if line.startswith(_SAYS)]
    assert said == [f"{_SAYS}interrupted; of a run, what was written so far is kept and can be read"]
    run = observatory.open_run(out)
    assert run.manifest.state == "failed"
    assert set(run.expert_load().source_rank) == {0, 1}
    assert "the unflushed tail is missing" not in " ".join(run.problems)
    assert not list(scratch.glob("observatory-ranks-*"))
