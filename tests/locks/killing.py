"""Kills or stops a process at a chosen line of the code that locks clocks.

Points are the lines in functions of
``observatory/locks/{locking,lease,lease_files,control,watchdog}.py``, in the order in which a process
runs them, each line at most three times. Point 0 is nowhere. The file that
``OBSERVATORY_POINTS`` names then takes the count, and else "killed" or "stopped" just before it is.

    python -m tests.locks.killing stop 37 MODULE ...      # as python -m MODULE ..., stopped at point 37
"""

from __future__ import annotations

import atexit
import os
import runpy
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from observatory.locks import locking

#: Names in the environment the file that takes what became of a point.
POINTS = "OBSERVATORY_POINTS"

_TIMES = 3
_OURS = tuple(f"/locks/{name}.py" for name in ("locking", "lease", "lease_files", "control", "watchdog"))
_IN_FUNCTION = 0x1  # CO_OPTIMIZED: no module, no class body


def kill_at_point(point: int, *, children: bool = False, stop: bool = False) -> Callable[[], int]:
    """Trace this process from here on, and kill it at a point.

    Args:
        point: from 1; 0 is nowhere.
        children: kill the processes that it started too, first: what a batch system does to a whole job.
        stop: SIGSTOP instead; it goes on at SIGCONT.

    Returns:
        Ends the tracing and tells how many points there were.
    """
    points = 0
    seen: Counter[tuple[str, int]] = Counter()

    def traced(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal points
        code = frame.f_code
        if not (code.co_flags & _IN_FUNCTION and code.co_filename.endswith(_OURS)):
            return None
        if event == "line":
            place = (code.co_filename, frame.f_lineno)
            seen[place] += 1
            if seen[place] <= _TIMES:
                points += 1
                if points == point:
                    _tell("stopped" if stop else "killed")
                    if stop:
                        os.kill(os.getpid(), signal.SIGSTOP)
                    else:
                        kill_now(children=children)
        return traced

    def end() -> int:
        sys.settrace(None)
        if point == 0:
            _tell(str(points))
        return points

    sys.settrace(traced)
    return end


def kill_now(*, children: bool) -> None:
    """Kill this process, and first, if wanted, those that it started."""
    if children:
        for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _tell(what: str) -> None:
    outcome = os.environ.get(POINTS)
    if outcome:
        Path(outcome).write_text(what)


def kill_watchdogs(point: int, *, stop: bool = False) -> None:
    """Kill, or stop, the watchdogs that this process starts at a point."""

    def command(module: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", __name__, "stop" if stop else "kill", str(point), module, *arguments]

    locking.python_module = command


if __name__ == "__main__":
    atexit.register(kill_at_point(int(sys.argv[2]), stop=sys.argv[1] == "stop"))
    sys.argv[:] = sys.argv[3:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
