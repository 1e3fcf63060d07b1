"""Leases: what we changed of a GPU, until when, for whom, and how to undo it; kept in one file per GPU.

A lock of the driver cannot be read back and outlives the process that set it. So nothing is set before a file
says that it is about to be. The file is whole at every moment: it is written under a temporary name and
renamed into its place. ``touched`` turns true just before the first change: undoing a lease that never came
so far changes nothing.

A lease that was given back or undone is not removed but renamed to ``gpu-*.LEASE_ID.over``, until its owner
and its watchdog have seen that: a lease whose file is missing without it was not given back.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
import uuid as uuids
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from observatory.errors import ClockError, LockRefusedError
from observatory.host.processes import ProcessId, machine_monotonic_ns
from observatory.locks.lease_files import FOLDER_VARIABLE, open_own
from observatory.locks.words import LeaseCode
from observatory.reasons import Reason
from observatory.run.files import one_line
from observatory.run.records import Count, Record, Text
from observatory.run.time_base import boot_id

_MOST_BYTES = 64 << 10
_TAIL_BYTES = 4096
#: A mark of a lease of another namespace is kept for so long after its expiry.
_KEPT_S = 24 * 3600.0
_UUID = re.compile(r"GPU-[0-9A-Fa-f-]{1,60}", re.ASCII)

#: What became of a lease: its file holds it; it was given back or undone; its file is missing or damaged; its
#: file is missing and another lease has its place.
Standing = Literal["held", "over", "vanished", "replaced"]


class Lease(Record):
    """What is changed of one GPU.

    Attributes:
        lease_id: unique.
        device_uuid: the GPU.
        owner: the process that asked for it.
        watchdog: the process that undoes it; None before it has started.
        boot_id: boot of the machine in which all of this holds, which a reboot undoes; empty without an id.
        created_unix_s: wall-clock label.
        expires_ns: machine's monotonic time at which it is undone, whether the owner lives or not.
        touched: a change was about to be made, or was made.
        locked: one of them was a lock of the clock; a lock of another program is not undone.
        limit_before_mw: power limit to restore; None when it was not changed.
    """

    lease_id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    device_uuid: Annotated[str, Field(pattern=r"^GPU-[0-9A-Fa-f-]{1,60}$")]
    owner: ProcessId
    watchdog: ProcessId | None = None
    boot_id: Text
    created_unix_s: float
    expires_ns: Count
    touched: bool = False
    locked: bool = False
    limit_before_mw: Annotated[int, Field(ge=1, le=10_000_000)] | None = None

    @property
    def problem(self) -> Reason | None:
        """Why it does not hold any more; None while it does.

        A lease of another PID or time namespace holds until it expires: whether its owner lives is not known.
        """
        if self.boot_id != (boot_id() or ""):
            return Reason(LeaseCode.BOOTED_SINCE)
        if self.owner.alive is False:
            return Reason(LeaseCode.OWNER_GONE, {"pid": self.owner.pid})
        if self.left_s <= 0:
            return Reason(LeaseCode.EXPIRED)
        return None

    @property
    def left_s(self) -> float:
        """Seconds until it expires; negative when it has."""
        return (self.expires_ns - machine_monotonic_ns()) / 1e9

    @property
    def holder(self) -> str:
        """The owner, in words."""
        if self.owner.alive is None:
            expiry = f"judged by its expiry in {self.left_s:.0f} s"
            return f"process {self.owner.pid} of another PID namespace, {expiry}"
        return f"process {self.owner.pid}"


def new_lease(device_uuid: str, *, duration_s: float) -> Lease:
    """A lease of this process that has changed nothing yet."""
    owner = ProcessId.of(os.getpid())
    if owner is None or owner.namespace is None:
        raise ClockError(
            "/proc does not identify processes here, so nothing could undo a lock",
            remedy="use Linux, with a /proc of this process's own PID namespace",
        )
    return Lease(
        lease_id=uuids.uuid4().hex,
        device_uuid=device_uuid,
        owner=owner,
        boot_id=boot_id() or "",
        created_unix_s=time.time(),
        expires_ns=machine_monotonic_ns() + round(duration_s * 1e9),
    )


def lease_path(folder: Path, device_uuid: str) -> Path:
    """File of a GPU's lease.

    Raises:
        LockRefusedError: the name is no UUID of an NVIDIA GPU.
    """
    if _UUID.fullmatch(device_uuid) is None:
        raise LockRefusedError(
            f"{device_uuid[:80]!r} is no UUID of an NVIDIA GPU",
            remedy="name it GPU-..., see `observatory doctor`",
        )
    return folder / f"{device_uuid.lower()}.json"


def find_leases(folder: Path) -> list[Path]:
    """Files of all leases, in the order of their names."""
    return sorted(folder.glob("gpu-*.json"))


def read_lease(path: Path) -> Lease | None:
    """The lease in a file; None when there is no such file.

    Raises:
        ClockError: the file is damaged or not ours, so that what was changed is not known.
    """
    try:
        with os.fdopen(open_own(path, os.O_RDONLY), "rb") as handle:
            lease = Lease.model_validate_json(handle.read(_MOST_BYTES))
        if path.name != lease_path(path.parent, lease.device_uuid).name:
            raise ValueError("a lease under the name of another GPU")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is damaged"
        raise ClockError(
            f"lease {path} cannot be read ({reason}), so what was changed is not known",
            remedy="look at the GPU's clocks, run `nvidia-smi -rgc -i UUID` if they are locked, and remove "
            "the file",
        ) from error
    return lease


def standing(path: Path, lease_id: str) -> Standing:
    """What became of a lease; certain only under its guard, but "over" is final."""
    try:
        lease = read_lease(path)
    except ClockError:
        lease = None
    if lease is not None and lease.lease_id == lease_id:
        return "held"
    if os.path.lexists(_over_path(path, lease_id)):
        return "over"
    return "vanished" if lease is None else "replaced"


def log_path(path: Path) -> Path:
    """The log of a lease's watchdog: one file per GPU, started anew with each lease."""
    return path.with_suffix(".log")


