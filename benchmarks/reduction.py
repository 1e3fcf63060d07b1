"""A run of 1,024 rank shards: how long does it take to open, and to reduce with one and two ranks of MPI?

    python benchmarks/reduction.py DIRECTORY [--shards 1024] [--steps 100] [--repeats 5]

Protocol: a seeded run of `--shards` ranks x `--steps` steps x 8 layers x 64 experts, with a span of every
step and two exchanges of every layer, is written under DIRECTORY unless it is there. Then ``open_run`` and
its parts are timed in this process, and ``mpiexec -n N observatory reduce`` for N = 1 and 2 in turn, so that
both see the same machine: whole commands, and the time in ``reduce_runs`` (imports and the start of MPI left
out) with the peak of each rank's resident memory. Medians over the repeats. The files are in the page cache.
Last, the rows of both are compared: they must be the same bytes. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa

from observatory.host.provenance import new_manifest
from observatory.run import RunWriter, open_run, routing_rows
from observatory.run.head import read_head
from observatory.run.manifest import ModelSpec, MoeLayerSpec, Topology

LAYERS, EXPERTS, TOKENS, TOP_K = 8, 64, 256, 2

_TIMED = """
import json, resource, sys, time
from pathlib import Path
from observatory.analysis.reduction.document import reduction_document
from observatory.campaign.message_passing import working_together
from observatory.campaign.reduction import reduce_runs
with working_together() as world:
    world.broadcast(b"")
    start = time.perf_counter()
    rows = reduce_runs([Path(sys.argv[1])], world=world)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
Path(f"{sys.argv[2]}.{world.rank}").write_text(
    json.dumps({"seconds": seconds, "peak_mib": peak, "document": reduction_document(rows)})
)
"""


def fill(writer: RunWriter, steps: int) -> None:
    """Append everything of the writer's rank."""
    random = np.random.default_rng([3, writer.rank])
    step_N, layer_N = np.repeat(np.arange(steps), LAYERS), np.tile(np.arange(LAYERS), steps)
    share_E = np.random.default_rng(3).dirichlet(np.full(EXPERTS, 2.0))
    load_NE = random.multinomial(TOKENS * TOP_K, share_E, size=len(step_N))
    rows = routing_rows(
        step_N=step_N, phase_N="decode", layer_N=layer_N, source_rank=writer.rank, tokens_N=TOKENS,
        load_NE=load_NE,
    )  # fmt: skip
    writer.append("routing", rows)
    start_S = np.arange(steps) * 10_000_000
    common = {
        "phase": pa.array(["decode"] * steps),
        "source_rank": pa.array(np.full(steps, writer.rank), pa.int32()),
    }
    writer.append(
        "spans",
        pa.table(
            {
                "step": pa.array(np.arange(steps)), **common, "name": pa.array(["phase"] * steps),
                "start_ns": pa.array(start_S), "end_ns": pa.array(start_S + random.integers(8e6, 9e6, steps)),
            }
        ),
    )  # fmt: skip
    count = steps * LAYERS
    begin_N = np.repeat(start_S, LAYERS) + np.tile(np.arange(LAYERS), steps) * 900_000
    for number, role in enumerate(("dispatch", "combine")):
        writer.append(
            "exchange",
            pa.table(
                {
                    "step": pa.array(step_N), "phase": pa.array(["decode"] * count),
                    "layer": pa.array(layer_N, pa.int32()),
                    "source_rank": pa.array(np.full(count, writer.rank), pa.int32()),
                    "role": pa.array([role] * count), "group": pa.array(["world"] * count),
                    "sequence": pa.array(np.arange(count) * 2 + number),
                    "start_ns": pa.array(begin_N + number * 400_000),
                    "end_ns": pa.array(begin_N + number * 400_000 + random.integers(1e5, 3e5, count)),
                    "send_bytes": pa.array([[4096] * 8] * count, pa.list_(pa.int64())),
                }
            ),
        )  # fmt: skip


def join(path: str, rank: int, steps: int) -> None:
    """Write one further rank."""
    with RunWriter.join(path, rank=rank) as writer:
        fill(writer, steps)


def generate(path: Path, shards: int, steps: int) -> None:
    """Write the run."""
    layers = tuple(
        MoeLayerSpec(layer=i, module=f"m.{i}", experts=EXPERTS, top_k=TOP_K) for i in range(LAYERS)
    )
    manifest = new_manifest(
        model=ModelSpec(name="synthetic", moe_layers=layers),
        topology=Topology(ranks=shards, ep=min(shards, EXPERTS)),
    )
    with RunWriter.create(path, manifest) as writer, ProcessPoolExecutor(2) as pool:
        fill(writer, steps)
        list(
            pool.map(join, [str(path)] * (shards - 1), range(1, shards), [steps] * (shards - 1), chunksize=16)
        )


def seconds_of(call: object, repeats: int) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()  # type: ignore[operator]
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shards", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    path = given.directory / f"run-{given.shards}-{given.steps}"
    if not path.exists():
        given.directory.mkdir(parents=True, exist_ok=True)
        generate(path, given.shards, given.steps)
    result: dict[str, object] = {
        "shards": given.shards, "steps": given.steps, "layers": LAYERS, "experts": EXPERTS,
        "head_s": seconds_of(lambda: read_head(path), given.repeats),
        "open_s": seconds_of(lambda: open_run(path), given.repeats),
    }  # fmt: skip
    beside = Path(sys.executable).parent / "mpiexec"
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec") or "mpiexec"
    runs: dict[int, list[list[dict[str, object]]]] = {1: [], 2: []}
    whole: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(given.repeats):
        for ranks in (1, 2):
            out = given.directory / "timed"
            launch = [mpiexec, "--allow-run-as-root", "--oversubscribe", "-n", str(ranks)]
            start = time.perf_counter()
            subprocess.run([*launch, sys.executable, "-c", _TIMED, str(path), str(out)], check=True)
            whole[ranks].append(time.perf_counter() - start)
            runs[ranks].append([json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(ranks)])
    for ranks, repeats in runs.items():
        result[f"reduce_{ranks}_s"] = statistics.median(float(str(each[0]["seconds"])) for each in repeats)
        result[f"command_{ranks}_s"] = statistics.median(whole[ranks])
        result[f"peak_{ranks}_mib"] = max(int(str(rank["peak_mib"])) for each in repeats for rank in each)
    result["speedup"] = float(str(result["reduce_1_s"])) / float(str(result["reduce_2_s"]))
    result["equal"] = (
        len({json.dumps(each[0]["document"]) for repeats in runs.values() for each in repeats}) == 1
    )
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
