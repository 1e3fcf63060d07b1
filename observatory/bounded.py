"""Reading small files that a user names, without trusting what they are."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

__all__ = ["read_at_most"]


def read_at_most(path: Path, limit: int) -> bytes | None:
    """The content of a plain file; None when it is larger than ``limit`` bytes.

    A pipe or device is refused rather than waited for.

    Raises:
        OSError: it cannot be read, or is no plain file.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as handle:
        kind = os.fstat(handle.fileno()).st_mode
        if not stat.S_ISREG(kind):
            reason = os.strerror(errno.EISDIR) if stat.S_ISDIR(kind) else "it is no plain file"
            raise OSError(errno.EISDIR if stat.S_ISDIR(kind) else errno.EINVAL, reason, str(path))
        content = handle.read(limit + 1)
    return None if len(content) > limit else content
