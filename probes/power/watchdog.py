"""The process that undoes a lease: ``python -m probes.power.watchdog LEASE_FILE LEASE_ID``.

It undoes the lease when its owner is gone, SIGKILL included, when the lease expires, and when it is told to
end (SIGTERM). It ends when the file is gone or holds another lease: then the owner has undone it.

Its standard error is a diary (:func:`probes.power.lease.diary_path`), of which ``observatory clocks status``
shows the last line.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from pathlib import Path

from observatory.errors import ObservatoryError
from probes.power.control import ClockControl
from probes.power.lease import Lease, ProcessId, guarded, read_lease, replace_lease
from probes.power.locking import undo

__all__ = ["main"]

_LOOK_S = 1.0
#: A driver that does not undo at once is asked again for so long; then the file stays, for `clocks unlock`.
_TRY_S = 120.0


def main(argv: list[str]) -> int:
    """Watch one lease until it is over."""
    path, lease_id = Path(argv[0]), argv[1]
    told_to_end = False

    def end(*_: object) -> None:
        nonlocal told_to_end
        told_to_end = True

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    lease = _lease_of(path, lease_id)
    if lease is None:
        return 1
    replace_lease(path, lease.model_copy(update={"watchdog": ProcessId.of(os.getpid())}))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    _note(f"watches over {lease.device_uuid} for process {lease.owner.pid}")
    while True:
        lease = _lease_of(path, lease_id)
        if lease is None:
            _note("the lease was given back")
            return 0
        if told_to_end or lease.problem is not None:
            return _undo(path, lease, lease.problem or "told to end")
        _wait(lease)


def _lease_of(path: Path, lease_id: str) -> Lease | None:
    lease = read_lease(path)
    return lease if lease is not None and lease.lease_id == lease_id else None


def _wait(lease: Lease) -> None:
    """Until the owner says or does something, a second has passed, or the lease expires."""
    left_s = max(0.0, (lease.expires_ns - time.monotonic_ns()) / 1e9)
    select.select([sys.stdin], [], [], min(_LOOK_S, left_s))
    if lease.owner.alive:
        time.sleep(0.01)  # an input that is closed is readable for ever


def _undo(path: Path, lease: Lease, why: str) -> int:
    """Undo, again and again for a while when the driver does not let us."""
    deadline = time.monotonic() + _TRY_S
    problem = ""
    while True:
        try:
            with guarded(path):
                now = _lease_of(path, lease.lease_id)
                if now is not None:
                    with ClockControl(now.device_uuid) as control:
                        undo(control, now)
                    path.unlink(missing_ok=True)
        except ObservatoryError as error:
            if str(error) != problem:
                problem = str(error)
                _note(f"{why}, and undoing fails, tried again for {_TRY_S:g} s: {problem}")
            if time.monotonic() > deadline:
                _note(f"gave up, {lease.device_uuid} may still be locked: {problem}")
                return 1
            time.sleep(_LOOK_S)
        else:
            changed = now is not None and now.touched
            _note(f"{why}: {'undid its changes' if changed else 'it had changed nothing'}")
            return 0


def _note(what: str) -> None:
    """A line in the diary; a full disk must not keep anything from being undone."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} watchdog {os.getpid()}: {what}\n")
        sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
