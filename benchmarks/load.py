"""Commands on large runs: processor time and peak memory of each.

    python -m benchmarks.load DIRECTORY [--scale 1.0] [--only exchange | routing | counts | energy] [--keep]

Protocol: runs are generated under DIRECTORY through ``RunWriter``, then each command runs once in a process
of its own, output to a file; processor time (user and system), wall time and the peak of resident memory are
of that process and the children it waited for (``wait4``). Files are in the page cache, as they were just
written.

``exchange``: 8 ranks on two nodes x 60 layers x dispatch and combine x 1,042 steps: 10^6 rows with lists of 8
numbers, about 90 MB. 512 tokens of 4 KiB per rank go to two experts each, by a Dirichlet(4) draw of each
layer; a rank computes in proportion to what it got, rank 3 a tenth longer; of every
5,000th exchange a rank left no row.
``routing``: 64 ranks x 500 layers x 2,000 steps x 16 experts, 10^9 counts in 64 million rows.
``counts``: 64 ranks x 61 layers x 1,000 steps x 256 experts, 10^9 counts in 4 million rows. In both, each
layer prefers experts by a Dirichlet(2) draw that drifts over the steps.
``energy``: 8 devices sampled every 50 ms for 24 hours (``energy_run``).
``--scale`` makes the steps or the day fewer.
"""

from __future__ import annotations

import argparse
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from benchmarks.command_cost import command_cost
from benchmarks.energy_run import energy_run
from observatory.host.provenance import new_manifest
from observatory.run import RunWriter, routing_rows
from observatory.run.manifest import ClockSpec, ModelSpec, MoeLayerSpec, Topology

Int64 = npt.NDArray[np.int64]

