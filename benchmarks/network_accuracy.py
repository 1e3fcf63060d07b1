"""How well the network model predicts captured traffic that was not in its fit, at another EP degree.

Fits on synthetic patterns at EP 2 and EP 4, and separately on EP 2 alone; predicts the captured matrices of
runs replayed at EP 4. Synthetic and captured matrices of EP 4 are measured in the same rounds, so that both
meet the machine in the same state. With ``--shaped-mbit`` every rank gets a network namespace of its own
behind links of that rate (needs root); without, all ranks share this host over loopback.

    python -m benchmarks.network_accuracy RUN [RUN ...] [--shaped-mbit 100] [--save DIR]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import pandas as pd

from collectives.bench import alltoall_plan
from collectives.replay import replay_plan
from observatory.campaign.benchmark import run_benchmark
from observatory.cost import fit_network
from observatory.cost.checking import check_predictions
from observatory.parallel.captured import captured_traffic
from observatory.records_bench import BenchPlan, BenchResult
from observatory.store import open_run

PATTERNS = ["uniform", "skewed", "hot", "random", "sparse", "one-sided", "empty"]
SIZES_BYTES = [2 << 10, 16 << 10, 128 << 10, 512 << 10, 1 << 20]


def measure(plan: BenchPlan, ranks: int, shaped_mbit: float | None) -> BenchResult:
    """Run a plan on local ranks, or on ranks in namespaces."""
    if shaped_mbit is None:
        result = run_benchmark(plan, ranks=ranks, backend="gloo", ranks_per_node=None)
        assert result is not None
        return result
    from tests.cost.shaped import run_on_nodes, shaped_nodes

    with tempfile.TemporaryDirectory() as folder, shaped_nodes(ranks, rate_mbit=shaped_mbit) as names:
        return run_on_nodes(plan, names, ranks_on_node=1, folder=Path(folder), timeout_s=590.0)


def synthetic(ranks: int, repeats: int, iterations: int) -> BenchPlan:
    """The benchmark that the fit sees."""
    return alltoall_plan(
        ranks=ranks,
        sizes_bytes=SIZES_BYTES,
        patterns=PATTERNS,
        algorithms=["flat"],
        seeds=range(2),
        warmup=1,
        repeats=repeats,
        iterations=iterations,
    )


def table(checked: pd.DataFrame) -> list[str]:
    """Markdown rows per kind of traffic."""
    lines = []
    checked = checked.assign(ratio=checked["predicted_us"] / checked["measured_us"])
    checked["inside"] = (checked["measured_us"] >= checked["low_us"]) & (
        checked["measured_us"] <= checked["high_us"]
    )
    groups = [(key, group) for key, group in checked.groupby(["pattern", "phase"])]
    groups.append((("captured", "all"), checked[checked["pattern"] == "captured"]))
    for (pattern, phase), group in groups:
        lines.append(
            f"| {pattern} | {phase} | {len(group)} | {group['measured_us'].median():.0f} "
            f"| {group['error'].median():.1%} | {group['error'].quantile(0.9):.1%} "
            f"| {group['ratio'].median():.2f} | {group['inside'].mean():.0%} |"
        )
    return lines


def main() -> int:
    """Measure, fit, predict, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--shaped-mbit", type=float)
    parser.add_argument("--steps", type=int, default=2, help="steps of each phase")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--save", type=Path, help="folder for the raw results")
    options = parser.parse_args()
    at_two = measure(synthetic(2, options.repeats, options.iterations), 2, options.shaped_mbit)
    plan = synthetic(4, options.repeats, options.iterations)
    for path in options.runs:
        run = open_run(path)
        captured = captured_traffic(run, ep=4, steps=options.steps)
        replay = replay_plan((item.traffic() for item in captured), algorithms=["flat"], roles=["dispatch"])
        plan = plan.model_copy(update={"traffic": (*plan.traffic, *replay.traffic)})
    both = measure(plan, 4, options.shaped_mbit)
    cases = both.cases
    at_four = both.model_copy(update={"cases": tuple(case for case in cases if case.role is None)})
    replayed = both.model_copy(update={"cases": tuple(case for case in cases if case.role is not None)})
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        for name, result in (("ep2", at_two), ("ep4", at_four), ("replayed", replayed)):
            (options.save / f"{name}.json").write_text(result.model_dump_json())
    for name, seen in (("EP 2 alone", [at_two]), ("synthetic patterns at EP 2 and EP 4", [at_two, at_four])):
        model = fit_network(seen)
        fit = model.of("flat")
        print(f"\nFit on {name}: form {fit.form}, {fit.cases} matrices; held-out error of each form:")
        print(", ".join(f"{score.form} {score.median_error:.1%}" for score in fit.scores))
        print("\n| traffic | phase | matrices | measured us | median error | p90 | bias | in interval |")
        print("|---|---|---:|---:|---:|---:|---:|---:|")
        print("\n".join(table(check_predictions(model, replayed))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
