"""What three gloo ranks do, case by case, for test_exchange_ranks.py; run as a program of its own.

Every case writes one run named after it. What only the program itself can see (its own results, its own
errors) is put into ``facts-<rank>.json`` and checked by the tests.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.distributed import all_to_all_single as imported_before_the_watch
from torch.distributed.nn.functional import all_to_all_single as old_autograd_wrapper

from observatory.probes.exchange.labels import ExchangeRecord, Label, labelled
from observatory.probes.exchange.tap import is_tapped
from observatory.probes.routing.adapters import Adapter
from observatory.probes.routing.sites import RoutingDecision
from tests.probes.expert_parallel import (
    ParallelModel,
    functional_collective,
    plain,
    tokens,
)
from tests.probes.rank_cases import Case, Rank, run_cases

WORLD = 3
#: Rows from rank i to rank j.
UNEVEN = [[1, 2, 3], [0, 4, 1], [5, 0, 2]]
ONE_SIDED = [[0, 0, 7], [0, 0, 0], [0, 0, 0]]
EMPTY = [[0, 0, 0]] * 3

CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def rows(me: Rank, columns: int = 2, dtype: torch.dtype = torch.float32, count: int = 6) -> torch.Tensor:
    """This rank's own rows."""
    values = torch.arange(count * columns).reshape(count, columns) + 100 * me.rank
    return values.to(dtype)


def exchange(rank: int, matrix: list[list[int]], given: torch.Tensor, **options: Any) -> torch.Tensor:
    sends, receives = matrix[rank], [row[rank] for row in matrix]
    out = given.new_zeros((sum(receives), *given.shape[1:]))
    work = dist.all_to_all_single(out, given[: sum(sends)].contiguous(), receives, sends, **options)
    if work is not None:
        work.wait()
    return out


@case
def splits(me: Rank) -> None:
    """Uneven, one-sided, empty, equal shares; bfloat16, complex, one-dimensional."""
    with me.watch("splits") as watch:
        exchange(me.rank, UNEVEN, rows(me, 2, count=10))
        watch.step()
        exchange(me.rank, ONE_SIDED, rows(me, 5, torch.bfloat16, count=10))
        watch.step()
        exchange(me.rank, EMPTY, rows(me))
        watch.step()
        dist.all_to_all_single(torch.empty(6, 2), rows(me))
        watch.step()
        exchange(me.rank, UNEVEN, rows(me, 1, torch.complex64, count=10))
        watch.step()
        dist.all_to_all_single(torch.empty(3, dtype=torch.int64), torch.arange(3))


@case
def ways(me: Rank) -> None:
    """Every way to start an all-to-all, one a step."""
    given, out = rows(me), torch.empty(6, 2)
    wrapped = rows(me).requires_grad_()
    shares = [2, 2, 2]
    world = dist.group.WORLD
    with me.watch("ways") as watch, torch.no_grad():
        for start in (
            lambda: dist.all_to_all_single(out, given),
            lambda: dist.distributed_c10d.all_to_all_single(out, given),
            lambda: imported_before_the_watch(out, given),
            lambda: old_autograd_wrapper(out, given),
            lambda: functional.wait_tensor(functional.all_to_all_single(given, shares, shares, world)),
            lambda: functional.wait_tensor(
                functional.all_to_all_single_autograd(wrapped, shares, shares, world)
            ),
            lambda: torch.ops._c10d_functional.wait_tensor(
                torch.ops._c10d_functional.all_to_all_single(given, shares, shares, "0")
            ),
            lambda: dist.all_gather_into_tensor(torch.empty(18, 2), given),
            lambda: dist.reduce_scatter_tensor(torch.empty(2, 2), given),
        ):
            start()
            watch.step()


@case
def asynchronous(me: Rank) -> None:
    """A handle is waited for long after its exchange was complete."""
    given, out = rows(me), torch.empty(6, 2)
    unwatched = dist.all_to_all_single(out, given, async_op=True)
    unwatched.wait()
    with me.watch("asynchronous"):
        before_ns = time.monotonic_ns()
        work = dist.all_to_all_single(out, given, async_op=True)
        time.sleep(0.3)
        completed = work.is_completed()
        work.wait()
        me.facts["asynchronous"] = {
            "same type": type(work) is type(unwatched),
            "completed": completed,
            "before_ns": before_ns,
            "waited_ns": time.monotonic_ns(),
        }


@case
def results(me: Rank) -> None:
    """The same training steps without a watch, with one, and without again."""
    found = []
    for number in range(3):
        model = ParallelModel(plain)
        hidden = tokens(0, 5, 2, 2, me.rank)
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
        watching = me.watch("results", model) if number == 1 else contextlib.nullcontext()
        with watching:
            for _ in range(2):
                out = model(hidden)
                out.square().sum().backward()
                optimiser.step()
        found.append((out.detach(), hidden.grad, model.layers[0][0].experts.scale.detach()))
    same = [all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True)) for other in found[1:]]
    me.facts["results"] = {"same": same, "tapped": is_tapped()}


