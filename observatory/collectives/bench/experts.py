"""Times the experts that one rank holds, over assignments and activated experts.

Shapes: N rows (assignments), H hidden size, A activated experts.

What is timed is the ``experts`` phase of the dispatchers (`observatory.collectives.dispatch.base`) around a
module with the local experts of a layer: the code that an expert-parallel run spends its ``experts`` spans
in. Protocol:

    for round in warm-up + repeats:
      for (assignments, activated) of the grid, in an order of this round:    # drift hits all points alike
        draw which experts are activated, and the rows of each                          not timed
        synchronise the device
        start = monotonic clock ------------------------------+
        experts phase                                         |  timed
        synchronise the device                                |
        end = monotonic clock --------------------------------+
        keep the raw time, unless it is a warm-up

Every activated expert has a row; the others are drawn with shares at random, as real loads are uneven. Rows
are sorted by expert, as they arrive from one source rank.

In the same rounds the whole layer is called as a single expert-parallel rank, on numbers of tokens. What is
left of its time without the experts, routed and shared, is what a rank does alone: the router, sorting and
packing rows, adding up outputs. A copy of the rows stands in it where they would be exchanged.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from observatory.analysis.experts.cost import FEWEST_POINTS
from observatory.collectives.autograd import Exchanger
from observatory.collectives.dispatch import ExpertMap, LocalExperts, make_dispatcher
from observatory.collectives.expert_parallel import local_experts, shard_layer
from observatory.collectives.transport.base import AloneTransport
from observatory.errors import BenchmarkError
from observatory.probes.exchange.labels import NullSink
from observatory.probes.routing.sites import RoutingSite
from observatory.run.documents.expert_bench import ExpertPoint, ExpertShape, TokensPoint

_SHARED_NAMES = ("shared_experts", "shared_expert", "shared_mlp")
#: Of the shares of activated experts: their loads differ by half of the mean.
_CONCENTRATION = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertGrid:
    """What is timed.

    Attributes:
        assignments: numbers of rows; 0 times a call without any.
        activated: numbers of experts with at least one row.
        warmup: rounds that are not kept.
        repeats: rounds that are kept.
        seed: of orders and splits.
    """

    assignments: tuple[int, ...]
    activated: tuple[int, ...]
    warmup: int
    repeats: int
    seed: int = 0

    def points(self, experts: int) -> list[tuple[int, int]]:
        """Assignments and activated experts of every point that so many experts allow.

        Raises:
            BenchmarkError: they are too few to fit a cost to.
        """
        pairs = [(rows, each) for rows in self.assignments for each in self.activated]
        fitting = [(rows, each) for rows, each in pairs if 1 <= each <= min(rows, experts)]
        points = list(dict.fromkeys(fitting))
        if len(points) < FEWEST_POINTS:
            raise BenchmarkError(
                f"{len(points)} points fit: assignments are at least the activated experts, of {experts}",
                expected=f"at least {FEWEST_POINTS}",
                remedy="give more --assignments, or more --activated",
            )
        return [*([(0, 0)] if 0 in self.assignments else []), *points]


def shape_of(site: RoutingSite) -> ExpertShape:
    """The experts of a layer, from their weights.

    Raises:
        BenchmarkError: the weights of the experts are not stacked in one module.
    """
    experts = site.spec.experts
    stacks = [p for _, p in site.module.named_parameters(recurse=False) if p.shape[:1] == (experts,)]
    matrices = [p for p in stacks if p.ndim == 3]
    if len(matrices) < 2:
        raise BenchmarkError(
            f"{site.spec.module} ({type(site.module).__name__}) has no stacked weights of {experts} experts",
            remedy="give the shape of its experts with --shape",
        )
    common = set.intersection(*(set(p.shape[1:]) for p in matrices))
    if len(common) != 1:  # without a gate both matrices have both sizes: the first is the way in
        transposed = bool(getattr(site.module, "is_transposed", False))
        common = {matrices[0].shape[1 if transposed else 2]}
    hidden = common.pop()
    return ExpertShape(
        hidden=hidden,
        # The way in may have gate and value in one matrix, twice as wide.
        intermediate=min(min(set(p.shape[1:]) - {hidden}, default=hidden) for p in matrices),
        experts=experts,
        top_k=site.spec.top_k,
        dtype=str(matrices[0].dtype).removeprefix("torch."),
        expert_bytes=sum(p.numel() * p.element_size() for p in stacks) // experts,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedLayer:
    """Times of a layer, as in `observatory.run.documents.expert_bench.ExpertBench`."""

    points: tuple[ExpertPoint, ...]
    shared_points: tuple[TokensPoint, ...]
    local_points: tuple[TokensPoint, ...]
    notes: tuple[str, ...]


def time_experts(
    site: RoutingSite,
    grid: ExpertGrid,
    *,
    experts_here: int,
    clock_ns: Callable[[], int] = time.monotonic_ns,
    progress: Callable[[int, int], None] | None = None,
) -> TimedLayer:
    """Time the first experts of a layer, and the rest of the layer around them.

    Args:
        site: the layer.
        grid: what is timed.
        experts_here: experts that the rank holds.
        clock_ns: monotonic clock.
        progress: takes rounds done and rounds in all.

    Raises:
        ModelError: the experts cannot be made expert-parallel.
        BenchmarkError: too few points fit.
    """
    points = grid.points(experts_here)
    shape = shape_of(site)
    local = local_experts(site, range(experts_here))
    weight = next(local.parameters())
    run = _experts_phase(local, experts_here)
    generator = np.random.default_rng(grid.seed)
    torch.manual_seed(grid.seed)
    hidden_NH = torch.randn(max(rows for rows, _ in points), shape.hidden, dtype=weight.dtype)
    hidden_NH = hidden_NH.to(weight.device)
    around = _Around(site, clock_ns)
    tokens = tuple(dict.fromkeys(rows // (shape.top_k or 1) for rows in grid.assignments))
    layers = [(count, None) for count in tokens if count and around.problem(hidden_NH[:1]) is None]
    calls: list[tuple[int, int | None]] = [*points, *layers]
    us_of: dict[tuple[int, int | None], list[float]] = {point: [] for point in points}
    for repeat in range(-grid.warmup, grid.repeats):
        for index in generator.permutation(len(calls)):
            rows, activated = calls[index]
            if activated is None:
                around.call(hidden_NH[:rows], keep=repeat >= 0)
                continue
            slots_N1 = torch.from_numpy(_slots(rows, activated, experts_here, generator)).unsqueeze(1)
            gates_N1 = torch.full((rows, 1), 0.5, dtype=weight.dtype, device=weight.device)
            call = partial(run, hidden_NH[:rows], slots_N1.to(weight.device), gates_N1)
            us = _timed_us(call, weight.device, clock_ns)
            if repeat >= 0:
                us_of[rows, activated].append(us)
        if progress is not None:
            progress(repeat + grid.warmup + 1, grid.warmup + grid.repeats)
    problem = around.problem(hidden_NH[:1])
    return TimedLayer(
        points=tuple(
            ExpertPoint(assignments=rows, activated=each, us_R=tuple(us_of[rows, each]))
            for rows, each in points
        ),
        shared_points=around.points("shared"),
        local_points=around.points("local"),
        notes=() if problem is None else (problem,),
    )


class _Around(NullSink):
    """The whole layer as one expert-parallel rank runs it, with its parts timed apart."""

    def __init__(self, site: RoutingSite, clock_ns: Callable[[], int]) -> None:
        self._site, self._clock_ns = site, clock_ns
        self._us: dict[str, dict[int, list[float]]] = {"shared": {}, "local": {}}
        self._inside_us: dict[str, float] = {}
        self._problem: str | None = None
        self._is_tried = False
        exchanger = Exchanger(AloneTransport(), self)
        self._layer = shard_layer(site, exchanger, [(0,)] * site.spec.experts)
        self._shared = _shared_module(site)

    def problem(self, hidden_1H: torch.Tensor) -> str | None:
        """Why the layer cannot be called alone; None when it can."""
        if not self._is_tried:
            self._is_tried = True
            try:
                self.call(hidden_1H, keep=False)
            except Exception as error:  # a model may do anything; what it did is reported
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                self._problem = f"the layer could not be called alone ({reason}): experts alone were timed"
        return self._problem

    def call(self, hidden_TH: torch.Tensor, *, keep: bool) -> None:
        """Time one call of the layer and of its parts."""
        if self._site.block is None:
            raise BenchmarkError(f"the block around {self._site.spec.module} is not known")
        self._inside_us.clear()
        timed_shared = partial(self._timed, "shared")
        self._layer.attach(keep_full=True)
        try:
            with _replaced_forward(self._shared, timed_shared):
                whole_us = self._timed_us(partial(self._site.block, hidden_TH.unsqueeze(0)))
        finally:
            self._layer.detach()
        if not keep:
            return
        tokens, shared_us = len(hidden_TH), self._inside_us.get("shared", 0.0)
        local_us = max(whole_us - self._inside_us.get("experts", 0.0) - shared_us, 1e-3)
        self._us["local"].setdefault(tokens, []).append(local_us)
        if self._shared is not None:
            self._us["shared"].setdefault(tokens, []).append(max(shared_us, 1e-3))

    def points(self, part: str) -> tuple[TokensPoint, ...]:
        """Times of a part."""
        return tuple(TokensPoint(tokens=tokens, us_R=tuple(us)) for tokens, us in self._us[part].items())

    @contextlib.contextmanager
    def span(self, name: str, layer: int | None) -> Iterator[None]:  # noqa: ARG002
        """Keep the time of one phase, its work on the device done."""
        start_ns = self._now_ns()
        yield
        self._add(name, start_ns)

    def _timed(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start_ns = self._now_ns()
        result = forward(*args, **kwargs)
        self._add(name, start_ns)
        return result

    def _add(self, name: str, start_ns: int) -> None:
        us = (self._now_ns() - start_ns) * 1e-3
        self._inside_us[name] = self._inside_us.get(name, 0.0) + us

    def _timed_us(self, call: Callable[[], Any]) -> float:
        return _timed_us(call, next(self._layer.local.parameters()).device, self._clock_ns)

    def _now_ns(self) -> int:
        device = next(self._layer.local.parameters()).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return self._clock_ns()


@contextlib.contextmanager
def _replaced_forward(module: nn.Module | None, around: Callable[..., Any]) -> Iterator[None]:
    """Call a module's forward through a function while the block lasts."""
    if module is None:
        yield
        return
    module.forward = partial(around, module.forward)
    try:
        yield
    finally:
        del module.forward


