"""How well a plan predicts steps of this machine that it has not seen: bundled models at EP 1, 2 and 4.

For every model, by the commands that a user has:

    bench experts                                    its experts
    bench alltoall --ranks 2, 4, fitted              the links
    profile, batches of 2 and 16 sequences, EP 1     loads, and the rest of a step
    profile, a batch of 8 sequences per rank, EP 1, 2 and 4      what is predicted

Predicted and measured are ms per step (of decode: per token of a user) and tokens per second of all ranks;
measured steps count with their median, as single steps of a shared machine take many times as long.

    python -m benchmarks.plan_accuracy [--models tiny-gqa,tiny-mla] [--ranks 1,2,4] [--save FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from observatory.advice.capacity.routing import captured_routing, routed
from observatory.analysis.capacity.measured import MeasuredServer
from observatory.analysis.capacity.model_shape import model_shape
from observatory.analysis.capacity.step import Parallel, Work
from observatory.analysis.experts import fit_experts
from observatory.analysis.network.network import load_network
from observatory.run import open_run
from observatory.run.documents.expert_bench import load_expert_bench

SEQUENCE, STEPS, BATCH = 64, 24, 8
LEARNT_BATCHES = (2, 16)
MODELS = "tiny-mla,tiny-mha,tiny-gqa,tiny-mamba2,tiny-gdn"


def call(folder: Path, *words: object) -> None:
    """One command of the observatory."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "observatory", *map(str, words)]
    code = subprocess.run(
        argv, check=False, cwd=folder, env=environment, stdout=subprocess.DEVNULL
    ).returncode
    # A network model that is not to be relied on is written, and ends with 3: a machine may have no better.
    if code not in ((0, 3) if words[0] == "fit" else (0,)):
        raise SystemExit(f"{' '.join(argv)} ended with {code}")


def profile(folder: Path, model: str, *, ranks: int, batch: int) -> Path:
    """A run of both phases."""
    out = folder / f"{model}-ep{ranks}-b{batch}"
    sizes = ["--batch-size", batch, "--sequence-length", SEQUENCE, "--steps", STEPS]
    call(folder, "profile", model, "--out", out, "--ep", ranks, *sizes, "--phase", "both")
    return out


def step_ms(path: Path, phase: str) -> float:
    """Median over steps of the slowest rank's duration."""
    spans = open_run(path).spans()
    spans = spans[(spans["name"] == "phase") & (spans["phase"] == phase)]
    ms = (spans["end_ns"] - spans["start_ns"]) / 1e6
    return float(ms.groupby(spans["step"]).max().median())


def rows_of(folder: Path, model: str, ranks: list[int]) -> Iterator[dict[str, Any]]:
    """Predicted and measured steps of one model."""
    call(folder, "bench", "experts", model, "--out", f"{model}-experts.json")
    learnt = [open_run(profile(folder, model, ranks=1, batch=batch)) for batch in LEARNT_BATCHES]
    shape = model_shape(dict(learnt[0].manifest.model.config or {}))
    loads = routed("captured", shape, captured_routing(learnt, shape))
    experts = fit_experts(load_expert_bench(folder / f"{model}-experts.json"))
    server = MeasuredServer(shape, learnt, experts, load_network(folder / "fit.json"))
    for count in ranks:
        parallel = Parallel(
            ranks=count, tp=1, slots=shape.moe.experts // count, gpus_per_node=server.gpus_per_domain
        )
        # Predicted before it is measured.
        work = {
            "decode": Work(decode=BATCH, context=SEQUENCE),
            "prefill": Work(decode=0, context=0, prefill=BATCH * SEQUENCE, prompt=SEQUENCE),
        }
        steps = {phase: server.step(parallel, item, loads) for phase, item in work.items()}
        path = profile(folder, model, ranks=count, batch=BATCH)
        for phase, step in steps.items():
            measured_ms = step_ms(path, phase)
            fast_ms, likely_ms, slow_ms = (1e3 * step.s_3).tolist()
            tokens = work[phase].tokens * count
            yield {
                "model": model,
                "ep": count,
                "phase": phase,
                "measured_ms": measured_ms,
                "plan_ms": likely_ms,
                "fast_ms": fast_ms,
                "slow_ms": slow_ms,
                "ratio": likely_ms / measured_ms,
                "inside": fast_ms <= measured_ms <= slow_ms,
                "measured_tokens_per_s": 1e3 * tokens / measured_ms,
                "plan_tokens_per_s": 1e3 * tokens / likely_ms,
            }


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    ranks = [int(text) for text in arguments.ranks.split(",")]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in (2, 4):
            call(folder, "bench", "alltoall", "--ranks", count, "--repeats", 7, "--out", f"a2a{count}.json")
        call(folder, "fit", "a2a2.json", "a2a4.json", "--out", "fit.json")
        print(
            "| model | EP | phase | measured ms | plan ms (fast to slow) | ratio | tokens/s: measured, plan |"
        )
        print("|---|--:|---|--:|--:|--:|--:|")
        for model in arguments.models.split(","):
            for row in rows_of(folder, model, ranks):
                rows.append(row)
                print(
                    f"| {row['model']} | {row['ep']} | {row['phase']} | {row['measured_ms']:.1f} | "
                    f"{row['plan_ms']:.1f} ({row['fast_ms']:.1f} to {row['slow_ms']:.1f}) | "
                    f"{row['ratio']:.2f} | {row['measured_tokens_per_s']:.0f}, "
                    f"{row['plan_tokens_per_s']:.0f} |",
                    flush=True,
                )
    if arguments.save:
        arguments.save.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
