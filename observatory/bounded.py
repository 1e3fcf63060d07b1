"""Reading small files that a user names, without trusting what they are."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

__all__ = ["open_plain", "read_at_most"]


def open_plain(path: Path) -> BinaryIO:
    """Open a plain file for reading. A pipe or device is refused rather than waited for.

    Raises:
        OSError: it cannot be opened, or is no plain file.
    """
    handle = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    kind = os.fstat(handle.fileno()).st_mode
    if stat.S_ISREG(kind):
        return handle
    handle.close()
    code = errno.EISDIR if stat.S_ISDIR(kind) else errno.EINVAL
    raise OSError(code, os.strerror(code) if stat.S_ISDIR(kind) else "it is no plain file", str(path))


def read_at_most(path: Path, limit: int) -> bytes | None:
    """The content of a plain file; None when it is larger than ``limit`` bytes.

    Raises:
        OSError: it cannot be read, or is no plain file.
    """
    with open_plain(path) as handle:
        content = handle.read(limit + 1)
    return None if len(content) > limit else content
