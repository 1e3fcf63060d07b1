"""The transport over MPI, through mpi4py; tensors travel as bytes of host memory.

Shapes: P ranks, G ranks of a group, H values per row.

All calls are the non-blocking ones of MPI, polled until done or until the time is up: a blocking call would
wait for a dead or hanging rank for ever.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from observatory.collectives.layout import Group, Layout, nodes_in_order, split_into_nodes
from observatory.collectives.transport.base import BaseTransport
from observatory.errors import ExchangeError
from observatory.host.ranks import RankOf
from observatory.hpc.mpi import start_mpi

#: Counts and displacements of the collectives are C ints.
MAX_MPI_COUNT = 2**31 - 1

_GRACE_S = 5.0
_HERE_TAG = 77


def check_mpi_counts(bytes_G: Sequence[int], what: str) -> None:
    """Refuse what MPI cannot count.

    Raises:
        ExchangeError: all bytes together are over 2^31 - 1, so that a count or a displacement would wrap.
    """
    total = sum(bytes_G)
    if total > MAX_MPI_COUNT:
        raise ExchangeError(
            f"{total} bytes are to be {what} in one exchange; MPI counts with 32-bit numbers, so at most "
            f"{MAX_MPI_COUNT}; use smaller batches, or the gloo or nccl backend"
        )


class MpiTransport(BaseTransport):
    """Ranks of MPI_COMM_WORLD."""

    backend = "mpi"

    def __init__(self, where: RankOf, *, ranks_per_node: int | None, timeout_s: float) -> None:
        self._owns_mpi = "mpi4py.MPI" not in sys.modules
        mpi = start_mpi(where, timeout_s, instead="use --backend gloo")
        self._mpi: Any = mpi
        world, duplicated = mpi.COMM_WORLD.Idup()
        self._world: Any = world
        rank, size = self._world.Get_rank(), self._world.Get_size()
        layout = Layout(rank=rank, node_of_P=(0,) * size)
        super().__init__(layout, device=torch.device("cpu"), timeout_s=timeout_s)
        if not _poll(duplicated.Test, timeout_s):
            raise ExchangeError(
                f"rank {rank} of {size} timed out after {timeout_s:g} s waiting for the other ranks to join; "
                "see the output of those that do not say this"
            )
        self._groups: dict[Group, Any] = {"world": self._world}
        if ranks_per_node is None:
            labels = self.all_gather_json([os.uname().nodename, where.node])
            nodes = nodes_in_order([tuple(label) for label in labels])
        else:
            nodes = split_into_nodes(size, ranks_per_node)
        self.layout = Layout(rank=rank, node_of_P=nodes)

    def barrier(self, timeout_s: float | None = None) -> None:
        """Wait for all ranks."""
        self._finish("a barrier", self._world.Ibarrier(), timeout_s)

    def close(self, error: str | None = None) -> None:
        """Finalise MPI when all is well; after an error the launcher ends the other ranks."""
        if self._owns_mpi and error is None and not self._mpi.Is_finalized():
            self._mpi.Finalize()
        self._owns_mpi = False

    def _all_to_all(
        self, rows: torch.Tensor, send_G: list[int], receive_G: list[int], group: Group
    ) -> torch.Tensor:
        sent = rows.detach().cpu()
        received = sent.new_empty((sum(receive_G), *sent.shape[1:]))
        width = _row_bytes(sent)
        send_bytes, receive_bytes = [n * width for n in send_G], [n * width for n in receive_G]
        check_mpi_counts(send_bytes, "sent")
        check_mpi_counts(receive_bytes, "received")
        request = self._communicator(group).Ialltoallv(
            [_memory(sent), send_bytes, _starts(send_bytes), self._mpi.BYTE],
            [_memory(received), receive_bytes, _starts(receive_bytes), self._mpi.BYTE],
        )
        self._finish(f"an all-to-all of group {group}", request, members=self.layout.members(group))
        return received.to(rows.device)

    def _all_gather(self, rows: torch.Tensor, rows_P: list[int]) -> torch.Tensor:
        sent = rows.detach().cpu()
        gathered = sent.new_empty((sum(rows_P), *sent.shape[1:]))
        bytes_P = [n * _row_bytes(sent) for n in rows_P]
        check_mpi_counts(bytes_P, "gathered")
        request = self._world.Iallgatherv(
            [_memory(sent), self._mpi.BYTE], [_memory(gathered), bytes_P, _starts(bytes_P), self._mpi.BYTE]
        )
        self._finish("an all-gather", request)
        return gathered.to(rows.device)

    def _reduce_scatter(self, rows: torch.Tensor, rows_P: list[int]) -> torch.Tensor:
        # MPI has no sum of 16-bit floats: parts are exchanged and summed here, in the order of ranks.
        own_rows = rows_P[self.rank]
        parts = self._all_to_all(rows, rows_P, [own_rows] * self.size, "world")
        return parts.reshape(self.size, own_rows, *rows.shape[1:]).sum(dim=0, dtype=rows.dtype)

    def _communicator(self, group: Group) -> Any:
        if group not in self._groups:
            members = self.layout.members(group)
            self.barrier()  # within the time limit; a split has none
            self._groups[group] = self._world.Split(color=members[0], key=self.rank)
        return self._groups[group]

    def _finish(
        self, what: str, request: Any, timeout_s: float | None = None, members: Sequence[int] | None = None
    ) -> None:
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        if _poll(request.Test, limit_s):
            return
        members = range(self.size) if members is None else members
        missing = self._missing(members, min(_GRACE_S, limit_s))
        named = f"rank{'s' if len(missing) > 1 else ''} {', '.join(str(rank) for rank in missing)}"
        who = (
            f"no answer from {named}"
            if missing
            else "all ranks answer, so the network is at fault or too slow"
        )
        raise ExchangeError(
            f"rank {self.rank} of {self.size} timed out in {what} after {limit_s:g} s: {who}; see the "
            "output of the ranks named"
        )

    def _missing(self, members: Sequence[int], grace_s: float) -> list[int]:
        """Members that do not say within the time that they wait too; all ranks hear that this one does."""
        note = bytearray(1)
        sent = [
            self._world.Isend([note, self._mpi.BYTE], dest=rank, tag=_HERE_TAG)
            for rank in range(self.size)
            if rank != self.rank
        ]
        others = [rank for rank in members if rank != self.rank]
        inbox = {rank: bytearray(1) for rank in others}
        requests = {
            rank: self._world.Irecv([inbox[rank], self._mpi.BYTE], source=rank, tag=_HERE_TAG)
            for rank in others
        }
        silent = set(others)

        def all_heard() -> bool:
            silent.difference_update([rank for rank in silent if requests[rank].Test()])
            return not silent

        _poll(all_heard, grace_s)
        with contextlib.suppress(self._mpi.Exception):
            for request in sent:
                request.Test()
        return sorted(silent)


def _poll(done: Callable[[], bool], limit_s: float) -> bool:
    """Whether it was done within the time. Spins first: exchanges are short."""
    start = time.monotonic()
    while not done():
        waited = time.monotonic() - start
        if waited > limit_s:
            return False
        time.sleep(0 if waited < 0.001 else 0.0001)
    return True


def _row_bytes(rows: torch.Tensor) -> int:
    """Bytes of one row."""
    values = 1
    for length in rows.shape[1:]:
        values *= length
    return values * rows.element_size()


def _memory(rows: torch.Tensor) -> Any:
    """The tensor's memory as bytes, not copied."""
    return rows.reshape(-1).view(torch.uint8).numpy()


def _starts(bytes_G: list[int]) -> list[int]:
    return [sum(bytes_G[:index]) for index in range(len(bytes_G))]