def find_logs(folder: Path) -> list[Path]:
    """Logs of all watchdogs, in the order of their GPUs."""
    return sorted(folder.glob("gpu-*.log"))


def last_line(path: Path) -> str | None:
    """The last line in the log of a lease's watchdog; None when it has written nothing."""
    try:
        with os.fdopen(open_own(log_path(path), os.O_RDONLY), "rb") as handle:
            handle.seek(max(0, handle.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = handle.read(_TAIL_BYTES).decode("utf-8", "replace").split("\n")
    except OSError:
        return None
    return next((one_line(line, 1000) for line in reversed(lines) if line.strip()), None)


def note(path: Path, what: str) -> None:
    """Write a line into the log of a lease; a full disk must not keep anything from being undone."""
    with contextlib.suppress(OSError):
        descriptor = open_own(log_path(path), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        with os.fdopen(descriptor, "a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {one_line(what, 1000)}\n")


def create_lease(path: Path, lease: Lease) -> None:
    """Write a lease where there is none; whole or not at all. Under its guard.

    Raises:
        LockRefusedError: there is one.
    """
    if os.path.lexists(path):
        raise LockRefusedError(
            f"{lease.device_uuid} is leased already", remedy="see `observatory clocks status`"
        )
    _write(path, lease, path)


def replace_lease(path: Path, lease: Lease) -> None:
    """Write a lease in place of an older state of itself. Under its guard."""
    _write(path, lease, path)


def end_lease(path: Path, lease: Lease) -> None:
    """Mark a lease as given back or undone, one whose file has vanished too. Under its guard."""
    if standing(path, lease.lease_id) == "held":
        path.replace(_over_path(path, lease.lease_id))
    else:
        _write(path, lease, _over_path(path, lease.lease_id))


def forget_lease(path: Path, lease: Lease) -> None:
    """Remove the mark of a lease that is over, when neither owner nor watchdog has to see it any more."""
    _over_path(path, lease.lease_id).unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove what processes that were killed have left of a GPU's former leases. Under its guard."""
    for temporary in path.parent.glob(f".{path.name}.*.tmp"):
        temporary.unlink(missing_ok=True)
    for mark in path.parent.glob(f"{path.stem}.*.over"):
        try:
            with os.fdopen(open_own(mark, os.O_RDONLY), "rb") as handle:
                lease = Lease.model_validate_json(handle.read(_MOST_BYTES))
        except (OSError, ValueError):
            mark.unlink(missing_ok=True)
            continue
        ended = all(process is None or process.alive is False for process in (lease.owner, lease.watchdog))
        if ended or lease.boot_id != (boot_id() or "") or lease.left_s < -_KEPT_S:
            mark.unlink(missing_ok=True)


def _over_path(path: Path, lease_id: str) -> Path:
    return path.with_suffix(f".{lease_id}.over")


def _write(path: Path, lease: Lease, place: Path) -> None:
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
                handle.write(lease.model_dump_json())
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, place)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise ClockError(
            f"lease {path} cannot be written ({error.strerror}), so nothing is changed",
            remedy=f"free space there, or name another folder in {FOLDER_VARIABLE}",
        ) from error
