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

__all__ = [
    "MARK",
    "command_of",
    "descendants",
    "end_all",
    "environment_of",
    "lives",
    "processes_of",
    "wait_until",
]

#: Variable that holds the mark of the running test.
MARK = "OBSERVATORY_TEST"
#: Python starts it at the first need and keeps it for later ones.
_KEPT = "multiprocessing.resource_tracker"
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
    """Running processes that carry the mark of a test or descend from this one, without some."""
    known = (int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal())
    marked = {pid for pid in known if environment_of(pid).get(MARK) == mark}
    found = (marked | descendants(os.getpid())) - {os.getpid(), *but}
    return {pid for pid in found if lives(pid) and _KEPT not in command_of(pid)}


def end_all(pids: Collection[int]) -> None:
    """Kill processes, each by its number, and reap those that are children of this one."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(map(lives, pids)), within_s=10.0)


def wait_until(true: Callable[[], bool], *, within_s: float) -> bool:
    """Whether it became true in time."""
    deadline = time.monotonic() + within_s
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True
