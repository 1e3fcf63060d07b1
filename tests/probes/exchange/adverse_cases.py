"""What four gloo ranks do to mislead the exchange probe; run as a program of its own.

Every case writes one run named after it; what only the program can see is put into ``facts-<rank>.json``.
"""

from __future__ import annotations

import contextlib
import time

import torch
import torch.distributed as dist
from torch import nn

from observatory.probes.exchange.tap import is_tapped
from observatory.probes.routing.adapters import Adapter
from observatory.probes.routing.sites import RoutingDecision
from tests.probes.expert_parallel import ParallelModel, parallel_adapter, plain, tokens
from tests.probes.rank_cases import Case, Rank, run_cases
from tests.probes.tiny import HIDDEN

WORLD = 4

CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def rows(count: int = 8) -> torch.Tensor:
    return torch.arange(2.0 * count).reshape(count, 2)


@case
def subgroups(me: Rank) -> None:
    """Two expert-parallel groups of two, whose gradients are averaged across them."""
    expert = [dist.new_group([0, 1]), dist.new_group([2, 3])][me.rank // 2]
    data = [dist.new_group([0, 2]), dist.new_group([1, 3])][me.rank % 2]
    model = ParallelModel(plain, group=expert)
    with me.watch("subgroups", model, adapter=parallel_adapter(2)) as watch:
        for step in range(2):
            model(tokens(0, 1, me.rank % 4, step)).sum().backward()
            for parameter in model.parameters():
                flat = parameter.grad.reshape(-1).repeat(2)
                dist.reduce_scatter_tensor(torch.empty(1), flat, group=data)
            watch.step()


@case
def interleaved(me: Rank) -> None:
    """Two groups of the same ranks, both in flight at once, waited for in another order."""
    pair = [dist.new_group(list(range(WORLD))) for _ in range(2)]
    with me.watch("interleaved"):
        for count in range(6):
            given = rows(4 * (count + 1))
            handles = [
                dist.all_to_all_single(torch.empty_like(given), given, group=group, async_op=True)
                for group in (pair if (count + me.rank) % 2 else pair[::-1])
            ]
            for handle in handles:
                handle.wait()


@case
def taken_down(me: Rank) -> None:
    """Groups of the same ranks, one after the other."""
    with me.watch("taken_down"):
        for _ in range(3):
            group = dist.new_group(list(range(WORLD)))
            for _ in range(2):
                dist.all_to_all_single(torch.empty(8, 2), rows(), group=group)
            dist.destroy_process_group(group)
            del group


@case
def torn(me: Rank) -> None:
    """An error between dispatch and combine, which the program survives."""

    def failing(
        given: torch.Tensor, receives: list[int], sends: list[int], group: dist.ProcessGroup | None = None
    ) -> torch.Tensor:
        out = plain(given, receives, sends, group)
        if fails.pop():
            raise ZeroDivisionError
        return out

    fails = [*[False] * 6, True]
    model = ParallelModel(failing)
    with me.watch("torn", model) as watch:
        with contextlib.suppress(ZeroDivisionError):
            model(tokens(0, 1, 2, 4))
        watch.step()
        model(tokens(0, 1, 2, 4))
        me.facts["torn"] = is_tapped()


@case
def in_flight(me: Rank) -> None:
    """The watch ends while an exchange is on its way; the last rank has not even begun."""
    given, out = rows() + 100 * me.rank, torch.empty(8, 2)
    with me.watch("in_flight"):
        if me.rank == WORLD - 1:
            time.sleep(0.7)
        began_ns = time.monotonic_ns()
        work = dist.all_to_all_single(out, given, async_op=True)
    left_ns = time.monotonic_ns()
    work.wait()
    me.facts["in_flight"] = {
        "left in ms": (left_ns - began_ns) / 1e6,
        "result": out[:, 0].tolist(),
        "tapped": is_tapped(),
    }


class Chunks(nn.Module):
    """Two halves of a batch, both dispatched before either is combined; nothing goes to rank 1 or from it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, hidden: torch.Tensor, _expert_T: torch.Tensor) -> torch.Tensor:
        rank, under_way = dist.get_rank(), []
        for half in range(2):
            counts_PP = [[0 if 1 in (i, j) else 1 + half * i + j for j in range(WORLD)] for i in range(WORLD)]
            sends, receives = counts_PP[rank], [row[rank] for row in counts_PP]
            there = hidden.new_empty(sum(receives), HIDDEN)
            given = hidden.new_ones(sum(sends), HIDDEN)
            work = dist.all_to_all_single(there, given, receives, sends, async_op=True)
            under_way.append((work, there, sends, receives))
        for work, there, sends, receives in under_way:
            work.wait()
            home = hidden.new_empty(sum(sends), HIDDEN)
            dist.all_to_all_single(home, (there * self.scale).detach(), sends, receives)
        return hidden


class ChunkedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Chunks()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.experts(hidden, hidden.detach()[:, 0].abs().long() % 2)
        return out


@case
def nothing_to_do(me: Rank) -> None:
    """A rank without any traffic cannot tell a dispatch from a combine."""
    adapter = Adapter(
        match=lambda _name, module: isinstance(module, Chunks),
        read=lambda _module, args, _kwargs, _output: RoutingDecision(
            expert_ids=args[1], tokens=args[1].shape[0]
        ),
        experts=2,
        top_k=1,
        when="before",
    )
    model = nn.Sequential(nn.Sequential(ChunkedLayer()))
    with me.watch("nothing_to_do", model, adapter=adapter) as watch:
        model(tokens(0, 1, 0))
        watch.step()


@case
def no_tokens(me: Rank) -> None:
    """A rank without tokens that serves the others' all the same."""
    model = ParallelModel(plain)
    mine = tokens(*([] if me.rank == 2 else [4, 5, me.rank]))
    with me.watch("no_tokens", model) as watch:
        model(mine).sum().backward()
        watch.step()


@case
def different_numbers(me: Rank) -> None:
    """Ranks make different numbers of exchanges, in groups of their own."""
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][me.rank // 2]
    with me.watch("different_numbers"):
        for _ in range(5 if me.rank < 2 else 2):
            dist.all_to_all_single(torch.empty(8, 2), rows(), group=pair)
        dist.all_to_all_single(torch.empty(8, 2), rows())


@case
def reentrant(me: Rank) -> None:
    """Layers that are recomputed the old way, without their first forward pass having a graph."""
    model = ParallelModel(plain, reentrant=True)
    with me.watch("reentrant", model) as watch:
        model(tokens(0, 1, 2, 4)).sum().backward()
        watch.step()


class Borrower(nn.Module):
    """A layer that runs the backward pass of another model before it combines."""

    def __init__(self, other: ParallelModel, mine: tuple[int, ...]) -> None:
        super().__init__()
        self.other, self.mine = other, mine
        self.experts = Chunks()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        loss = self.other(tokens(*self.mine)).sum()
        self.experts(hidden, hidden.detach()[:, 0].abs().long() % 2)
        loss.backward()
        return hidden


@case
def backward_inside(me: Rank) -> None:
    """Gradients of one layer that travel while another one is in its forward pass."""
    adapter = Adapter(
        match=lambda _name, module: isinstance(module, Chunks) or type(module).__name__ == "ParallelExperts",
        read=lambda _module, args, _kwargs, _output: RoutingDecision(
            expert_ids=args[1], tokens=args[1].shape[0]
        ),
        experts=2 * WORLD,
        top_k=1,
        when="before",
    )
    model = nn.Sequential(nn.Sequential(Borrower(ParallelModel(plain), (0, 1, 2, 4))))
    with me.watch("backward_inside", model, adapter=adapter) as watch:
        model(tokens(0, 1, 0))
        watch.step()


class Counting(nn.Module):
    """A layer that exchanges counts, which have no gradient, right after its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, hidden: torch.Tensor, _expert_T: torch.Tensor) -> torch.Tensor:
        counts = torch.ones(WORLD, dtype=torch.int64)
        there = plain(hidden, [2] * WORLD, [2] * WORLD)
        dist.all_to_all_single(torch.empty_like(counts), counts)
        return plain(there * self.scale, [2] * WORLD, [2] * WORLD)


class CountingLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Counting()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.experts(hidden, hidden.detach()[:, 0].abs().long() % 2)
        return out


@case
def counts_after_rows(me: Rank) -> None:
    """An exchange without a gradient directly behind one that has one."""
    adapter = Adapter(
        match=lambda _name, module: isinstance(module, Counting),
        read=lambda _module, args, _kwargs, _output: RoutingDecision(
            expert_ids=args[1], tokens=args[1].shape[0]
        ),
        experts=2,
        top_k=1,
        when="before",
    )
    model = nn.Sequential(nn.Sequential(CountingLayer()))
    with me.watch("counts_after_rows", model, adapter=adapter) as watch:
        model(tokens(*range(2 * WORLD))).sum().backward()
        watch.step()


if __name__ == "__main__":
    run_cases(CASES, world=WORLD, timeout_s=60)
