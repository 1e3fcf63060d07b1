"""Locking clocks without regret: nothing is changed without a lease and a watchdog that undoes it.

    with ClockLease.acquire("GPU-...", duration_s=600) as lease:
        lease.lock(780)          # MHz, snapped to a supported clock
        ...                      # measure; sample the clock under load, the driver may hold another
        lease.lock(1200)

Order, so that a kill at any point leaves nothing locked for longer than the watchdog needs to notice:

    lease file written -> watchdog ready -> lease says touched -> driver told -> ... -> driver told to undo
    -> lease file removed -> watchdog ends

A kill before "touched" has changed nothing; after it the watchdog undoes. Where a batch system kills every
process of a job at once, the watchdog goes too: the lease file stays, and ``observatory clocks unlock`` in
the site's epilogue, or the next lease of that GPU, undoes it (docs/power.md#locking).
"""

from __future__ import annotations

import contextlib
import select
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from observatory.children import python_module
from observatory.errors import ClockError, LockRefusedError, ObservatoryError
from probes.power.control import ClockControl
from probes.power.lease import (
    Lease,
    create_lease,
    diary_path,
    find_leases,
    guarded,
    last_words,
    lease_folder,
    lease_path,
    new_lease,
    read_lease,
    replace_lease,
    this_boot,
)

__all__ = ["ClockLease", "UndoneLease", "refuse_leased", "undo", "undo_leases"]

_WATCHDOG_S = 20.0
_END_S = 5.0


class ClockLease:
    """The right to change one GPU's clock and power limit for a while; made by :meth:`acquire`.

    As a context manager it gives the right back, which undoes every change.
    """

    def __init__(
        self, control: ClockControl, path: Path, lease: Lease, watchdog: subprocess.Popen[bytes]
    ) -> None:
        self._control = control
        self._path = path
        self._lease = lease
        self._watchdog = watchdog

    @classmethod
    def acquire(cls, device_uuid: str, *, duration_s: float, folder: Path | None = None) -> Self:
        """Take the lease of a GPU. Nothing of the GPU is changed yet.

        Args:
            device_uuid: the GPU, in full.
            duration_s: when it is undone at the latest, whatever happens.
            folder: where leases are kept; the machine's own by default.

        Raises:
            LockRefusedError: the GPU is partitioned, shared, or leased by a process that lives.
            ClockError: no lease can be kept, or the watchdog does not start.
            DeviceError: there is no such GPU.
        """
        if not duration_s > 0:
            raise ClockError(f"a lease of {duration_s:g} s is no lease; give more than 0 s")
        path = lease_path(folder or lease_folder(), device_uuid)
        control = ClockControl(device_uuid)
        try:
            reason = control.refusal()
            if reason is not None:
                raise LockRefusedError(f"clocks are not touched: {reason}")
            with guarded(path):
                _clear_stale(path)
                lease = new_lease(device_uuid, duration_s=duration_s)
                create_lease(path, lease)
            watchdog = _start_watchdog(path, lease)
            lease = read_lease(path) or lease  # the watchdog has put itself in
        except BaseException:
            control.close()
            raise
        return cls(control, path, lease, watchdog)

    @property
    def control(self) -> ClockControl:
        """What the driver says of the GPU."""
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
        with guarded(self._path):
            before = self._lease
            self._about_to_change(locked=True)
            try:
                return self._control.lock_sm_clock(wanted_mhz)
            except LockRefusedError:
                self._rewrite(before)
                raise

    def unlock(self) -> None:
        """Take our lock of the clock away, under this lease; where we have set none, nothing."""
        if self._lease.locked:
            self._control.unlock()

    def limit(self, limit_mw: int) -> int:
        """Set the power limit; the one before is restored at the end.

        Raises:
            LockRefusedError, ClockError: as for :meth:`lock`; or the limit before cannot be read.
        """
        with guarded(self._path):
            before = self._lease
            before_mw = before.limit_before_mw or self._control.power_limit_mw
            if before_mw is None:
                raise LockRefusedError(
                    "the driver does not tell the power limit in force, so it could not be restored: nothing "
                    "was changed"
                )
            self._about_to_change(limit_before_mw=before_mw)
            try:
                return self._control.set_power_limit_mw(limit_mw)
            except LockRefusedError:
                self._rewrite(before)
                raise

    def restore_limit(self) -> None:
        """Put the power limit back to what it was, under this lease."""
        if self._lease.limit_before_mw is not None:
            self._control.set_power_limit_mw(self._lease.limit_before_mw)

    def release(self) -> None:
        """Undo every change and give the lease back; doing it twice does nothing.

        Raises:
            ClockError: the driver did not undo it; the watchdog goes on trying.
        """
        with guarded(self._path):
            if _held(self._path, self._lease):
                undo(self._control, self._lease)
                self._path.unlink(missing_ok=True)
        self._control.close()
        if self._watchdog.stdin is not None and not self._watchdog.stdin.closed:
            with contextlib.suppress(OSError):
                self._watchdog.stdin.close()  # wakes it up
        try:
            self._watchdog.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._watchdog.terminate()
            self._watchdog.wait(_END_S)
        if self._watchdog.stdout is not None:
            self._watchdog.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _about_to_change(self, *, locked: bool = False, limit_before_mw: int | None = None) -> None:
        """Say in the lease what is about to happen; refuse when nobody would undo it."""
        if not _held(self._path, self._lease) or self._lease.problem is not None:
            raise LockRefusedError(
                f"the lease of {self._lease.device_uuid} is over, and what it changed is undone; take a "
                "longer one"
            )
        if self._watchdog.poll() is not None:
            raise LockRefusedError(
                "the watchdog that would undo the lock has died, so nothing is changed; begin again"
            )
        before = self._lease.limit_before_mw if limit_before_mw is None else limit_before_mw
        locked = locked or self._lease.locked
        self._rewrite(
            self._lease.model_copy(update={"touched": True, "locked": locked, "limit_before_mw": before})
        )

    def _rewrite(self, lease: Lease) -> None:
        if lease != self._lease:
            replace_lease(self._path, lease)
            self._lease = lease


