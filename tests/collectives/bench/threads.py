"""Ranks as threads of this process: a transport for tests that need no fabric."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from observatory.collectives.layout import Group, Layout
from observatory.collectives.transport.base import BaseTransport

Result = TypeVar("Result")


class ThreadTransport(BaseTransport):
    """One of several threads; rows are handed over in a shared list."""

    backend = "threads"

    def __init__(self, rank: int, ranks: int, shared: list[Any], meeting: threading.Barrier) -> None:
        layout = Layout(rank=rank, node_of_P=(0,) * ranks)
        super().__init__(layout, device=torch.device("cpu"), timeout_s=20.0)
        self._shared, self._meeting = shared, meeting

    def barrier(self, timeout_s: float | None = None) -> None:
        self._meeting.wait(timeout_s or self.timeout_s)

    def close(self, error: str | None = None) -> None: ...

    def _all_to_all(
        self,
        rows: torch.Tensor,
        send_G: list[int],
        receive_G: list[int],
        group: Group,  # noqa: ARG002
    ) -> torch.Tensor:
        self._shared[self.rank] = torch.split(rows, send_G)
        self.barrier()
        received = torch.cat([parts[self.rank] for parts in self._shared])
        assert received.shape[0] == sum(receive_G)
        self.barrier()
        return received.clone()

    def _all_gather(self, rows: torch.Tensor, rows_P: list[int]) -> torch.Tensor:  # noqa: ARG002
        self._shared[self.rank] = rows
        self.barrier()
        gathered = torch.cat(list(self._shared))
        self.barrier()
        return gathered

    def _reduce_scatter(self, rows: torch.Tensor, rows_P: list[int]) -> torch.Tensor:
        raise NotImplementedError


def on_threads(
    ranks: int, work: Callable[[ThreadTransport], Result], kind: type[ThreadTransport] = ThreadTransport
) -> list[Result]:
    """What each rank returns."""
    shared: list[Any] = [None] * ranks
    meeting = threading.Barrier(ranks, timeout=20.0)

    def run(rank: int) -> Result:
        try:
            return work(kind(rank, ranks, shared, meeting))
        except BaseException:
            meeting.abort()
            raise

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))
