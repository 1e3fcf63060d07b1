"""Exchanges that gradients can pass: the backward of an exchange is the exchange the other way.

Shapes: G ranks of a group, P ranks, N rows sent, M rows received, T rows of this rank.

All ranks of a group must run the backward too, also those that had nothing to send: tensors without rows
keep their place in the graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from observatory.collectives.layout import Group
from observatory.collectives.transport.protocol import Transport
from observatory.probes.exchange.labels import ExchangeRecord, ExchangeSink, Label, NullSink, Role, labelled

_REVERSE: dict[Role, Role] = {"dispatch": "combine", "combine": "dispatch", "other": "other"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Route:
    """Splits of one exchange: rows to and from each member."""

    group: Group
    send_G: tuple[int, ...]
    receive_G: tuple[int, ...]

    def reverse(self) -> _Route:
        return _Route(group=self.group, send_G=self.receive_G, receive_G=self.send_G)


class Exchanger:
    """Differentiable exchanges of one transport, reported to one sink.

    Attributes:
        transport: what carries the rows.
        sink: takes every exchange of payload, forward and backward.
    """

    def __init__(self, transport: Transport, sink: ExchangeSink | None = None) -> None:
        self.transport = transport
        self.sink: ExchangeSink = NullSink() if sink is None else sink
        self._sequence: dict[Group, int] = {}

    def exchange(
        self,
        tensors: Sequence[torch.Tensor],
        send_G: Sequence[int],
        receive_G: Sequence[int],
        *,
        label: Label,
        group: Group = "world",
    ) -> list[torch.Tensor]:
        """Send consecutive rows of several tensors to each member, in one exchange.

        Args:
            tensors: (N, width) each; gradients pass those of floating point.
            send_G: rows to each member of the group.
            receive_G: rows from each member.
            label: what the exchange is for.
            group: who takes part.

        Returns:
            The received rows of each tensor, (M, width), in the order of members.
        """
        route = _Route(group=group, send_G=tuple(send_G), receive_G=tuple(receive_G))
        return list(_Exchange.apply(self, route, label, *tensors))  # type: ignore[no-untyped-call]

    def gather(
        self, tensors: Sequence[torch.Tensor], rows_P: Sequence[int], *, label: Label
    ) -> list[torch.Tensor]:
        """All ranks' rows of several tensors, (sum of rows_P, width) each; backward sums over ranks."""
        return list(_Gather.apply(self, tuple(rows_P), label, *tensors))  # type: ignore[no-untyped-call]

    def reduce_scatter(self, rows: torch.Tensor, rows_P: Sequence[int], *, label: Label) -> torch.Tensor:
        """Sum rows over ranks and keep this rank's part; backward gathers."""
        summed: torch.Tensor = _ReduceScatter.apply(self, tuple(rows_P), label, rows)  # type: ignore[no-untyped-call]
        return summed

    def move(self, tensors: Sequence[torch.Tensor], route: _Route, label: Label) -> list[torch.Tensor]:
        """One exchange without gradients."""
        layout = tuple((tensor.shape[1], tensor.dtype) for tensor in tensors)
        rows, width = pack_rows(tensors), row_bytes(layout)
        members = self.transport.layout.members(route.group)
        received = self._timed(
            lambda: self.transport.all_to_all_v(rows, route.send_G, route.receive_G, group=route.group),
            label,
            route.group,
            send_bytes=self._per_rank(members, route.send_G, width),
            receive_bytes=self._per_rank(members, route.receive_G, width),
        )
        return unpack_rows(received, layout)

    def collect(
        self, tensors: Sequence[torch.Tensor], rows_P: tuple[int, ...], label: Label
    ) -> list[torch.Tensor]:
        """One all-gather without gradients."""
        layout = tuple((tensor.shape[1], tensor.dtype) for tensor in tensors)
        rows, width = pack_rows(tensors), row_bytes(layout)
        own_rows = rows_P[self.transport.rank]
        gathered = self._timed(
            lambda: self.transport.all_gather_v(rows, rows_P),
            label,
            "world",
            send_bytes=[own_rows * width] * self.transport.size,
            receive_bytes=[n * width for n in rows_P],
        )
        return unpack_rows(gathered, layout)

    def sum_parts(self, rows: torch.Tensor, rows_P: tuple[int, ...], label: Label) -> torch.Tensor:
        """One reduce-scatter without gradients."""
        width, own_rows = row_bytes(((rows.shape[1], rows.dtype),)), rows_P[self.transport.rank]
        return self._timed(
            lambda: self.transport.reduce_scatter_v(rows.detach(), rows_P),
            label,
            "world",
            send_bytes=[n * width for n in rows_P],
            receive_bytes=[own_rows * width] * self.transport.size,
        )

    def _timed(
        self,
        call: Callable[[], torch.Tensor],
        label: Label,
        group: Group,
        *,
        send_bytes: list[int],
        receive_bytes: list[int],
    ) -> torch.Tensor:
        sequence = self._sequence[group] = self._sequence.get(group, -1) + 1
        with labelled(label):
            start_ns = time.monotonic_ns()
            received = call()
            end_ns = time.monotonic_ns()
        self.sink.record(
            ExchangeRecord(
                role=label.role,
                layer=label.layer,
                group=group,
                sequence=sequence,
                algorithm=label.algorithm,
                backend=self.transport.backend,
                send_bytes=send_bytes,
                receive_bytes=receive_bytes,
                start_ns=start_ns,
                end_ns=end_ns,
            )
        )
        return received

    def _per_rank(self, members: Sequence[int], rows_G: Sequence[int], width: int) -> list[int]:
        """Bytes by rank of the world from rows by member of the group."""
        bytes_P = [0] * self.transport.size
        for rank, rows in zip(members, rows_G, strict=True):
            bytes_P[rank] = rows * width
        return bytes_P


