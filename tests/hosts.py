"""Two hosts on one machine: each has a network, a name and, where the kernel allows, a clock of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.analysis.network import shaped
from tests.paths import ROOT

HOSTS = 2
_PORT = 29577
_LAUNCHERS = ("SLURM", "PMI", "OMPI_", "TORCHELASTIC", "MASTER_", "GLOO_", "RANK", "WORLD_SIZE", "LOCAL_")


def why_not() -> str | None:
    """Why such hosts cannot be made here; None when they can."""
    reason = shaped.why_not()
    if reason is None and (shutil.which("unshare") is None or not _can("--uts")):
        return "a host name of one's own needs unshare (util-linux) and root"
    return reason


def ahead_s() -> int:
    """How far the clock of the second host is ahead; 0 where the kernel has one clock for all."""
    return 1_000 if _can("--uts", "--time", "--monotonic", "1000") else 0


def run_on_hosts(
    program: Sequence[str],
    *,
    ranks_on_host: int,
    folder: Path,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
) -> list[str]:
    """What the hosts print while ``torchrun`` runs a program over all of them; all must end well."""
    ahead = ahead_s()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}
    own = {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(environment or {})}
    processes: list[subprocess.Popen[bytes]] = []
    logs = [folder / f"host{host}.log" for host in range(HOSTS)]
    with shaped.shaped_nodes(HOSTS, rate_mbit=1_000) as names:
        try:
            for host, (name, log) in enumerate(zip(names, logs, strict=True)):
                clock = ["--time", "--monotonic", str(ahead * host)] if ahead else []
                command = [
                    *("ip", "netns", "exec", name),
                    *("unshare", "--uts", *clock, "--fork", "--kill-child"),
                    *("sh", "-c", 'hostname "$0"; exec "$@"', f"host{host}"),
                    *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run"),
                    *(f"--nnodes={HOSTS}", f"--node-rank={host}", f"--nproc-per-node={ranks_on_host}"),
                    *(f"--master-addr={shaped.address_of(0)}", f"--master-port={_PORT}"),
                    *program,
                ]
                with log.open("wb") as output:
                    processes.append(
                        subprocess.Popen(
                            command,
                            cwd=folder,
                            env=own,
                            stdin=subprocess.DEVNULL,
                            stdout=output,
                            stderr=output,
                        )
                    )
            deadline = time.monotonic() + timeout_s
            codes = [process.wait(max(1.0, deadline - time.monotonic())) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
    said = [log.read_text(encoding="utf-8", errors="replace") for log in logs]
    assert codes == [0] * HOSTS, "\n".join(text[-3000:] for text in said)
    return said


def _can(*options: str) -> bool:
    done = subprocess.run(["unshare", *options, "true"], capture_output=True, check=False, timeout=20)
    return done.returncode == 0
