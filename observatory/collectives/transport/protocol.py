"""Moving rows of tensors between ranks, the same way over every fabric.

Shapes: P ranks, G ranks of a group, N rows sent, T rows of one rank, H values per row.

Every call is collective over its group and blocks until this rank's part is done (on a GPU: until it is
enqueued). Splits count rows and follow the order of ``layout.members(group)``. Whatever goes wrong in an
exchange is an ``ExchangeError`` that names the ranks that did not answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from observatory.collectives.layout import Group, Layout


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
        """The value of every rank, by rank; values are what JSON can hold."""
        ...

    def gather_json(self, value: Any) -> list[Any] | None:
        """The value of every rank on rank 0; None elsewhere."""
        ...

    def close(self, error: str | None = None) -> None:
        """Leave; ranks that later wait for this one receive ``error``."""
        ...
