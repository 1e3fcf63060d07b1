"""The processes that work on one command together: this one alone, or the ranks of MPI_COMM_WORLD.

Messages are bytes that the receiver decodes itself; no Python object is sent.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, Protocol

from observatory.errors import ExchangeError, ObservatoryError, RunFormatError
from observatory.host.ranks import find_rank
from observatory.hpc.mpi import start_mpi
from observatory.run.files import one_line

#: Longest wait for the other ranks to start.
_START_LIMIT_S = 120.0
#: MPI counts with C ints.
_MAX_BYTES = 2**31 - 1


class World(Protocol):
    """Processes that are numbered from 0.

    Attributes:
        rank: number of this process.
        size: how many there are.
    """

    rank: int
    size: int

    def broadcast(self, content: bytes) -> bytes:
        """What rank 0 gave; all ranks call it."""

    def send(self, content: bytes, to: int) -> None:
        """Send without waiting for the receiver."""

    def receive(self, source: int) -> bytes:
        """Wait for the next message of a rank; messages of one rank arrive in order."""

    def finish(self) -> None:
        """Wait until everything that was sent has arrived, and for all ranks."""

    def abort(self, sentence: str) -> None:
        """Where there are other ranks, say why on stderr and end all of them at once."""


class Alone:
    """One process."""

    rank, size = 0, 1

    def broadcast(self, content: bytes) -> bytes:
        """The content."""
        return content

    def send(self, content: bytes, to: int) -> None:
        """There is no other rank."""
        raise AssertionError(f"{len(content)} bytes for rank {to} of 1")

    def receive(self, source: int) -> bytes:
        """There is no other rank."""
        raise AssertionError(f"bytes from rank {source} of 1")

    def finish(self) -> None:
        """Nothing was sent."""

    def abort(self, sentence: str) -> None:
        """There is no other rank to end."""


class Mpi:
    """The ranks of a communicator of MPI."""

    def __init__(self, mpi: Any) -> None:
        self._mpi = mpi
        self._world = mpi.COMM_WORLD
        self.rank: int = self._world.Get_rank()
        self.size: int = self._world.Get_size()
        self._sent: list[tuple[Any, bytes]] = []

    def broadcast(self, content: bytes) -> bytes:
        """What rank 0 gave."""
        length = bytearray(len(content).to_bytes(8, "little"))
        self._world.Bcast([length, self._mpi.BYTE], root=0)
        buffer = bytearray(content if self.rank == 0 else int.from_bytes(length, "little"))
        self._world.Bcast([buffer, self._mpi.BYTE], root=0)
        return bytes(buffer)

    def send(self, content: bytes, to: int) -> None:
        """Send without waiting for the receiver."""
        if len(content) > _MAX_BYTES:
            raise RunFormatError(
                f"the partial result of a run takes {len(content) >> 20} MiB",
                expected=f"at most {_MAX_BYTES >> 20} MiB in one message",
                remedy="reduce this run in one process",
            )
        self._sent.append((self._world.Isend([content, self._mpi.BYTE], dest=to), content))

    def receive(self, source: int) -> bytes:
        """Wait for the next message of a rank."""
        status = self._mpi.Status()
        self._world.Probe(source=source, status=status)
        buffer = bytearray(status.Get_count(self._mpi.BYTE))
        self._world.Recv([buffer, self._mpi.BYTE], source=source)
        return bytes(buffer)

    def finish(self) -> None:
        """Wait until everything has arrived, and for all ranks."""
        self._mpi.Request.Waitall([request for request, _ in self._sent])
        self._sent.clear()
        self._world.Barrier()
        self._mpi.Finalize()

    def abort(self, sentence: str) -> None:
        """Say why on stderr and end all ranks at once; does not return."""
        sys.stderr.write(f"observatory: rank {self.rank} of {self.size}: {one_line(sentence)}\n")
        sys.stderr.flush()
        self._world.Abort(1)


@contextlib.contextmanager
def working_together() -> Iterator[World]:
    """The ranks that work on one command; an error of one that the others do not meet ends all of them.

    Raises:
        CaptureError, ExchangeError: see `find_world`.
    """
    world = find_world()
    try:
        yield world
    except BaseException as error:
        if not (isinstance(error, ObservatoryError) and error.of_all_ranks):
            kind = "" if isinstance(error, ObservatoryError) else f"{type(error).__name__}: "
            world.abort(f"{kind}{error}; the other ranks are ended")
        raise


def find_world() -> World:
    """The ranks that mpiexec or srun started this process with; else this process alone.

    Raises:
        CaptureError: launchers disagree on ranks.
        ExchangeError: the ranks were started by something else than MPI, or MPI is not installed.
    """
    where = find_rank()
    if where.world == 1:
        return Alone()
    if where.launcher not in ("mpiexec", "srun"):
        raise ExchangeError(
            f"{where.launcher} started {where.world} processes, which know nothing of each other here",
            expected="ranks of MPI",
            remedy="start them with mpiexec or srun, or run it in one process",
        )
    return Mpi(start_mpi(where, _START_LIMIT_S, instead="run it in one process"))
