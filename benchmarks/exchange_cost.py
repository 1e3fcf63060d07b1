"""What the exchange probe costs per all-to-all: the time of a call with it over the time without.

Protocol: P gloo ranks on this machine, one thread each, run the same model of MoE layers that send rows to
their experts and back, under ``observatory.watch`` with and without ``exchanges``, in blocks of several
passes in the order off, on, on, off. Entering and leaving a watch, the routing hooks (both have them) and the
first pass are not timed. The time of a block is the sum over its calls of all-to-all, each timed on its own,
by three clocks: the processor time of the whole process (threads of gloo and ours included), that of the
calling thread, and the wall clock. The ratio is the geometric mean over groups of four blocks, with its 90 %
bootstrap interval (``benchmarks.interleaved``); microseconds are the ratio less one times the mean call
without. Of the ranks the one with the largest ratio is reported. Two places:

    in place    an expert multiplies a matrix of its own between the calls: the layers' matrices exceed the
                caches, so that neither torch's code nor ours is in them
    loop        nothing between the calls: all code stays in the caches, which understates the cost

Three ways to call:

    blocking    dist.all_to_all_single: the probe waits in the caller's place
    async       async_op=True and wait at once: the end comes from a callback on gloo's thread
    functional  the functional collective and wait_tensor: likewise

Apart from these, per exchange, as medians of the differences of the blocks: the processor time of the whole
passes (with hooks of the layers, and what our code costs that of others by displacing it from the caches),
and that of ending the watch, which builds and writes the rows.

Run: ``python -m benchmarks.exchange_cost [--ranks 2] [--groups 40] [--kib 8] [--ways blocking ...]``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn

import observatory
from benchmarks.interleaved import interleaved
from observatory.probes.routing.adapters import Adapter
from observatory.probes.routing.sites import RoutingDecision

LAYERS, HIDDEN, PASSES = 16, 64, 5
#: Bytes of the matrix that an expert multiplies: 16 of them are twice the largest cache of this machine.
MATRIX_BYTES = 4 << 20
PLACES = {"in place": MATRIX_BYTES, "loop": 0}
CLOCKS = ("process", "thread", "wall")
_READ = (time.process_time_ns, time.thread_time_ns, time.perf_counter_ns)

AllToAll = Callable[[torch.Tensor], torch.Tensor]


def ways(world: int, rows: int) -> dict[str, AllToAll]:
    shares = [rows // world] * world
    group = dist.group.WORLD
    assert group is not None

    def blocking(given: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(given)
        dist.all_to_all_single(out, given, shares, shares)
        return out

    def asynchronous(given: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(given)
        dist.all_to_all_single(out, given, shares, shares, async_op=True).wait()
        return out

    def functional_one(given: torch.Tensor) -> torch.Tensor:
        out = functional.all_to_all_single(given, shares, shares, group)
        waited: torch.Tensor = functional.wait_tensor(out)  # type: ignore[no-untyped-call]
        return waited

    return {"blocking": blocking, "async": asynchronous, "functional": functional_one}


class TimedCalls:
    """An all-to-all whose calls are timed.

    Attributes:
        taken_ns: sums by clock since it was set to zero.
    """

    def __init__(self, call: AllToAll) -> None:
        self._call = call
        self.taken_ns = [0, 0, 0]

    def __call__(self, given: torch.Tensor) -> torch.Tensor:
        """The call, timed."""
        began_ns = [read() for read in _READ]
        out = self._call(given)
        ended_ns = [read() for read in reversed(_READ)]
        for clock, (begin, end) in enumerate(zip(began_ns, reversed(ended_ns), strict=True)):
            self.taken_ns[clock] += end - begin
        return out


class Experts(nn.Module):
    """Sends rows to their experts and back."""

    def __init__(self, exchange: TimedCalls, matrix_bytes: int) -> None:
        super().__init__()
        self.exchange = exchange
        self.matrix = nn.Parameter(torch.randn(matrix_bytes // (4 * HIDDEN), HIDDEN), requires_grad=False)

    def forward(self, hidden: torch.Tensor, expert_T: torch.Tensor) -> torch.Tensor:
        """Rows there and back; which experts, only the probe reads."""
        del expert_T
        there = self.exchange(hidden)
        self.matrix @ there[0]
        home = self.exchange(there)
        self.matrix @ home[0]
        return home


class Layer(nn.Module):
    """One MoE layer."""

    def __init__(self, exchange: TimedCalls, matrix_bytes: int) -> None:
        super().__init__()
        self.experts = Experts(exchange, matrix_bytes)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Route and exchange."""
        return self.experts(hidden, (hidden[:, :1] > 0).long())


def adapter() -> Adapter:
    return Adapter(
        match=lambda _name, module: isinstance(module, Experts),
        read=lambda _module, args, _kwargs, _output: RoutingDecision(
            expert_ids=args[1], tokens=args[1].shape[0]
        ),
        experts=2,
        top_k=1,
        when="before",
    )


