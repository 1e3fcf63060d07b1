"""What all transports share: checks of what is to be sent, JSON, agreement, and the transport of one rank.

Shapes: P ranks, G ranks of a group, N rows sent, T rows of one rank, H values per row.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, final

import torch

from observatory.collectives.layout import Group, Layout
from observatory.collectives.transport.protocol import Transport
from observatory.errors import ExchangeError, alike

_MAX_JSON_BYTES = 64 << 20


class BaseTransport(ABC):
    """A transport whose subclasses only move contiguous rows with checked splits."""

    backend: str

    def __init__(self, layout: Layout, *, device: torch.device, timeout_s: float) -> None:
        self.layout = layout
        self.device = device
        self.timeout_s = timeout_s

    @property
    @final
    def rank(self) -> int:
        """This rank."""
        return self.layout.rank

    @property
    @final
    def size(self) -> int:
        """P."""
        return self.layout.size

    @property
    @final
    def node_of_P(self) -> tuple[int, ...]:
        """Node of each rank, (P,)."""
        return self.layout.node_of_P

    def exchange_counts(self, counts_G: torch.Tensor, *, group: Group = "world") -> torch.Tensor:
        """Send entry g to member g; see :class:`~.protocol.Transport`."""
        members = self.layout.members(group)
        if counts_G.dtype != torch.int64 or counts_G.shape[0] != len(members):
            raise ExchangeError(
                f"counts are {counts_G.dtype} of shape {tuple(counts_G.shape)}; expected int64 with one "
                f"entry for each of the {len(members)} ranks of group {group}"
            )
        one_each = [1] * len(members)
        rows = counts_G.reshape(len(members), -1).to(self.device).contiguous()
        received = self._all_to_all(rows, one_each, one_each, group)
        return received.reshape(counts_G.shape).cpu()

    def all_to_all_v(
        self,
        rows_NH: torch.Tensor,
        send_rows_G: Sequence[int],
        receive_rows_G: Sequence[int],
        *,
        group: Group = "world",
    ) -> torch.Tensor:
        """Send consecutive rows to each member; see :class:`~.protocol.Transport`."""
        members = self.layout.members(group)
        for name, rows_G in (("send", send_rows_G), ("receive", receive_rows_G)):
            if len(rows_G) != len(members) or min(rows_G) < 0:
                raise ExchangeError(
                    f"{name} rows are {list(rows_G)}; expected {len(members)} numbers from 0 on, one for "
                    f"each rank of group {group}"
                )
        if sum(send_rows_G) != rows_NH.shape[0]:
            raise ExchangeError(
                f"{rows_NH.shape[0]} rows were given and {sum(send_rows_G)} are to be sent; expected as many"
            )
        return self._all_to_all(rows_NH.contiguous(), list(send_rows_G), list(receive_rows_G), group)

    def all_gather_v(self, rows_TH: torch.Tensor, rows_P: Sequence[int]) -> torch.Tensor:
        """The rows of all ranks; see :class:`~.protocol.Transport`."""
        if len(rows_P) != self.size or rows_TH.shape[0] != rows_P[self.rank]:
            raise ExchangeError(
                f"rank {self.rank} gives {rows_TH.shape[0]} rows where the ranks give {list(rows_P)}; "
                "expected its own number among them"
            )
        return self._all_gather(rows_TH.contiguous(), list(rows_P))

    def reduce_scatter_v(self, rows_TH: torch.Tensor, rows_P: Sequence[int]) -> torch.Tensor:
        """Sum over ranks and keep one's part; see :class:`~.protocol.Transport`."""
        if len(rows_P) != self.size or rows_TH.shape[0] != sum(rows_P):
            raise ExchangeError(
                f"{rows_TH.shape[0]} rows are to be summed into parts of {list(rows_P)}; expected their sum"
            )
        return self._reduce_scatter(rows_TH.contiguous(), list(rows_P))

    def all_gather_json(self, value: Any) -> list[Any]:
        """The value of every rank, by rank; see :class:`~.protocol.Transport`."""
        text = json.dumps(value).encode()
        sizes_P = self.exchange_counts(torch.full((self.size,), len(text), dtype=torch.int64)).tolist()
        if sum(sizes_P) > _MAX_JSON_BYTES:
            raise ExchangeError(f"ranks would exchange {sum(sizes_P)} bytes of JSON; expected 64 MiB")
        rows = torch.frombuffer(bytearray(text), dtype=torch.uint8).reshape(-1, 1).to(self.device)
        texts = bytes(self.all_gather_v(rows, sizes_P).cpu().reshape(-1).tolist())
        ends = torch.tensor(sizes_P).cumsum(0).tolist()
        return [json.loads(texts[end - size : end]) for size, end in zip(sizes_P, ends, strict=True)]

    def gather_json(self, value: Any) -> list[Any] | None:
        """The value of every rank on rank 0; None elsewhere."""
        values = self.all_gather_json(value)
        return values if self.rank == 0 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close(None if error is None else " ".join(f"{type(error).__name__}: {error}".split())[:500])

    @abstractmethod
    def barrier(self, timeout_s: float | None = None) -> None:
        """Wait for all ranks; see :class:`~.protocol.Transport`."""

    @abstractmethod
    def close(self, error: str | None = None) -> None:
        """Leave; see :class:`~.protocol.Transport`."""

    @abstractmethod
    def _all_to_all(
        self, rows: torch.Tensor, send_G: list[int], receive_G: list[int], group: Group
    ) -> torch.Tensor:
        """Exchange contiguous rows with checked splits."""

    @abstractmethod
    def _all_gather(self, rows: torch.Tensor, rows_P: list[int]) -> torch.Tensor:
        """Collect contiguous rows with checked sizes."""

    @abstractmethod
    def _reduce_scatter(self, rows: torch.Tensor, rows_P: list[int]) -> torch.Tensor:
        """Sum contiguous rows with checked sizes."""