def _experts_phase(local: nn.Module, experts: int) -> Callable[..., torch.Tensor]:
    """The phase as a dispatcher of a single rank runs it."""
    transport = AloneTransport()
    dispatcher = make_dispatcher(
        "flat",
        Exchanger(transport),
        ExpertMap([(0,)] * experts, transport.layout),
        LocalExperts(run=local, parameters=tuple(local.parameters())),
    )
    return dispatcher.experts


def _timed_us(call: Callable[[], Any], device: torch.device, clock_ns: Callable[[], int]) -> float:
    """Microseconds of a call, all its work on the device done."""
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.synchronize(device)
    start_ns = clock_ns()
    call()
    if is_cuda:
        torch.cuda.synchronize(device)
    return max(clock_ns() - start_ns, 1) * 1e-3


def _slots(rows: int, activated: int, experts: int, generator: np.random.Generator) -> np.ndarray[Any, Any]:
    """Expert of each row, ascending: so many experts drawn at random, each with at least one row."""
    if not rows:
        return np.zeros(0, dtype=np.int64)
    share_A = generator.dirichlet(np.full(activated, _CONCENTRATION))
    rows_A = 1 + generator.multinomial(rows - activated, share_A)
    chosen_A = np.sort(generator.choice(experts, activated, replace=False))
    return np.repeat(chosen_A, rows_A).astype(np.int64)


def _shared_module(site: RoutingSite) -> nn.Module | None:
    """The shared experts next to the routed ones; None where there are none under the usual names."""
    if site.block is None or not site.spec.shared_experts:
        return None
    named = dict(site.block.named_children())
    return next((named[name] for name in _SHARED_NAMES if name in named), None)
