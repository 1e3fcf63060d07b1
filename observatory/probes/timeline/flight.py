"""torch's flight recorder in this process, read while it runs.

Only our thread reads it. A read takes Python's interpreter lock for as long as torch needs to write the ring
down (30 us an entry, measured), so it is read as rarely as the ring allows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

from observatory.run.flight_recorder import RecorderIndex, parse_recorder_dump

#: In the order in which torch looks at them, and what it takes where neither is set.
_SIZE_VARIABLES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
_DEFAULT_SIZE = 2000
#: A read of more would hold the program up for seconds.
_MOST_ENTRIES = 1 << 15

#: CUDA builds keep NCCL's entries apart from those of other backends.
_DUMPS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")


def _ring_size() -> int | None:
    """Entries that the recorder keeps, as the environment says; None where it says no number."""
    size = next((os.environ[name] for name in _SIZE_VARIABLES if name in os.environ), str(_DEFAULT_SIZE))
    try:
        return int(size)
    except ValueError:
        return None


def recorder_unsupported() -> str | None:
    """Why the recorder cannot be read in this process; None when it can."""
    if not _dumps():
        return f"torch {torch.__version__} has no flight recorder that writes JSON"
    size = _ring_size()
    if size is not None and 0 < size <= _MOST_ENTRIES:
        return None
    return f"{_SIZE_VARIABLES[0]} is not from 1 to {_MOST_ENTRIES}"


def _dumps() -> list[Callable[[], bytes]]:
    c10d = getattr(torch._C, "_distributed_c10d", None)
    return [getattr(c10d, name) for name in _DUMPS if hasattr(c10d, name)]


class FlightRecorder:
    """What the recorder said when it was read last.

    Attributes:
        reads: how often it was read.
        read_ns: host time that took, nanoseconds.
        due_after: exchanges after which it should be read again before its ring moves on; other collectives
            take room in it as well.
        index: what it said.
    """

    def __init__(self) -> None:
        self.reads = 0
        self.read_ns = 0
        self.due_after = max(1, (_ring_size() or _DEFAULT_SIZE) // 2)
        self.index = RecorderIndex()

    def read(self) -> None:
        """Look at the recorder.

        Raises:
            RunFormatError: this torch writes something else than we know.
        """
        began_ns = time.monotonic_ns()
        ahead_ns = time.time_ns() - time.monotonic_ns()
        documents = [dump() for dump in _dumps()]
        dumps = [parse_recorder_dump(document, name="torch's flight recorder") for document in documents]
        self.index = RecorderIndex(
            (entry for dump in dumps for entry in dump.entries), unix_minus_monotonic_ns=ahead_ns
        )
        self.reads += 1
        self.read_ns += time.monotonic_ns() - began_ns
