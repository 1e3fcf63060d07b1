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
          local: prefill of the chunk, then as fetch; of an expert, its weights are here  |
          (edits of a cache: splice, trim; see `observatory.collectives.bench.decoder`)  |
          end ----------------------------------------------------------------------------+
          compare the result with full attention, or with the expert, on one rank    not timed

Parts that compute are timed on their own where they run; what is left of the total is transfer, with whatever
a holder needs to notice a request. Requests and answers are exchanges of the transport, of flat bytes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from observatory.collectives.bench.route_fetch_cases import (
    CachedAttention,
    CacheEdits,
    RemoteExpert,
    Stopwatch,
    Work,
)
from observatory.collectives.transport.base import agree
from observatory.errors import ExchangeError
from observatory.run.documents.route_fetch import (
    RouteFetchCase,
    RouteFetchPlan,
    RouteFetchResult,
    Stage,
)
from observatory.run.manifest import CoreSpec
from observatory.run.usable_cores import find_cores

if TYPE_CHECKING:
    from observatory.collectives.transport.protocol import Transport

_TOLERANCE = {"float32": 2e-4, "bfloat16": 5e-2, "float16": 1e-2}


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
    if plan.device == "cuda" and not torch.cuda.is_available():
        raise ExchangeError("device 'cuda' needs a GPU that torch can use, which is not here; give cpu")
    text = plan.model_dump_json(exclude={"argv"})
    agree(transport, {"plan": hashlib.sha256(text.encode()).hexdigest()})
    cases = [case for index in range(len(plan.shapes)) for case in _cases(transport, plan, index)]
    for repeat in range(-plan.warmup, plan.repeats):
        for options in cases:
            for case in options if repeat % 2 else options[::-1]:
                case.work.prepare()
                transport.barrier(barrier_timeout_s)
                case.run(keep=repeat >= 0)
    flat = [case for options in cases for case in options]
    everyone = transport.gather_json(
        [[case.stage_us_R for case in flat], find_cores().model_dump(exclude={"threads"})]
    )
    return None if everyone is None else _result(transport, plan, flat, everyone)


class _Case:
    """One option at one point on this rank."""

    def __init__(self, shape: int, work: Work, *, device: torch.device, tolerance: float) -> None:
        self.shape, self.work = shape, work
        self.total_us_R: list[float] = []
        self.stage_us_R: list[dict[str, float]] = []
        self.worst_error = 0.0
        self._device, self._tolerance = device, tolerance

    def run(self, *, keep: bool) -> None:
        """Once, after a barrier."""
        watch = Stopwatch(self._device)
        start_ns = watch.now_ns()
        result = self.work.body(watch)
        total_ns = watch.now_ns() - start_ns
        if result is not None:
            error = self.work.check(result)
            self.worst_error = max(self.worst_error, error if error >= 0 else float("inf"))  # NaN is wrong
        if keep:
            self.total_us_R.append(max(total_ns, 1) / 1e3)
            self.stage_us_R.append({name: ns / 1e3 for name, ns in watch.stage_ns.items()})

    @property
    def correct(self) -> bool:
        """Whether every result was right, as rank 0 saw it."""
        return self.worst_error <= self._tolerance


def _cases(transport: Transport, plan: RouteFetchPlan, index: int) -> Iterator[list[_Case]]:
    """The options of each point of a shape."""
    shape, device, seed = plan.shapes[index], torch.device(plan.device), plan.seed + index
    source = RemoteExpert if shape.kind == "expert" else CachedAttention
    works = list(source(transport, shape, plan.points[index], seed=seed, device=device).works())
    if plan.edits and plan.edits[index]:
        works += CacheEdits(transport.rank, shape, plan.edits[index], seed=seed, device=device).works()
    for options in works:
        yield [_Case(index, work, device=device, tolerance=_TOLERANCE[shape.dtype]) for work in options]


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
                **case.work.point.model_dump(),
                shape=case.shape,
                option=case.work.option,
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
