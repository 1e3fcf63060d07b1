"""How well layer-steps are predicted before they are run: measured experts and links, and a capture at EP 1.

Shapes: S steps, L layers, P ranks.

For every model and number of ranks, by the commands that a user has:

    bench experts --ep P, on all cores at once       the experts that one rank holds
    bench alltoall --ranks P, fitted                 the links
    profile --ep 1, batches of all P ranks together  the loads; `place` makes a placement from them
    profile --ep P: flat and hierarchical, linear and placed    "measured"
    both benchmarks again
    profile --ep P again, in reverse order                      measured again

Half of the ranks are one node by name (--ranks-per-node), so that both algorithms can be compared. Of each
layer-step: the layer from the last rank's arrival to its end (the shortest of the ranks' whole layers),
exchanges likewise, experts of the slowest rank. Predicted and measured steps are other tokens of the same
text: they are compared layer by layer, at the first quartile of benchmarks' repeats and of measured steps, as
other programs disturb the rest. Nothing of a measured run is in its prediction. Benchmarks and runs are
repeated, so that a machine that drifts does so for both, and means of both are compared. What a measurement
says about the other is the noise, what a prediction says about the other the drift; no model can be expected
to come closer. Where ranks are more than the cores, they take turns (``shared_cores``).

    python -m benchmarks.step_time [--models tiny-gqa,tiny-mla] [--ranks 2,4] [--steps 12] [--save FILE]
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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from observatory.analysis.experts import fit_experts, layer_step_times
from observatory.analysis.network import fit_network
from observatory.analysis.parallel.placement import load_placement
from observatory.analysis.parallel.step_loads import step_loads
from observatory.analysis.parallel.traffic import fold_sources
from observatory.run import open_run
from observatory.run.documents.bench import BenchResult, load_bench
from observatory.run.documents.expert_bench import ExpertBench, load_expert_bench
from observatory.run.exchange_algorithms import Algorithm

#: Bytes that a dispatcher announces to each rank, and sends with a row for each slot that it names.
COUNT_BYTES, SLOT_BYTES = 24, 8
BATCH, SEQUENCE = 8, 128
CAPTURED_STEPS = 16
#: Of repeats and of steps the fastest quarter is compared: other programs on the machine disturb the rest.
QUIET = 0.25
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
#: What is left of the layer: local work and shared experts, which have no spans of their own. Spans of
#: exchanges include packing rows, which is predicted as local.
REST = "rest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Microseconds of one part of one layer's step, predicted and measured twice."""

    model: str
    ranks: int
    algorithm: str
    placement: str
    phase: str
    layer: int
    part: str
    guess_us: float
    guess_again_us: float = 0.0
    first_us: float = 0.0
    again_us: float = 0.0

    @property
    def predicted_us(self) -> float:
        """Mean of the predictions from both benchmarks."""
        return (self.guess_us + self.guess_again_us) / 2

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

    @property
    def drift(self) -> float:
        """|prediction again - prediction| / prediction."""
        return abs(self.guess_again_us / self.guess_us - 1.0)


def observatory(*commands: Sequence[object]) -> None:
    """Run commands of the observatory at the same time."""
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "observatory", *map(str, words)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for words in commands
    ]
    for process, words in zip(running, commands, strict=True):
        _, errors = process.communicate()
        if process.returncode:
            raise SystemExit(f"observatory {' '.join(map(str, words))}: {errors.strip()[-500:]}")
    sys.stderr.write(f"{' '.join(map(str, commands[0][:6]))}: load {os.getloadavg()[0]:.1f}\n")


