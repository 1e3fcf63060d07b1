"""The process that undoes a lease: ``python -m observatory.locks.watchdog LEASE_FILE LEASE_ID``.

It undoes the lease when its owner is gone, SIGKILL included, when the lease expires, and at SIGTERM. It ends
when the lease was given back or undone by another process. When the lease's file has vanished without that,
it undoes what the owner has last said to have changed, as soon as no other lease of the GPU is there. The
owner says it in the file and, for that case, on standard input.

It keeps a log (:func:`observatory.locks.lease.log_path`), of which ``observatory clocks status`` shows
the last line.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from pathlib import Path

from observatory.errors import ClockError, LeaseBusyError, ObservatoryError
from observatory.host.processes import ProcessId
from observatory.locks.control import ClockControl
from observatory.locks.lease import (
    Lease,
    Standing,
    end_lease,
    forget_lease,
    note,
    read_lease,
    replace_lease,
    standing,
)
from observatory.locks.lease_files import guarded
from observatory.locks.locking import undo
from observatory.locks.words import lease_words

_LOOK_S = 1.0
#: A driver that does not undo at once is asked again for so long; then the file stays, for `clocks unlock`.
_TRY_S = 120.0


def main(argv: list[str]) -> int:
    """Watch one lease until it is over."""
    path, lease_id = Path(argv[0]), argv[1]
    asked_to_end = False

    def end(*_: object) -> None:
        nonlocal asked_to_end
        asked_to_end = True

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with guarded(path):
        lease = read_lease(path)
        if lease is None or lease.lease_id != lease_id:
            return 1
        if lease.owner.alive is None:
            _note(path, f"cannot see process {lease.owner.pid}: it is of another PID namespace")
            return 1
        lease = lease.model_copy(update={"watchdog": ProcessId.of(os.getpid())})
        replace_lease(path, lease)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    _note(path, f"watches over {lease.device_uuid} for process {lease.owner.pid}")
    while True:
        state, lease = _look(path, lease)
        if state == "over":
            _note(path, "the lease was given back")
            return _end(path, lease)
        if state != "held":
            return _undo(path, lease, "the lease's file has vanished without being given back")
        problem = lease.problem
        if asked_to_end or problem is not None:
            return _undo(path, lease, lease_words(problem) if problem else "asked to end")
        _wait(lease)


def _look(path: Path, lease: Lease) -> tuple[Standing, Lease]:
    """What became of the lease, and the last that is known of it."""
    state = standing(path, lease.lease_id)
    readable, _, _ = select.select([sys.stdin], [], [], 0.0)
    received = os.read(sys.stdin.fileno(), 1 << 16) if readable else b""
    with contextlib.suppress(ValueError, IndexError):
        lease = Lease.model_validate_json(received.splitlines()[-1])
    with contextlib.suppress(ClockError):
        stored = read_lease(path)
        if stored is not None and stored.lease_id == lease.lease_id:
            lease = stored
    return state, lease


def _wait(lease: Lease) -> None:
    """Until the owner says or does something, a second has passed, or the lease expires."""
    select.select([sys.stdin], [], [], min(_LOOK_S, max(0.0, lease.left_s)))
    if lease.owner.alive:
        time.sleep(0.01)  # an input that is closed is readable for ever


def _undo(path: Path, lease: Lease, why: str) -> int:
    """Undo, again and again: for a while when the driver does not let us, and until others are done."""
    deadline = None
    noted = ""
    while True:
        try:
            with guarded(path):
                state, lease = _look(path, lease)
                if state == "replaced" and lease.touched:
                    raise LeaseBusyError("another lease of the GPU is there")
                if state in ("held", "vanished"):
                    if lease.touched:
                        with ClockControl(lease.device_uuid) as control:
                            undo(control, lease)
                    end_lease(path, lease)
        except ObservatoryError as error:
            busy = isinstance(error, LeaseBusyError)
            if str(error) != noted:
                noted = str(error)
                until = "undone later" if busy else f"tried again for {_TRY_S:g} s"
                _note(path, f"{why}, and undoing fails, {until}: {noted}")
            if not busy:
                deadline = deadline or time.monotonic() + _TRY_S
                if time.monotonic() > deadline:
                    _note(path, f"gave up, {lease.device_uuid} may still be locked: {noted}")
                    return 1
            time.sleep(_LOOK_S)
        else:
            done = "undid its changes" if lease.touched else "it had changed nothing"
            _note(path, f"{why}: {'given back meanwhile' if state == 'over' else done}")
            return _end(path, lease)


def _end(path: Path, lease: Lease) -> int:
    """End; the mark that the lease is over stays for an owner that lives."""
    if lease.owner.alive is False:
        forget_lease(path, lease)
    return 0


def _note(path: Path, what: str) -> None:
    note(path, f"watchdog {os.getpid()}: {what}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