@dataclass(frozen=True, slots=True, kw_only=True)
class UndoneLease:
    """What became of one lease file.

    Attributes:
        path: the file.
        lease: what it held; None when it was damaged.
        undone: whether its GPU is as it was before.
        reason: why it was undone, or why not.
    """

    path: Path
    lease: Lease | None
    undone: bool
    reason: str


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
    found = []
    for path in find_leases(folder):
        if only in (None, path):
            with guarded(path):
                found.append(_undo_file(path, force=force))
    return found


def _undo_file(path: Path, *, force: bool) -> UndoneLease:
    lease = None
    try:
        lease = read_lease(path)
        if lease is None:
            return UndoneLease(path=path, lease=None, undone=True, reason="it was given back meanwhile")
        problem = lease.problem
        if problem is None and not force:
            reason = f"its owner, process {lease.owner.pid}, lives; --force undoes it all the same"
            return UndoneLease(path=path, lease=lease, undone=False, reason=reason)
        if lease.touched:
            with ClockControl(lease.device_uuid) as control:
                undo(control, lease)
        path.unlink(missing_ok=True)
    except ObservatoryError as error:
        return UndoneLease(path=path, lease=lease, undone=False, reason=str(error))
    return UndoneLease(path=path, lease=lease, undone=True, reason=problem or "as asked for")


def undo(control: ClockControl, lease: Lease) -> None:
    """Undo what a lease has changed; nothing when it has changed nothing.

    Raises:
        ClockError: the driver did not do it.
    """
    if not lease.touched or lease.boot_id != this_boot():
        return
    if lease.locked:
        control.unlock()
    if lease.limit_before_mw is not None and control.power_limit_mw != lease.limit_before_mw:
        control.restore_power_limit_mw(lease.limit_before_mw)


def _held(path: Path, lease: Lease) -> bool:
    """Whether the file still holds this lease: the watchdog removes it when it has undone it."""
    found = read_lease(path)
    return found is not None and found.lease_id == lease.lease_id


def _clear_stale(path: Path) -> None:
    """Undo a lease whose owner is gone, so that another can be taken.

    Raises:
        LockRefusedError: its owner lives.
    """
    found = read_lease(path)
    if found is None:
        return
    _refuse_held(found)
    with ClockControl(found.device_uuid) as control:
        undo(control, found)
    path.unlink(missing_ok=True)


def refuse_leased(device_uuid: str, *, folder: Path | None = None) -> None:
    """Refuse a GPU whose clock a process of ours may change at any moment, or has left changed.

    Raises:
        LockRefusedError: it is leased, or a lease of it was not undone yet.
    """
    found = read_lease(lease_path(folder or lease_folder(), device_uuid))
    if found is None:
        return
    _refuse_held(found)
    if found.touched:
        raise LockRefusedError(
            f"what a lease of {device_uuid} has changed is not undone ({found.problem}); run `observatory "
            "clocks unlock` first"
        )


def _refuse_held(lease: Lease) -> None:
    if lease.problem is None:
        raise LockRefusedError(
            f"{lease.device_uuid} is leased by process {lease.owner.pid}; wait for it, or end it"
        )


def _start_watchdog(path: Path, lease: Lease) -> subprocess.Popen[bytes]:
    """Start the process that undoes the lease, and wait until it watches.

    Raises:
        ClockError: it does not start; the lease is given back, nothing was changed.
    """
    try:
        diary_path(path).unlink(missing_ok=True)
        # Not the owner's standard error: a pipe that waits for its end would wait for the watchdog.
        with diary_path(path).open("ab") as diary:
            process = subprocess.Popen(
                python_module("probes.power.watchdog", str(path), lease.lease_id),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=diary,
                start_new_session=True,  # Ctrl-C and hang-ups of the terminal are the owner's
            )
    except OSError as error:
        path.unlink(missing_ok=True)
        raise ClockError(
            f"the watchdog that would undo the lock does not start ({error.strerror}), so nothing is changed"
        ) from error
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], _WATCHDOG_S)
    if not readable or process.stdout.readline() != b"ready\n":
        process.kill()
        process.wait()
        path.unlink(missing_ok=True)
        said = last_words(path)
        raise ClockError(
            "the watchdog that would undo the lock does not start, so nothing is changed"
            + ("" if said is None else f" ({said})")
        )
    return process
