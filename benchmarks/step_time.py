"""How well layer-steps are predicted before they are run: measured experts and links, and a capture at EP 1.

Shapes: S steps, L layers, P ranks.

For every model and number of ranks, by the commands that a user has:

    bench experts --ep P                             the experts that one rank holds
    bench alltoall --ranks P, fit                    the links
    profile --ep 1, batches of all P ranks together  the loads; `place` makes a placement from them
    predict all layouts and write them down ------------------------------------------- blind until here
    profile --ep P: flat and hierarchical, linear and placed             measured
    the same again in reverse order                                      measured again: the noise

Half of the ranks are one node by name (--ranks-per-node), so that both algorithms can be compared. Of each
layer-step: the layer from the last rank's arrival to its end (the shortest of the ranks' whole layers),
exchanges likewise, experts of the slowest rank. Predicted and measured steps are other tokens of the same
text: medians over steps are compared, layer by layer, with the mean of both measurements; what one of them
says about the other is the noise, and no model can be expected to come closer. Where ranks are more than the
cores, they take turns (``shared_cores``).

    python -m benchmarks.step_time [--models tiny-gqa,tiny-mla] [--ranks 2,4] [--steps 16] [--save FILE]
    python -m benchmarks.step_time --report FILE [FILE ...]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from observatory.analysis.experts import fit_experts, layer_step_times
from observatory.analysis.network import load_network
from observatory.analysis.parallel.placement import load_placement
from observatory.analysis.parallel.step_loads import step_loads
from observatory.analysis.parallel.traffic import fold_sources
from observatory.run import open_run
from observatory.run.documents.expert_bench import load_expert_bench
from observatory.run.exchange_algorithms import Algorithm

#: Bytes that a dispatcher announces to each rank, and sends with a row for each slot that it names.
COUNT_BYTES, SLOT_BYTES = 24, 8
BATCH, SEQUENCE = 8, 128
ALGORITHMS: tuple[Algorithm, ...] = ("flat", "hierarchical")
PHASES = ("prefill", "decode")
#: Part of a layer-step, the spans that it is measured by, and whether the slowest or the last rank counts.
PARTS = {
    "counts": ("count_exchange", False),
    "dispatch": ("dispatch", False),
    "experts": ("experts", True),
    "combine": ("combine", False),
    "total": ("moe_layer", False),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Microseconds of one part of one layer's step, median over steps, predicted and measured twice."""

    model: str
    ranks: int
    algorithm: str
    placement: str
    phase: str
    layer: int
    part: str
    predicted_us: float
    first_us: float = 0.0
    again_us: float = 0.0

    @property
    def measured_us(self) -> float:
        """Mean of both measurements."""
        return (self.first_us + self.again_us) / 2

    @property
    def error(self) -> float:
        """|predicted - measured| / measured."""
        return abs(self.predicted_us / self.measured_us - 1.0)

    @property
    def noise(self) -> float:
        """|again - first| / first."""
        return abs(self.again_us / self.first_us - 1.0)


