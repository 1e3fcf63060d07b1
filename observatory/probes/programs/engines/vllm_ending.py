"""The end of a vLLM server, which kills the engine's processes at once unless it is asked to drain requests.

Those of them that watch a model need a moment to write the rest. The parent gives it to them, and then does
what it did before; requests are aborted all the same.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

#: Holds one file for each process with a watch that is not closed; made by the server's first process.
_FOLDER = "OBSERVATORY_VLLM_OPEN"
_MOST_S = 10.0
_PAUSE_S = 0.02


class OpenWatch:
    """Whether this process has a watch that is not closed, for the process that would kill it."""

    def __init__(self) -> None:
        self._file = Path(os.environ[_FOLDER], str(os.getpid()))

    def set(self) -> None:
        """It has one."""
        self._file.touch()

    def clear(self) -> None:
        """It has none."""
        self._file.unlink(missing_ok=True)


def wait_for_watches() -> None:
    """Have this process let its engine's processes close their watches before it kills them."""
    from vllm.v1.engine import utils

    if _FOLDER not in os.environ:
        os.environ[_FOLDER] = tempfile.mkdtemp(prefix="observatory-vllm-")
        atexit.register(_remove, os.environ[_FOLDER], os.getpid())
    kill = utils.shutdown

    @functools.wraps(kill)
    def end_in_order(processes: Any, timeout: float | None = None) -> None:
        if timeout == 0:
            for process in processes:
                if process.is_alive():
                    process.terminate()
            _await(processes, Path(os.environ[_FOLDER]))
        kill(processes, timeout=timeout)

    utils.shutdown = end_in_order


def _await(processes: Any, folder: Path) -> None:
    until = time.monotonic() + _MOST_S
    while time.monotonic() < until and any(process.is_alive() for process in processes):
        if not any(folder.iterdir()):
            return
        time.sleep(_PAUSE_S)


def _remove(folder: str, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
