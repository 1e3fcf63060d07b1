"""What the exchange probe costs per all-to-all.

Protocol: P gloo ranks on this machine, one thread each. Warm-up of every variant; then rounds in which every
variant runs once, in an order drawn anew each round and the same on all ranks. A variant is a loop of calls;
putting the probe on and taking it off is not timed, nor is the thread that writes rows (it sleeps until the
end). Every call is timed on its own, and a round's time is the median of its calls. Two clocks: the wall
clock, which is what the program notices, other programs on the machine included; and the calling thread's
processor time, which is steadier and leaves out what happens on gloo's own threads. The cost is the median
over rounds of (watched - plain of the same round); the interval is the distribution-free 95 % interval of
that median. Of the ranks the largest cost counts. Variants:

    blocking    dist.all_to_all_single: we wait in the caller's place
    async       async_op=True and wait at once: the end comes from a callback on gloo's thread
    functional  the functional collective and wait_tensor: likewise

Run: ``python -m benchmarks.exchange_cost [--ranks 2] [--rounds 40] [--calls 50] [--json FILE]``.
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
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn

from observatory.host.provenance import new_manifest
from observatory.probes.exchange.probe import ExchangeProbe
from observatory.probes.timeline.log import ExchangeLog
from observatory.probes.timeline.streams import Anchors
from observatory.run import RunWriter
from observatory.run.manifest import ModelSpec, Topology

SIZES = {"small": 64, "large": 1 << 18}
COLUMNS = 16


def variants(rows: int, world: int) -> dict[str, Callable[[], Any]]:
    given, out = torch.randn(rows, COLUMNS), torch.empty(rows, COLUMNS)
    shares = [rows // world] * world
    group = dist.group.WORLD
    assert group is not None
    return {
        "blocking": lambda: dist.all_to_all_single(out, given, shares, shares),
        "async": lambda: dist.all_to_all_single(out, given, shares, shares, async_op=True).wait(),
        "functional": lambda: functional.wait_tensor(  # type: ignore[no-untyped-call]
            functional.all_to_all_single(given, shares, shares, group)
        ),
    }


def timed(call: Callable[[], Any], calls: int) -> tuple[float, float]:
    """Median wall and processor time of one call, microseconds."""
    wall_us, own_us = [], []
    dist.barrier()
    for _ in range(calls):
        wall_ns, own_ns = time.perf_counter_ns(), time.thread_time_ns()
        call()
        own_us.append((time.thread_time_ns() - own_ns) / 1000)
        wall_us.append((time.perf_counter_ns() - wall_ns) / 1000)
    return float(np.median(wall_us)), float(np.median(own_us))


def rank_main(folder: Path, rank: int, world: int, rounds: int, calls: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world)
    manifest = new_manifest(model=ModelSpec(name="none"), topology=Topology(ranks=world))
    run = folder / "run"
    writer = RunWriter.create(run, manifest) if rank == 0 else RunWriter.join(run, rank=rank)
    raw: dict[str, dict[str, list[tuple[float, float]]]] = {}
    order = np.random.default_rng(0)
    for size, rows in SIZES.items():
        loops = variants(rows, world)
        names = [(way, watched) for way in loops for watched in (False, True)]
        times: dict[str, list[tuple[float, float]]] = {f"{way} {watched}": [] for way, watched in names}
        for number in range(-2, rounds):
            for index in order.permutation(len(names)):
                way, watched = names[index]
                count = calls if rows < SIZES["large"] else max(5, calls // 5)
                probe = None
                if watched:
                    anchors = Anchors()
                    log = ExchangeLog(writer, anchors, flush_s=3600)
                    probe = ExchangeProbe(
                        nn.Identity(),
                        [],
                        log,
                        anchors,
                        situation=lambda: (0, None),
                        phase_now=lambda: "unknown",
                    )
                    probe.attach()
                found = timed(loops[way], count)
                if probe is not None:
                    probe.detach()
                    log.close()
                if number >= 0:
                    times[f"{way} {watched}"].append(found)
        raw[size] = times
    writer.close()
    (folder / f"raw-{rank}.json").write_text(json.dumps(raw), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def interval(plain: list[float], watched: list[float]) -> dict[str, float]:
    """Median of the paired differences and its 95 % interval (binomial order statistics)."""
    difference = np.sort(np.array(watched) - np.array(plain))
    half = 1.96 * np.sqrt(len(difference)) / 2
    low = int(max(0, len(difference) / 2 - half))
    high = int(min(len(difference) - 1, len(difference) / 2 + half))
    return {
        "median": float(np.median(difference)),
        "low": float(difference[low]),
        "high": float(difference[high]),
        "plain": float(np.median(plain)),
    }


def summary(raws: list[dict[str, dict[str, list[tuple[float, float]]]]]) -> dict[str, Any]:
    """Cost per size, variant and clock: of the rank where it is largest."""
    found: dict[str, Any] = {}
    for size in SIZES:
        for way in ("blocking", "async", "functional"):
            for position, clock in enumerate(("wall", "thread")):
                of_ranks = [
                    interval(
                        [pair[position] for pair in raw[size][f"{way} False"]],
                        [pair[position] for pair in raw[size][f"{way} True"]],
                    )
                    for raw in raws
                ]
                found.setdefault(size, {}).setdefault(way, {})[clock] = max(
                    of_ranks, key=lambda cost: cost["median"]
                )
    return found


def table(costs: dict[str, Any]) -> list[str]:
    lines = [f"{'size':8} {'way':12} {'clock':8} {'plain us':>10} {'cost us':>10} {'95 % interval':>20}"]
    for size, ways in costs.items():
        for way, clocks in ways.items():
            for clock, cost in clocks.items():
                between = f"{cost['low']:.1f} .. {cost['high']:.1f}"
                lines.append(
                    f"{size:8} {way:12} {clock:8} {cost['plain']:10.1f} {cost['median']:10.1f} {between:>20}"
                )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=50)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        rank_main(options.folder, options.rank, options.ranks, options.rounds, options.calls)
        return 0
    with tempfile.TemporaryDirectory() as name:
        command = [
            sys.executable,
            "-m",
            "benchmarks.exchange_cost",
            *sys.argv[1:],
            "--folder",
            name,
            "--rank",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ranks = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(options.ranks)]
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            return 1
        raws = [json.loads((Path(name) / f"raw-{rank}.json").read_text()) for rank in range(options.ranks)]
    costs = summary(raws)
    print("\n".join(table(costs)))
    document = {
        "benchmark": "exchange_cost",
        "argv": sys.argv[1:],
        "ranks": options.ranks,
        "rounds": options.rounds,
        "calls": options.calls,
        "backend": "gloo",
        "rows": SIZES,
        "row_bytes": COLUMNS * 4,
        "machine": platform.platform(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "cost_us_per_call": costs,
    }
    if options.json is not None:
        options.json.write_text(json.dumps({**document, "raw": raws}), encoding="utf-8")
    else:
        print(json.dumps(document, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
