"""How close layouts come to a perfect balance, next to greedy ones and to a bound, and what they cost.

    OMP_NUM_THREADS=1 python benchmarks/placement.py [mean | steps | rules | change] [--seeds 12]

Protocol: generated loads (`analysis.parallel.balancing.families`); no load is measured. ``greedy`` is the
published greedy way, water-filled copies packed largest first, as `greedy_layout` has it. Values are the
busiest rank over the mean, means over layers; seconds are of processor time of one process, of the solver
alone.

* ``mean``: 58 layers of 256 experts, ranks and replicas as in the table.
* ``steps``: 128 experts, 32 ranks, 32 replicas, top-8; popularity and topics walk; layouts are made on 32
  steps and judged on the 32 after them, step by step.
* ``rules``: groups on nodes, speeds, limited moves, activated experts, nodes per token, large layers.
* ``change``: 64 experts, 16 ranks; today's layout is that of the 32 steps before the 32 that are seen; layers
  change where the expected gain exceeds the cost. Regret is against the better of changing and staying.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from observatory.analysis.parallel.balancing import (
    Float64,
    Int64,
    balanced_layout,
    greedy_layout,
    holders,
    lower_bound,
    rank_times,
    steps_layout,
)
from observatory.analysis.parallel.balancing.coactivation import nodes_touched
from observatory.analysis.parallel.balancing.families import (
    POPULARITIES,
    drifting_loads,
    popularity,
    still_loads,
    topic_tokens,
)
from observatory.analysis.parallel.balancing.nodes import node_bound
from observatory.analysis.parallel.balancing.problem import Objective, Problem
from observatory.analysis.parallel.balancing.solving import layout_of_mean, solve

SETTINGS = ((32, 0), (64, 0), (32, 32), (64, 64), (128, 128))


def busiest(load_SLE: Float64, layout: Int64, speed_P: Float64 | None = None) -> float:
    """Mean over steps and layers of the busiest rank over the mean."""
    return float(rank_times(load_SLE, layout, speed_P).max(axis=2).mean())


def timed(make: Callable[..., Int64], *arguments: Any, **options: Any) -> tuple[Int64, float]:
    began_s = time.process_time()
    layout = make(*arguments, **options)
    return layout, time.process_time() - began_s


def solved(problem: Problem) -> Int64:
    return solve(problem).slot_LPK


def stacked(layers: list[Int64]) -> Float64:
    return np.stack(layers, axis=1).astype(np.float64)


def mean_rows() -> Iterator[str]:
    yield "| loads | ranks + replicas | greedy | here | lower bound | CPU s |"
    yield "|---|--:|--:|--:|--:|--:|"
    for ranks, replicas in SETTINGS:
        for case in POPULARITIES:
            load_LE = popularity(case)
            layout, cpu_s = timed(balanced_layout, load_LE, ranks, replicas)
            greedy = busiest(load_LE[None], greedy_layout(load_LE, ranks, replicas))
            bound = lower_bound(load_LE, ranks, replicas).mean()
            here = busiest(load_LE[None], layout)
            yield f"| {case} | {ranks} + {replicas} | {greedy:.3f} | {here:.3f} | {bound:.3f} | {cpu_s:.2f} |"


def step_rows(seeds: int) -> Iterator[str]:
    yield "| drift | tokens per rank | greedy | mean | steps | here | hindsight |"
    yield "|--:|--:|--:|--:|--:|--:|--:|"
    for drift in (0.0, 0.3, 0.6):
        for tokens in (8, 64):
            load_SLE = stacked(
                [drifting_loads(drift, tokens=tokens * 32, seed=seed) for seed in range(seeds)]
            )
            first, after = load_SLE[:32], load_SLE[32:]
            mean_LE = first.mean(axis=0)
            greedy = greedy_layout(mean_LE, 32, 32)
            layouts = (
                greedy,
                balanced_layout(mean_LE, 32, 32),
                steps_layout(first, greedy),
                solve(Problem(load_SLE=first, ranks=32, replicas=32)).slot_LPK,
                steps_layout(after, greedy_layout(after.mean(axis=0), 32, 32)),
            )
            cells = " | ".join(f"{busiest(after, layout):.3f}" for layout in layouts)
            yield f"| {drift:g} | {tokens} | {cells} |"


def rule_rows(seeds: int) -> Iterator[str]:
    yield "| case | greedy | here | bound or aim | CPU s |"
    yield "|---|--:|--:|--:|--:|"
    yield from group_rows()
    yield from speed_rows()
    yield from move_rows()
    loads = [still_loads(1.0, steps=96, seed=seed) for seed in range(2 * seeds)]
    first, after = np.split(stacked(loads), [32])
    problem = Problem(load_SLE=first, ranks=32, objective=Objective.ACTIVE)
    layout, cpu_s = timed(solved, problem)
    scores = [activated(after, one) for one in (greedy_layout(first.mean(axis=0), 32, 0), layout)]
    yield f"| activated experts, 32 ranks, 16 tokens | {scores[0]:.2f} | {scores[1]:.2f} | | {cpu_s:.2f} |"
    for strength in (3.0, 2.0, 0.0):
        yield node_row(strength, seeds)
    load_LE = popularity("zipf 1.0", layers=61, experts=512)
    layout, cpu_s = timed(balanced_layout, load_LE, 512, 512)
    greedy = busiest(load_LE[None], greedy_layout(load_LE, 512, 512))
    here = busiest(load_LE[None], layout)
    yield f"| 61 x 512, 512 + 512, zipf 1.0 | {greedy:.3f} | {here:.3f} | 1.000 | {cpu_s:.2f} |"


def group_rows() -> Iterator[str]:
    everything = []
    for ranks, nodes in ((32, 4), (64, 8)):
        for case in POPULARITIES:
            load_LE = popularity(case)
            problem = Problem(
                load_SLE=load_LE[None],
                ranks=ranks,
                replicas=ranks,
                nodes=nodes,
                groups=8,
                objective=Objective.MEAN,
            )
            layout, cpu_s = timed(layout_of_mean, problem, load_LE)
            greedy = busiest(load_LE[None], layout_of_mean(problem, load_LE, is_greedy=True))
            here = busiest(load_LE[None], layout)
            bound = float(node_bound(load_LE, nodes=nodes, groups=8).mean())
            everything.append((greedy, here, bound))
            yield (
                f"| 8 groups on {nodes} nodes, {ranks} + {ranks}, {case} | {greedy:.3f} | {here:.3f} | "
                f"{bound:.3f} | {cpu_s:.2f} |"
            )
    greedy, here, bound = np.mean(everything, axis=0)
    yield f"| groups, mean of the 14 | {greedy:.3f} | {here:.3f} | {bound:.3f} | |"


def speed_rows() -> Iterator[str]:
    settings = [(ranks, spread, "zipf 0.8") for ranks, spread in ((32, 0.077), (64, 0.277), (128, 0.277))]
    settings += [(128, spread, case) for spread in (0.077, 0.277) for case in ("zipf 1.0", "zipf 1.2")]
    for ranks, spread, case in settings:
        load_LE = popularity(case)
        speed_P = 1 + spread * (np.random.default_rng(0).random(ranks) - 0.5)
        speed_LP = np.tile(speed_P, (len(load_LE), 1))
        layout, cpu_s = timed(balanced_layout, load_LE, ranks, ranks, speed_LP=speed_LP)
        greedy = busiest(load_LE[None], greedy_layout(load_LE, ranks, ranks), speed_P)
        here = busiest(load_LE[None], layout, speed_P)
        yield (
            f"| speeds spread {100 * spread:.1f} %, {ranks} + {ranks}, {case} | {greedy:.3f} | {here:.4f} | "
            f"1.0000 | {cpu_s:.2f} |"
        )


def move_rows() -> Iterator[str]:
    load_LE = popularity("zipf 1.0")
    after_LE = load_LE * np.exp(0.4 * np.random.default_rng(9).standard_normal(load_LE.shape))
    today = greedy_layout(load_LE, 64, 64)
    stay = busiest(after_LE[None], today)
    fresh = greedy_layout(after_LE, 64, 64)
    moves = (holders(fresh, 256) & ~holders(today, 256)).sum(axis=(1, 2)).mean()
    new = busiest(after_LE[None], fresh)
    yield f"| stay; a new greedy layout, {moves:.0f} moves | {new:.3f} | {stay:.3f} | | |"
    for most in (20, 40, 80, 160):
        problem = Problem(
            load_SLE=after_LE[None],
            ranks=64,
            replicas=64,
            current_LPE=holders(today, 256).astype(np.int8),
            max_moves=most,
            objective=Objective.MOVES,
        )
        layout, cpu_s = timed(solved, problem)
        yield f"| at most {most} moves | | {busiest(after_LE[None], layout):.3f} | 1.000 | {cpu_s:.2f} |"


def activated(load_SLE: Float64, layout: Int64) -> float:
    active_SLE = (load_SLE > 0).astype(np.float64)
    mean = active_SLE.sum(axis=2).mean() / layout.shape[1]
    return float(rank_times(active_SLE, layout).max(axis=2).mean() * mean)


def node_row(strength: float, seeds: int) -> str:
    touched, verdicts, spent_s = [], 0, 0.0
    for seed in range(seeds):
        token_TK, step_T = topic_tokens(strength, seed=seed)
        load_SE = np.stack([np.bincount(token_TK[step_T == s].ravel(), minlength=128) for s in range(64)])
        early_T = step_T < 32
        problem = Problem(
            load_SLE=load_SE[:32, None].astype(np.float64),
            ranks=32,
            nodes=4,
            objective=Objective.NODES,
            token_TK=token_TK[early_T],
            token_step_T=step_T[early_T],
        )
        began_s = time.process_time()
        solution = solve(problem)
        spent_s += time.process_time() - began_s
        later = replace(problem, token_TK=token_TK[~early_T], token_step_T=step_T[~early_T])
        layouts = (
            greedy_layout(problem.load_SLE.mean(axis=0), 32, 0),
            solution.slot_LPK,
            solve(later).slot_LPK,
        )
        verdicts += solution.structure is not None and solution.structure.is_there
        row = []
        for layout in layouts:
            node_E = np.empty(128, dtype=np.int64)
            node_E[layout[0].reshape(4, -1)] = np.arange(4)[:, None]
            row.append(nodes_touched(token_TK[~early_T], node_E, 4).mean())
        touched.append(row)
    greedy, here, hindsight = np.mean(touched, axis=0)
    return (
        f"| nodes per token, topics of strength {strength:g} (structure in {verdicts} of {seeds}) | "
        f"{greedy:.2f} | {here:.2f} | {hindsight:.2f} | {spent_s / seeds:.2f} |"
    )


def change_rows(seeds: int) -> Iterator[str]:
    """Layers of one case have one regime; a case has 8."""
    real, expected, promised, greedy = [], [], [], []
    for drift in (0.0, 0.1, 0.2, 0.4, 0.9):
        for tokens in (128, 512, 2048):
            for seed in range(max(1, seeds // 6)):
                layers = [
                    drifting_loads(drift, steps=96, experts=64, tokens=tokens, seed=1000 * seed + layer)
                    for layer in range(8)
                ]
                before, seen, after = np.split(stacked(layers), [32, 64])
                today = solve(Problem(load_SLE=before, ranks=16)).slot_LPK
                held_LPE = holders(today, 64).astype(np.int8)
                solution = solve(Problem(load_SLE=seen, ranks=16, current_LPE=held_LPE))
                fresh = solve(Problem(load_SLE=seen, ranks=16)).slot_LPK
                one, two = (
                    np.stack([rank_times(load, layout).max(axis=2).mean(axis=0) for layout in (today, fresh)])
                    for load in (seen, after)
                )
                assert solution.gain_L is not None
                promised.append(one[0] - one[1])
                real.append(two[0] - two[1])
                expected.append(solution.gain_L)
                other = rank_times(after, greedy_layout(seen.mean(axis=0), 16, 0)).max(axis=2).mean(axis=0)
                greedy.append(two[0] - other)
    real_NL, expected_NL, promised_NL = (np.array(value) for value in (real, expected, promised))
    yield f"cases {len(real_NL)}; real gain {real_NL.mean():.3f}, greedy's {np.mean(greedy):.3f}"
    for name, value in (("expected", expected_NL), ("promised", promised_NL)):
        across = np.corrcoef(value.mean(axis=1), real_NL.mean(axis=1))[0, 1]
        single = np.corrcoef(value.ravel(), real_NL.ravel())[0, 1]
        yield f"{name}: {value.mean():.3f}; correlation of cases {across:.2f}, of layers {single:.2f}"
    yield ""
    yield "| cost | never | always | always, greedy | here | here, a case at a time |"
    yield "|--:|--:|--:|--:|--:|--:|"
    for cost in (0.0, 0.02, 0.05, 0.1, 0.2):
        net = real_NL - cost
        best, chosen = np.maximum(net, 0), np.where(expected_NL > cost, net, 0)
        whole = np.maximum(net.mean(axis=1), 0) - chosen.mean(axis=1)
        cells = [best, best - net, best - (np.array(greedy) - cost), best - chosen, whole]
        yield f"| {cost:g} | " + " | ".join(f"{cell.mean():.4f}" for cell in cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("part", nargs="?", default="mean", choices=["mean", "steps", "rules", "change"])
    parser.add_argument("--seeds", type=int, default=12)
    arguments = parser.parse_args()
    rows = {
        "mean": mean_rows,
        "steps": lambda: step_rows(arguments.seeds),
        "rules": lambda: rule_rows(arguments.seeds),
        "change": lambda: change_rows(arguments.seeds),
    }
    for row in rows[arguments.part]():
        print(row, flush=True)


if __name__ == "__main__":
    main()
