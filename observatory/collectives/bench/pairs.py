"""Single numbers between two ranks, over torch.distributed or MPI: what clock alignment needs of a fabric."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import distributed

from observatory.collectives.transport.protocol import Transport
from observatory.errors import ExchangeError
from observatory.probes.alignment import PairLink, TimeBaseAlignment, align

_TAG = 78


class TorchPairs:
    """The ranks of a torch.distributed process group; its timeout bounds every wait."""

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.rank = distributed.get_rank(group)
        self.size = distributed.get_world_size(group)
        device = "cuda" if distributed.get_backend(group) == "nccl" else "cpu"
        self._value = torch.zeros(1, dtype=torch.int64, device=device)

    def send(self, peer: int, value: int) -> None:
        """Send one number."""
        self._value.fill_(value)
        self._guarded(peer, lambda: distributed.send(self._value, group=self._group, group_dst=peer))

    def receive(self, peer: int) -> int:
        """Wait for a number."""
        self._guarded(peer, lambda: distributed.recv(self._value, group=self._group, group_src=peer))
        return int(self._value.item())

    def _guarded(self, peer: int, call: Any) -> None:
        try:
            call()
        except RuntimeError as error:
            raise _silent(self.rank, peer, str(error)) from error


class MpiPairs:
    """The ranks of an MPI communicator."""

    def __init__(self, communicator: Any, *, timeout_s: float = 60.0) -> None:
        self._communicator = communicator
        self._timeout_s = timeout_s
        self.rank = int(communicator.Get_rank())
        self.size = int(communicator.Get_size())

    def send(self, peer: int, value: int) -> None:
        """Send one number."""
        message = bytearray(value.to_bytes(8, "little", signed=True))
        self._finish(peer, self._communicator.Isend(message, dest=peer, tag=_TAG))

    def receive(self, peer: int) -> int:
        """Wait for a number."""
        message = bytearray(8)
        self._finish(peer, self._communicator.Irecv(message, source=peer, tag=_TAG))
        return int.from_bytes(message, "little", signed=True)

    def _finish(self, peer: int, request: Any) -> None:
        """Poll without sleeping: a nap would look like delay on the way."""
        give_up = time.monotonic() + self._timeout_s
        while not request.Test():
            if time.monotonic() > give_up:
                raise _silent(self.rank, peer, f"no answer for {self._timeout_s:g} s")
            time.sleep(0)


def pair_link(transport: Transport) -> PairLink | None:
    """Numbers between the ranks of a transport; None for a transport of one rank."""
    if transport.backend == "alone":
        return None
    if transport.backend == "mpi":
        from mpi4py import MPI

        return MpiPairs(MPI.COMM_WORLD, timeout_s=transport.timeout_s)
    return TorchPairs()


def align_transport(transport: Transport, *, rounds: int = 64) -> TimeBaseAlignment:
    """Align the clocks of all ranks of a transport; every rank must call it."""
    link = pair_link(transport)
    if link is None:
        return align(_Alone(), rounds=rounds)
    return align(link, rounds=rounds)


class _Alone:
    """The link of one rank, which has no peers."""

    rank, size = 0, 1

    def send(self, peer: int, value: int) -> None:  # noqa: ARG002
        raise AssertionError("one rank sends nothing")

    def receive(self, peer: int) -> int:  # noqa: ARG002
        raise AssertionError("one rank receives nothing")


def _silent(rank: int, peer: int, reason: str) -> ExchangeError:
    return ExchangeError(
        f"rank {rank} cannot align its clock with rank {peer}: {' '.join(reason.split())[:300]}; "
        f"look at the output of rank {peer}"
    )