def benchmark(model: str, ranks: int, folder: Path) -> None:
    """Measure experts and links."""
    folder.mkdir()
    together = min(ranks, len(os.sched_getaffinity(0)))
    observatory(
        *(
            ("bench", "experts", model, "--ep", ranks, "--out", folder / f"experts-{number}.json")
            for number in range(together)
        )
    )
    observatory((
        "bench", "alltoall", "--ranks", ranks, "--ranks-per-node", ranks // 2, "--algorithm",
        ",".join(ALGORITHMS), "--sizes", "512,2KiB,8KiB,64KiB,512KiB,2MiB", "--seeds", 2, "--repeats", 9,
        "--out", folder / "bench.json",
    ))  # fmt: skip


def capture(model: str, ranks: int, folder: Path) -> None:
    """Loads of all ranks' tokens on one rank, and a placement made from them."""
    observatory((
        "profile", model, "--ep", 1, "--batch-size", BATCH * ranks, "--sequence-length", SEQUENCE, "--steps",
        CAPTURED_STEPS, "--phase", "both", "--out", folder / "capture",
    ))  # fmt: skip
    observatory(
        ("place", folder / "capture", "--ranks", ranks, "--phase", "prefill", "--out", folder / "placed.json")
    )


def predicted(model: str, ranks: int, folder: Path, benches: Path) -> Iterator[Row]:
    """Every layer and part, median over steps, for all layouts."""
    cost = fit_experts(quiet_experts(load_expert_bench(benches / "experts-0.json")))
    network = fit_network([quiet_exchanges(load_bench(benches / "bench.json"))])
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
            assert times.total_s is not None
            assert times.local_s is not None
            assert times.shared_s is not None
            for (at, layer), part in itertools.product(enumerate(loads.layers), (*PARTS, REST)):
                of_part = times.local_s + times.shared_s if part == REST else getattr(times, f"{part}_s")
                yield Row(
                    model=model, ranks=ranks, algorithm=algorithm, placement=placement, phase=phase,
                    layer=layer, part=part, guess_us=float(np.median(of_part[:, at])) * 1e6,
                )  # fmt: skip


def quiet_experts(bench: ExpertBench) -> ExpertBench:
    """The first quartile of the repeats of every point."""
    parts = ("points", "shared_points", "local_points")
    quiet = {
        part: tuple(
            point.model_copy(update={"us_R": (float(np.quantile(point.us_R, QUIET)),)})
            for point in getattr(bench, part)
        )
        for part in parts
    }
    return bench.model_copy(update=quiet)


def quiet_exchanges(bench: BenchResult) -> BenchResult:
    """The fastest half of the repeats of every matrix, whose median is the first quartile of all."""
    cases = []
    for case in bench.cases:
        kept_R = np.argsort(case.exchange_us_R)[: max(1, round(2 * QUIET * len(case.rank_us_RP)))]
        waits = case.wait_us_RP
        kept = {
            "rank_us_RP": tuple(case.rank_us_RP[at] for at in kept_R),
            "wait_us_RP": None if waits is None else tuple(waits[at] for at in kept_R),
        }
        cases.append(case.model_copy(update=kept))
    return bench.model_copy(update={"cases": tuple(cases)})


