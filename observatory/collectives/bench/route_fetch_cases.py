"""What ranks do to route, fetch or have data here, and how a result is checked.

Shapes: L layers, P ranks, K holders, C tokens of a chunk, T query tokens, W values of a cache entry.

Every rank draws the same data, so that rank 0 can compute on its own what it must get from the others.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from observatory.collectives.bench.cached_attention import (
    Partial,
    attend,
    full_attention,
    merge,
    turn_entries,
    turn_queries,
)
from observatory.collectives.bench.decoder import Decoder, Edit, longest_text
from observatory.run.documents.route_fetch import INDEX_BYTES, STATISTICS_BYTES, Option, Point, Shape, Stage

if TYPE_CHECKING:
    from observatory.collectives.transport.protocol import Transport

#: How far further on the chunk stands for rank 0 than where its holders cached it.
_SHIFT = 1000
#: Tokens that rank 0 holds itself, whose partial result is merged.
_NEAR_TOKENS = 16
#: Query tokens whose result is compared with full attention in every repeat.
_CHECKED_TOKENS = 8


@dataclass(slots=True)
class Stopwatch:
    """Times of the stages of one run on this rank, nanoseconds."""

    device: torch.device
    stage_ns: dict[Stage, int] = field(default_factory=lambda: defaultdict(int))

    def now_ns(self) -> int:
        """Now, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic_ns()

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Add the time of a block to a stage."""
        start_ns = self.now_ns()
        yield
        self.stage_ns[name] += self.now_ns() - start_ns


#: Runs an option on this rank; rank 0 returns its result.
Body = Callable[[Stopwatch], Tensor | None]
#: Largest difference of a result from the expected one, relative to the largest value.
Check = Callable[[Tensor], float]


def _nothing() -> None:
    """Prepare nothing."""


class Work(NamedTuple):
    """One option at one point: what this rank does, what is checked, and what is made ready before."""

    option: Option
    point: Point
    body: Body
    check: Check
    prepare: Callable[[], None] = _nothing


class _Wire:
    """Bytes between rank 0 and the holders, as exchanges of all ranks."""

    def __init__(self, transport: Transport, device: torch.device) -> None:
        self._transport = transport
        self._nothing = torch.empty(0, dtype=torch.uint8, device=device)

    def to_holders(self, messages: Sequence[Tensor] | None, sizes_P: Sequence[int]) -> Tensor:
        """Send a message of so many bytes to each rank; what this rank received, flat."""
        size, rank = self._transport.size, self._transport.rank
        if rank == 0:
            assert messages is not None
            return self._exchange(messages, list(sizes_P), [0] * size)
        return self._exchange([], [0] * size, [sizes_P[rank], *([0] * (size - 1))])

    def to_rank_0(self, message: Sequence[Tensor], sizes_P: Sequence[int]) -> Tensor:
        """Send this rank's message of so many bytes to rank 0, which receives all, by rank."""
        size, rank = self._transport.size, self._transport.rank
        if rank == 0:
            return self._exchange([], [0] * size, list(sizes_P))
        return self._exchange(message, [sizes_P[rank], *([0] * (size - 1))], [0] * size)

    def _exchange(self, parts: Sequence[Tensor], send_P: list[int], receive_P: list[int]) -> Tensor:
        flat = [part.reshape(-1).view(torch.uint8) for part in parts]
        rows = torch.cat(flat) if len(flat) > 1 else flat[0] if flat else self._nothing
        return self._transport.all_to_all_v(rows[:, None], send_P, receive_P)[:, 0]


