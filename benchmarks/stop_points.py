"""SIGSTOP at points of the code that locks clocks, until the lease expires; for ``benchmarks.kill_points``.

    owner starts -> ... -> stopped at the point -> its lease expires -> [a second owner leases, locks, limits]
    -> continued -> it ends -> [the second owner's lock is looked at; it releases] -> what the driver holds

A second owner is refused where the first was stopped alone with the lease (it holds the file lock).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from observatory.errors import ObservatoryError
from tests.locks.killing import kill_watchdogs
from tests.locks.test_locking import UUID, Host

#: What is stopped until its lease has expired -> the scenario of ``kill_points`` that has the same points.
STOPS = {
    "owner stopped": "owner",
    "owner stopped, a second owner": "owner",
    "watchdog stopped and its owner killed, a second owner": "owner in the middle, then watchdog",
}
SECOND = {"lock": 1350.0, "limit": 500.0}
#: A lease this long has to suffice to come to the point; doubled where it does not.
_FIRST_S = 2.0
_TRIES = 4
_END_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StopOutcome:
    """What became of one point.

    Attributes:
        scenario: key of ``STOPS``.
        point: the point.
        stopped: whether the process came to it.
        alone: it was stopped while it held the lease's file lock.
        undone: the driver held nothing of it any more before it was continued.
        second: "leased" or "refused"; None where there was no second owner.
        disturbed: another process changed the device while the second owner held it.
        left: what the driver held in the end, where that is not what it held at first.
    """

    scenario: str
    point: int
    stopped: bool
    alone: bool = False
    undone: bool = False
    second: str | None = None
    disturbed: bool = False
    left: dict[str, float] | None = None


class Stop:
    """Processes of one point."""

    def __init__(self, host: Host, fork: Callable[[Callable[[], int]], int]) -> None:
        self._host = host
        self._fork = fork

    def owner(self, point: int, duration_s: float) -> int | None:
        """An owner that is stopped; None when it ended instead."""
        from tests.locks import lock_owner

        pid = self._fork(lambda: lock_owner.main([UUID, str(point), "stop", str(duration_s)]))
        return pid if os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1]) else None

    def watchdog(self, point: int) -> int | None:
        """A watchdog that is stopped, whose owner was killed; None when it ended instead."""
        from observatory.locks import locking
        from tests.locks import lock_owner

        def main() -> int:
            locking._WATCHDOG_S = 3.0  # one that is stopped before it watches is killed by its owner
            kill_watchdogs(point, stop=True)
            return lock_owner.main([UUID, "middle"])

        pid = self._fork(main)
        os.waitpid(pid, 0)
        with contextlib.suppress(ChildProcessError):
            watchdog, status = os.waitpid(-1, os.WUNTRACED)
            return watchdog if os.WIFSTOPPED(status) else None
        return None

    def second(self) -> tuple[int, int, int] | None:
        """A second owner that holds a lock and a limit: its id, and pipes from and to it; None: refused."""
        from observatory.locks import lease_files
        from observatory.locks.locking import ClockLease

        read_end, write_end = os.pipe()
        wait, go_on = os.pipe()

        def main() -> int:
            os.close(go_on)
            lease_files._GUARD_S = 0.2
            try:
                with ClockLease.acquire(UUID, duration_s=600) as held:
                    held.lock(int(SECOND["lock"]))
                    held.limit(int(SECOND["limit"] * 1000))
                    os.write(write_end, b"y")
                    os.read(wait, 1)
            except ObservatoryError:
                os.write(write_end, b"n")
                raise
            return 0

        pid = self._fork(main)
        os.close(write_end)
        os.close(wait)
        if os.read(read_end, 1) == b"y":
            return pid, read_end, go_on
        os.close(read_end)
        os.close(go_on)
        os.waitpid(pid, 0)
        return None

    def expire(self) -> None:
        """Wait until the lease that is there has expired."""
        for path in self._host.leases.glob("gpu-*.json"):
            with contextlib.suppress(FileNotFoundError):
                expires_ns = json.loads(path.read_text())["expires_ns"]
                time.sleep(max(0.0, (expires_ns - time.monotonic_ns()) / 1e9) + 0.01)

    def alone(self) -> bool:
        """Whether a process holds the file lock of the lease."""
        for path in self._host.leases.glob("gpu-*.lock"):
            with path.open() as handle:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return True
        return False


def play_stop(
    host: Host,
    scenario: str,
    point: int,
    *,
    fork: Callable[[Callable[[], int]], int],
    reap: Callable[[], None],
    held: Callable[[], dict[str, float]],
    clean: dict[str, float],
) -> StopOutcome:
    """Play one point.

    Args:
        host: machine with one GPU.
        scenario: key of ``STOPS``.
        point: from 1.
        fork: starts a process that calls a function.
        reap: waits for all processes that are left.
        held: what the driver held after the changes that it has logged.
        clean: what it held at first.
    """
    stop = Stop(host, fork)
    process, duration_s = None, _FIRST_S
    for _ in range(_TRIES):
        process = stop.watchdog(point) if scenario.startswith("watchdog") else stop.owner(point, duration_s)
        if process is not None:
            break
        reap()
        duration_s *= 2
    if process is None:
        return StopOutcome(scenario=scenario, point=point, stopped=False)
    alone = stop.alone()
    second = None
    if scenario.startswith("owner"):
        stop.expire()
    if scenario.endswith("second owner"):
        second = stop.second()
    elif not alone:
        deadline = time.monotonic() + _END_S
        while held() != clean and time.monotonic() < deadline:
            time.sleep(0.02)
    undone = held() == clean or second is not None
    before = len(host.driver.changes())
    os.kill(process, signal.SIGCONT)
    os.waitpid(process, 0)
    disturbed = False
    if second is not None:
        pid, read_end, go_on = second
        disturbed = any(change.pid != pid for change in host.driver.changes()[before:]) or held() != SECOND
        os.close(go_on)
        os.waitpid(pid, 0)
        os.close(read_end)
    reap()
    state = host.state()
    return StopOutcome(
        scenario=scenario,
        point=point,
        stopped=True,
        alone=alone,
        undone=undone,
        second=None if not scenario.endswith("second owner") else "leased" if second else "refused",
        disturbed=disturbed,
        left=None if state == clean else state,
    )
