"""The folder of leases, and whether it is ours alone.

Whoever may rename a folder on the way to a file decides what the file is. So every folder from the root on is
owned by root or by this user and is writable by its owner only, as OpenSSH demands of its keys; a folder of
root's with the sticky bit (/tmp) may be writable by all. Links are followed one by one under the same rule.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from observatory.errors import ClockError

FOLDER_VARIABLE = "OBSERVATORY_LEASES"
#: Bits of a mode that let the group or all others write.
OTHERS_WRITE = 0o022
_MOST_LINKS = 40


def lease_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where leases of this machine are kept, made if need be; gone after a reboot, like the locks.

    Raises:
        ClockError: it cannot be made, or others may write to it or to a folder above it.
    """
    told = environment.get(FOLDER_VARIABLE)
    if told:
        folder = Path(told)
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
            found = place.lstat()
            _refuse_untrusted(place, found)
            if stat.S_ISLNK(found.st_mode):
                links += 1
                if links > _MOST_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                target = Path(os.readlink(place))
                done = Path("/") if target.is_absolute() else done
                rest.extend(part for part in reversed(target.parts) if part != "/")
            else:
                done = place
        found = done.lstat()
    except OSError as error:
        raise ClockError(
            f"leases cannot be kept in {folder} ({error.strerror})",
            remedy=f"name a folder in {FOLDER_VARIABLE}",
        ) from error
    if found.st_uid != os.geteuid() or found.st_mode & OTHERS_WRITE:
        raise _not_ours(done)
    return done


def _refuse_untrusted(place: Path, found: os.stat_result) -> None:
    """Refuse a component of a path that others could replace, or put something of theirs into.

    Raises:
        ClockError: it is such a one.
        OSError: it is neither a folder nor a link.
    """
    if found.st_uid not in (0, os.geteuid()):
        raise _not_ours(place)
    if stat.S_ISLNK(found.st_mode):
        return  # its mode says nothing; what it leads to is looked at
    if not stat.S_ISDIR(found.st_mode):
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if found.st_mode & OTHERS_WRITE and not (found.st_uid == 0 and found.st_mode & stat.S_ISVTX):
        raise _not_ours(place)


def _not_ours(place: Path) -> ClockError:
    return ClockError(
        f"{place} is not ours alone (its owner is user {place.lstat().st_uid}, its mode "
        f"{stat.S_IMODE(place.lstat().st_mode):o}), so leases in it cannot be trusted",
        remedy=f"name a folder in {FOLDER_VARIABLE} that only you and root may write to, as all folders "
        "above it",
    )
