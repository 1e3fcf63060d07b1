"""Leases: what we changed of a GPU, until when, for whom, and how to undo it; kept in one file per GPU.

A lock of the driver cannot be read back and outlives the process that set it. So nothing is set before a file
says that it is about to be. The file is whole at every moment: it is written beside its place and linked or
renamed into it. ``touched`` turns true just before the first change: undoing a lease that never came so far
changes nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import time
import uuid as uuids
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field

from observatory.bounded import read_at_most
from observatory.errors import ClockError, LockRefusedError
from observatory.records import Count, Record, Text
from observatory.store.files import one_line

__all__ = [
    "Lease",
    "ProcessId",
    "create_lease",
    "diary_path",
    "find_diaries",
    "find_leases",
    "guarded",
    "last_words",
    "lease_folder",
    "lease_path",
    "new_lease",
    "read_lease",
    "replace_lease",
    "this_boot",
]

_FOLDER_VARIABLE = "OBSERVATORY_LEASES"
_MOST_BYTES = 64 << 10
_TAIL_BYTES = 4096
_UUID = re.compile(r"GPU-[0-9A-Fa-f-]{1,60}", re.ASCII)


class ProcessId(Record):
    """A process, told apart from a later one of the same number.

    Attributes:
        pid: its number.
        started: when it started, in clock ticks since the boot.
    """

    pid: Annotated[int, Field(ge=1)]
    started: Count

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The process of this number; None when there is none, or it has ended and nobody has asked yet."""
        try:
            text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        state, *rest = text.rpartition(")")[2].split()
        return None if state in ("Z", "X") else cls(pid=pid, started=int(rest[18]))

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return ProcessId.of(self.pid) == self


class Lease(Record):
    """What is changed of one GPU.

    Attributes:
        lease_id: unique.
        device_uuid: the GPU.
        owner: the process that asked for it.
        watchdog: the process that undoes it; None before it has started.
        boot_id: boot of the machine in which all of this holds; a reboot undoes it by itself.
        created_unix_s: wall-clock label.
        expires_ns: monotonic time at which it is undone, whether the owner lives or not.
        touched: a change was about to be made, or was made.
        locked: one of them was a lock of the clock; somebody else's is none of ours to undo.
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
    def problem(self) -> str | None:
        """Why it does not hold any more; None while it does."""
        if self.boot_id != this_boot():
            return "the machine was booted since"
        if not self.owner.alive:
            return f"its owner, process {self.owner.pid}, is gone"
        if time.monotonic_ns() >= self.expires_ns:
            return "it has expired"
        return None


def this_boot() -> str:
    """Id of this boot of the machine; empty where the system does not tell."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def new_lease(device_uuid: str, *, duration_s: float) -> Lease:
    """A lease of this process that has changed nothing yet."""
    owner = ProcessId.of(os.getpid())
    if owner is None:
        raise ClockError(
            "this system has no /proc to tell processes apart, so nothing could undo a lock; use Linux"
        )
    return Lease(
        lease_id=uuids.uuid4().hex,
        device_uuid=device_uuid,
        owner=owner,
        boot_id=this_boot(),
        created_unix_s=time.time(),
        expires_ns=time.monotonic_ns() + round(duration_s * 1e9),
    )


def lease_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where leases of this machine are kept, made if need be; gone after a reboot, like the locks.

    Raises:
        ClockError: it cannot be made, or others may write to it.
    """
    told = environment.get(_FOLDER_VARIABLE)
    if told:
        folder = Path(told)
    elif os.geteuid() == 0:
        folder = Path("/run/moe-observatory/leases")
    else:
        folder = Path(environment.get("XDG_RUNTIME_DIR") or f"/tmp/moe-observatory-{os.geteuid()}") / "leases"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise ClockError(
            f"leases cannot be kept in {folder} ({error.strerror}); name a folder in {_FOLDER_VARIABLE}"
        ) from error
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
        raise ClockError(
            f"{folder} is not ours alone, so its leases cannot be trusted; name a folder of your own in "
            f"{_FOLDER_VARIABLE}"
        )
    return folder


def lease_path(folder: Path, device_uuid: str) -> Path:
    """File of a GPU's lease.

    Raises:
        LockRefusedError: the name is no UUID of an NVIDIA GPU.
    """
    if _UUID.fullmatch(device_uuid) is None:
        raise LockRefusedError(
            f"{device_uuid[:80]!r} is no UUID of an NVIDIA GPU; name it GPU-..., see `observatory doctor`"
        )
    return folder / f"{device_uuid.lower()}.json"


def find_leases(folder: Path) -> list[Path]:
    """Files of all leases, in the order of their names."""
    return sorted(path for path in folder.glob("gpu-*.json") if not path.is_symlink())


def read_lease(path: Path) -> Lease | None:
    """The lease in a file; None when there is no such file.

    Raises:
        ClockError: the file is damaged, so that what was changed is not known.
    """
    try:
        content = read_at_most(path, _MOST_BYTES)
        lease = Lease.model_validate_json(b"" if content is None else content)  # too large: no lease of ours
        if path.name != lease_path(path.parent, lease.device_uuid).name:
            raise ValueError("a lease under the name of another GPU")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ClockError(
            f"lease {path} cannot be read, so what was changed is not known; look at the GPU's clocks, run "
            f"`nvidia-smi -rgc -i UUID` if they are locked, and remove the file"
        ) from error
    return lease


def diary_path(path: Path) -> Path:
    """What the watchdog of a lease writes of its doings: one file per GPU, begun anew with each lease."""
    return path.with_suffix(".log")


def find_diaries(folder: Path) -> list[Path]:
    """Diaries of all watchdogs, in the order of their GPUs."""
    return sorted(path for path in folder.glob("gpu-*.log") if not path.is_symlink())


def last_words(path: Path) -> str | None:
    """The last line in the diary of a lease's watchdog; None when it has written nothing."""
    try:
        with diary_path(path).open("rb") as handle:
            handle.seek(max(0, handle.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = handle.read(_TAIL_BYTES).decode("utf-8", "replace").split("\n")
    except OSError:
        return None
    return next((one_line(line, 1000) for line in reversed(lines) if line.strip()), None)


@contextlib.contextmanager
def guarded(path: Path) -> Iterator[None]:
    """Alone with a lease: between looking at it and acting on it nobody else does either.

    The kernel gives the right back when its holder dies.
    """
    with path.with_suffix(".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def create_lease(path: Path, lease: Lease) -> None:
    """Write a lease where there is none; whole or not at all.

    Raises:
        LockRefusedError: there is one.
    """
    temporary = _written(path, lease)
    try:
        os.link(temporary, path)
    except FileExistsError as error:
        raise LockRefusedError(
            f"{lease.device_uuid} is leased already; see `observatory clocks status`"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def replace_lease(path: Path, lease: Lease) -> None:
    """Write a lease in place of an older state of itself."""
    _written(path, lease).replace(path)


def _written(path: Path, lease: Lease) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as handle:
            handle.write(lease.model_dump_json())
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ClockError(
            f"lease {path} cannot be written ({error.strerror}), so nothing is changed; free space there, or "
            f"name another folder in {_FOLDER_VARIABLE}"
        ) from error
    return temporary