def observatory(*words: object, codes: tuple[int, ...] = (0,)) -> None:
    """Run a command of the observatory."""
    argv = [sys.executable, "-m", "observatory", *map(str, words)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode not in codes:
        raise SystemExit(f"{' '.join(argv)}: {done.stderr.strip()[-500:]}")
    sys.stderr.write(f"{' '.join(map(str, words[:6]))}: load {os.getloadavg()[0]:.1f}\n")


def prepare(model: str, ranks: int, steps: int, folder: Path) -> None:
    """Everything that predictions are made from."""
    observatory("bench", "experts", model, "--ep", ranks, "--out", folder / "experts.json")
    bench = folder / "bench.json"
    observatory(
        "bench", "alltoall", "--ranks", ranks, "--ranks-per-node", ranks // 2, "--algorithm",
        ",".join(ALGORITHMS), "--sizes", "512,2KiB,8KiB,64KiB,256KiB,1MiB", "--seeds", 2, "--repeats", 9,
        "--out", bench,
    )  # fmt: skip
    observatory("fit", bench, "--out", folder / "network.json", codes=(0, 3))
    observatory(
        "profile", model, "--ep", 1, "--batch-size", BATCH * ranks, "--sequence-length", SEQUENCE, "--steps",
        steps, "--phase", "both", "--out", folder / "capture",
    )  # fmt: skip
    observatory(
        "place", folder / "capture", "--ranks", ranks, "--phase", "prefill", "--out", folder / "placed.json"
    )


def predicted(model: str, ranks: int, folder: Path) -> Iterator[Row]:
    """Medians over steps of every layer and part, for all layouts."""
    cost = fit_experts(load_expert_bench(folder / "experts.json"))
    network = load_network(folder / "network.json")
    run = open_run(folder / "capture")
    specs = run.manifest.model.moe_layers
    nodes = tuple(rank // (ranks // 2) for rank in range(ranks))
    cores = len(os.sched_getaffinity(0))
    for phase in PHASES:
        loads = step_loads(run, phase=phase, by_source=True)
        assert loads.load_SLRE is not None
        load_SLRE = np.stack(
            [fold_sources(loads.load_SLRE[:, at], ranks)[0] for at in range(len(loads.layers))], axis=1
        )
        for placement, algorithm in itertools.product(("linear", "placed"), ALGORITHMS):
            slot_LPK = layout(folder, placement, loads.layers, load_SLRE.shape[3], ranks)
            times = layer_step_times(
                load_SLRE,
                slot_LPK,
                cost,
                network=network,
                node_of_P=nodes,
                algorithm=algorithm,
                dispatch="nearest",
                shared_cores=cores if ranks > cores else None,
                row_extra_bytes=SLOT_BYTES * (1 if algorithm == "flat" else loads.top_k or 1),
                count_bytes=COUNT_BYTES,
                shared_experts=specs[0].shared_experts,
            )
            for (at, layer), part in itertools.product(enumerate(loads.layers), PARTS):
                of_part = getattr(times, f"{part}_s")
                yield Row(
                    model=model, ranks=ranks, algorithm=algorithm, placement=placement, phase=phase,
                    layer=layer, part=part, predicted_us=float(np.median(of_part[:, at])) * 1e6,
                )  # fmt: skip


def layout(
    folder: Path, placement: str, layers: tuple[int, ...], experts: int, ranks: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Experts in the slots of every rank, (L, P, K)."""
    if placement == "linear":
        return np.tile(np.arange(experts).reshape(ranks, -1), (len(layers), 1, 1))
    file = load_placement(folder / "placed.json")
    homes = [file.for_layer(layer, experts=experts, ep=ranks).rank_of_E for layer in layers]
    return np.stack([np.argsort(home_E, kind="stable").reshape(ranks, -1) for home_E in homes])


Key = tuple[str, str, str, int, str]


def measured(model: str, ranks: int, steps: int, folder: Path) -> dict[Key, list[float]]:
    """Medians over steps of both measurements by algorithm, placement, phase, layer and part."""
    result: dict[Key, list[float]] = {}
    layouts = list(itertools.product(("linear", "placed"), ALGORITHMS))
    for number, (placement, algorithm) in enumerate((*layouts, *reversed(layouts))):
        out = folder / f"run-{number}"
        observatory(
            "profile", model, "--ep", ranks, "--ranks-per-node", ranks // 2, "--algorithm", algorithm,
            "--placement", "linear" if placement == "linear" else folder / "placed.json", "--batch-size",
            BATCH, "--sequence-length", SEQUENCE, "--steps", steps, "--phase", "both", "--out", out,
        )  # fmt: skip
        spans = open_run(out).spans()
        spans = spans[spans["layer"].notna()].astype({"layer": int})
        spans["us"] = (spans["end_ns"] - spans["start_ns"]) / 1e3
        keys = ["phase", "layer", "step", "source_rank", "name"]
        wide = spans.groupby(keys)["us"].sum().unstack("source_rank")
        for part, (name, slowest) in PARTS.items():
            of_part = wide.xs(name, level="name")
            us = (
                (of_part.max(axis=1) if slowest else of_part.min(axis=1)).groupby(["phase", "layer"]).median()
            )
            for (phase, layer), value in us.items():
                result.setdefault((algorithm, placement, phase, layer, part), []).append(float(value))
    return result


def report(rows: list[Row]) -> None:
    """The errors, and what they come from."""
    head = (
        f"{'us, median of layers':36} {'phase':8} {'measured':>9} {'predicted':>9} {'error':>6} {'noise':>6}"
    )
    print(f"\n{head}")
    totals = [row for row in rows if row.part == "total"]
    for key, group in grouped(totals, "model", "ranks", "algorithm", "placement", "phase"):
        us, guess = np.median([(row.measured_us, row.predicted_us) for row in group], axis=0)
        noise = np.median([row.noise for row in group])
        name = f"{key[0]} EP {key[1]} {key[2]} {key[3]}"
        print(f"{name:36} {key[4]:8} {us:9.0f} {guess:9.0f} {guess / us - 1:+6.0%} {noise:6.0%}")
    us_of = {identity(row): row.measured_us for row in totals}
    head = f"{'part':9} {'phase':8} {'ranks':>5} {'error':>6} {'p90':>6} {'noise':>6} {'bias':>5}"
    print(f"\n{head} {'missed of the layer':>20}")
    for key, group in grouped(rows, "part", "phase", "ranks"):
        errors = [row.error for row in group]
        bias = np.median([row.predicted_us / row.measured_us for row in group])
        missed = np.median([(row.measured_us - row.predicted_us) / us_of[identity(row)] for row in group])
        print(
            f"{key[0]:9} {key[1]:8} {key[2]:5} {np.median(errors):6.0%} {np.quantile(errors, 0.9):6.0%} "
            f"{np.median([row.noise for row in group]):6.0%} {bias:5.2f} {missed:+20.0%}"
        )
    right = list(orders(totals))
    print(
        f"\nfaster of two layouts over 10 % apart in both measurements: right in {sum(right)} of {len(right)}"
    )


def identity(row: Row) -> tuple[object, ...]:
    """The layer-step that a row is of."""
    return (row.model, row.ranks, row.algorithm, row.placement, row.phase, row.layer)


def grouped(rows: list[Row], *names: str) -> Iterator[tuple[tuple[object, ...], list[Row]]]:
    """Rows that have these in common, in order of appearance."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row, name) for name in names), []).append(row)
    yield from groups.items()


def orders(totals: list[Row]) -> Iterator[bool]:
    """Whether the faster of two layouts of the same model, ranks and phase was predicted to be faster."""
    for _, group in grouped(totals, "model", "ranks", "phase"):
        sums = [
            np.sum([(row.predicted_us, row.first_us, row.again_us) for row in one], axis=0)
            for _, one in grouped(group, "algorithm", "placement")
        ]
        for one, other in itertools.combinations(sums, 2):
            guess, first, again = np.log(one / other)
            if min(abs(first), abs(again)) > np.log(1.1) and (first > 0) == (again > 0):
                yield bool((guess > 0) == (first > 0))


def compared(model: str, ranks: int, steps: int, folder: Path) -> list[Row]:
    """Predict, then measure."""
    folder.mkdir()
    prepare(model, ranks, steps, folder)
    guesses = list(predicted(model, ranks, folder))
    us_of = measured(model, ranks, steps, folder)
    return [
        Row(**{**asdict(row), "first_us": first_us, "again_us": again_us})
        for row in guesses
        for first_us, again_us in [us_of[row.algorithm, row.placement, row.phase, row.layer, row.part]]
    ]


def main() -> None:
    """Predict, measure, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="tiny-gqa,tiny-mla")
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--report", type=Path, nargs="+", help="report saved rows instead of measuring")
    options = parser.parse_args()
    if options.report:
        report([Row(**row) for path in options.report for row in json.loads(path.read_text())])
        return
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        for model, ranks in itertools.product(options.models.split(","), map(int, options.ranks.split(","))):
            rows += compared(model, ranks, options.steps, Path(name) / f"{model}-{ranks}")
    if options.save:
        options.save.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    report(rows)


if __name__ == "__main__":
    main()
