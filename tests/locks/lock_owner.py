"""Owns a lease, changes a clock and a limit, gives it back; killed or stopped at a chosen point.

    python -m tests.locks.lock_owner UUID POINT|middle [everybody | stop SECONDS]

POINT is one of :mod:`tests.locks.killing`; 0 is nowhere and prints how many there are; ``middle`` is where
both a lock and a limit are held. With ``everybody`` its watchdog is killed just before; with ``stop`` it is
stopped instead of killed, and its lease lasts so many seconds.
"""

from __future__ import annotations

import sys

from observatory.locks.locking import ClockLease
from tests.locks.killing import kill_at_point, kill_now


def main(argv: list[str]) -> int:
    uuid, middle, everybody = argv[0], argv[1] == "middle", "everybody" in argv[2:]
    stop = "stop" in argv[2:]
    end = kill_at_point(-1 if middle else int(argv[1]), children=everybody, stop=stop)
    with ClockLease.acquire(uuid, duration_s=float(argv[-1]) if stop else 60.0) as held:
        held.lock(780)
        held.limit(400_000)
        held.lock(1200)
        if middle:
            kill_now(children=everybody)
        held.restore_limit()
        held.unlock()
        held.lock(900)
    print(end())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
