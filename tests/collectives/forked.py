"""Ranks as forks of one process that has imported everything: imports cost more than the tests.

``Forked(world, work)`` runs ``work(rank)`` on P forks and collects what each returns, or its error. A fork
that does not end in time is killed by its id.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from observatory.errors import ObservatoryError
from observatory.hpc.launch import meeting_point, rank_environment


class Forked:
    """Running forks; ``collect`` waits for them."""

    def __init__(self, world: int, work: Callable[[int], Any]) -> None:
        self._stack = contextlib.ExitStack()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        port = self._stack.enter_context(_meeting_point_elsewhere())
        self._pids: list[int] = []
        sys.stdout.flush()
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                os.environ.update(rank_environment(rank, world, port=port, run_id="forked"))
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
                _work(rank, work, self._folder)
            self._pids.append(pid)

    def collect(self, *, timeout_s: float) -> list[dict[str, Any]]:
        """Per rank ``value`` or ``error`` (one of ours) if it said either, and how it ``ended``."""
        with self._stack:
            ended = _await(self._pids, timeout_s)
            return [_told(self._folder / str(rank), how) for rank, how in enumerate(ended)]


@contextlib.contextmanager
def _meeting_point_elsewhere() -> Iterator[int]:
    """Keep the store in a process of its own: forks of one with the store's threads inherit their locks."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        with meeting_point() as port:
            os.write(writing, str(port).encode())
            signal.pause()
    os.close(writing)
    try:
        yield int(os.read(reading, 16))
    finally:
        os.close(reading)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _work(rank: int, work: Callable[[int], Any], folder: Path) -> None:
    """All that a fork does; whatever happens, it never gets back into the code that forked it."""
    faulthandler.enable()
    # torch makes its pool of threads anew after a fork; threads that load a model would race to do it.
    torch.set_num_threads(torch.get_num_threads())
    try:
        try:
            outcome: dict[str, Any] = {"value": work(rank)}
        except ObservatoryError as error:
            outcome = {"error": str(error)}
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        (folder / f"{rank}.part").write_text(json.dumps(outcome))
        (folder / f"{rank}.part").rename(folder / str(rank))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(70)


def _await(pids: list[int], timeout_s: float) -> list[str]:
    deadline = time.monotonic() + timeout_s
    ended: dict[int, str] = {}
    while len(ended) < len(pids) and time.monotonic() < deadline:
        for pid in pids:
            if pid not in ended:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    ended[pid] = str(os.waitstatus_to_exitcode(status))
        time.sleep(0.01)
    for pid in pids:
        if pid not in ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGABRT)  # shows where it hangs, unless it is stopped
                time.sleep(0.5)
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            ended[pid] = "hung"
    return [ended[pid] for pid in pids]


def _told(path: Path, ended: str) -> dict[str, Any]:
    outcome: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return {**outcome, "ended": ended}