def _backwards(label: Label) -> Label:
    return replace(label, role=_REVERSE[label.role], backward=not label.backward)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, exchanger: Exchanger, route: _Route, label: Label, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.exchanger, ctx.route, ctx.label = exchanger, route, label
        ctx.floating = [tensor.is_floating_point() for tensor in tensors]
        received = exchanger.move(tensors, route, label)
        ctx.mark_non_differentiable(
            *(t for t, floating in zip(received, ctx.floating, strict=True) if not floating)
        )
        return tuple(received)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        carried = [g for g, floating in zip(gradients, ctx.floating, strict=True) if floating]
        returned = iter(ctx.exchanger.move(carried, ctx.route.reverse(), _backwards(ctx.label)))
        return (None, None, None, *(next(returned) if floating else None for floating in ctx.floating))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, exchanger: Exchanger, rows_P: tuple[int, ...], label: Label, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.exchanger, ctx.rows_P, ctx.label = exchanger, rows_P, label
        ctx.floating = [tensor.is_floating_point() for tensor in tensors]
        gathered = exchanger.collect(tensors, rows_P, label)
        ctx.mark_non_differentiable(
            *(t for t, floating in zip(gathered, ctx.floating, strict=True) if not floating)
        )
        return tuple(gathered)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        label = _backwards(ctx.label)
        return (
            None,
            None,
            None,
            *(
                ctx.exchanger.sum_parts(gradient, ctx.rows_P, label) if floating else None
                for gradient, floating in zip(gradients, ctx.floating, strict=True)
            ),
        )


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, exchanger: Exchanger, rows_P: tuple[int, ...], label: Label, rows: torch.Tensor
    ) -> torch.Tensor:
        ctx.exchanger, ctx.rows_P, ctx.label = exchanger, rows_P, label
        return exchanger.sum_parts(rows, rows_P, label)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        return (None, None, None, *ctx.exchanger.collect([gradient], ctx.rows_P, _backwards(ctx.label)))


#: (width, dtype) of each tensor of a row.
RowFormat = tuple[tuple[int, torch.dtype], ...]


def pack_rows(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Bytes (N, bytes of a row) of tensors of shape (N, width) each.

    Hidden states, gate weights and slot ids of a row differ in dtype; as bytes they need one exchange instead
    of three, and no conversion.
    """
    parts = [_plain(tensor.detach()).view(torch.uint8) for tensor in tensors]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def row_bytes(layout: RowFormat) -> int:
    """Bytes of one row."""
    return sum(width * dtype.itemsize for width, dtype in layout)


def unpack_rows(rows: torch.Tensor, layout: RowFormat) -> list[torch.Tensor]:
    """The tensors that :func:`pack_rows` made these bytes of, each (N, width) and contiguous."""
    widths = [width * dtype.itemsize for width, dtype in layout]
    parts = torch.split(rows, widths, dim=1)
    # A slice may start anywhere; clone gives it a place of its own that any dtype can be read from.
    return [
        part.clone(memory_format=torch.contiguous_format).view(dtype)
        for part, (_, dtype) in zip(parts, layout, strict=True)
    ]


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its values side by side; an expanded one without rows is contiguous in name only."""
    if tensor.is_contiguous() and tensor.stride(-1) == 1:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
