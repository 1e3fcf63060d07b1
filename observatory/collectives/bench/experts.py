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
are sorted by expert, as they arrive from one source rank. The shared experts of the layer are timed alone in
the same rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from observatory.analysis.experts.cost import FEWEST_POINTS
from observatory.collectives.autograd import Exchanger
from observatory.collectives.dispatch import ExpertMap, LocalExperts, make_dispatcher
from observatory.collectives.expert_parallel import local_experts
from observatory.collectives.transport.base import AloneTransport
from observatory.errors import BenchmarkError
from observatory.probes.routing.sites import RoutingSite
from observatory.run.documents.expert_bench import ExpertPoint, ExpertShape, SharedPoint

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


def time_experts(
    site: RoutingSite,
    grid: ExpertGrid,
    *,
    experts_here: int,
    clock_ns: Callable[[], int] = time.monotonic_ns,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[tuple[ExpertPoint, ...], tuple[SharedPoint, ...]]:
    """Time the first experts of a layer, and its shared experts where it has any.

    Args:
        site: the layer.
        grid: what is timed.
        experts_here: experts that the rank holds.
        clock_ns: monotonic clock.
        progress: takes rounds done and rounds in all.

    Raises:
        ModelError: the experts cannot be made expert-parallel.
        BenchmarkError: no point fits.
    """
    points = grid.points(experts_here)
    local = local_experts(site, range(experts_here))
    weight = next(local.parameters())
    run = _experts_phase(local, experts_here)
    shared = _shared_module(site)
    most = max(rows for rows, _ in points)
    tokens = [rows for rows in grid.assignments if rows] if shared is not None else []
    generator = np.random.default_rng(grid.seed)
    torch.manual_seed(grid.seed)
    hidden_NH = torch.randn(max([most, *tokens]), shape_of(site).hidden, dtype=weight.dtype)
    hidden_NH = hidden_NH.to(weight.device)
    calls: dict[tuple[str, int, int], list[float]] = {("experts", *point): [] for point in points}
    calls |= {("shared", rows, 0): [] for rows in tokens}
    for repeat in range(-grid.warmup, grid.repeats):
        for index in generator.permutation(len(calls)):
            kind, rows, activated = list(calls)[index]
            call: Callable[[], Any]
            if kind == "shared":
                assert shared is not None
                call = _bound(shared, hidden_NH[:rows])
            else:
                slots = _slots(rows, activated, experts_here, generator)
                slots_N1 = torch.from_numpy(slots).to(weight.device).unsqueeze(1)
                gates_N1 = torch.full((rows, 1), 0.5, dtype=weight.dtype, device=weight.device)
                call = _bound(run, hidden_NH[:rows], slots_N1, gates_N1)
            us = _timed_us(call, weight.device, clock_ns)
            if repeat >= 0:
                calls[kind, rows, activated].append(us)
        if progress is not None:
            progress(repeat + grid.warmup + 1, grid.warmup + grid.repeats)
    return (
        tuple(
            ExpertPoint(assignments=rows, activated=each, us_R=tuple(calls["experts", rows, each]))
            for rows, each in points
        ),
        tuple(SharedPoint(tokens=rows, us_R=tuple(calls["shared", rows, 0])) for rows in tokens),
    )


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


def _bound(call: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: call(*arguments)


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
