"""How well the closed forms predict route, fetch and local, and how often they pick the faster one.

Two hosts or more (network namespaces, needs root) joined by links of a known rate, one rank on each. Every
point is predicted by a fit that did not see it (five folds); the options of a point are compared where their
measured costs differ by more than 10 %.

    python -m benchmarks.route_fetch_accuracy [--rates-mbit 50 200] [--points 96] [--repeats 7] [--save DIR]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from observatory.analysis.route_fetch.fitting import hold_out_points
from observatory.cli.parsing import parse_shape
from observatory.collectives.bench.route_fetch_plan import route_fetch_plan
from observatory.run.documents.route_fetch import Option, RouteFetchResult, load_route_fetch
from tests.analysis.network.shaped import run_ranks, shaped_nodes

#: A bucket of one small frame: what passes a larger one at once would look like a trip of no time.
MTU_BYTES = 1500
SHAPES = ("mla:4,128,32", "gqa:8,2,64", "mha:4,64", "sparse:4,128,32,128", "expert:256")


def measure(rate_mbit: float, hosts: int, points: int, repeats: int, folder: Path) -> Path:
    """One rank on each host, all behind links of a rate."""
    plan = route_fetch_plan(
        [parse_shape(text) for text in SHAPES],
        points=points,
        rows=(8, 800),
        sizes=(8, 800),
        layers=(1, 3),
        warmup=1,
        repeats=repeats,
    )
    with shaped_nodes(hosts, rate_mbit=rate_mbit, mtu_bytes=MTU_BYTES, burst_s=0.0) as names:
        return run_ranks(plan, names, ranks_on_node=1, folder=folder, timeout_s=580.0)


def percent(share: float | None) -> str:
    """A share, or a dash where there is none."""
    return "-" if share is None else f"{100 * share:.1f} %"


def lines(name: str, result: RouteFetchResult) -> list[str]:
    """A row for each shape: errors on both sides of the knee, and how often the pick is right."""
    rows = []
    for index, shape in enumerate(result.shapes):
        held_out = hold_out_points(result, index)
        both: tuple[Option, ...] = ("route", "fetch")
        predicted, measured, apart, regret = held_out.winners(both)
        right = predicted == measured
        knee, above = held_out.knee_bytes, int((held_out.above_N & held_out.of(both)).sum())
        rows.append(
            f"| {name} | {shape.name} | {'-' if knee is None else f'{knee / 1e3:.1f} kB'} | "
            f"{percent(held_out.mape(both, above=True))} ({above}) | "
            f"{percent(held_out.mape(both, above=False))} | "
            f"{int(right[apart].sum())} of {int(apart.sum())} | {int(right.sum())} of {len(right)} | "
            f"{int((measured == 0).sum())} / {int((measured == 1).sum())} | {percent(float(regret.mean()))} |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rates-mbit", type=float, nargs="+", default=[50.0, 200.0])
    parser.add_argument("--hosts", type=int, default=2, help="one asks, the others hold")
    parser.add_argument("--points", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    table = [
        "| link | shape | knee | MAPE above (cases) | MAPE below | right where > 10 % apart | right in all | "
        "route / fetch faster | time lost |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for rate_mbit in options.rates_mbit:
        with tempfile.TemporaryDirectory() as folder:
            path = measure(rate_mbit, options.hosts, options.points, options.repeats, Path(folder))
            result = load_route_fetch(path)
            if options.save is not None:
                (options.save / f"route-fetch-{rate_mbit:g}.json").write_bytes(path.read_bytes())
        sys.stderr.write(f"{rate_mbit:g} Mbit/s: load {os.getloadavg()[0]:.1f}\n")
        table += lines(f"{rate_mbit:g} Mbit/s", result)
    sys.stdout.write("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