class AloneTransport(BaseTransport):
    """One rank: what it sends, it receives."""

    backend = "alone"

    def __init__(self) -> None:
        super().__init__(Layout(rank=0, node_of_P=(0,)), device=torch.device("cpu"), timeout_s=0.0)

    def barrier(self, timeout_s: float | None = None) -> None:
        """There is no rank to wait for."""

    def close(self, error: str | None = None) -> None:
        """Nothing to leave."""

    def _all_to_all(
        self, rows: torch.Tensor, send_G: list[int], receive_G: list[int], group: Group
    ) -> torch.Tensor:
        if send_G != receive_G:
            raise ExchangeError(
                f"rank 0 of 1 sends {send_G[0]} rows and expects {receive_G[0]} in group {group}; "
                "expected what it sends"
            )
        return rows.clone()

    def _all_gather(self, rows: torch.Tensor, rows_P: list[int]) -> torch.Tensor:  # noqa: ARG002
        return rows.clone()

    def _reduce_scatter(self, rows: torch.Tensor, rows_P: list[int]) -> torch.Tensor:  # noqa: ARG002
        return rows.clone()


def agree(transport: Transport, what: dict[str, Any]) -> None:
    """Make sure that all ranks are about to do the same.

    Args:
        transport: joins the ranks.
        what: name -> value that JSON can hold; must be equal on all ranks.

    Raises:
        ExchangeError: on every rank, naming the first difference and the ranks that differ from rank 0.
    """
    values_of_ranks = transport.all_gather_json(what)
    for name in what:
        values = [json.dumps(values.get(name), sort_keys=True) for values in values_of_ranks]
        different = [rank for rank, value in enumerate(values) if value != values[0]]
        if different:
            raise alike(
                ExchangeError(
                    f"the ranks disagree on {name}: rank 0 has {values[0][:120]}, rank {different[0]} has "
                    f"{values[different[0]][:120]}; start all ranks with the same model and options"
                )
            )