def measure(folder: Path, way: AllToAll, matrix_bytes: int, rows: int, groups: int) -> dict[str, Any]:
    """Ratios, and mean times without, of one way to call in one place; of this rank."""
    calls = TimedCalls(way)
    model = nn.Sequential(*(Layer(calls, matrix_bytes) for _ in range(LAYERS)))
    hidden = torch.randn(rows, HIDDEN)
    exchanges = 2 * LAYERS * PASSES
    taken: dict[bool, list[tuple[float, ...]]] = {False: [], True: []}
    is_on, number = False, 0
    stack = ExitStack()

    def leave() -> float:
        began_ns = time.process_time_ns()
        stack.close()
        return (time.process_time_ns() - began_ns) / 1000

    def switch(on: bool) -> None:
        nonlocal is_on, number
        is_on, number = on, number + 1
        run = folder / f"run-{number}"
        options = {"adapters": [adapter()], "align_clocks": False, "flush_s": 3600.0}
        watch = stack.enter_context(observatory.watch(model, run, exchanges=on, **options))
        model(hidden)
        watch.step()
        dist.barrier()

    def block() -> tuple[float, ...]:
        calls.taken_ns = [0, 0, 0]
        began_ns = time.process_time_ns()
        for _ in range(PASSES):
            model(hidden)
        passes_us = (time.process_time_ns() - began_ns) / 1000
        times_us = (*(ns / 1000 for ns in calls.taken_ns), passes_us, leave())
        taken[is_on].append(times_us)
        return times_us

    for on in (False, True):
        switch(on)
        block()
    taken[False].clear()
    taken[True].clear()
    ratios = interleaved(block, switch, groups=groups)
    off_us, on_us = (np.array(taken[on]) / exchanges for on in (False, True))
    costs = {
        name: interval(on_us[:, column], off_us[:, column])
        for name, column in (("whole pass", 3), ("rows", 4))
    }
    return {
        "ratio": dict(zip(CLOCKS, ratios, strict=False)),
        "without_us": dict(zip(CLOCKS, off_us.mean(axis=0).tolist(), strict=False)),
        "apart_us": costs,
    }


def interval(on_B: np.ndarray[Any, Any], off_B: np.ndarray[Any, Any]) -> tuple[float, float, float]:
    """Median over pairs of blocks of the difference, and its 90 % interval (binomial order statistics)."""
    difference = np.sort(on_B - off_B)
    half = 1.645 * np.sqrt(len(difference)) / 2
    low = int(max(0, len(difference) / 2 - half))
    high = int(min(len(difference) - 1, len(difference) / 2 + half))
    return float(np.median(difference)), float(difference[low]), float(difference[high])


@torch.no_grad()
def rank_main(folder: Path, rank: int, given: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=given.ranks
    )
    rows = given.kib * 1024 // (4 * HIDDEN)
    found: dict[str, Any] = {}
    calls = ways(given.ranks, rows)
    for way in given.ways or calls:
        for place, matrix_bytes in PLACES.items():
            runs = folder / f"{way} {place}"
            found.setdefault(way, {})[place] = measure(runs, calls[way], matrix_bytes, rows, given.groups)
    (folder / f"found-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def slowest(of_ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What the rank with the largest ratio of processor time found, by way and place."""
    return {
        way: {
            place: max(
                (found[way][place] for found in of_ranks), key=lambda found: found["ratio"]["process"][0]
            )
            for place in places
        }
        for way, places in of_ranks[0].items()
    }


def table(found: dict[str, Any]) -> list[str]:
    lines = [f"{'way':11} {'place':9} {'clock':11} {'without us':>10} {'ratio':>22} {'cost us':>8}"]
    for way, places in found.items():
        for place, cost in places.items():
            for clock, (ratio, low, high) in cost["ratio"].items():
                without_us = cost["without_us"][clock]
                between = f"{ratio:.3f} ({low:.3f} to {high:.3f})"
                lines.append(
                    f"{way:11} {place:9} {clock:11} {without_us:10.1f} {between:>22} "
                    f"{(ratio - 1) * without_us:8.1f}"
                )
            for name, (cost_us, low, high) in cost["apart_us"].items():
                between = f"({low:.1f} to {high:.1f})"
                lines.append(f"{way:11} {place:9} {name:11} {'':10} {between:>22} {cost_us:8.1f}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--groups", type=int, default=40, help="of four blocks: off, on, on, off")
    parser.add_argument("--kib", type=int, default=8, help="that a rank sends, its own share included")
    parser.add_argument("--ways", nargs="+", choices=("blocking", "async", "functional"), help="default: all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        rank_main(given.folder, given.rank, given)
        return 0
    with tempfile.TemporaryDirectory() as name:
        program = [sys.executable, "-m", "benchmarks.exchange_cost"]
        command = [*program, *sys.argv[1:], "--folder", name, "--rank"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ranks = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(given.ranks)]
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            return 1
        raws = [json.loads((Path(name) / f"found-{rank}.json").read_text()) for rank in range(given.ranks)]
    print("\n".join(table(slowest(raws))))
    document = {
        "benchmark": "exchange_cost",
        "argv": sys.argv[1:],
        "backend": "gloo",
        "exchanges_per_block": 2 * LAYERS * PASSES,
        "machine": platform.platform(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "ranks": raws,
    }
    if given.json is not None:
        given.json.write_text(json.dumps(document), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