@case
def roles(me: Rank) -> None:
    """Two training steps of a model whose exchanges are autograd functions."""
    model = ParallelModel(plain)
    with me.watch("roles", model) as watch:
        for experts in ((0, 1, 2, 4), (5, 5, 5, me.rank)):
            model(tokens(*experts)).sum().backward()
            watch.step()


@case
def roles_functional(me: Rank) -> None:
    """The same with functional collectives."""
    model = ParallelModel(functional_collective)
    with me.watch("roles_functional", model) as watch:
        model(tokens(0, 1, 2, 4)).sum().backward()
        watch.step()


@case
def recomputed(me: Rank) -> None:
    """Checkpointed layers exchange again during backward."""
    model = ParallelModel(plain, reentrant=False)
    with me.watch("recomputed", model) as watch:
        model(tokens(0, 1, 2, 4)).sum().backward()
        watch.step()


@case
def compiled(me: Rank) -> None:
    """Compiled before the watch, run in it."""
    shares = [2, 2, 2]

    @torch.compile(backend="aot_eager")
    def doubled(given: torch.Tensor) -> torch.Tensor:
        return functional.all_to_all_single(given, shares, shares, dist.group.WORLD) * 2

    plain_result = doubled(rows(me))
    with me.watch("compiled"):
        watched = doubled(rows(me))
    me.facts["compiled"] = torch.equal(plain_result, watched)


@case
def compiled_model(me: Rank) -> None:
    """A model that is compiled with the hooks in it."""
    model = ParallelModel(functional_collective)
    with me.watch("compiled_model", model) as watch:
        torch.compile(model, backend="aot_eager")(tokens(0, 1, 2, 4)).sum().backward()
        watch.step()


class Overlapping(torch.nn.Module):
    """Experts that work on one half of the tokens while the other half travels."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((), 2.0))
        self.ways = [(of[rank], [row[rank] for row in of]) for of in (UNEVEN, UNEVEN[::-1])]

    def forward(self, hidden: torch.Tensor, _expert_T: torch.Tensor) -> torch.Tensor:
        world, halves = dist.group.WORLD, []
        begin = 0
        for sends, receives in self.ways:
            half = hidden[begin : begin + sum(sends)]
            begin += sum(sends)
            halves.append(functional.all_to_all_single_autograd(half, receives, sends, world))
        home = []
        for there, (sends, receives) in zip(halves, self.ways, strict=True):
            worked = functional.wait_tensor(there) * self.scale
            home.append(functional.all_to_all_single_autograd(worked, sends, receives, world))
        return torch.cat([functional.wait_tensor(half) for half in home])


class OverlappingLayer(torch.nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.experts = Overlapping(rank)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.experts(hidden, hidden.detach()[:, 0].abs().long() % 3)
        return out


def overlapping_adapter() -> Adapter:
    return Adapter(
        match=lambda _name, module: isinstance(module, Overlapping),
        read=lambda _module, args, _kwargs, _output: RoutingDecision(
            expert_ids=args[1], tokens=args[1].shape[0]
        ),
        experts=3,
        top_k=1,
        when="before",
    )


def overlap(me: Rank, name: str, **compile_options: Any) -> None:
    """Two training steps; the same without a watch must come out the same."""
    rows = 2 * sum(map(sum, UNEVEN)) // 3 + 6
    results = []
    for watching in (False, True):
        model: torch.nn.Module = torch.nn.Sequential(torch.nn.Sequential(OverlappingLayer(me.rank)))
        hidden = tokens(*range(rows))
        watch: Any = contextlib.nullcontext()
        if watching:
            watch = me.watch(name, model, adapter=overlapping_adapter())
        with watch:
            run = torch.compile(model, **compile_options) if compile_options else model
            for _ in range(2):
                out = run(hidden)
                out.sum().backward()
        results.append((out.detach(), hidden.grad))
    me.facts[name] = [torch.equal(a, b) for a, b in zip(*results, strict=True)]


@case
def overlapped(me: Rank) -> None:
    """Functional collectives, computing while the next one is on its way."""
    overlap(me, "overlapped")


@case
def overlapped_compiled(me: Rank) -> None:
    """The same in one compiled graph."""
    overlap(me, "overlapped_compiled", backend="aot_eager", fullgraph=True)


@case
def outcome(me: Rank) -> None:
    """Phases that the caller says, and roles that the program says."""
    with me.watch("outcome") as watch:
        with watch.phase("decode"):
            dist.all_to_all_single(torch.empty(6, 2), rows(me))
        with labelled(Label(role="combine", layer=7, algorithm="flat", backward=True)):
            dist.all_to_all_single(torch.empty(6, 2), rows(me))
        with watch.exchange_sink.span("pack", 7):
            pass
        watch.exchange_sink.record(
            ExchangeRecord(
                role="dispatch",
                layer=7,
                group="world",
                sequence=0,
                algorithm="flat",
                backend="mpi",
                send_bytes=[1, 2, 3],
                receive_bytes=[3, 2, 1],
                start_ns=1,
                end_ns=5,
            )
        )


@case
def groups(me: Rank) -> None:
    """A group of some ranks, and two groups of the same ranks."""
    outer = dist.new_group([0, 2])
    again = dist.new_group([0, 2])
    with me.watch("groups"):
        if me.rank != 1:
            for group in (outer, again, outer):
                dist.all_to_all_single(torch.empty(4, 2), rows(me, count=4), group=group)
        dist.all_to_all_single(torch.empty(6, 2), rows(me))
    for group in (outer, again):
        dist.destroy_process_group(group)


@case
def threads(me: Rank) -> None:
    """Two threads, each on its own group."""
    pair = [dist.new_group([0, 1, 2]) for _ in range(2)]

    def work(group: dist.ProcessGroup) -> None:
        for _ in range(30):
            dist.all_to_all_single(torch.empty(6, 2), rows(me), group=group)

    with me.watch("threads"):
        started = [threading.Thread(target=work, args=(group,)) for group in pair]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()


@case
def many(me: Rank) -> None:
    """Small exchanges one after the other, all to all."""
    with me.watch("many"):
        for number in range(400):
            dist.all_to_all_single(torch.empty(6, 2), rows(me), async_op=number % 4 == 3)
            dist.all_reduce(torch.zeros(1))


@case
def recorder(me: Rank) -> None:
    """With torch's flight recorder beside the probe; ranks whose groups count differently."""
    pair = dist.new_group([0, 2])
    with me.watch("recorder", flight_recorder=True):
        for number in range(5):
            if me.rank == number % 2:
                dist.send(torch.ones(3), 2)
            if me.rank == 2:
                dist.recv(torch.ones(3), number % 2)
            exchange(me.rank, UNEVEN, rows(me, 2, count=10))
            dist.all_reduce(torch.ones(2))
            if me.rank != 1:
                dist.all_to_all_single(torch.empty(4, 2), rows(me, count=4), group=pair, async_op=True).wait()
        functional.wait_tensor(functional.all_to_all_single(rows(me), [2] * 3, [2] * 3, dist.group.WORLD))
        dist.all_gather_into_tensor(torch.empty(18, 2), rows(me))
        dist.reduce_scatter_tensor(torch.empty(2, 2), rows(me))
        dist.all_to_all([torch.empty(2)] * 3, [torch.empty(2)] * 3)


