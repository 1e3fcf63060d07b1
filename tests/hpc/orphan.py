"""A rank under guard that hangs where no signal reaches it, and writes what becomes of its shard.

    python orphan.py FOLDER

It needs neither torch nor MPI, so that it is there at once.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from observatory.host.ranks import find_rank
from observatory.hpc.rank_guard import SHARDS, guard_rank


class Shard:
    """Keeps in a file why its rank was ended."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def mark(self, reason: str) -> None:
        self._path.write_text(reason)

    close = mark


def main() -> None:
    folder = Path(sys.argv[1])
    rank = find_rank().rank
    guard_rank()
    SHARDS.append(Shard(folder / f"shard-{rank}"))
    begun = folder / f"begun-{rank}"
    begun.write_text(f"{os.getpid()} {os.getppid()}")
    begun.rename(folder / f"pid-{rank}")
    mutex = ctypes.create_string_buffer(64)  # a pthread_mutex_t
    lock = ctypes.CDLL(None).pthread_mutex_lock
    while True:
        lock(mutex)  # the second call waits for ever, and is not interrupted


if __name__ == "__main__":
    main()
