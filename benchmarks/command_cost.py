"""What a command of the program takes of the machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandCost:
    """Of one command, as the kernel accounts it.

    Attributes:
        processor_s: user and system time, seconds.
        wall_s: time from start to end, seconds.
        peak_bytes: most of resident memory.
    """

    processor_s: float
    wall_s: float
    peak_bytes: int


def command_cost(arguments: list[str], output: Path) -> CommandCost:
    """Run ``observatory`` with these arguments; what it prints goes to a file.

    Raises:
        SystemExit: it fails.
    """
    began_s = time.monotonic()
    with output.open("wb") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", "observatory", *arguments], stdout=file, stderr=subprocess.STDOUT
        )
        # Waited for by itself, so that what the kernel accounts is this child's alone.
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed ({child.returncode}): {output.read_text()[-500:]}")
    return CommandCost(
        processor_s=usage.ru_utime + usage.ru_stime,
        wall_s=time.monotonic() - began_s,
        peak_bytes=usage.ru_maxrss * 1024,
    )
