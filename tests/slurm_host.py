"""A Slurm cluster on one machine: munged, slurmctld, and one slurmd for each of four nodes.

All nodes are this host under other names, so what tells them apart is Slurm alone. Everything lives under a
temporary folder and listens on free ports; what was started is ended, by its process id.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

NODES = 4
_CPUS = 4
_PR_SET_PDEATHSIG = 1  # of prctl(2)
_START_S, _END_S, _POLL_S = 400.0, 120.0, 0.05
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "squeue", "sinfo", "scontrol")
#: Marks of launchers and of jobs that the tests themselves may run in.
_LAUNCHERS = ("SLURM", "PMI", "OMPI_", "PRTE_", "TORCHELASTIC", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_")
_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))


def why_not() -> str | None:
    """Why no Slurm can be started here; None when it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a Slurm of one's own needs root on Linux"
    missing = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]
    return f"{', '.join(missing)} missing: apt-get install slurm-wlm munge" if missing else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A batch job that was submitted.

    Attributes:
        job_id: its number.
        folder: where it runs.
    """

    job_id: str
    folder: Path

    @property
    def output(self) -> str:
        """What it has written so far, on both streams."""
        path = self.folder / "output"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def wait(self, timeout_s: float) -> int:
        """The exit code of its script.

        Raises:
            TimeoutError: it still runs, or was ended before it could say.
        """
        deadline = time.monotonic() + timeout_s
        code = self.folder / "code"
        while not code.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {self.job_id} did not end within {timeout_s:g} s:\n{self.output}")
            time.sleep(_POLL_S)
        return int(code.read_text())


class SlurmHost:
    """The running cluster; made by :func:`slurm_host`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}
        self.environment = {**kept, "PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def call(self, *command: str) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(
            command, env=self.environment, check=True, capture_output=True, text=True, timeout=_START_S
        )
        return done.stdout.strip()

    def submit(self, lines: Sequence[str], folder: Path) -> Job:
        """Submit a batch script on all nodes; it stops at the first line that fails, as ``set -e`` does."""
        folder.mkdir(parents=True, exist_ok=True)
        script = folder / "script"
        outcome = "trap 'echo $? > code.part; mv code.part code' EXIT"
        script.write_text("\n".join(("#!/bin/bash", "set -e", f"cd '{folder}'", outcome, *lines, "")))
        options = (f"--nodes={NODES}", "--exclusive", f"--chdir={folder}", f"--output={folder}/output")
        return Job(job_id=self.call("sbatch", "--parsable", *options, str(script)), folder=folder)

    def start(self) -> None:
        """Start the daemons and wait until all nodes are idle."""
        (self.folder / "state").mkdir()
        munge = {name: self.folder / f"munge.{name}" for name in ("key", "socket", "pid", "log", "seed")}
        munge["key"].write_bytes(secrets.token_bytes(128))
        munge["key"].chmod(0o600)
        (self.folder / "slurm.conf").write_text(_configuration(self.folder, munge["socket"]))
        self._start(
            *("munged", "--foreground", "--force", f"--key-file={munge['key']}"),
            *(f"--socket={munge['socket']}", f"--pid-file={munge['pid']}"),
            *(f"--log-file={munge['log']}", f"--seed-file={munge['seed']}"),
        )
        self._until("the socket of munged", munge["socket"].exists)
        self.start_controller()
        for node in range(1, NODES + 1):
            self._start("slurmd", "-D", "-N", f"n{node}")
        self._until("four idle nodes", lambda: self._answer("sinfo", "-h", "-o", "%T %D") == f"idle {NODES}")

    def start_controller(self) -> None:
        """Start slurmctld, which takes over what it finds in its folder."""
        self._controller = self._start("slurmctld", "-D")

    def stop_controller(self) -> None:
        """End slurmctld, as an administrator does; jobs go on."""
        self._controller.terminate()
        self._controller.wait(_END_S)
        self._daemons.remove(self._controller)

    def lose(self, job: str) -> None:
        """Kill all processes of a job at once, as a node that dies does."""
        for pid in self._left():
            with contextlib.suppress(OSError):
                entry = Path(f"/proc/{pid}")
                is_step = f"slurmstepd: [{job}.".encode() in (entry / "cmdline").read_bytes()
                if is_step or f"SLURM_JOB_ID={job}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """Cancel what runs, then end the daemons, the last first."""
        if self._answer("squeue", "-h"):
            self._answer("scancel", "--user=root")
            deadline = time.monotonic() + _END_S
            while self._answer("squeue", "-h") and time.monotonic() < deadline:
                time.sleep(_POLL_S)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(_END_S)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in self._left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _left(self) -> list[int]:
        """Processes that only this cluster can have started: its configuration is in their environment."""
        mark = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdecimal() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{command[0]}-{len(self._daemons)}.out").open("ab") as log:
            daemon = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - no Python thread runs at this point
            )
        self._daemons.append(daemon)
        return daemon

    def _answer(self, *command: str) -> str | None:
        """What a command prints; None when the cluster does not answer."""
        with contextlib.suppress(subprocess.SubprocessError):
            return self.call(*command)
        return None

    def _until(self, what: str, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_S
        while not holds():
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text()[-800:] for path in sorted(self.folder.glob("*.out")))
                raise TimeoutError(f"{what} did not come within {_START_S:g} s:\n{logs}")
            time.sleep(_POLL_S)


@contextlib.contextmanager
def slurm_host() -> Iterator[SlurmHost]:
    """A cluster of four idle nodes n1 to n4, each with four processors as far as Slurm knows."""
    # Not pytest's folder: the path of a socket has to be short.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        host = SlurmHost(Path(folder))
        try:
            host.start()
            yield host
        finally:
            host.stop()


def _configuration(folder: Path, munge_socket: Path) -> str:
    name = socket.gethostname()
    control, *ports = _free_ports(1 + NODES)
    nodes = (
        f"NodeName=n{node} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} CPUs={_CPUS}"
        for node, port in enumerate(ports, start=1)
    )
    return "\n".join(
        (
            "ClusterName=observatory",
            f"SlurmctldHost={name}(127.0.0.1)",
            f"SlurmctldPort={control}",
            "SlurmUser=root",
            f"AuthInfo=socket={munge_socket},cred_expire=5",
            f"StateSaveLocation={folder}/state",
            f"SlurmdSpoolDir={folder}/spool-%n",
            f"SlurmctldPidFile={folder}/slurmctld.pid",
            f"SlurmdPidFile={folder}/slurmd-%n.pid",
            "SlurmdParameters=config_overrides",  # nodes claim more processors than this machine may have
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            "SchedulerType=sched/builtin",
            "SchedulerParameters=sched_interval=2",  # instead of 60 s, for jobs that come back
            "MpiDefault=none",
            "AccountingStorageType=accounting_storage/none",
            "JobAcctGatherType=jobacct_gather/none",
            "KillWait=2",
            # The port where ranks meet follows from the job's number; others may test beside us.
            f"FirstJobId={random.randrange(1, 60000)}",
            *nodes,
            "PartitionName=all Nodes=ALL Default=YES State=UP",
            "",
        )
    )


def _die_with_parent() -> None:
    """A test run that is killed leaves no daemon behind."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
