"""How close layouts come to a perfect balance, next to greedy ones and to a bound, and what they cost.

    OMP_NUM_THREADS=1 python benchmarks/placement.py [--steps] [--seeds 12]

Protocol: 58 layers of 256 experts with loads of seven families (Zipf popularity in random order, log-normal,
Dirichlet), ranks and replicas as in the table. ``greedy`` is the published greedy way, water-filled copies
packed largest first, as `greedy_layout` has it. Values are the busiest rank over the mean, means over layers;
seconds are of processor time of one process, of `balanced_layout` alone. No load is measured: families stand
for what a model may do.

With ``--steps``: 128 experts, 32 ranks, 32 replicas, top-8; popularity walks with a correlation time of 50
steps and topics that move experts together; layouts are made on 32 steps and judged on the 32 after them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from observatory.analysis.parallel.balancing import (
    Float64,
    Int64,
    balanced_layout,
    greedy_layout,
    lower_bound,
    rank_loads,
    steps_layout,
)
from tests.analysis.parallel.test_balancing import CASES, drifting, loads_of, ratio

SETTINGS = ((32, 0), (64, 0), (32, 32), (64, 64), (128, 128))


def mean_rows() -> Iterator[str]:
    yield "| loads | ranks + replicas | greedy | here | lower bound | CPU s |"
    yield "|---|--:|--:|--:|--:|--:|"
    for ranks, replicas in SETTINGS:
        for case in CASES:
            load_LE = loads_of(case)
            began = time.process_time()
            layout = balanced_layout(load_LE, ranks, replicas)
            seconds = time.process_time() - began
            greedy = ratio(load_LE, greedy_layout(load_LE, ranks, replicas)).mean()
            bound = lower_bound(load_LE, ranks, replicas).mean()
            here = ratio(load_LE, layout).mean()
            yield (
                f"| {case} | {ranks} + {replicas} | {greedy:.3f} | {here:.3f} | {bound:.3f} | {seconds:.2f} |"
            )


def on_steps(load_SLE: Float64, layout: Int64) -> float:
    load_SLP = rank_loads(load_SLE, layout)
    return float((load_SLP.max(axis=2) / load_SLP.mean(axis=2)).mean())


def step_rows(seeds: int) -> Iterator[str]:
    yield "| drift | tokens per rank | greedy | mean | steps, from greedy | steps, from mean | hindsight |"
    yield "|--:|--:|--:|--:|--:|--:|--:|"
    for drift in (0.0, 0.3, 0.6):
        for tokens in (8, 64):
            scores = []
            for seed in range(seeds):
                load_SLE = drifting(seed, drift, tokens=tokens * 32)[:, None].astype(np.float64)
                first, after = load_SLE[:32], load_SLE[32:]
                greedy, best = (make(first.mean(axis=0), 32, 32) for make in (greedy_layout, balanced_layout))
                layouts = (
                    greedy,
                    best,
                    steps_layout(first, greedy),
                    steps_layout(first, best),
                    steps_layout(after, greedy_layout(after.mean(axis=0), 32, 32)),
                )
                scores.append([on_steps(after, layout) for layout in layouts])
            cells = " | ".join(f"{value:.3f}" for value in np.mean(scores, axis=0))
            yield f"| {drift:g} | {tokens} | {cells} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--seeds", type=int, default=12)
    arguments = parser.parse_args()
    for row in step_rows(arguments.seeds) if arguments.steps else mean_rows():
        print(row, flush=True)


if __name__ == "__main__":
    main()
