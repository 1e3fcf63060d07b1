"""Processes that tests start, and how all of them end.

Every test has a mark of its own in the environment. What it starts inherits the mark, also with a session of
its own or without its parent. :func:`processes_of` finds it so, and the descendants of this process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path

#: Variable that holds the mark of the running test.
MARK = "OBSERVATORY_TEST"
#: Parts of command lines of what Python and torch start at the first need and keep for later ones.
_KEPT = ("multiprocessing.resource_tracker", "multiprocessing.forkserver", "_inductor")
_POLL_S = 0.05


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in "ZX"
    return False


def command_of(pid: int) -> str:
    """Its command line; empty when it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def environment_of(pid: int) -> dict[str, str]:
    """The environment it was started with; empty when it is gone or another user's."""
    with contextlib.suppress(OSError):
        parts = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
        return dict(part.split("=", 1) for part in parts if "=" in part)
    return {}


def descendants(pid: int) -> set[int]:
    """Processes that it has started, and those that these have."""
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, children.read_text().split()):
                found |= {child, *descendants(child)}
    return found


def processes_of(mark: str, *, but: Collection[int] = ()) -> set[int]:
    """Running processes that carry the mark of a test or descend from this one, without some.

    What a test has a fixture of the session restart, carries the session's mark and is not the test's.
    """
    known = (int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal())
    mark_of = {pid: environment_of(pid).get(MARK) for pid in known}
    session = mark.partition("-")[0]
    marked = {pid for pid in mark_of if mark_of[pid] == mark}
    descended = {pid for pid in descendants(os.getpid()) if mark_of.get(pid) != session or session == mark}
    found = (marked | descended) - {os.getpid(), *but}
    return {pid for pid in found if lives(pid) and not any(part in command_of(pid) for part in _KEPT)}


def end_all(mark: str, *, but: Collection[int] = ()) -> None:
    """Kill the processes of a mark, each by its number, until none is left: they may start others."""

    def none_left() -> bool:
        left = processes_of(mark, but=but)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not left

    wait_until(none_left, within_s=10.0)


def wait_until(true: Callable[[], bool], *, within_s: float) -> bool:
    """Whether it became true in time."""
    deadline = time.monotonic() + within_s
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True
