"""Processes that own leases and do what a test asks of them, one call at a time.

a = Owner(host)
a.ask("held = ClockLease.acquire(UUID, duration_s=60)")
a.ask("held.lock(780)")
a.stop(); a.begin("held.unlock()"); a.go_on(); a.answer()
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.locks.test_locking import UUID, Host

CLEAN = {"lock": 0.0, "limit": 700.0}
_ANSWER_S = 400.0
_CODE = f"""
import json, os, signal, sys, threading, time
from pathlib import Path
from observatory.errors import *
from observatory.locks import locking
from observatory.locks.locking import ClockLease
UUID = {UUID!r}
def refused(call):
    try:
        exec(call, names)
    except LockRefusedError:
        return
    raise AssertionError(call)
names = dict(globals())
for line in sys.stdin:
    try:
        exec(json.loads(line), names)
        outcome = [None, str(names.pop("outcome", ""))]
    except Exception as error:
        outcome = [type(error).__name__, str(error)]
    print(json.dumps(outcome), flush=True)
"""


class Owner:
    """One such process; ``prefix`` is a command that starts it."""

    def __init__(self, host: Host, prefix: Sequence[str] = ()) -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-c", _CODE],
            env=host.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        """Its process id; of a prefix's process where there is one."""
        return self.process.pid

    def begin(self, statements: str) -> None:
        """Ask for something without waiting for the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(statements) + "\n")

    def answer(self) -> tuple[str | None, str]:
        """Name and text of the error, or None and what the statements left in ``outcome``."""
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], _ANSWER_S)
        assert readable, f"no answer in {_ANSWER_S:g} s"
        error, outcome = json.loads(self.process.stdout.readline())
        return error, outcome

    def ask(self, statements: str) -> str:
        """Ask for something that must not fail."""
        error, outcome = self.try_(statements)
        assert error is None, outcome
        return outcome

    def try_(self, statements: str) -> tuple[str | None, str]:
        """Ask for something that may fail."""
        self.begin(statements)
        return self.answer()

    def acquire(self, duration_s: float = 60.0) -> int:
        """Acquire a lease; its watchdog's process id."""
        return int(
            self.ask(
                f"held = ClockLease.acquire(UUID, duration_s={duration_s})\noutcome = held._watchdog.pid"
            )
        )

    def hold_short(self, *calls: str) -> None:
        """Acquire a lease that expires soon, and make calls in time, however slow the machine is."""
        for duration_s in (2.0, 8.0, 32.0):
            error, outcome = self.try_(
                "\n".join([f"held = ClockLease.acquire(UUID, duration_s={duration_s})", *calls])
            )
            if error is None:
                return
            self.try_("held.release()")
        raise AssertionError(outcome)

    def stop(self) -> None:
        """SIGSTOP, and wait until it is stopped."""
        os.kill(self.pid, signal.SIGSTOP)
        self.wait_stopped()

    def wait_stopped(self) -> None:
        """Wait until it is stopped, by whomever."""
        assert eventually(lambda: _state(self.pid) == "T")

    def go_on(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End it."""
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()
        self.kill()


@contextlib.contextmanager
def owners(host: Host, count: int, prefix: Sequence[str] = ()) -> Iterator[list[Owner]]:
    """So many processes, ended afterwards."""
    started = [Owner(host, prefix) for _ in range(count)]
    try:
        yield started
    finally:
        for owner in started:
            owner.close()


def eventually(holds: Callable[[], bool], within_s: float = 60.0) -> bool:
    """Whether something becomes true in time."""
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
