"""Starts the ranks of a test as processes of their own and ends them, whatever happens.

``python -m tests.probes.spawned MODULE OUT WORLD`` imports what the ranks need once and forks them: imports
cost more than the tests. It prints their exit codes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from pathlib import Path

from tests.paths import ROOT


def run_ranks(module: str, out: Path, *, world: int, timeout_s: float) -> list[int]:
    """Exit codes of ``python -m module out rank``; their output is in ``out/rank-<n>.log``.

    Raises:
        TimeoutError: a rank still ran; its output is in the message.
    """
    starter = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", __name__, module, str(out), str(world)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        codes: list[int] = json.loads(starter.communicate(timeout=timeout_s)[0])
        return codes
    except subprocess.TimeoutExpired as error:
        logs = [path.read_text(encoding="utf-8", errors="replace") for path in _logs(out, world)]
        tails = "\n".join(log[-1500:] for log in logs)
        raise TimeoutError(f"ranks of {module} still ran after {timeout_s:g} s:\n{tails}") from error
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(starter.pid, signal.SIGKILL)
        starter.wait()


def _logs(out: Path, world: int) -> list[Path]:
    return [out / f"rank-{rank}.log" for rank in range(world)]


def _run(module: str, out: Path, rank: int, log: Path) -> None:
    """All that a fork does; it never gets back into the code that forked it."""
    code = 1
    try:
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = [module, str(out), str(rank)]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    module, out, world = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    importlib.import_module(module)
    pids = []
    for rank, log in enumerate(_logs(out, world)):
        pid = os.fork()
        if pid == 0:
            _run(module, out, rank, log)
        pids.append(pid)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]))


if __name__ == "__main__":
    main()
