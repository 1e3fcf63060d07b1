"""How well the network model predicts captured traffic at EP degrees that were not in its fit.

The protocol, on links of a known rate (namespaces, needs root) and on loopback:

    benchmark synthetic patterns    EP 3, 5, 6                               goes into the fit
    replay captured matrices        EP 4 (between those), EP 8 (beyond them)  "measured"
    benchmark again                 EP 6, 5, 3                               goes into the fit
    replay again, new processes     EP 8, 4                                  "repeated": the noise
    benchmark                       EP 2                                     a fit of its own, to compare

Benchmarks stand before and after the replays, so that a machine that slows down slows both. No captured
matrix and no measurement at EP 4 or 8 is in a fit. The noise is what one replay says about another of the
same matrix: no model can be expected to come closer. Runs that were captured on as many ranks as are
predicted, with their exchanges, are compared with their own transfer times as well, on loopback.

    python -m benchmarks.network_accuracy RUN [RUN ...] [--links both] [--shaped-mbit 10] [--save DIR]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.network_accuracy_tables import fit_lines, live_lines, replay_lines
from observatory.analysis.network import fit_network
from observatory.analysis.parallel.captured import captured_traffic
from observatory.campaign.benchmark import run_benchmark
from observatory.collectives.bench.measure import alltoall_plan
from observatory.collectives.bench.replay import replay_plan
from observatory.run import Run, open_run
from observatory.run.documents.bench import BenchPlan, BenchResult

FIT_RANKS = (3, 5, 6)
PREDICTED_RANKS = (4, 8)
PATTERNS = ["uniform", "routed", "skewed", "random", "sparse", "empty"]
SIZES_BYTES = [1 << 10, 2 << 10, 4 << 10, 8 << 10, 32 << 10, 128 << 10, 512 << 10]
#: Small packets: one frame at once is then a small part of a decode step's exchange.
MTU_BYTES = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """What joins the ranks, and how often is measured on it.

    Attributes:
        name: for tables.
        rate_mbit: every rank is a host of its own behind a link of this rate; None: loopback.
        repeats: of a benchmark; it is run twice.
        replays: of captured matrices, by phase.
    """

    name: str
    rate_mbit: float | None
    repeats: int
    replays: dict[str, int]

    def measure(self, plan: BenchPlan, ranks: int) -> BenchResult:
        """Run a plan on ranks of its own."""
        if self.rate_mbit is None:
            result = run_benchmark(plan, ranks=ranks, backend="gloo", ranks_per_node=None)
            assert result is not None
            return result
        from tests.analysis.network.shaped import run_on_nodes, shaped_nodes

        with (
            tempfile.TemporaryDirectory() as folder,
            shaped_nodes(ranks, rate_mbit=self.rate_mbit, mtu_bytes=MTU_BYTES, burst_s=0.0) as names,
        ):
            return run_on_nodes(plan, names, ranks_on_node=1, folder=Path(folder), timeout_s=590.0)


@dataclass(slots=True)
class Measured:
    """Everything that was measured on some links.

    Attributes:
        bench: benchmarks by number of ranks.
        replay: first and second replay by number of ranks and phase.
        loads: load averages after every measurement.
    """

    bench: dict[int, list[BenchResult]] = field(default_factory=dict)
    replay: dict[tuple[int, str], list[BenchResult]] = field(default_factory=dict)
    loads: list[float] = field(default_factory=list)

    def note(self, what: str) -> None:
        """Keep the load, and say that something is done."""
        self.loads.append(os.getloadavg()[0])
        sys.stderr.write(f"{what}: load {self.loads[-1]:.1f}\n")


def bench_plan(ranks: int, repeats: int) -> BenchPlan:
    """What the fit sees."""
    return alltoall_plan(
        ranks=ranks,
        sizes_bytes=SIZES_BYTES,
        patterns=PATTERNS,
        algorithms=["flat"],
        seeds=range(2),
        warmup=1,
        repeats=repeats,
        iterations=1,
    )


def captured_plan(runs: Sequence[Run], ranks: int, phase: str, repeats: int) -> BenchPlan:
    """The dispatches of one step of every layer of every run, without uniform companions."""
    captured = (
        item.traffic() for run in runs for item in captured_traffic(run, ep=ranks, phase=phase, steps=1)
    )
    plan = replay_plan(
        captured, algorithms=["flat"], roles=["dispatch"], warmup=1, repeats=repeats, iterations=1
    )
    return plan.model_copy(
        update={"traffic": tuple(item for item in plan.traffic if item.pattern == "captured")}
    )


def measure(links: Links, runs: Sequence[Run]) -> Measured:
    """The protocol above."""
    found = Measured()

    def bench(ranks: int) -> None:
        result = links.measure(bench_plan(ranks, links.repeats), ranks)
        found.bench.setdefault(ranks, []).append(result)
        found.note(f"{links.name}, benchmark at EP {ranks}")

    def replay(ranks: int) -> None:
        for phase, repeats in links.replays.items():
            result = links.measure(captured_plan(runs, ranks, phase, repeats), ranks)
            found.replay.setdefault((ranks, phase), []).append(result)
            found.note(f"{links.name}, {phase} at EP {ranks}")

    for turn in (1, -1):
        for ranks in FIT_RANKS[::turn]:
            bench(ranks)
        for ranks in PREDICTED_RANKS[::turn]:
            replay(ranks)
    bench(2)
    return found


def save(measured: Measured, folder: Path) -> None:
    """Keep the raw results."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"bench-ep{ranks}": results for ranks, results in measured.bench.items()}
    named |= {f"{phase}-ep{ranks}": results for (ranks, phase), results in measured.replay.items()}
    for name, results in named.items():
        for index, result in enumerate(results):
            (folder / f"{name}-{index}.json").write_text(result.model_dump_json())


def main() -> int:
    """Measure, fit, predict, print markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--links", choices=("both", "shaped", "loopback"), default="both")
    parser.add_argument("--shaped-mbit", type=float, default=10.0, help="rate of the shaped links")
    parser.add_argument("--save", type=Path, help="folder for the raw results")
    options = parser.parse_args()
    runs = [open_run(path) for path in options.runs]
    shaped = Links(
        name=f"shaped, {options.shaped_mbit:g} Mbit/s per rank",
        rate_mbit=options.shaped_mbit,
        repeats=4,
        replays={"prefill": 5, "decode": 15},
    )
    loopback = Links(
        name=f"loopback, {os.cpu_count()} cores",
        rate_mbit=None,
        repeats=6,
        replays={"prefill": 15, "decode": 21},
    )
    for links in {"both": (shaped, loopback), "shaped": (shaped,), "loopback": (loopback,)}[options.links]:
        measured = measure(links, runs)
        if options.save:
            save(measured, options.save / ("loopback" if links.rate_mbit is None else "shaped"))
        model = fit_network([result for ranks in FIT_RANKS for result in measured.bench[ranks]])
        alone = fit_network(measured.bench[2])
        print(f"\n{links.name}; load average {min(measured.loads):.1f} to {max(measured.loads):.1f}\n")
        print("\n".join(fit_lines(model)), end="\n\n")
        print("\n".join(replay_lines(model, measured.replay, fitted_to="EP 3, 5, 6")), end="\n\n")
        print("\n".join(replay_lines(alone, measured.replay, fitted_to="EP 2 alone", only_all=True)))
        if links.rate_mbit is None:
            for run in runs:
                if run.manifest.topology.ranks in PREDICTED_RANKS:
                    print("\n".join(["", *live_lines(model, run)]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
