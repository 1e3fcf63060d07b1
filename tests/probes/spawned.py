"""Starts the ranks of a test as processes of their own and ends them, whatever happens."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.paths import ROOT


def run_ranks(module: str, out: Path, *, world: int, timeout_s: float) -> list[int]:
    """Exit codes of ``python -m module out rank``; their output is in ``out/rank-<n>.log``.

    Raises:
        TimeoutError: a rank still ran; its output is in the message.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    logs = [out / f"rank-{rank}.log" for rank in range(world)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w", encoding="utf-8") as file:
            command = [sys.executable, "-W", "ignore", "-m", module, str(out), str(rank)]
            processes.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
            )
    deadline = time.monotonic() + timeout_s
    try:
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired as error:
        tails = "\n".join(log.read_text(encoding="utf-8", errors="replace")[-1500:] for log in logs)
        raise TimeoutError(f"ranks of {module} still ran after {timeout_s:g} s:\n{tails}") from error
    finally:
        for process in processes:
            process.kill()
            process.wait()
