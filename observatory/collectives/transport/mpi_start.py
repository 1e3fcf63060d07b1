"""Starting MPI within a time limit.

mpi4py holds the interpreter's lock in MPI_Init, which waits for all ranks and knows no time limit: neither a
thread nor a signal handler of this process can end a wait there. Another process can.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator

from observatory.host.children import python_code
from observatory.host.ranks import RankOf

#: Arguments: seconds, process id, what to say. Ends when its input is closed.
_WATCHER = """
import os, select, signal, sys
limit, pid, sentence = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if not select.select([0], [], [], limit)[0] and os.getppid() == pid:
    os.write(2, (sentence + "\\n").encode())
    os.kill(pid, signal.SIGKILL)
"""


@contextlib.contextmanager
def limited_start(where: RankOf, limit_s: float) -> Iterator[None]:
    """Kill this process, with a sentence on its standard error, when MPI has not started in time.

    The launcher then ends the other ranks.
    """
    sentence = (
        f"observatory: rank {where.rank} of {where.world} waited in vain in MPI_Init for {limit_s:g} s: a "
        "rank did not start, or hangs; see the output of all ranks, and whether all hosts have the same MPI"
    )
    watcher = subprocess.Popen(
        python_code(_WATCHER, str(limit_s), str(os.getpid()), sentence),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        watcher.communicate()
