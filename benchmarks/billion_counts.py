"""10^9 expert counts: are all layer metrics there in under 60 s and 2 GB on two cores?

    python benchmarks/billion_counts.py DIRECTORY [--steps 1000] [--keep] [--json]

Protocol: a seeded run of steps x 61 layers x 256 experts x 64 ranks is generated under DIRECTORY (about
1.2 GB for 1,000 steps), then a fresh Python process opens it and computes ``layer_metrics`` (``metrics_s``
with opening and without imports, ``metrics_cpu_s`` the CPU time of the same), streams it once more without
computing (``read_only_s``) and reports the peak of its resident memory (VmHWM of /proc/self/status). The
files are in the page cache, as they were just written. The exit code is 1 when time or memory is above its
bound.

The loads: each layer prefers experts by a Dirichlet(2) draw that drifts over the steps; each rank sends
4096 tokens to 8 experts each, drawn as rounded normals of multinomial mean and variance with exact totals.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from observatory.host.provenance import new_manifest
from observatory.run import RunWriter, open_run, routing_rows
from observatory.run.manifest import ModelSpec, MoeLayerSpec, Topology

TOKENS, TOP_K, LAYERS, EXPERTS, RANKS = 4096, 8, 61, 256, 64
STEPS_PER_BATCH = 16
MOST_SECONDS, MOST_BYTES = 60.0, 2e9


def write_rank(path: str, rank: int, steps: int, run_id: str) -> int:
    """Generate and write all rows of one rank; returns the counts written."""
    if rank == 0:
        raise ValueError("rank 0 is written by the process that creates the run")
    with RunWriter.join(path, rank=rank, run_id=run_id) as writer:
        return fill(writer, steps)


def fill(writer: RunWriter, steps: int) -> int:
    """Append the rows of the writer's rank."""
    shared = np.random.default_rng(7)
    popular_LE = shared.dirichlet(np.full(EXPERTS, 2.0), LAYERS)
    later_LE = shared.dirichlet(np.full(EXPERTS, 2.0), LAYERS)
    own = np.random.default_rng([7, writer.rank])
    for first in range(0, steps, STEPS_PER_BATCH):
        count = min(STEPS_PER_BATCH, steps - first)
        drift_S = (np.arange(first, first + count) / max(1, steps - 1))[:, None, None]
        share_SLE = (1 - 0.3 * drift_S) * popular_LE + 0.3 * drift_S * later_LE
        load_NE = draw(own, share_SLE.reshape(-1, EXPERTS))
        writer.append(
            "routing",
            routing_rows(
                step_N=np.repeat(np.arange(first, first + count), LAYERS),
                phase_N="prefill",
                layer_N=np.tile(np.arange(LAYERS), count),
                source_rank=writer.rank,
                tokens_N=TOKENS,
                load_NE=load_NE,
            ),
        )
    return steps * LAYERS * EXPERTS


def draw(random: np.random.Generator, share_NE: np.ndarray) -> np.ndarray:
    """Loads of TOKENS x TOP_K assignments with the given shares; every row sums exactly."""
    mean_NE = share_NE * (TOKENS * TOP_K)
    noise_NE = random.standard_normal(mean_NE.shape, dtype=np.float32)
    load_NE: np.ndarray = np.maximum(
        np.rint(mean_NE + noise_NE * np.sqrt(mean_NE * (1 - share_NE))), 0
    ).astype(np.int64)
    # The total is off by about its square root: spread that evenly, and the rest on the largest expert.
    excess_N = load_NE.sum(axis=1) - TOKENS * TOP_K
    load_NE = np.maximum(load_NE - np.rint(excess_N / EXPERTS).astype(np.int64)[:, None], 0)
    missing_N = TOKENS * TOP_K - load_NE.sum(axis=1)
    load_NE[np.arange(len(load_NE)), load_NE.argmax(axis=1)] += missing_N
    return load_NE


def generate(path: Path, steps: int) -> dict[str, float]:
    layers = tuple(
        MoeLayerSpec(layer=layer, module=f"layers.{layer}.mlp", experts=EXPERTS, top_k=TOP_K)
        for layer in range(LAYERS)
    )
    manifest = new_manifest(
        model=ModelSpec(name="generated", moe_layers=layers), topology=Topology(ranks=RANKS, gpus_per_node=8)
    )
    started = time.perf_counter()
    with RunWriter.create(path, manifest) as writer, ProcessPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(write_rank, str(path), rank, steps, manifest.run_id) for rank in range(1, RANKS)]
        counts = fill(writer, steps) + sum(job.result() for job in jobs)
    seconds = time.perf_counter() - started
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {"counts": counts, "generate_s": seconds, "disk_bytes": size}


def measure(path: Path) -> dict[str, float]:
    """Time layer_metrics on an existing run in a fresh process."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, "--measure", str(path)], check=True, stdout=subprocess.PIPE, text=True
    )
    return {"wall_s": time.perf_counter() - started, **json.loads(done.stdout)}


def child(path: str) -> None:
    from observatory.analysis.routing.summary import layer_metrics

    started, cpu_started = time.perf_counter(), time.process_time()
    run = open_run(path)
    frame = layer_metrics(run)
    metrics_s, metrics_cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    started = time.perf_counter()
    counts = sum(block.load_SPE.size for block in run.iter_loads())
    read_s = time.perf_counter() - started
    peak = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    if run.problems or len(frame) != LAYERS:
        raise SystemExit(f"the generated run is not whole: {run.problems}, {len(frame)} layers")
    print(
        json.dumps(
            {
                "metrics_s": metrics_s,
                "metrics_cpu_s": metrics_cpu_s,
                "load_average": os.getloadavg()[0],
                "read_only_s": read_s,
                "peak_bytes": peak,
                "rows": len(frame),
                "counts_read": counts,
                "assignments": int(frame["assignments"].sum()),
            }
        )
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="leave the generated run in place")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        child(str(options.directory))
        return 0
    path = options.directory / f"billion-counts-{options.steps}"
    made = generate(path, options.steps)
    try:
        runs = [measure(path) for _ in range(options.repeat)]
    finally:
        if not options.keep:
            shutil.rmtree(path)
    expected = options.steps * LAYERS * RANKS * TOKENS * TOP_K
    slowest = max(run["metrics_s"] for run in runs)
    peak = max(run["peak_bytes"] for run in runs)
    met = slowest < MOST_SECONDS and peak < MOST_BYTES and runs[0]["assignments"] == expected
    result = {
        "host": platform.node(),
        "cores": os.cpu_count(),
        "steps": options.steps,
        **made,
        "runs": runs,
        "met": met,
    }
    if options.json:
        print(json.dumps(result))
    else:
        times = ", ".join(f"{run['metrics_s']:.1f}" for run in runs)
        cpu_s = ", ".join(f"{run['metrics_cpu_s']:.1f}" for run in runs)
        print(
            f"{made['counts']:.3g} counts, {made['disk_bytes'] / 1e9:.2f} GB, generated in "
            f"{made['generate_s']:.0f} s; layer metrics {times} s (CPU {cpu_s} s), reading alone "
            f"{runs[0]['read_only_s']:.1f} s, peak {peak / 1e9:.2f} GB on {os.cpu_count()} cores: "
            f"{'within' if met else 'NOT within'} {MOST_SECONDS:g} s and {MOST_BYTES / 1e9:g} GB"
        )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
