"""Locking clocks: nothing is changed without a lease and a watchdog that undoes it.

    with ClockLease.acquire("GPU-...", duration_s=600) as lease:
        lease.lock(780)          # MHz, snapped to a supported clock
        ...                      # measure; sample the clock under load, the driver may hold another
        lease.lock(1200)

Order, so that a kill at any point leaves nothing locked for longer than the watchdog needs to notice:

    lease file written -> watchdog ready -> lease says touched -> driver sets -> ... -> driver undoes
    -> lease file removed -> watchdog ends

A kill before "touched" has changed nothing; after it the watchdog undoes. Where a batch system kills every
process of a job at once, the watchdog goes too: the lease file stays, and ``observatory clocks unlock`` in
the site's epilogue, or the next lease of that GPU, undoes it (docs/power.md#locking).

An owner may be stopped and continued at any point, while its lease expires and another process takes the GPU.
So every change is made alone with the lease (``guarded``), when its file still holds it and it has not
expired; an owner that was stopped in between has kept all others out, and undoes what it then set too late.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from observatory.errors import ClockError, LockRefusedError, ObservatoryError
from observatory.host.children import python_module
from observatory.locks.control import ClockControl
from observatory.locks.lease import (
    Lease,
    create_lease,
    end_lease,
    find_leases,
    forget_lease,
    last_line,
    lease_path,
    log_path,
    new_lease,
    read_lease,
    remove_leftovers,
    replace_lease,
    standing,
)
from observatory.locks.lease_files import guarded, lease_folder, open_own, trusted_folder
from observatory.locks.words import LeaseCode, lease_words, refusal_remedy, refusal_words
from observatory.reasons import Reason
from observatory.run.time_base import boot_id

_WATCHDOG_S = 20.0
_END_S = 5.0


class ClockLease:
    """The right to change one GPU's clock and power limit for a while; made by :meth:`acquire`.

    As a context manager it gives the right back, which undoes every change. It belongs to the process that
    acquired it: in a fork of that process nothing can be changed through it, and giving it back does nothing.
    """

    def __init__(
        self, control: ClockControl, path: Path, lease: Lease, watchdog: subprocess.Popen[bytes]
    ) -> None:
        self._control = control
        self._path = path
        self._lease = lease
        self._watchdog = watchdog
        self._released = False
        control.before_change = _refuse_directly

    @classmethod
    def acquire(cls, device_uuid: str, *, duration_s: float, folder: Path | None = None) -> Self:
        """Take the lease of a GPU. Nothing of the GPU is changed yet.

        Args:
            device_uuid: the GPU, in full.
            duration_s: when it is undone at the latest, whatever happens.
            folder: where leases are kept; the machine's own by default.

        Raises:
            LockRefusedError: the GPU is partitioned, shared, or leased by a process that lives, or of another
                PID namespace.
            ClockError: no lease can be kept, or the watchdog does not start.
            DeviceError: there is no such GPU.
        """
        if not duration_s > 0:
            raise ClockError(f"lease duration must be positive, got {duration_s:g} s")
        path = lease_path(lease_folder() if folder is None else trusted_folder(folder), device_uuid)
        control = ClockControl(device_uuid)
        lease = watchdog = None
        try:
            refusal = control.refusal()
            if refusal is not None:
                raise LockRefusedError(
                    f"clocks are not touched: {refusal_words(refusal)}", remedy=refusal_remedy(refusal)
                )
            with guarded(path):
                _clear_stale(path)
                remove_leftovers(path)
                lease = new_lease(device_uuid, duration_s=duration_s)
                create_lease(path, lease)
            watchdog = _start_watchdog(path, lease)
            current = read_lease(path)  # the watchdog has put itself in
            if current is None or current.lease_id != lease.lease_id:
                raise _over(lease)
        except BaseException:
            control.close()
            if watchdog is not None:
                _end_watchdog(watchdog)
            if lease is not None:
                _give_up(path, lease)
            raise
        return cls(control, path, current, watchdog)

    @property
    def control(self) -> ClockControl:
        """What the driver says of the GPU; it refuses changes, which go through the lease."""
        return self._control

    def lock(self, sm_clock_mhz: int) -> int:
        """Lock the SM clock to the nearest supported one.

        Returns:
            The clock asked of the driver; whether it holds is seen in samples under load.

        Raises:
            LockRefusedError: the driver does not permit it, or the lease is over.
            ClockError: no such clock, or the driver failed.
        """
        wanted_mhz = self._control.snap(sm_clock_mhz)
        with self._changing():
            self._announce(locked=True)
            return self._control.lock_sm_clock(wanted_mhz)

    def unlock(self) -> None:
        """Take our lock of the clock away, under this lease; where we have set none, nothing.

        Raises:
            LockRefusedError, ClockError: as for :meth:`lock`.
        """
        with self._changing():
            if self._lease.locked:
                self._control.unlock()

    def limit(self, limit_mw: int) -> int:
        """Set the power limit; the one before is restored at the end.

        Raises:
            LockRefusedError, ClockError: as for :meth:`lock`; or the limit before cannot be read.
        """
        with self._changing():
            before_mw = self._lease.limit_before_mw or self._control.power_limit_mw
            if before_mw is None:
                raise LockRefusedError(
                    "the driver does not report the power limit in force, so it could not be restored: "
                    "nothing was changed"
                )
            self._announce(limit_before_mw=before_mw)
            return self._control.set_power_limit_mw(limit_mw)

    def restore_limit(self) -> None:
        """Put the power limit back to what it was, under this lease.

        Raises:
            LockRefusedError, ClockError: as for :meth:`lock`.
        """
        with self._changing():
            if self._lease.limit_before_mw is not None:
                self._control.set_power_limit_mw(self._lease.limit_before_mw)

    def release(self) -> None:
        """Undo every change and give the lease back; doing it twice does nothing.

        Raises:
            LeaseBusyError: another process is changing the GPU and does not come to an end.
            ClockError: the driver did not undo it, or another lease has the place of this one, whose file has
                vanished; the watchdog goes on trying.
        """
        if self._released or not self._lease.owner.is_this_process:
            return
        with guarded(self._path):
            state = standing(self._path, self._lease.lease_id)
            if state in ("held", "vanished"):
                self._undo_own()
            elif state == "replaced" and self._lease.touched:
                raise ClockError(
                    f"the lease of {self._lease.device_uuid} has vanished and another has its place, so what "
                    "it changed is not undone now but by its watchdog, when the other is over"
                )
        self._released = True
        self._control.close()
        _end_watchdog(self._watchdog)
        forget_lease(self._path, self._lease)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Alone with a lease that is ours and holds, which is looked at again just before a change and after.

        Raises:
            LockRefusedError: it is over, or this process is a fork of its owner.
        """
        if not self._lease.owner.is_this_process:
            raise LockRefusedError(
                f"the lease of {self._lease.device_uuid} is process {self._lease.owner.pid}'s, and this "
                f"process, {os.getpid()}, is not it",
                remedy="acquire one here when that is over",
            )
        with guarded(self._path):
            self._refuse_over()
            before = self._lease
            self._control.before_change = self._refuse_over
            try:
                yield
            except LockRefusedError:
                self._rewrite(before)
                raise
            finally:
                self._control.before_change = _refuse_directly
            if self._lease.problem is not None:  # this process was stopped in the call of the driver
                self._undo_own()
                raise _over(self._lease)

    def _undo_own(self) -> None:
        """Undo every change and end the lease. Under its guard."""
        self._control.before_change = None
        try:
            undo(self._control, self._lease)
        finally:
            self._control.before_change = _refuse_directly
        end_lease(self._path, self._lease)

    def _refuse_over(self) -> None:
        state = standing(self._path, self._lease.lease_id)
        if state in ("vanished", "replaced"):
            raise LockRefusedError(
                f"the file of the lease of {self._lease.device_uuid} has vanished without being given back, "
                "so nothing more is changed, and its watchdog undoes what it changed",
                remedy=f"see who removes files of {self._path.parent}",
            )
        if state == "over" or self._lease.problem is not None:
            raise _over(self._lease)

    def _announce(self, *, locked: bool = False, limit_before_mw: int | None = None) -> None:
        """State in the lease what is about to happen; refuse when no watchdog would undo it."""
        if self._watchdog.poll() is not None:
            raise LockRefusedError(
                "the watchdog that would undo the lock has died, so nothing is changed", remedy="begin again"
            )
        before = self._lease.limit_before_mw if limit_before_mw is None else limit_before_mw
        locked = locked or self._lease.locked
        self._rewrite(
            self._lease.model_copy(update={"touched": True, "locked": locked, "limit_before_mw": before})
        )

    def _rewrite(self, lease: Lease) -> None:
        if lease == self._lease or standing(self._path, lease.lease_id) != "held":
            return
        replace_lease(self._path, lease)
        self._lease = lease
        assert self._watchdog.stdin is not None
        with contextlib.suppress(OSError):  # it has died, or is stopped and its pipe is full
            os.write(self._watchdog.stdin.fileno(), lease.model_dump_json().encode() + b"\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class UndoneLease:
    """What became of one lease file.

    Attributes:
        path: the file.
        lease: what it held; None when it was damaged.
        undone: whether its GPU is as it was before.
        reason: why it was undone, or why not.
        spared: it was left because it still held when it was looked at.
    """

    path: Path
    lease: Lease | None
    undone: bool
    reason: Reason
    spared: bool = False


def undo_leases(folder: Path, *, uuid: str | None = None, force: bool = False) -> list[UndoneLease]:
    """Undo the leases in a folder that do not hold any more; nothing that is not ours is touched.

    Args:
        folder: where leases are kept.
        uuid: only this GPU's.
        force: also those whose owner lives.

    Raises:
        LockRefusedError: the name is no UUID of an NVIDIA GPU.
    """
    only = None if uuid is None else lease_path(folder, uuid)
    return [_undo_file(path, force=force) for path in find_leases(folder) if only in (None, path)]


def _undo_file(path: Path, *, force: bool) -> UndoneLease:
    lease = None
    try:
        lease = read_lease(path)
        if lease is not None and _spared(lease, force):  # without the guard, which its owner may hold
            return _left(path, lease)
        with guarded(path):
            lease = read_lease(path)
            if lease is None:
                return UndoneLease(path=path, lease=None, undone=True, reason=Reason(LeaseCode.GIVEN_BACK))
            if _spared(lease, force):
                return _left(path, lease)
            problem = lease.problem
            _undo_and_end(path, lease)
    except ObservatoryError as error:
        refusal = Reason(LeaseCode.NOT_UNDONE, {"error": str(error)})
        return UndoneLease(path=path, lease=lease, undone=False, reason=refusal)
    return UndoneLease(path=path, lease=lease, undone=True, reason=problem or Reason(LeaseCode.FORCED))


def _spared(lease: Lease, force: bool) -> bool:
    return lease.problem is None and not force


def _left(path: Path, lease: Lease) -> UndoneLease:
    reason = Reason(LeaseCode.OWNER_LIVES, {"pid": lease.owner.pid})
    if lease.owner.alive is None:
        reason = Reason(LeaseCode.OWNER_UNSEEN, {"pid": lease.owner.pid, "left_s": lease.left_s})
    return UndoneLease(path=path, lease=lease, undone=False, reason=reason, spared=True)


def _undo_and_end(path: Path, lease: Lease) -> None:
    """Undo a lease that the file holds, whoever's it is. Under its guard."""
    if lease.touched:
        with ClockControl(lease.device_uuid) as control:
            undo(control, lease)
    end_lease(path, lease)


def undo(control: ClockControl, lease: Lease) -> None:
    """Undo what a lease has changed; nothing when it has changed nothing.

    Raises:
        ClockError: the driver did not do it.
    """
    if not lease.touched or lease.boot_id != (boot_id() or ""):
        return
    if lease.locked:
        control.unlock()
    if lease.limit_before_mw is not None and control.power_limit_mw != lease.limit_before_mw:
        control.restore_power_limit_mw(lease.limit_before_mw)


def _refuse_directly() -> None:
    raise LockRefusedError(
        "nothing is changed outside of the lease",
        remedy="call lock, unlock, limit or restore_limit of the lease",
    )


def _over(lease: Lease) -> LockRefusedError:
    return LockRefusedError(
        f"the lease of {lease.device_uuid} is over, and what it changed is undone", remedy="take a longer one"
    )


def _clear_stale(path: Path) -> None:
    """Undo a lease whose owner is gone, so that another can be taken.

    Raises:
        LockRefusedError: its owner lives.
    """
    lease = read_lease(path)
    if lease is not None:
        _why_over(lease)
        _undo_and_end(path, lease)


def _give_up(path: Path, lease: Lease) -> None:
    """Take back a lease that has changed nothing yet; where that fails it expires."""
    with contextlib.suppress(ObservatoryError, OSError), guarded(path):
        if standing(path, lease.lease_id) == "held":
            end_lease(path, lease)
        forget_lease(path, lease)


def refuse_leased(device_uuid: str, *, folder: Path | None = None) -> None:
    """Refuse a GPU whose clock a process of ours may change at any moment, or has left changed.

    Raises:
        LockRefusedError: it is leased, or a lease of it was not undone yet.
    """
    lease = read_lease(lease_path(lease_folder() if folder is None else trusted_folder(folder), device_uuid))
    if lease is None:
        return
    problem = _why_over(lease)
    if lease.touched:
        raise LockRefusedError(
            f"what a lease of {device_uuid} has changed is not undone ({lease_words(problem)})",
            remedy="run `observatory clocks unlock` first",
        )


def _why_over(lease: Lease) -> Reason:
    """Why a lease does not hold any more.

    Raises:
        LockRefusedError: it holds.
    """
    problem = lease.problem
    if problem is None:
        raise LockRefusedError(
            f"{lease.device_uuid} is leased by {lease.holder}", remedy="wait for it, or end it"
        )
    return problem


def _start_watchdog(path: Path, lease: Lease) -> subprocess.Popen[bytes]:
    """Start the process that undoes the lease, and wait until it watches.

    Raises:
        ClockError: it does not start.
    """
    try:
        log_path(path).unlink(missing_ok=True)
        # Not the owner's standard error: a pipe that waits for its end would wait for the watchdog.
        with os.fdopen(open_own(log_path(path), os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as log:
            process = subprocess.Popen(
                python_module("observatory.locks.watchdog", str(path), lease.lease_id),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C and hang-ups of the terminal are the owner's
            )
    except OSError as error:
        raise ClockError(
            f"the watchdog that would undo the lock does not start ({error.strerror}), so nothing is changed"
        ) from error
    assert process.stdin is not None
    assert process.stdout is not None
    os.set_blocking(process.stdin.fileno(), False)
    readable, _, _ = select.select([process.stdout], [], [], _WATCHDOG_S)
    if not readable or process.stdout.readline() != b"ready\n":
        process.kill()
        _end_watchdog(process)
        last = last_line(path)
        raise ClockError(
            "the watchdog that would undo the lock does not start, so nothing is changed"
            + ("" if last is None else f" ({last})")
        )
    return process


def _end_watchdog(process: subprocess.Popen[bytes]) -> None:
    """Wait for the watchdog of a lease that is over; one that is stopped is killed."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(OSError):
        process.stdin.close()  # wakes it up
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
