"""Which monotonic clock a process reads."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path


def boot_id(proc: Path = Path("/proc")) -> str | None:
    """Id of this boot of the machine; None where the system does not have one."""
    try:
        return (proc / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None


@functools.cache
def clock_identity() -> int | None:
    """Number that two processes share exactly when they read the same CLOCK_MONOTONIC.

    Containers of one host may live in time namespaces of their own, with a monotonic clock of their own.

    Returns:
        63 bits of a hash over boot id and time namespace, never 0; None where the system has neither.
    """
    boot = boot_id()
    if boot is None:
        return None
    try:
        namespace = str(os.stat("/proc/self/ns/time").st_ino)
    except FileNotFoundError:
        namespace = "none"  # kernels before 5.6 have one clock for all
    except OSError:
        return None
    digest = hashlib.sha256(f"{boot} {namespace}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1 or 1


def clock_name(identity: int | None) -> str | None:
    """An identity as runs keep it."""
    return None if identity is None else f"{identity:016x}"
