"""Joins the ranks with the transport that fits: the process group that is there, NCCL, MPI, gloo, or none."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping

import torch

from observatory.collectives.transport.base import AloneTransport, BaseTransport
from observatory.errors import ExchangeError
from observatory.host.ranks import BackendChoice, RankOf, check_backend, find_rank


def open_transport(
    backend: BackendChoice = "auto",
    *,
    ranks_per_node: int | None = None,
    timeout_s: float = 60.0,
    environment: Mapping[str, str] = os.environ,
) -> BaseTransport:
    """Join the other ranks.

    Args:
        backend: ``auto`` takes the process group that is there, else NCCL where every rank of the node has a
            GPU of its own, else MPI under ``mpiexec``, else gloo; one rank stays alone.
        ranks_per_node: pretend that nodes are so many consecutive ranks; None takes the hosts as they are.
        timeout_s: how long to wait for ranks to join, and for any exchange.
        environment: what the launcher has set.

    Raises:
        ExchangeError: a rank does not join (named), or the backend does not fit.
        CaptureError: launchers disagree on ranks.
    """
    check_backend(backend)
    where = find_rank(environment=environment)
    chosen = _choose(where) if backend == "auto" else backend
    if chosen == "alone":
        if where.world > 1:
            raise ExchangeError(
                f"backend alone was asked for on rank {where.rank} of {where.world}; expected one rank"
            )
        if ranks_per_node not in (None, 1):
            raise ExchangeError(f"{ranks_per_node} ranks per node do not divide 1 rank; leave it out")
        return AloneTransport()
    if chosen == "mpi":
        if importlib.util.find_spec("mpi4py") is None:
            raise ExchangeError("backend mpi needs mpi4py; pip install 'moe-observatory[mpi]'")
        from observatory.collectives.transport.mpi import MpiTransport

        return MpiTransport(where, ranks_per_node=ranks_per_node, timeout_s=timeout_s)
    if chosen == "nccl" and not torch.cuda.is_available():
        raise ExchangeError(
            "backend nccl was asked for, but torch finds no GPU here; expected one for each rank: take gloo, "
            "or a build of torch for this machine's GPUs"
        )
    from observatory.collectives.transport.torch import TorchTransport

    return TorchTransport(
        chosen, where, ranks_per_node=ranks_per_node, timeout_s=timeout_s, environment=environment
    )


def _choose(where: RankOf) -> BackendChoice:
    if where.world == 1 and where.launcher != "torch.distributed":
        return "alone"
    if where.launcher == "torch.distributed":
        return "gloo"  # whatever the group has; it is not made anew
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus > (where.local_rank or 0) and gpus >= (where.local_world or 1):
        return "nccl"
    if where.launcher == "mpiexec" and importlib.util.find_spec("mpi4py") is not None:
        return "mpi"
    return "gloo"
