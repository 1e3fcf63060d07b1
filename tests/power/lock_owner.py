"""Owns a lease, changes a clock and a limit, gives it back; killed at a chosen line of our own code.

    python -m tests.power.lock_owner UUID KILL_AT

KILL_AT counts the lines of ``probes/power/{locking,lease,control}.py`` as this process runs them, each line
at most three times; 0 kills nowhere and prints how many there are.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from types import FrameType
from typing import Any

from probes.power import control, lease, locking
from probes.power.locking import ClockLease

_TIMES = 3
_OURS = {module.__file__ for module in (control, lease, locking)}


def main(argv: list[str]) -> int:
    uuid, kill_at = argv[0], int(argv[1])
    lines = 0
    seen: Counter[tuple[str, int]] = Counter()

    def traced(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename not in _OURS:
            return None
        if event == "line":
            place = (frame.f_code.co_filename, frame.f_lineno)
            seen[place] += 1
            lines += seen[place] <= _TIMES
            if lines == kill_at and kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return traced

    sys.settrace(traced)
    with ClockLease.acquire(uuid, duration_s=60) as held:
        held.lock(780)
        held.limit(400_000)
        held.lock(1200)
        held.restore_limit()
        held.unlock()
        held.lock(900)
    sys.settrace(None)
    print(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
