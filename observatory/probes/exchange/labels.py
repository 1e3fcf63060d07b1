"""What dispatchers report about themselves while they run: spans of phases, and exchanges.

Two ways out, for two readers:

* An :class:`ExchangeSink` is handed to what moves tokens; it is called once per phase and once per exchange.
* :func:`current_label` returns, inside an exchange, what the exchange is for. A probe that watches the
  communication library from below (``observatory.probes.exchange``) reads it there, and then needs no sink.
"""

from __future__ import annotations

import contextlib
import contextvars
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

#: ``dispatch``: source rank to expert rank; ``combine``: back; ``other``: counts, barriers, agreements.
Role = Literal["dispatch", "combine", "other"]

#: Phases of one MoE layer, in order; the names of the spans.
PHASE_NAMES = ("route", "count_exchange", "pack", "dispatch", "experts", "combine", "unpack")


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """What an exchange is for.

    Attributes:
        role: direction of the tokens. The gradient of a dispatch travels back, so it is a ``combine``.
        layer: MoE layer; None outside any.
        algorithm: ``flat``, ``hierarchical``, ``gather`` or another's name; None when there is none.
        backward: whether it carries gradients.
    """

    role: Role
    layer: int | None = None
    algorithm: str | None = None
    backward: bool = False


_label: contextvars.ContextVar[Label | None] = contextvars.ContextVar("observatory_exchange", default=None)


def current_label() -> Label | None:
    """What the exchange in progress on this thread is for; None outside ours."""
    return _label.get()


@contextlib.contextmanager
def labelled(label: Label) -> Iterator[None]:
    """Exchanges started inside carry this label."""
    token = _label.set(label)
    try:
        yield
    finally:
        _label.reset(token)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanRecord:
    """One phase of one layer call; monotonic nanoseconds."""

    name: str
    layer: int | None
    start_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeRecord:
    """One exchange of payload.

    Attributes:
        role: direction of the tokens.
        layer: MoE layer.
        group: who took part: ``world``, ``node`` or ``across``.
        sequence: number of the exchange in its group, the same on all its ranks.
        algorithm: the dispatcher's algorithm.
        backend: gloo, nccl, mpi or alone.
        send_bytes: bytes to each rank of the world, (P,).
        receive_bytes: bytes from each rank of the world, (P,).
        start_ns: monotonic time before the call.
        end_ns: monotonic time after it; on a GPU the time it was enqueued, not completed.
    """

    role: Role
    layer: int | None
    group: str
    sequence: int
    algorithm: str | None
    backend: str
    send_bytes: Sequence[int]
    receive_bytes: Sequence[int]
    start_ns: int
    end_ns: int


@runtime_checkable
class ExchangeSink(Protocol):
    """Takes what dispatchers report; called on the thread that moves the tokens, so it must be quick."""

    def span(self, name: str, layer: int | None) -> AbstractContextManager[None]:
        """Around one phase (one of ``PHASE_NAMES``) of one layer."""
        ...

    def record(self, record: ExchangeRecord) -> None:
        """After one exchange."""
        ...


class NullSink:
    """Takes nothing."""

    def span(self, name: str, layer: int | None) -> AbstractContextManager[None]:  # noqa: ARG002
        """A block without effect."""
        return contextlib.nullcontext()

    def record(self, record: ExchangeRecord) -> None:
        """Forget it."""


@dataclass(slots=True)
class MemorySink:
    """Keeps everything in memory: for benchmarks and tests.

    Attributes:
        spans: phases in the order in which they ended.
        exchanges: exchanges in order.
    """

    spans: list[SpanRecord] = field(default_factory=list)
    exchanges: list[ExchangeRecord] = field(default_factory=list)

    @contextlib.contextmanager
    def span(self, name: str, layer: int | None) -> Iterator[None]:
        """Keep the time of one phase."""
        start_ns = time.monotonic_ns()
        try:
            yield
        finally:
            self.spans.append(
                SpanRecord(name=name, layer=layer, start_ns=start_ns, end_ns=time.monotonic_ns())
            )

    def record(self, record: ExchangeRecord) -> None:
        """Keep one exchange."""
        self.exchanges.append(record)
