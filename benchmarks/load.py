"""Commands on large runs: processor time and peak memory of each.

    python -m benchmarks.load DIRECTORY [--scale 1.0] [--only exchange | routing] [--keep]

Protocol: runs are generated under DIRECTORY through ``RunWriter``, then each command runs once in a process
of its own, output to a file; processor time (user and system) and the peak of resident memory are of that
process and the children it waited for (``wait4``). Files are in the page cache, as they were just written.

``exchange``: 8 ranks on two nodes x 60 layers x dispatch and combine x 1,042 steps: 10^6 rows with lists of 8
numbers, about 90 MB. 512 tokens of 4 KiB per rank go to two experts each, by a Dirichlet(4) draw of each
layer; a rank computes in proportion to what it got, rank 3 a tenth longer; of every
5,000th exchange a rank left no row.
``routing``: 64 ranks x 500 layers x 2,000 steps x 16 experts: 10^9 counts, about 3 GB.
``--scale`` makes the steps fewer.
"""

from __future__ import annotations

import argparse
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from benchmarks.command_cost import command_cost
from observatory.host.provenance import new_manifest
from observatory.run import RunWriter, routing_rows
from observatory.run.manifest import ClockSpec, ModelSpec, MoeLayerSpec, Topology

Int64 = npt.NDArray[np.int64]

RANKS, LAYERS, STEPS, TOKENS, TOP_K, TOKEN_BYTES = 8, 60, 1042, 512, 2, 4096
ROUTING_RANKS, ROUTING_LAYERS, ROUTING_STEPS, EXPERTS = 64, 500, 2000, 16
STEPS_AT_ONCE = 16
COMMANDS = {"exchange": ("exchanges", "report"), "routing": ("routing", "scan", "report")}


def exchange_run(path: Path, steps: int) -> int:
    """Generate a run of exchanges; returns its rows."""
    manifest = new_manifest(
        model=ModelSpec(name="generated"),
        topology=Topology(ranks=RANKS, node_of_rank=(0, 0, 0, 0, 1, 1, 1, 1)),
    )
    random = np.random.default_rng(7)
    share_LP = random.dirichlet(np.full(RANKS, 4.0), LAYERS)
    writers = [RunWriter.create(path, manifest)]
    writers += [RunWriter.join(path, rank=rank) for rank in range(1, RANKS)]
    now_P, rows = np.full(RANKS, 10**12, np.int64), 0
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
            table = exchange_rows(writer.rank, sequence_C, start_CP, end_CP, send_CPP).filter(
                pa.array(left_C)
            )
            writer.append("exchange", table)
            rows += len(table)
    for writer in reversed(writers):
        writer.set_clock(ClockSpec(offset_ns=0, uncertainty_ns=5_000, method="ping-pong"))
        writer.close()
    return rows


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


def routing_run(path: Path, steps: int) -> int:
    """Generate a run of loads; returns its counts."""
    layers = tuple(
        MoeLayerSpec(layer=layer, module=f"layers.{layer}.mlp", experts=EXPERTS, top_k=TOP_K)
        for layer in range(ROUTING_LAYERS)
    )
    manifest = new_manifest(
        model=ModelSpec(name="generated", moe_layers=layers),
        topology=Topology(ranks=ROUTING_RANKS, gpus_per_node=8),
    )
    with RunWriter.create(path, manifest) as writer, ProcessPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(fill_rank, str(path), rank, steps, manifest.run_id)
            for rank in range(1, ROUTING_RANKS)
        ]
        fill(writer, steps)
        for job in jobs:
            job.result()
    return steps * ROUTING_LAYERS * ROUTING_RANKS * EXPERTS


def fill_rank(path: str, rank: int, steps: int, run_id: str) -> None:
    """Write the loads of one rank."""
    with RunWriter.join(Path(path), rank=rank, run_id=run_id) as writer:
        fill(writer, steps)


def fill(writer: RunWriter, steps: int) -> None:
    """Append the loads of the writer's rank."""
    share_LE = np.random.default_rng(7).dirichlet(np.full(EXPERTS, 2.0), ROUTING_LAYERS)
    own = np.random.default_rng([7, writer.rank])
    for first in range(0, steps, STEPS_AT_ONCE):
        count = min(STEPS_AT_ONCE, steps - first)
        load_SLE = own.multinomial(TOKENS * TOP_K, share_LE, (count, ROUTING_LAYERS))
        writer.append(
            "routing",
            routing_rows(
                step_N=np.repeat(np.arange(first, first + count), ROUTING_LAYERS),
                phase_N="prefill",
                layer_N=np.tile(np.arange(ROUTING_LAYERS), count),
                source_rank=writer.rank,
                tokens_N=TOKENS,
                load_NE=load_SLE.reshape(-1, EXPERTS),
            ),
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--scale", type=float, default=1.0, help="of the steps")
    parser.add_argument("--only", choices=tuple(COMMANDS))
    parser.add_argument("--keep", action="store_true", help="leave the generated runs in place")
    options = parser.parse_args()
    make = {"exchange": (exchange_run, STEPS, "rows"), "routing": (routing_run, ROUTING_STEPS, "counts")}
    print("| run | command | processor time (s) | peak memory (MB) |\n|---|---|---|---|", flush=True)
    for kind in [options.only] if options.only else COMMANDS:
        build, steps, of = make[kind]
        path = options.directory / f"load-{kind}"
        size = build(path, max(1, round(steps * options.scale)))
        for command in COMMANDS[kind]:
            more = (
                ["--force", "--out", str(options.directory / f"load-{kind}.html")]
                if command == "report"
                else []
            )
            output = options.directory / f"load-{kind}-{command}.txt"
            cost = command_cost([command, str(path), *more], output)
            figures = f"{cost.processor_s:.1f} | {cost.peak_bytes / 1e6:.0f}"
            print(f"| {kind}, {size:,} {of} | `{command}` | {figures} |", flush=True)
        if not options.keep:
            shutil.rmtree(path)


if __name__ == "__main__":
    main()