RANKS, LAYERS, STEPS, TOKENS, TOP_K, TOKEN_BYTES = 8, 60, 1042, 512, 2, 4096
STEPS_AT_ONCE = 16
COMMANDS = {
    "exchange": ("exchanges", "report"),
    "routing": ("routing", "scan", "report"),
    "counts": ("routing",),
    "energy": ("energy", "report"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Loads:
    """Shape of a run of loads."""

    steps: int
    layers: int
    experts: int
    tokens: int
    top_k: int


MANY_LAYERS = Loads(steps=2000, layers=500, experts=16, tokens=512, top_k=2)
MANY_EXPERTS = Loads(steps=1000, layers=61, experts=256, tokens=4096, top_k=8)


def exchange_run(path: Path, scale: float) -> None:
    """Generate a run of exchanges."""
    steps = max(1, round(scale * STEPS))
    manifest = new_manifest(
        model=ModelSpec(name="generated"),
        topology=Topology(ranks=RANKS, node_of_rank=(0, 0, 0, 0, 1, 1, 1, 1)),
    )
    random = np.random.default_rng(7)
    share_LP = random.dirichlet(np.full(RANKS, 4.0), LAYERS)
    writers = [RunWriter.create(path, manifest)]
    writers += [RunWriter.join(path, rank=rank) for rank in range(1, RANKS)]
    now_P = np.full(RANKS, 10**12, np.int64)
    for first in range(0, steps, STEPS_AT_ONCE):
        count = min(STEPS_AT_ONCE, steps - first)
        drawn_CPP = random.multinomial(TOKENS * TOP_K, share_LP[None, :, None], (count, LAYERS, RANKS))
        sent_CPP = drawn_CPP.reshape(-1, RANKS, RANKS).astype(np.int64) * TOKEN_BYTES
        # Each dispatch is followed by its combine, which goes the way back.
        send_CPP = np.stack([sent_CPP, sent_CPP.swapaxes(1, 2)], axis=1).reshape(-1, RANKS, RANKS)
        start_CP, end_CP = exchange_times(now_P, send_CPP, random)
        sequence_C = first * LAYERS * 2 + np.arange(len(send_CPP))
        for writer in writers:
            left_C = (sequence_C % 5000 != 4999) | (sequence_C % RANKS != writer.rank)
            table = exchange_rows(writer.rank, sequence_C, start_CP, end_CP, send_CPP)
            writer.append("exchange", table.filter(pa.array(left_C)))
    for writer in reversed(writers):
        writer.set_clock(ClockSpec(offset_ns=0, uncertainty_ns=5_000, method="ping-pong"))
        writer.close()


def exchange_times(now_P: Int64, send_CPP: Int64, random: np.random.Generator) -> tuple[Int64, Int64]:
    """Arrivals and ends of exchanges that follow each other; ``now_P`` is moved on."""
    start_CP, end_CP = np.empty((2, *send_CPP.shape[:2]), np.int64)
    slower_P = np.where(np.arange(RANKS) == 3, 1.1, 1.0)
    jitter_CP = random.gamma(4.0, 5_000.0, start_CP.shape)
    received_CP = send_CPP.sum(axis=1)
    for c in range(len(send_CPP)):
        work_ns_P = received_CP[c - 1] * 0.02 if c % 2 else np.full(RANKS, 60_000.0)
        start_CP[c] = now_P + (work_ns_P * slower_P + jitter_CP[c]).astype(np.int64)
        end_CP[c] = start_CP[c].max() + (20_000 + received_CP[c] * 0.005).astype(np.int64)
        now_P[:] = end_CP[c]
    return start_CP, end_CP


def exchange_rows(rank: int, sequence_C: Int64, start_CP: Int64, end_CP: Int64, send_CPP: Int64) -> pa.Table:
    """Rows of one rank."""
    size = len(sequence_C)
    ends = pa.array(np.arange(size + 1, dtype=np.int32) * RANKS)
    lists = {
        "send_bytes": send_CPP[:, rank].reshape(-1), "receive_bytes": send_CPP[:, :, rank].reshape(-1)
    }  # fmt: skip
    texts = {"phase": "prefill", "group": "0-7", "algorithm": "all_to_all", "backend": "nccl"}
    return pa.table(
        {
            "step": sequence_C // (2 * LAYERS),
            "layer": (sequence_C // 2 % LAYERS).astype(np.int32),
            "source_rank": np.full(size, rank, np.int32),
            "role": np.where(sequence_C % 2, "combine", "dispatch"),
            **{name: np.full(size, text) for name, text in texts.items()},
            "sequence": sequence_C,
            "start_ns": start_CP[:, rank],
            "end_ns": end_CP[:, rank],
            **{name: pa.ListArray.from_arrays(ends, pa.array(values)) for name, values in lists.items()},
            "blocking": np.full(size, True),
            "backend_group": np.full(size, "1"),
            "backend_sequence": sequence_C,
        }
    )


def routing_run(path: Path, scale: float, *, shape: Loads) -> None:
    """Generate a run of loads."""
    steps = max(1, round(scale * shape.steps))
    layers = tuple(
        MoeLayerSpec(layer=layer, module=f"layers.{layer}.mlp", experts=shape.experts, top_k=shape.top_k)
        for layer in range(shape.layers)
    )
    manifest = new_manifest(
        model=ModelSpec(name="generated", moe_layers=layers), topology=Topology(ranks=64, gpus_per_node=8)
    )
    with RunWriter.create(path, manifest) as writer, ProcessPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(fill_rank, str(path), rank, steps, shape, manifest.run_id) for rank in range(1, 64)
        ]
        fill(writer, steps, shape)
        for job in jobs:
            job.result()


def fill_rank(path: str, rank: int, steps: int, shape: Loads, run_id: str) -> None:
    """Write the loads of one rank."""
    with RunWriter.join(Path(path), rank=rank, run_id=run_id) as writer:
        fill(writer, steps, shape)


def fill(writer: RunWriter, steps: int, shape: Loads) -> None:
    """Append the loads of the writer's rank."""
    shared, own = np.random.default_rng(7), np.random.default_rng([7, writer.rank])
    early_LE, late_LE = shared.dirichlet(np.full(shape.experts, 2.0), (2, shape.layers)).astype(np.float32)
    for first in range(0, steps, STEPS_AT_ONCE):
        count = min(STEPS_AT_ONCE, steps - first)
        drift_S = np.linspace(0, 0.3, steps, dtype=np.float32)[first : first + count, None, None]
        share_SLE = early_LE + drift_S * (late_LE - early_LE)
        writer.append(
            "routing",
            routing_rows(
                step_N=np.repeat(np.arange(first, first + count), shape.layers),
                phase_N="prefill",
                layer_N=np.tile(np.arange(shape.layers), count),
                source_rank=writer.rank,
                tokens_N=shape.tokens,
                load_NE=draw(own, share_SLE.reshape(-1, shape.experts), shape.tokens * shape.top_k),
            ),
        )


def draw(random: np.random.Generator, share_NE: npt.NDArray[np.float32], assignments: int) -> Int64:
    """Rounded normals of multinomial mean and variance; every row sums exactly."""
    mean_NE = share_NE * np.float32(assignments)
    noise_NE = random.standard_normal(mean_NE.shape, dtype=np.float32)
    noise_NE *= np.sqrt(mean_NE * (1 - share_NE))
    load_NE = np.maximum(np.rint(mean_NE + noise_NE), 0).astype(np.int64)
    # The total is off by about its square root: that is spread evenly, and the rest on the largest expert.
    excess_N = load_NE.sum(axis=1) - assignments
    load_NE = np.maximum(load_NE - np.rint(excess_N / load_NE.shape[1]).astype(np.int64)[:, None], 0)
    missing_N = assignments - load_NE.sum(axis=1)
    load_NE[np.arange(len(load_NE)), load_NE.argmax(axis=1)] += missing_N
    return load_NE


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--scale", type=float, default=1.0, help="of the steps or the day")
    parser.add_argument("--only", choices=tuple(COMMANDS))
    parser.add_argument("--keep", action="store_true", help="leave the generated runs, or use them again")
    options = parser.parse_args()
    print("| run | command | processor time (s) | wall (s) | peak memory (MB) |\n|---|---|---|---|---|")
    for kind in [options.only] if options.only else COMMANDS:
        path = options.directory / f"load-{kind}-{options.scale:g}"
        build, size, of = RUNS[kind]
        if not path.exists():
            build(path, options.scale)
        for command in COMMANDS[kind]:
            more = {"report": ["--force", "--out", f"{path}.html"], "energy": ["--json"]}.get(command, [])
            cost = command_cost([command, str(path), *more], path.with_name(f"{path.name}-{command}.txt"))
            figures = f"{cost.processor_s:.1f} | {cost.wall_s:.1f} | {cost.peak_bytes / 1e6:.0f}"
            what = f"{kind}, {size * options.scale:,.0f} {of}"
            print(f"| {what} | `{command}` | {figures} |", flush=True)
        if not options.keep:
            shutil.rmtree(path)


#: What writes each run, its size at scale 1, and of what.
RUNS = {
    "exchange": (exchange_run, STEPS * RANKS * LAYERS * 2, "rows"),
    "routing": (partial(routing_run, shape=MANY_LAYERS), 500 * 2000 * 64 * 16, "counts"),
    "counts": (partial(routing_run, shape=MANY_EXPERTS), 61 * 1000 * 64 * 256, "counts"),
    "energy": (energy_run, 24 * 3600 * 20 * 8, "samples"),
}


if __name__ == "__main__":
    main()
