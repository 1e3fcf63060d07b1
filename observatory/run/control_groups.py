"""Control groups of this process, versions 1 and 2: what its site or container lets it use."""

from __future__ import annotations

import contextlib
from pathlib import Path

#: No limit in use is larger: version 1 writes the largest number of pages where there is none.
_MOST_BYTES = 1 << 60


def own_groups(proc: Path, controller: str) -> list[Path]:
    """Folders of this process's groups, the innermost first, up to where the hierarchy is mounted.

    Args:
        proc: where processes are shown.
        controller: ``cpu``, ``memory``, ...; of version 1 its own hierarchy, of version 2 the common one.

    Returns:
        Empty where the system has none, or what it shows cannot be read.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        groups = [line.split(":", 2) for line in (proc / "self/cgroup").read_text("utf-8").splitlines()]
        mounts = [line.split() for line in (proc / "self/mountinfo").read_text("utf-8").splitlines()]
        folders: list[Path] = []
        for _, controllers, path in groups:
            version_1 = controller in controllers.split(",")
            if controllers and not version_1:
                continue
            kind = "cgroup" if version_1 else "cgroup2"
            for fields in mounts:
                rest = fields[fields.index("-") + 1 :]
                if rest[0] != kind or (version_1 and controller not in rest[2].split(",")):
                    continue
                folders += _up(Path(fields[4]), root=fields[3], path=path)
                break
        return folders
    return []


def memory_limit_bytes(proc: Path) -> int | None:
    """The smallest memory limit of this process's groups; None without one."""
    limits = []
    for folder in own_groups(proc, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):
                limits.append(int((folder / name).read_text("ascii")))  # "max" is no number
    return min((limit for limit in limits if 0 < limit < _MOST_BYTES), default=None)


def _up(mount: Path, *, root: str, path: str) -> list[Path]:
    """Groups from the innermost to where the hierarchy is mounted; a container sees a part of it."""
    inside = path[len(root) :] if root != "/" and path.startswith(root) else path
    parts = [part for part in inside.split("/") if part not in ("", "..")]
    if not mount.joinpath(*parts).is_dir():
        parts = []
    return [mount.joinpath(*parts[:length]) for length in range(len(parts), -1, -1)]
