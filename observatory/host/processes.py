"""Processes of a machine, and names of them and of moments that hold in every PID and time namespace.

Containers of one machine may share the folder of leases. A process id means another process in the next PID
namespace, and start times of processes differ between time namespaces: a process is judged by its id only
from the namespaces in which it was named. Expiry is in the monotonic time of the initial time namespace.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from observatory.run.bounded import read_at_most
from observatory.run.records import Count, Record

_CAP_SYS_ADMIN = 21
_MAX_ANCESTORS = 1024


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """What the kernel says of a process.

    Attributes:
        ended: it has ended and was not waited for yet.
        parent: process id of its parent.
        started: when it started, in clock ticks since the boot.
    """

    ended: bool
    parent: int
    started: int

    @classmethod
    def of(cls, pid: int) -> ProcessStat | None:
        """The process of this number; None when there is none."""
        try:
            content = read_at_most(Path(f"/proc/{pid}/stat"), 4096) or b""
            # The second field is the name in parentheses and may hold anything.
            state, parent, *rest = content.rpartition(b")")[2].split()
            return cls(ended=state in (b"Z", b"X"), parent=int(parent), started=int(rest[17]))
        except (OSError, ValueError, IndexError):
            return None


class ProcessId(Record):
    """A process, distinguished from a later one with the same id.

    Attributes:
        pid: its number.
        started: when it started, in clock ticks since the boot.
        namespace: the PID and time namespaces in which both hold; None where that is not known.
    """

    pid: Annotated[int, Field(ge=1)]
    started: Count
    namespace: Annotated[str, Field(max_length=200)] | None = None

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The process of this number; None when there is none, or it has ended and was not waited for yet."""
        stat = ProcessStat.of(pid)
        if stat is None or stat.ended:
            return None
        return cls(pid=pid, started=stat.started, namespace=process_namespace())

    @property
    def alive(self) -> bool | None:
        """Whether it still runs; None where it is of other namespaces than this process, and not known."""
        if self.namespace is None or self.namespace != process_namespace():
            return None
        return self._same_as(ProcessId.of(self.pid))

    @property
    def is_this_process(self) -> bool:
        """Whether it is the process that asks; a fork of it is not."""
        return self.pid == os.getpid() and self._same_as(ProcessId.of(self.pid))

    def _same_as(self, other: ProcessId | None) -> bool:
        return other is not None and (other.pid, other.started) == (self.pid, self.started)


def process_namespace() -> str | None:
    """PID and time namespace of this process, the same text for all processes of both and for no others.

    None where /proc is missing or shows the processes of another PID namespace, and where the children of
    this process will be in other namespaces than it is: then no watchdog could judge it.
    """
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return None
        names = []
        for kind in ("pid", "time"):
            if kind == "time" and not os.path.exists("/proc/self/ns/time"):
                continue  # a kernel without time namespaces
            status = os.stat(f"/proc/self/ns/{kind}")
            children = os.stat(f"/proc/self/ns/{kind}_for_children")
            if (status.st_dev, status.st_ino) != (children.st_dev, children.st_ino):
                return None
            names.append(f"{kind}:{status.st_dev}:{status.st_ino}")
    except OSError:
        return None
    return " ".join(names)


def machine_monotonic_ns() -> int:
    """Monotonic time of the initial time namespace, ns: the same in all containers of the machine."""
    offset_ns = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/timens_offsets").read_text(encoding="ascii").splitlines():
            clock, seconds, nanoseconds = line.split()
            if clock in ("monotonic", "1"):
                offset_ns = int(seconds) * 1_000_000_000 + int(nanoseconds)
    return time.monotonic_ns() - offset_ns


def has_admin_capability() -> bool | None:
    """Whether this process has CAP_SYS_ADMIN, which drivers ask for; None where the system does not say."""
    try:
        status = read_at_most(Path("/proc/self/status"), 65536)
    except OSError:
        return None
    for line in (status or b"").decode("ascii", "replace").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_SYS_ADMIN & 1)
    return None


def descends_from(pid: int, ancestor: int) -> bool:
    """Whether a process is another one or below it; not when it has ended or is not visible here."""
    for _ in range(_MAX_ANCESTORS):
        if pid == ancestor:
            return Path(f"/proc/{pid}").exists()
        stat = ProcessStat.of(pid) if pid > 1 else None
        if stat is None:
            return False
        pid = stat.parent
    return False