def layout(
    folder: Path, placement: str, layers: tuple[int, ...], experts: int, ranks: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Experts in the slots of every rank, (L, P, K)."""
    if placement == "linear":
        return np.tile(np.arange(experts).reshape(ranks, -1), (len(layers), 1, 1))
    file = load_placement(folder / "placed.json")
    homes = [file.for_layer(layer, experts=experts, ep=ranks).rank_of_E for layer in layers]
    return np.stack([np.argsort(home_E, kind="stable").reshape(ranks, -1) for home_E in homes])


def measured(
    model: str, ranks: int, steps: int, folder: Path, *, backwards: bool
) -> dict[tuple[str, str, str, int, str], float]:
    """First quartiles over steps by algorithm, placement, phase, layer and part."""
    result: dict[tuple[str, str, str, int, str], float] = {}
    layouts = list(itertools.product(("linear", "placed"), ALGORITHMS))
    for placement, algorithm in reversed(layouts) if backwards else layouts:
        out = folder / f"{algorithm}-{placement}{'-again' if backwards else ''}"
        observatory((
            "profile", model, "--ep", ranks, "--ranks-per-node", ranks // 2, "--algorithm", algorithm,
            "--placement", "linear" if placement == "linear" else folder / "placed.json", "--batch-size",
            BATCH, "--sequence-length", SEQUENCE, "--steps", steps, "--phase", "both", "--out", out,
        ))  # fmt: skip
        spans = open_run(out).spans()
        spans = spans[spans["layer"].notna()].astype({"layer": int})
        spans["us"] = (spans["end_ns"] - spans["start_ns"]) / 1e3
        keys = ["phase", "layer", "step", "source_rank", "name"]
        wide = spans.groupby(keys)["us"].sum().unstack("source_rank")
        of_part = {}
        for part, (name, slowest) in PARTS.items():
            of_rank = wide.xs(name, level="name")
            of_part[part] = of_rank.max(axis=1) if slowest else of_rank.min(axis=1)
        of_part[REST] = 2 * of_part["total"] - sum(of_part.values())
        for part, of_step in of_part.items():
            us = of_step.groupby(["phase", "layer"]).quantile(QUIET)
            for (phase, layer), value in us.items():
                result[algorithm, placement, phase, layer, part] = float(value)
    return result


def report(rows: list[Row]) -> None:
    """The errors, and what they come from."""
    head = f"{'us, median of layers':36} {'phase':7} {'measured':>8} {'predicted':>9} {'error':>6}"
    print(f"\n{head} {'noise':>6} {'drift':>5}")
    totals = [row for row in rows if row.part == "total"]
    for key, group in grouped(totals, "model", "ranks", "algorithm", "placement", "phase"):
        us, guess = np.median([(row.measured_us, row.predicted_us) for row in group], axis=0)
        noise, drift = np.median([(row.noise, row.drift) for row in group], axis=0)
        name = f"{key[0]} EP {key[1]} {key[2]} {key[3]}"
        print(f"{name:36} {key[4]:7} {us:8.0f} {guess:9.0f} {guess / us - 1:+6.0%} {noise:6.0%} {drift:5.0%}")
    us_of = {identity(row): row.measured_us for row in totals}
    head = (
        f"{'part':9} {'phase':8} {'ranks':>5} {'error':>6} {'p90':>6} {'noise':>6} {'drift':>6} {'bias':>5}"
    )
    print(f"\n{head} {'missed of layer':>16}")
    for key, group in grouped(rows, "part", "phase", "ranks"):
        errors = [row.error for row in group]
        bias = np.median([row.predicted_us / row.measured_us for row in group])
        missed = np.median([(row.measured_us - row.predicted_us) / us_of[identity(row)] for row in group])
        print(
            f"{key[0]:9} {key[1]:8} {key[2]:5} {np.median(errors):6.0%} {np.quantile(errors, 0.9):6.0%} "
            f"{np.median([row.noise for row in group]):6.0%} {np.median([row.drift for row in group]):6.0%} "
            f"{bias:5.2f} {missed:+16.0%}"
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
    """Predict, measure, and both again."""
    folder.mkdir()
    benchmark(model, ranks, folder / "before")
    capture(model, ranks, folder)
    first = measured(model, ranks, steps, folder, backwards=False)
    benchmark(model, ranks, folder / "between")
    again = measured(model, ranks, steps, folder, backwards=True)
    both = [predicted(model, ranks, folder, folder / benches) for benches in ("before", "between")]
    rows = []
    for row, row_again in zip(*both, strict=True):
        key = (row.algorithm, row.placement, row.phase, row.layer, row.part)
        rows.append(replace(row, guess_again_us=row_again.guess_us, first_us=first[key], again_us=again[key]))
    return rows


def main() -> None:
    """Predict, measure, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="tiny-gqa,tiny-mla")
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--steps", type=int, default=12)
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
