"""What /proc tells about processes: whose they are, and what they may do."""

from __future__ import annotations

from pathlib import Path

from observatory.run.bounded import read_at_most

_CAP_SYS_ADMIN = 21
_MAX_ANCESTORS = 1024


def has_admin_capability() -> bool | None:
    """Whether this process has CAP_SYS_ADMIN, which drivers ask for; None where the system does not tell."""
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
        if pid <= 1:
            return False
        parent = _parent(pid)
        if parent is None:
            return False
        pid = parent
    return False


def _parent(pid: int) -> int | None:
    try:
        stat = read_at_most(Path(f"/proc/{pid}/stat"), 4096) or b""
        # The second field is the name in parentheses and may hold anything.
        return int(stat.rpartition(b")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None
