"""Owns a lease, changes a clock and a limit, gives it back; killed at a chosen point.

    python -m tests.power.lock_owner UUID KILL_AT|middle [everybody]

KILL_AT is a point of :mod:`tests.power.killing`; 0 kills nowhere and prints how many there are; ``middle`` is
where both a lock and a limit are held. With ``everybody`` its watchdog is killed just before it.
"""

from __future__ import annotations

import sys

from probes.power.locking import ClockLease
from tests.power.killing import kill_at_point, kill_now


def main(argv: list[str]) -> int:
    uuid, middle, everybody = argv[0], argv[1] == "middle", "everybody" in argv[2:]
    end = kill_at_point(-1 if middle else int(argv[1]), children=everybody)
    with ClockLease.acquire(uuid, duration_s=60) as held:
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
