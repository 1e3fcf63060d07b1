"""Times what it costs to send rows to cached data, to bring the data here, and to have it here already.

Shapes: R repeats, L layers, P ranks, C tokens of a chunk, T query tokens, W values of a cache entry.

Rank 0 asks; every other rank holds an equal part of the chunk (of an expert, the last rank holds all).

    for round in warm-up + repeats:              # slow drift of the machine hits all cases alike
      for point in plan:
        for option in turns (route, fetch, local): # each first in every second round
          barrier
          start ------------------------------------------------------------------------+
          route: L times: request with the rows -> attend at the holders -> partials back |
                 -> merge with what rank 0 holds itself                                   |  timed on
          fetch: one request -> entries of all layers back -> turn to their new position  |  rank 0
                 -> L times attend here, merge                                            |
          local: what an expert costs whose weights are here                              |
          end ----------------------------------------------------------------------------+
          compare the result with full attention, or with the expert, on one rank    not timed

Parts that compute are timed on their own where they run; what is left of the total is transfer, with whatever
a holder needs to notice a request. Requests and answers are exchanges of the transport, of flat bytes.
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
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
from observatory.collectives.transport.base import agree
from observatory.errors import ExchangeError
from observatory.run.documents.route_fetch import (
    INDEX_BYTES,
    STATISTICS_BYTES,
    Option,
    Point,
    RouteFetchCase,
    RouteFetchPlan,
    RouteFetchResult,
    Shape,
    Stage,
)
from observatory.run.manifest import CoreSpec
from observatory.run.usable_cores import find_cores

if TYPE_CHECKING:
    from observatory.collectives.transport.protocol import Transport

#: Root of x^3 = x + 1.
_PLASTIC = 1.324717957244746
#: How far further on the chunk stands for rank 0 than where its holders cached it.
_SHIFT = 1000
#: Tokens that rank 0 holds itself, whose partial result is merged.
_OWN_TOKENS = 16
#: Rows of query tokens whose result is compared with full attention in every repeat.
_CHECKED_TOKENS = 8
_TOLERANCE = {"float32": 2e-4, "bfloat16": 5e-2, "float16": 1e-2}


def route_fetch_plan(
    shapes: Sequence[Shape],
    *,
    points: int = 64,
    rows: tuple[int, int],
    sizes: tuple[int, int],
    layers: Sequence[int],
    warmup: int,
    repeats: int,
    seed: int = 0,
    device: str = "cpu",
) -> RouteFetchPlan:
    """Points that fill a logarithmic rectangle evenly, for each shape.

    Args:
        shapes: what to measure.
        points: of each shape.
        rows: fewest and most query rows, or tokens of an expert; rounded to whole tokens.
        sizes: fewest and most tokens of a chunk, or inner width of an expert.
        layers: numbers of layers, dealt out in turns; experts have one.
        warmup: rounds that are not kept.
        repeats: rounds that are kept.
        seed: of points and data.
        device: torch device that computes.
    """
    offset_2 = np.random.default_rng(seed).random(2)
    # Additive recurrence with the plastic number: evenly spread in every prefix.
    place_N2 = (offset_2 + np.arange(1, points + 1)[:, None] / _PLASTIC ** np.array([1, 2])) % 1.0

    def at(share: float, ends: tuple[int, int]) -> int:
        return round(float(ends[0] * (ends[1] / ends[0]) ** share))

    return RouteFetchPlan(
        shapes=tuple(shapes),
        points=tuple(
            tuple(
                Point(
                    rows=max(1, round(at(row, rows) / shape.heads)) * shape.heads,
                    size=at(size, sizes),
                    layers=1 if shape.kind == "expert" else layers[index % len(layers)],
                )
                for index, (row, size) in enumerate(place_N2.tolist())
            )
            for shape in shapes
        ),
        warmup=warmup,
        repeats=repeats,
        seed=seed,
        device=device,
    )


def run_route_fetch(
    transport: Transport, plan: RouteFetchPlan, *, barrier_timeout_s: float = 60.0
) -> RouteFetchResult | None:
    """Run a plan on all ranks together.

    Args:
        transport: the joined ranks, two or more.
        plan: the same on every rank.
        barrier_timeout_s: how long ranks wait for each other.

    Returns:
        The result on rank 0, None on the others.

    Raises:
        ExchangeError: fewer than two ranks, a chunk with fewer tokens than holders, different plans, or an
            exchange failed.
    """
    if transport.size < 2:
        raise ExchangeError("one rank has nowhere to send rows; start two or more")
    smallest = min(point.size for points in plan.points for point in points)
    if smallest < transport.size - 1:
        raise ExchangeError(
            f"a chunk of {smallest} tokens cannot be held by {transport.size - 1} ranks",
            expected="a token for each",
        )
    if plan.device not in ("cpu", "cuda") or (plan.device == "cuda" and not torch.cuda.is_available()):
        raise ExchangeError(
            f"device {plan.device!r} is not available here", expected="cpu, or cuda with a GPU"
        )
    text = plan.model_dump_json(exclude={"argv"})
    agree(transport, {"plan": hashlib.sha256(text.encode()).hexdigest()})
    cases = [
        case for index, points in enumerate(plan.points) for case in _cases(transport, plan, index, points)
    ]
    for repeat in range(-plan.warmup, plan.repeats):
        for options in cases:
            for case in options if repeat % 2 else options[::-1]:
                transport.barrier(barrier_timeout_s)
                case.run(keep=repeat >= 0)
    flat = [case for options in cases for case in options]
    everyone = transport.gather_json(
        [[case.stage_us_R for case in flat], find_cores().model_dump(exclude={"threads"})]
    )
    return None if everyone is None else _result(transport, plan, flat, everyone)


@dataclass(slots=True)
class _Stopwatch:
    """Times of the stages of one run on this rank, nanoseconds."""

    device: torch.device
    stage_ns: dict[Stage, int] = field(default_factory=lambda: defaultdict(int))

    def now_ns(self) -> int:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic_ns()

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        start_ns = self.now_ns()
        yield
        self.stage_ns[name] += self.now_ns() - start_ns


#: Runs an option on this rank; rank 0 returns its result.
Body = Callable[[_Stopwatch], Tensor | None]
#: Largest difference of a result from the expected one, relative to the largest value.
Check = Callable[[Tensor], float]


class _Case:
    """One option at one point on this rank."""

    def __init__(
        self, transport: Transport, shape: int, point: Point, option: Option, body: Body, check: Check,
        *, device: torch.device, tolerance: float,
    ) -> None:  # fmt: skip
        self.shape, self.point, self.option = shape, point, option
        self.total_us_R: list[float] = []
        self.stage_us_R: list[dict[str, float]] = []
        self.worst_error = 0.0
        self.tolerance = tolerance
        self._rank, self._device, self._body, self._check = transport.rank, device, body, check

    def run(self, *, keep: bool) -> None:
        """Once, after a barrier."""
        watch = _Stopwatch(self._device)
        start_ns = watch.now_ns()
        result = self._body(watch)
        total_ns = watch.now_ns() - start_ns
        if result is not None:
            error = self._check(result)
            self.worst_error = max(self.worst_error, error if error == error else float("inf"))  # noqa: PLR0124
        if keep:
            self.total_us_R.append(max(total_ns, 1) / 1e3)
            self.stage_us_R.append({name: ns / 1e3 for name, ns in watch.stage_ns.items()})

    @property
    def correct(self) -> bool:
        """Whether every result was right, as rank 0 saw it."""
        return self.worst_error <= self.tolerance


def _cases(
    transport: Transport, plan: RouteFetchPlan, index: int, points: Sequence[Point]
) -> Iterator[list[_Case]]:
    shape, device = plan.shapes[index], torch.device(plan.device)
    source = _Attention if shape.kind != "expert" else _Expert
    data = source(transport, shape, points, seed=plan.seed + index, device=device)
    for point in points:
        bodies, check = data.bodies(point)
        yield [
            _Case(
                transport, index, point, option, body, check, device=device, tolerance=_TOLERANCE[shape.dtype]
            )
            for option, body in bodies.items()
        ]


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


class _Attention:
    """Attention over a chunk that the other ranks hold in equal parts."""

    def __init__(
        self, transport: Transport, shape: Shape, points: Sequence[Point], *, seed: int, device: torch.device
    ) -> None:
        self.shape, self.device, self.rank = shape, device, transport.rank
        self.holders = transport.size - 1
        self.wire = _Wire(transport, device)
        draw = _Random(seed, shape, device)
        layers = max(point.layers for point in points)
        chunk, tokens = max(point.size for point in points), max(p.rows for p in points) // shape.heads
        entries_LCW = draw(layers, chunk, shape.entry)
        self.cached_LCW, self.wanted_LCW = entries_LCW.clone(), entries_LCW
        own_LCW, query_LTHD = (
            draw(layers, _OWN_TOKENS, shape.entry),
            draw(layers, tokens, shape.heads, shape.key),
        )
        after = _SHIFT + chunk
        positions = torch.arange(chunk + _OWN_TOKENS + tokens, device=device)
        for layer in range(layers):
            turn_entries(self.cached_LCW[layer], positions[:chunk], shape)
            turn_entries(self.wanted_LCW[layer], _SHIFT + positions[:chunk], shape)
            turn_entries(own_LCW[layer], after + positions[:_OWN_TOKENS], shape)
            at = after + _OWN_TOKENS + positions[:tokens]
            query_LTHD[layer] = turn_queries(query_LTHD[layer], at[:, None], shape)
        self.own_LCW, self.query_LTHD = own_LCW, query_LTHD
        self.order_C = torch.randperm(chunk, generator=torch.Generator().manual_seed(seed)).to(device)

    def bodies(self, point: Point) -> tuple[dict[Option, Body], Check]:
        """What this rank does for each option, and the check of what comes out on rank 0."""
        tokens = point.rows // self.shape.heads
        spans = _spans(point.size, self.holders)
        index_KN = [self._selection(stop - start) for start, stop in spans]
        request = self._request(point, tokens, spans, index_KN)
        return (
            {"route": request.route, "fetch": request.fetch},
            lambda result: self._error(result, point, tokens, spans, index_KN),
        )

    def _selection(self, held: int) -> Tensor | None:
        """Entries that are attended to among those of one holder; None for all."""
        if self.shape.selected is None:
            return None
        wanted = min(held, -(-self.shape.selected // self.holders))
        return self.order_C[self.order_C < held][:wanted].contiguous()

    def _request(
        self, point: Point, tokens: int, spans: Sequence[tuple[int, int]], index_KN: Sequence[Tensor | None]
    ) -> _Request:
        own: list[Partial] = []
        if self.rank == 0:
            own = [
                attend(self.query_LTHD[layer, :tokens], self.own_LCW[layer], self.shape)
                for layer in range(point.layers)
            ]
        return _Request(self, point, tokens, spans, index_KN, own)

    def _error(
        self, result_LGNV: Tensor, point: Point, tokens: int, spans: Sequence[tuple[int, int]],
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
            entries_CW = torch.cat([*parts, self.own_LCW[layer]])
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

    data: _Attention
    point: Point
    tokens: int
    spans: Sequence[tuple[int, int]]
    index_KN: Sequence[Tensor | None]
    own_L: list[Partial]

    def route(self, watch: _Stopwatch) -> Tensor | None:
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
                    result.append(merge([self.own_L[layer], *parts]))
        return torch.stack(result) if rank == 0 else None

    def fetch(self, watch: _Stopwatch) -> Tensor | None:
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
        result = []
        for layer in range(layers):
            with watch.stage("attend"):
                query_THD = self.data.query_LTHD[layer, : self.tokens]
                attended = [attend(query_THD, part[layer], shape) for part in parts]
            with watch.stage("merge"):
                result.append(merge([self.own_L[layer], *attended]))
        return torch.stack(result)

    def _index_bytes(self, holder: int) -> int:
        index = self.index_KN[holder]
        return 0 if index is None else INDEX_BYTES * len(index)

    def _attend_here(self, layer: int, received: Tensor, watch: _Stopwatch) -> list[Tensor]:
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


class _Expert:
    """A gated expert whose weights the last rank holds."""

    def __init__(
        self, transport: Transport, shape: Shape, points: Sequence[Point], *, seed: int, device: torch.device
    ) -> None:
        self.shape, self.device, self.rank, self.ranks = shape, device, transport.rank, transport.size
        self.wire = _Wire(transport, device)
        draw = _Random(seed, shape, device)
        self.weight_F3H = draw(max(point.size for point in points), 3, shape.key) * shape.key**-0.5
        self.token_TH = draw(max(point.rows for point in points), shape.key)

    def bodies(self, point: Point) -> tuple[dict[Option, Body], Check]:
        """What this rank does for each option, and the check of what comes out on rank 0."""
        token_TH, weight_F3H = self.token_TH[: point.rows], self.weight_F3H[: point.size]
        width = self.shape.key * self.shape.element_bytes
        rows_P = [*([0] * (self.ranks - 1)), point.rows * width]
        weights_P = [*([0] * (self.ranks - 1)), 3 * point.size * width]
        request_P = [*([0] * (self.ranks - 1)), INDEX_BYTES]
        holds, asks = self.rank == self.ranks - 1, self.rank == 0

        def applied(token_TH: Tensor, weight_F3H: Tensor, watch: _Stopwatch) -> Tensor:
            with watch.stage("experts"):
                return _gated(token_TH, weight_F3H)

        def route(watch: _Stopwatch) -> Tensor | None:
            received = self.wire.to_holders([token_TH] if asks else None, rows_P)
            answer = []
            if holds:
                rows = received.view(token_TH.dtype).view(point.rows, -1)
                answer = [applied(rows, weight_F3H, watch)]
            returned = self.wire.to_rank_0(answer, rows_P)
            return returned.view(token_TH.dtype).view(point.rows, -1) if asks else None

        def fetch(watch: _Stopwatch) -> Tensor | None:
            request = torch.zeros(1, dtype=torch.int64, device=self.device)
            self.wire.to_holders([request] if asks else None, request_P)
            returned = self.wire.to_rank_0([weight_F3H] if holds else [], weights_P)
            if not asks:
                return None
            return applied(token_TH, returned.view(token_TH.dtype).view(point.size, 3, -1), watch)

        def local(watch: _Stopwatch) -> Tensor | None:
            return applied(token_TH, weight_F3H, watch) if asks else None

        expected = _gated(token_TH, weight_F3H) if asks else token_TH
        return (
            {"route": route, "fetch": fetch, "local": local},
            lambda result: _difference(result, expected),
        )


def _gated(token_TH: Tensor, weight_F3H: Tensor) -> Tensor:
    """down(silu(gate x) * up x); rows of ``weight_F3H`` are gate, up and the transposed down."""
    gate_FH, up_FH, down_FH = weight_F3H.unbind(1)
    return (functional.silu(token_TH @ gate_FH.T) * (token_TH @ up_FH.T)) @ down_FH


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


def _result(
    transport: Transport,
    plan: RouteFetchPlan,
    cases: Sequence[_Case],
    everyone: list[tuple[list[list[dict[Stage, float]]], dict[str, Any]]],
) -> RouteFetchResult:
    from observatory.host.provenance import collect_provenance

    origin = collect_provenance()

    def stages(index: int) -> dict[Stage, tuple[float, ...]]:
        """The longest of any rank: holders work at the same time, and rank 0 alone does the rest."""
        runs_PR = [stage_us_CR[index] for stage_us_CR, _ in everyone]
        names = list(dict.fromkeys(name for runs_R in runs_PR for run in runs_R for name in run))
        return {
            name: tuple(max(run.get(name, 0.0) for run in runs_P) for runs_P in zip(*runs_PR, strict=True))
            for name in names
        }

    return RouteFetchResult(
        created_unix_s=time.time(),
        argv=plan.argv,
        backend=transport.backend,
        device=plan.device,
        node_of_P=transport.node_of_P,
        warmup=plan.warmup,
        repeats=plan.repeats,
        shapes=plan.shapes,
        cases=tuple(
            RouteFetchCase(
                **case.point.model_dump(),
                shape=case.shape,
                option=case.option,
                total_us_R=tuple(case.total_us_R),
                stage_us_R=stages(index),
                correct=case.correct,
                worst_error=min(case.worst_error, 1e30),
            )
            for index, case in enumerate(cases)
        ),
        git_sha=origin["git_sha"],
        hosts=origin["hosts"],
        software=origin["software"],
        cores_P=tuple(CoreSpec.model_validate(cores) for _, cores in everyone),
        notes=plan.notes,
    )
