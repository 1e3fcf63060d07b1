"""How well the network model predicts unseen matrices on links whose rates are drawn at random.

Every rank is a network namespace behind a token bucket (needs root). The kind, the number of ranks and the
rates of a set-up are drawn by its seed: all links alike; one rate up and another down; one rank slower, both
ways or one; two tiers, groups of ranks that share a slower link to each other. All patterns of `bench
alltoall` go into the fit; matrices of other seeds and sizes, measured in processes of their own afterwards,
are predicted.

    python -m benchmarks.network_links [--setups 24] [--first-seed 1000] [--save DIR]
    python -m benchmarks.network_links --saved DIR          # from the files that --save kept
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from observatory.analysis.network import fit_network
from observatory.analysis.network.checking import check_predictions
from observatory.collectives.bench.measure import alltoall_plan
from observatory.collectives.bench.patterns import PATTERNS
from observatory.run.documents.bench import BenchPlan, BenchResult, load_bench

KINDS = ("equal", "asymmetric", "one slow rank", "two tiers")
MTU_BYTES = 1500
FIT_BYTES = (8 << 10, 32 << 10, 96 << 10)
UNSEEN_BYTES = (16 << 10, 64 << 10)
UNSEEN_PATTERNS = ("routed", "random", "skewed", "sparse", "hot")


@dataclass(frozen=True, slots=True, kw_only=True)
class SetUp:
    """Links drawn at random, 10^6 bits per second; ``slow``: the rank with links of its own, up and down."""

    kind: str
    ranks: int
    up_mbit: float
    down_mbit: float
    slow: tuple[int, float, float] | None = None
    together: int = 1
    uplink_mbit: float | None = None

    @property
    def name(self) -> str:
        """For tables."""
        return (
            f"{self.kind}, {self.ranks} ranks, {self.up_mbit:.0f} / {self.down_mbit:.0f} Mbit/s"
            + (f", rank {self.slow[0]} {self.slow[1]:.0f} / {self.slow[2]:.0f}" if self.slow else "")
            + (f", {self.together} together, {self.uplink_mbit:.0f} between" if self.uplink_mbit else "")
        )


def draw(seed: int) -> SetUp:
    """The set-up of a seed; kinds follow one another."""
    generator = np.random.default_rng(seed)
    kind = KINDS[seed % len(KINDS)]
    up = float(np.exp(generator.uniform(np.log(15), np.log(40))))
    factor = float(np.exp(generator.uniform(np.log(1.5), np.log(5))))
    ranks = int(generator.integers(2, 7))
    if kind == "asymmetric":
        rates = generator.permutation([up, up / factor])
        return SetUp(kind=kind, ranks=ranks, up_mbit=float(rates[0]), down_mbit=float(rates[1]))
    if kind == "one slow rank":
        own = ((up / factor, up / factor), (up / factor, up), (up, up / factor))[generator.integers(3)]
        slow = (int(generator.integers(ranks)), *own)
        return SetUp(kind=kind, ranks=ranks, up_mbit=up, down_mbit=up, slow=slow)
    if kind == "two tiers":
        ranks, together = ((4, 2), (6, 2), (6, 3))[generator.integers(3)]
        return SetUp(
            kind=kind, ranks=ranks, up_mbit=up, down_mbit=up, together=together, uplink_mbit=up / factor
        )
    return SetUp(kind=kind, ranks=ranks, up_mbit=up, down_mbit=up)


def plan(setup: SetUp, patterns: Sequence[str], sizes_bytes: Sequence[int], seeds: range) -> BenchPlan:
    """Exchanges of so many ranks."""
    return alltoall_plan(
        ranks=setup.ranks,
        sizes_bytes=sizes_bytes,
        patterns=patterns,
        algorithms=["flat"],
        seeds=seeds,
        warmup=1,
        repeats=11,
    )


def measure(setup: SetUp) -> tuple[BenchResult, BenchResult]:
    """What is fitted, and what is predicted."""
    from tests.analysis.network.shaped import Link, run_on_nodes, shaped_nodes

    others = {setup.slow[0]: Link(up_mbit=setup.slow[1], down_mbit=setup.slow[2])} if setup.slow else {}
    usual = Link(up_mbit=setup.up_mbit, down_mbit=setup.down_mbit)
    uplink = None
    if setup.uplink_mbit is not None:
        uplink = Link(up_mbit=setup.uplink_mbit, down_mbit=setup.uplink_mbit)
    with (
        tempfile.TemporaryDirectory() as folder,
        shaped_nodes(
            setup.ranks,
            rate_mbit=setup.up_mbit,
            mtu_bytes=MTU_BYTES,
            burst_s=0.0,
            others=dict.fromkeys(range(setup.ranks), usual) | others,
            together=setup.together,
            uplink=uplink,
        ) as names,
    ):
        first, second = (
            run_on_nodes(
                exchanges,
                names,
                ranks_on_node=1,
                folder=Path(folder),
                timeout_s=280.0,
                ranks_per_node=setup.together,
            )
            for exchanges in (
                plan(setup, tuple(PATTERNS), FIT_BYTES, range(2)),
                plan(setup, UNSEEN_PATTERNS, UNSEEN_BYTES, range(100, 103)),
            )
        )
    return first, second


def checked(fitted: BenchResult, unseen: BenchResult) -> pd.DataFrame:
    """Unseen matrices against a fit of the others."""
    found = check_predictions(fit_network([fitted]), unseen)
    found["inside"] = found["measured_us"].between(found["low_us"], found["high_us"])
    return found


def row(name: str, setups: int, found: pd.DataFrame) -> str:
    """A row of the table."""
    error = found["error"]
    return (
        f"| {name} | {setups} | {len(found)} | {error.median():.1%} | {error.quantile(0.9):.1%} "
        f"| {found['inside'].mean():.0%} |"
    )


def main() -> int:
    """Measure or read, fit, predict, print markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setups", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=1000)
    parser.add_argument("--save", type=Path, help="folder for the raw results")
    parser.add_argument("--saved", type=Path, help="folder of raw results to use instead of measuring")
    options = parser.parse_args()
    frames: list[pd.DataFrame] = []
    for seed in range(options.first_seed, options.first_seed + options.setups):
        setup = draw(seed)
        if options.saved:
            results = tuple(load_bench(options.saved / f"{seed}-{name}.json") for name in ("fit", "unseen"))
        else:
            results = measure(setup)
        if options.save:
            options.save.mkdir(parents=True, exist_ok=True)
            for name, result in zip(("fit", "unseen"), results, strict=True):
                (options.save / f"{seed}-{name}.json").write_text(result.model_dump_json())
        found = checked(*results).assign(kind=setup.kind)
        sys.stderr.write(f"{setup.name}: median error {found['error'].median():.1%}\n")
        frames.append(found)
    print("| links | set-ups | matrices | median error | p90 | in the 90 % interval |")
    print("|---|---|---|---|---|---|")
    for kind in KINDS:
        own = [frame for frame in frames if frame["kind"].iloc[0] == kind]
        if own:
            print(row(kind, len(own), pd.concat(own)))
    print(row("all", len(frames), pd.concat(frames)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
