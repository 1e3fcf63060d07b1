"""Moving rows of tensors between ranks, the same way over every fabric.

Shapes: P ranks, G ranks of a group, N rows sent, T rows of one rank, H values per row.

Every call is collective over its group and blocks until this rank's part is done (on a GPU: until it is
enqueued). Splits count rows and follow the order of ``layout.members(group)``. Whatever goes wrong in an
exchange is an ``ExchangeError`` that names the ranks that did not answer.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import torch

from observatory.collectives.layout import Group, Layout
from observatory.errors import ExchangeError
from observatory.host.ranks import RankOf, find_rank

if TYPE_CHECKING:
    from observatory.collectives.transport.base import BaseTransport

BackendChoice = Literal["auto", "gloo", "nccl", "mpi", "alone"]


class Transport(Protocol):
    """What dispatchers, benchmarks and clock alignment need of a fabric.

    Attributes:
        backend: ``gloo``, ``nccl``, ``mpi`` or ``alone``.
        layout: this rank, the others, and their nodes.
        device: where this fabric takes its tensors from; gloo and MPI take any and copy.
        timeout_s: how long an exchange may take before it is an error.
    """

    backend: str
    layout: Layout
    device: torch.device
    timeout_s: float

    @property
    def rank(self) -> int:
        """This rank."""
        ...

    @property
    def size(self) -> int:
        """P."""
        ...

    @property
    def node_of_P(self) -> tuple[int, ...]:
        """Node of each rank, (P,)."""
        ...

    def exchange_counts(self, counts_G: torch.Tensor, *, group: Group = "world") -> torch.Tensor:
        """Send entry g to member g, and receive its entry for this rank.

        Args:
            counts_G: int64, (G,) or (G, C) for C numbers to each.
            group: who takes part.
        """
        ...

    def all_to_all_v(
        self,
        rows_NH: torch.Tensor,
        send_rows_G: Sequence[int],
        receive_rows_G: Sequence[int],
        *,
        group: Group = "world",
    ) -> torch.Tensor:
        """Send consecutive rows to each member; the rows received, in the order of members."""
        ...

    def all_gather_v(self, rows_TH: torch.Tensor, rows_P: Sequence[int]) -> torch.Tensor:
        """The rows of all ranks one after the other; rank p contributes ``rows_P[p]``."""
        ...

    def reduce_scatter_v(self, rows_TH: torch.Tensor, rows_P: Sequence[int]) -> torch.Tensor:
        """Sum rows over ranks, then keep this rank's part of ``rows_P[rank]`` rows."""
        ...

    def barrier(self, timeout_s: float | None = None) -> None:
        """Wait for all ranks."""
        ...

    def all_gather_json(self, value: Any) -> list[Any]:
        """Everybody's value, by rank; values are what JSON can hold."""
        ...

    def gather_json(self, value: Any) -> list[Any] | None:
        """Everybody's value on rank 0; None elsewhere."""
        ...

    def close(self, error: str | None = None) -> None:
        """Leave; ``error`` is told to ranks that later wait for this one."""
        ...


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
    if backend not in get_args(BackendChoice):
        raise ExchangeError(
            f"backend {backend!r} does not exist; expected {', '.join(get_args(BackendChoice))}"
        )
    where = find_rank(environment=environment)
    chosen = _choose(where) if backend == "auto" else backend
    if chosen == "alone":
        if where.world > 1:
            raise ExchangeError(
                f"backend alone was asked for on rank {where.rank} of {where.world}; expected one rank"
            )
        if ranks_per_node not in (None, 1):
            raise ExchangeError(f"{ranks_per_node} ranks per node do not divide 1 rank; leave it out")
        from observatory.collectives.transport.base import AloneTransport

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
    import torch

    if where.launcher == "torch.distributed":
        return "gloo"  # whatever the group has; it is not made anew
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus > (where.local_rank or 0) and gpus >= (where.local_world or 1):
        return "nccl"
    if where.launcher == "mpiexec" and importlib.util.find_spec("mpi4py") is not None:
        return "mpi"
    return "gloo"