@case
def nested(me: Rank) -> None:
    """A watch inside a watch."""
    with me.watch("nested_outer"):
        dist.all_to_all_single(torch.empty(6, 2), rows(me))
        with me.watch("nested_inner"):
            dist.all_to_all_single(torch.empty(6, 2), rows(me))
        still = is_tapped()
        dist.all_to_all_single(torch.empty(6, 2), rows(me))
    me.facts["nested"] = {"inside": still, "after": is_tapped()}


@case
def refused(me: Rank) -> None:
    """Calls that torch refuses are refused in the same words, and leave no row."""
    wrong: list[Callable[[], Any]] = [
        lambda: dist.all_to_all_single(torch.empty(6, 2), rows(me), [1, 2, 3], [9, 9, 9]),
        lambda: dist.all_to_all([torch.empty(1)] * 2, [torch.empty(1)] * 3),
    ]

    def said() -> list[str]:
        found = []
        for call in wrong:
            try:
                call()
            except Exception as error:
                found.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")
        return found

    unwatched = said()
    with me.watch("refused"):
        watched = said()
    me.facts["refused"] = [unwatched, watched]


@case
def raised(me: Rank) -> None:
    """The program's own exception ends the watch."""
    model = ParallelModel(plain)
    with contextlib.suppress(ZeroDivisionError), me.watch("raised", model):
        model(tokens(0, 1, 2, 4))
        raise ZeroDivisionError
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    me.facts["raised"] = {"tapped": is_tapped(), "hooks": len(hooks)}


@case
def switched_off(me: Rank) -> None:
    """Without the probe there is nothing of it."""
    with me.watch("switched_off", exchanges=False):
        me.facts["switched_off"] = is_tapped()
        dist.all_to_all_single(torch.empty(6, 2), rows(me))


@case
def killed(me: Rank) -> None:
    """The last case: rank 2 dies while the others are in an exchange with it."""
    error = "none"
    with me.watch("killed", flush_s=0.1):
        dist.all_to_all_single(torch.empty(6, 2), rows(me))
        if me.rank == 2:
            time.sleep(0.5)
            os._exit(9)
        try:
            dist.all_to_all_single(torch.empty(6, 2), rows(me))
        except RuntimeError as caught:
            error = type(caught).__name__
    me.facts["killed"] = error


if __name__ == "__main__":
    run_cases(CASES, world=WORLD, timeout_s=30, last="killed")
