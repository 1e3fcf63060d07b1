"""The folder of leases, which is ours alone, and its files: plain ones of ours, changed by one at a time.

Whoever may rename a folder on the way to a file decides what the file is. So every folder from the root on is
owned by root or by this user and is writable by its owner only, as OpenSSH demands of its keys; a folder of
root's with the sticky bit (/tmp) may be writable by all. Links to folders are followed one by one under the
same rule; files are opened without links.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from observatory.errors import ClockError, LeaseBusyError

FOLDER_VARIABLE = "OBSERVATORY_LEASES"
#: Bits of a mode that let the group or all others write.
_OTHERS_WRITE = 0o022
_MOST_LINKS = 40
#: Longest wait for another process to let go of a guard: it holds it for calls of the driver only.
_GUARD_S = 5.0
#: Open guards of this process, for its forks to close.
_guards: set[int] = set()


def lease_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where leases of this machine are kept, made if need be; gone after a reboot, like the locks.

    Raises:
        ClockError: it cannot be made, or others may write to it or to a folder above it.
    """
    configured = environment.get(FOLDER_VARIABLE)
    if configured:
        folder = Path(configured)
    elif os.geteuid() == 0:
        folder = Path("/run/moe-observatory/leases")
    else:
        folder = Path(environment.get("XDG_RUNTIME_DIR") or f"/tmp/moe-observatory-{os.geteuid()}") / "leases"
    return trusted_folder(folder)


def trusted_folder(folder: Path) -> Path:
    """A folder that is ours alone, made if need be; without links in its path.

    Raises:
        ClockError: it cannot be made, or others may write to it or to a folder above it.
    """
    done, rest, links = Path("/"), list(reversed(folder.absolute().parts[1:])), 0
    try:
        _refuse_untrusted(done, done.lstat())
        while rest:
            name = rest.pop()
            if name == "..":
                done = done.parent
                continue
            place = done / name
            with contextlib.suppress(FileExistsError):
                if not os.path.lexists(place):
                    place.mkdir(mode=0o700)
            status = place.lstat()
            _refuse_untrusted(place, status)
            if stat.S_ISLNK(status.st_mode):
                links += 1
                if links > _MOST_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                target = Path(os.readlink(place))
                done = Path("/") if target.is_absolute() else done
                rest.extend(part for part in reversed(target.parts) if part != "/")
            else:
                done = place
        status = done.lstat()
    except OSError as error:
        raise ClockError(
            f"leases cannot be kept in {folder} ({error.strerror})",
            remedy=f"name a folder in {FOLDER_VARIABLE}",
        ) from error
    if status.st_uid != os.geteuid() or status.st_mode & _OTHERS_WRITE:
        raise _not_ours(done)
    return done


def _refuse_untrusted(place: Path, status: os.stat_result) -> None:
    """Refuse a component of a path that others could replace, or put something of theirs into.

    Raises:
        ClockError: it is such a one.
        OSError: it is neither a folder nor a link.
    """
    if status.st_uid not in (0, os.geteuid()):
        raise _not_ours(place)
    if stat.S_ISLNK(status.st_mode):
        return  # its mode says nothing; what it leads to is looked at
    if not stat.S_ISDIR(status.st_mode):
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if status.st_mode & _OTHERS_WRITE and not (status.st_uid == 0 and status.st_mode & stat.S_ISVTX):
        raise _not_ours(place)


def _not_ours(place: Path) -> ClockError:
    return ClockError(
        f"{place} is not ours alone (its owner is user {place.lstat().st_uid}, its mode "
        f"{stat.S_IMODE(place.lstat().st_mode):o}), so leases in it cannot be trusted",
        remedy=f"name a folder in {FOLDER_VARIABLE} that only you and root may write to, as all folders "
        "above it",
    )


def open_own(path: Path, flags: int) -> int:
    """Open a plain file of ours in a trusted folder; made with mode 0600 where ``flags`` say so.

    Raises:
        OSError: it cannot be opened; or it is a link, a pipe, a device, has a second name, is another user's,
            or may be written by others.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a symbolic link", str(path)) from error
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, "it is no plain file", str(path)) from error
        raise
    status = os.fstat(descriptor)
    reason = (
        "it is no plain file" if not stat.S_ISREG(status.st_mode)
        else f"its owner is user {status.st_uid}" if status.st_uid != os.geteuid()
        else "it has a second name, a hard link" if status.st_nlink > 1
        else "others may write to it" if status.st_mode & _OTHERS_WRITE
        else None
    )  # fmt: skip
    if reason is not None:
        os.close(descriptor)
        raise OSError(errno.EPERM, reason, str(path))
    return descriptor


@contextlib.contextmanager
def guarded(path: Path) -> Iterator[None]:
    """Alone with a lease: between looking at it and acting on it no other process or thread does either.

    The kernel gives the right back when its holder dies; a holder that is stopped keeps it.

    Raises:
        LeaseBusyError: another holds it and does not let go.
        ClockError: its file cannot be opened, or is not ours.
    """
    descriptor = _take_guard(path.with_suffix(".lock"))
    try:
        yield
    finally:
        if descriptor in _guards:  # in a fork it is neither ours nor open any more
            _guards.discard(descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _take_guard(guard: Path) -> int:
    deadline = time.monotonic() + _GUARD_S
    while True:
        try:
            try:
                descriptor = open_own(guard, os.O_RDWR | os.O_CREAT)
            except FileNotFoundError:
                trusted_folder(guard.parent)  # removed while we live
                descriptor = open_own(guard, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise ClockError(
                f"guard {guard} of a lease cannot be taken ({error.strerror}), so nothing is changed",
                remedy="see what it is, and remove it",
            ) from error
        _guards.add(descriptor)
        taken = False
        try:
            taken = _locked(descriptor, deadline) and _still_named(descriptor, guard)
            if taken:
                return descriptor
        finally:
            if not taken:
                _guards.discard(descriptor)
                os.close(descriptor)
        if time.monotonic() > deadline:
            raise LeaseBusyError(
                f"{_holder(guard)} is changing {guard.stem} and has not come to an end in {_GUARD_S:g} s, "
                "so nothing is changed",
                remedy="see whether that process is stopped, let it go on or end it",
            )


def _locked(descriptor: int, deadline: float) -> bool:
    """Whether the lock of a file could be had in time."""
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        else:
            return True


def _still_named(descriptor: int, guard: Path) -> bool:
    """Whether the file is the one that others would open: a lock on a removed file excludes nothing."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), guard.lstat())
    return False


def _holder(guard: Path) -> str:
    """The process that holds a guard, as the kernel lists it."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        inode = guard.lstat().st_ino
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            fields = line.split()
            if fields[1] == "FLOCK" and int(fields[5].rpartition(":")[2]) == inode and int(fields[4]) > 0:
                return f"process {fields[4]}"
    return "another process"


def _close_guards() -> None:
    """In a fork: a copy of a guard would keep it taken after its holder's death."""
    for descriptor in _guards:
        os.close(descriptor)
    _guards.clear()


os.register_at_fork(after_in_child=_close_guards)