class CachedAttention:
    """Attention over a chunk that the other ranks hold in equal parts."""

    def __init__(
        self, transport: Transport, shape: Shape, points: Sequence[Point], *, seed: int, device: torch.device
    ) -> None:
        self.shape, self.device, self.rank = shape, device, transport.rank
        self.holders = transport.size - 1
        self.wire = _Wire(transport, device)
        self.points, draw = points, _Random(seed, shape, device)
        layers = max(point.layers for point in points)
        chunk, tokens = max(point.size for point in points), max(p.rows for p in points) // shape.heads
        self.decoder, entries_LCW = None, draw(layers, chunk, shape.entry)
        if shape.can_prefill and shape.hidden is not None:
            # The cache is what the layers make of a text, so that all options have the same result.
            self.decoder, self.text_CX = Decoder(shape, layers, draw), draw(chunk, shape.hidden)
            self.decoder.prefill(
                self.text_CX, torch.empty_like(entries_LCW), start=0, shift=_SHIFT, plain_LCW=entries_LCW
            )
        self.cached_LCW, self.wanted_LCW = entries_LCW.clone(), entries_LCW
        self.near_LCW = draw(layers, _NEAR_TOKENS, shape.entry)
        self.query_LTHD = draw(layers, tokens, shape.heads, shape.key)
        after = _SHIFT + chunk
        positions = torch.arange(chunk + _NEAR_TOKENS + tokens, device=device)
        at_T = after + _NEAR_TOKENS + positions[:tokens]
        for layer in range(layers):
            turn_entries(self.cached_LCW[layer], positions[:chunk], shape)
            turn_entries(self.wanted_LCW[layer], _SHIFT + positions[:chunk], shape)
            turn_entries(self.near_LCW[layer], after + positions[:_NEAR_TOKENS], shape)
            self.query_LTHD[layer] = turn_queries(self.query_LTHD[layer], at_T[:, None], shape)
        self.order_C = torch.randperm(chunk, generator=torch.Generator().manual_seed(seed)).to(device)

    def works(self) -> Iterator[list[Work]]:
        """The options of each point."""
        for point in self.points:
            tokens = point.rows // self.shape.heads
            spans = _spans(point.size, self.holders)
            index_KN = [self._selection(stop - start) for start, stop in spans]
            request = self._request(point, tokens, spans, index_KN)
            check = functools.partial(self._error, point=point, tokens=tokens, spans=spans, index_KN=index_KN)
            works = [Work("route", point, request.route, check), Work("fetch", point, request.fetch, check)]
            if self.decoder is not None:
                works.append(Work("local", point, request.local, check))
            yield works

    def _selection(self, held: int) -> Tensor | None:
        """Entries that are attended to among those of one holder; None for all."""
        if self.shape.selected is None:
            return None
        wanted = min(held, -(-self.shape.selected // self.holders))
        return self.order_C[self.order_C < held][:wanted].contiguous()

    def _request(
        self, point: Point, tokens: int, spans: Sequence[tuple[int, int]], index_KN: Sequence[Tensor | None]
    ) -> _Request:
        near: list[Partial] = []
        if self.rank == 0:
            near = [
                attend(self.query_LTHD[layer, :tokens], self.near_LCW[layer], self.shape)
                for layer in range(point.layers)
            ]
        return _Request(self, point, tokens, spans, index_KN, near)

    def _error(
        self, result_LGNV: Tensor, *, point: Point, tokens: int, spans: Sequence[tuple[int, int]],
        index_KN: Sequence[Tensor | None],
    ) -> float:  # fmt: skip
        """Of some query tokens in all layers, against full attention at the positions that rank 0 has."""
        chosen = torch.linspace(0, tokens - 1, min(tokens, _CHECKED_TOKENS)).long().to(self.device)
        worst = 0.0
        for layer in range(point.layers):
            wanted_CW = self.wanted_LCW[layer]
            parts = [
                wanted_CW[start:stop] if index is None else wanted_CW[start:stop][index]
                for (start, stop), index in zip(spans, index_KN, strict=True)
            ]
            entries_CW = torch.cat([*parts, self.near_LCW[layer]])
            expected = full_attention(self.query_LTHD[layer][chosen], entries_CW, self.shape)
            rows_GTRV = result_LGNV[layer].reshape(self.shape.kv_heads, tokens, -1, self.shape.value)[
                :, chosen
            ]
            worst = max(worst, _difference(rows_GTRV.flatten(1, 2), expected))
        return worst


def _spans(tokens: int, holders: int) -> list[tuple[int, int]]:
    """First and last token (exclusive) that each holder has, as equal as possible."""
    ends = [tokens * (holder + 1) // holders for holder in range(holders)]
    return list(zip([0, *ends[:-1]], ends, strict=True))


@dataclass(slots=True)
class _Request:
    """Attention at one point, with all sizes that both sides know."""

    data: CachedAttention
    point: Point
    tokens: int
    spans: Sequence[tuple[int, int]]
    index_KN: Sequence[Tensor | None]
    near_L: list[Partial]

    def route(self, watch: Stopwatch) -> Tensor | None:
        """Rows there, partial results back, layer by layer."""
        shape, rank = self.data.shape, self.data.rank
        rows = self.tokens * shape.heads
        query_bytes = rows * shape.key * shape.element_bytes
        partial_bytes = rows * (STATISTICS_BYTES + shape.value * shape.element_bytes)
        out_P = [0, *(query_bytes + self._index_bytes(holder) for holder in range(self.data.holders))]
        back_P = [0, *([partial_bytes] * self.data.holders)]
        shift, result = torch.tensor(_SHIFT, device=self.data.device), []
        for layer in range(self.point.layers):
            messages, answer = None, []
            if rank == 0:
                with watch.stage("rotate"):
                    query_THD = turn_queries(self.data.query_LTHD[layer, : self.tokens], -shift, shape)
                messages = [part for index in self.index_KN for part in (*_given(index), query_THD)]
            received = self.data.wire.to_holders(messages, out_P)
            if rank > 0:
                answer = self._attend_here(layer, received, watch)
            returned = self.data.wire.to_rank_0(answer, back_P)
            if rank == 0:
                with watch.stage("merge"):
                    parts = [self._partial(part) for part in torch.split(returned, back_P[1:])]
                    result.append(merge([self.near_L[layer], *parts]))
        return torch.stack(result) if rank == 0 else None

    def fetch(self, watch: Stopwatch) -> Tensor | None:
        """Entries of all layers here, turned to where they stand, attended to here."""
        shape, rank, layers = self.data.shape, self.data.rank, self.point.layers
        held_K = [
            stop - start if index is None else len(index)
            for (start, stop), index in zip(self.spans, self.index_KN, strict=True)
        ]
        out_P = [0, *(max(INDEX_BYTES, self._index_bytes(holder)) for holder in range(self.data.holders))]
        back_P = [0, *(layers * held * shape.entry_bytes for held in held_K)]
        messages, answer = None, []
        if rank == 0:
            nothing = torch.zeros(1, dtype=torch.int64, device=self.data.device)
            messages = [nothing if index is None else index for index in self.index_KN]
        received = self.data.wire.to_holders(messages, out_P)
        if rank > 0:
            start, stop = self.spans[rank - 1]
            entries_LCW = self.data.cached_LCW[:layers, start:stop]
            if shape.selected is not None:
                with watch.stage("gather"):
                    entries_LCW = entries_LCW[:, received.view(torch.int64)]
            answer = [entries_LCW.contiguous()]
        returned = self.data.wire.to_rank_0(answer, back_P)
        if rank > 0:
            return None
        dtype = self.data.cached_LCW.dtype
        parts = [part.view(dtype).view(layers, -1, shape.entry) for part in torch.split(returned, back_P[1:])]
        with watch.stage("rotate"):
            shift = torch.tensor(_SHIFT, device=self.data.device)
            for part in parts:
                turn_entries(part.flatten(0, 1), shift, shape)
        return self._attend_all(parts, watch)

    def local(self, watch: Stopwatch) -> Tensor | None:
        """Entries of all layers from a prefill, attended to here."""
        data, layers = self.data, self.point.layers
        if data.rank > 0:
            return None
        assert data.decoder is not None
        with watch.stage("prefill"):
            cache_LCW = torch.empty_like(data.wanted_LCW[:layers, : self.point.size])
            data.decoder.prefill(data.text_CX[: self.point.size], cache_LCW, start=0, shift=_SHIFT)
        return self._attend_all([cache_LCW], watch)

    def _attend_all(self, parts: Sequence[Tensor], watch: Stopwatch) -> Tensor:
        """Attention of all layers over entries that are here, (L, N, W) each."""
        result = []
        for layer in range(self.point.layers):
            with watch.stage("attend"):
                query_THD = self.data.query_LTHD[layer, : self.tokens]
                attended = [attend(query_THD, part[layer], self.data.shape) for part in parts]
            with watch.stage("merge"):
                result.append(merge([self.near_L[layer], *attended]))
        return torch.stack(result)

    def _index_bytes(self, holder: int) -> int:
        index = self.index_KN[holder]
        return 0 if index is None else INDEX_BYTES * len(index)

    def _attend_here(self, layer: int, received: Tensor, watch: Stopwatch) -> list[Tensor]:
        """A holder's partial result for the rows that it received, statistics first."""
        data, shape = self.data, self.data.shape
        start, stop = self.spans[data.rank - 1]
        entries_CW = data.cached_LCW[layer, start:stop]
        cut = self._index_bytes(data.rank - 1)
        index, query = received[:cut], received[cut:]
        if shape.selected is not None:
            with watch.stage("gather"):
                entries_CW = entries_CW[index.view(torch.int64)]
        with watch.stage("attend"):
            query_THD = query.view(data.cached_LCW.dtype).view(self.tokens, shape.heads, shape.key)
            partial = attend(query_THD, entries_CW, shape)
        return [partial.peak, partial.normaliser, partial.output]

    def _partial(self, message: Tensor) -> Partial:
        shape, rows = self.data.shape, self.tokens * self.data.shape.heads
        per_head = rows // shape.kv_heads
        statistics, output = message[: rows * STATISTICS_BYTES], message[rows * STATISTICS_BYTES :]
        peak, normaliser = statistics.view(torch.float32).view(2, shape.kv_heads, per_head)
        return Partial(
            output.view(self.data.cached_LCW.dtype).view(shape.kv_heads, per_head, shape.value),
            peak,
            normaliser,
        )


def _given(index: Tensor | None) -> list[Tensor]:
    return [] if index is None else [index]


class RemoteExpert:
    """A gated expert whose weights the last rank holds."""

    def __init__(
        self, transport: Transport, shape: Shape, points: Sequence[Point], *, seed: int, device: torch.device
    ) -> None:
        self.shape, self.device, self.rank, self.ranks = shape, device, transport.rank, transport.size
        self.wire = _Wire(transport, device)
        self.points, draw = points, _Random(seed, shape, device)
        self.weight_F3H = draw(max(point.size for point in points), 3, shape.key) * shape.key**-0.5
        self.token_TH = draw(max(point.rows for point in points), shape.key)

    def works(self) -> Iterator[list[Work]]:
        """The options of each point."""
        return map(self._works, self.points)

    def _works(self, point: Point) -> list[Work]:
        token_TH, weight_F3H = self.token_TH[: point.rows], self.weight_F3H[: point.size]
        width = self.shape.key * self.shape.element_bytes
        rows_P = [*([0] * (self.ranks - 1)), point.rows * width]
        weights_P = [*([0] * (self.ranks - 1)), 3 * point.size * width]
        request_P = [*([0] * (self.ranks - 1)), INDEX_BYTES]
        holds, asks = self.rank == self.ranks - 1, self.rank == 0

        def applied(token_TH: Tensor, weight_F3H: Tensor, watch: Stopwatch) -> Tensor:
            with watch.stage("experts"):
                return _gated(token_TH, weight_F3H)

        def route(watch: Stopwatch) -> Tensor | None:
            received = self.wire.to_holders([token_TH] if asks else None, rows_P)
            answer = []
            if holds:
                rows = received.view(token_TH.dtype).view(point.rows, -1)
                answer = [applied(rows, weight_F3H, watch)]
            returned = self.wire.to_rank_0(answer, rows_P)
            return returned.view(token_TH.dtype).view(point.rows, -1) if asks else None

        def fetch(watch: Stopwatch) -> Tensor | None:
            request = torch.zeros(1, dtype=torch.int64, device=self.device)
            self.wire.to_holders([request] if asks else None, request_P)
            returned = self.wire.to_rank_0([weight_F3H] if holds else [], weights_P)
            if not asks:
                return None
            return applied(token_TH, returned.view(token_TH.dtype).view(point.size, 3, -1), watch)

        def local(watch: Stopwatch) -> Tensor | None:
            return applied(token_TH, weight_F3H, watch) if asks else None

        expected = _gated(token_TH, weight_F3H) if asks else token_TH
        check = functools.partial(_difference, expected=expected)
        return [
            Work("route", point, route, check),
            Work("fetch", point, fetch, check),
            Work("local", point, local, check),
        ]


def _gated(token_TH: Tensor, weight_F3H: Tensor) -> Tensor:
    """down(silu(gate x) * up x); rows of ``weight_F3H`` are gate, up and the transposed down."""
    gate_FH, up_FH, down_FH = weight_F3H.unbind(1)
    return (functional.silu(token_TH @ gate_FH.T) * (token_TH @ up_FH.T)) @ down_FH


class CacheEdits:
    """Edits of a cache, on rank 0 alone."""

    def __init__(
        self, rank: int, shape: Shape, points: Sequence[Point], *, seed: int, device: torch.device
    ) -> None:
        self.rank, self.points = rank, points
        if rank == 0:
            draw = _Random(seed, shape, device)
            self.decoder = Decoder(shape, max(point.layers for point in points), draw)
            self.text_NX = draw(longest_text(points), shape.hidden or 1)

    def works(self) -> Iterator[list[Work]]:
        """The options of each point."""
        for point in self.points:
            if self.rank > 0:
                yield [Work(option, point, lambda _: None, lambda _: 0.0) for option in ("splice", "trim")]
                continue
            edited = _EditedCache(Edit(self.decoder, point, self.text_NX))
            yield [
                Work("splice", point, edited.splice, edited.splice_error, edited.reset),
                Work("trim", point, edited.trim, edited.trim_error, edited.reset),
            ]


class _EditedCache:
    """A cache that is edited over and over."""

    def __init__(self, edit: Edit) -> None:
        self._edit = edit
        self._cache_LCW = edit.cache_LCW.clone()
        self.splice_error = functools.partial(_difference, expected=edit.spliced_LCW)
        self.trim_error = functools.partial(_difference, expected=edit.trimmed_LCW)

    def reset(self) -> None:
        """Put the text back that is edited."""
        self._cache_LCW.copy_(self._edit.cache_LCW)

    def splice(self, watch: Stopwatch) -> Tensor:
        """Splice, in place."""
        with watch.stage("splice"):
            return self._edit.splice(self._cache_LCW)

    def trim(self, watch: Stopwatch) -> Tensor:
        """Prefill all behind the prefix."""
        with watch.stage("prefill"):
            return self._edit.trim(self._cache_LCW)


class _Random:
    """Normal values that are the same on every rank."""

    def __init__(self, seed: int, shape: Shape, device: torch.device) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._dtype, self._device = getattr(torch, shape.dtype), device

    def __call__(self, *size: int) -> Tensor:
        values = torch.randn(*size, generator=self._generator)
        return values.to(device=self._device, dtype=self._dtype)


def _difference(result: Tensor, expected: Tensor) -> float:
    difference = (result.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp_min(1e-30))
