"""Are changes of a set-up as good as predicted, and in that order? What is advised for the bundled models?

    python -m benchmarks.mitigations --measure [--model tiny-gqa] [--ranks 4] [--rounds 2]
    python -m benchmarks.mitigations --models

``--measure``: on ranks of this machine, by the commands that a user has. A run of today's set-up (flat,
linear) is advised on with a network model of `bench alltoall --algorithm all`; then every change that can be
run is run: the chosen placement, 4 replicas, deduplication, deduplication with the placement, hierarchical
and gather, each in every round, in reversed order in every second round. A step is the sum over layers of the
rank that takes longest in the exchanges and experts of a layer (spans), at the first quartile of steps, as
other programs disturb the rest. Nothing of a changed run is in its prediction; today's run is what all are
predicted from.

``--models``: verdicts on the five bundled models at EP 8 and 32, from the loads of a capture on one rank,
expert times of `bench experts --ep 8` and a network model of 2, 4 and 8 ranks; EP 32 is extrapolated. Expert
caches are compared where memory holds half of a rank's experts, against keeping the most used.
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

import numpy as np

from observatory.run import open_run

SPANS = ("count_exchange", "dispatch", "experts", "combine")
QUIET = 0.25
NONE = "\u2013"
#: Assumed rate at which experts come from the host, where only half of them fit into a rank's memory.
HOST_BYTES_PER_S = 1e8
MODELS = ("tiny-mha", "tiny-mla", "tiny-gqa", "tiny-mamba2", "tiny-gdn")
#: Row of the advice -> options of the run that makes the change.
CHANGES: dict[str, tuple[str, ...]] = {
    "today": (),
    "placement": ("--placement", "placement.json"),
    "4 replicas": ("--placement", "replicas.json"),
    "deduplication": ("--deduplicate",),
    "placement, once per rank": ("--deduplicate", "--placement", "placement.json"),
    "hierarchical": ("--algorithm", "hierarchical"),
    "gather": ("--algorithm", "gather"),
}


def observatory(*words: str, folder: Path) -> str:
    """Run a command in a folder and return what it prints."""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "observatory", *words],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 3):
        raise SystemExit(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def step_ms(run: Path) -> float:
    """A quiet step: sum over layers of the rank that takes longest."""
    spans = open_run(run).spans()
    spans = spans[spans["name"].isin(SPANS)]
    spans = spans.assign(ms=(spans["end_ns"].astype("int64") - spans["start_ns"].astype("int64")) / 1e6)
    of_rank = spans.groupby(["step", "layer", "source_rank"])["ms"].sum()
    of_step = of_rank.groupby(level=[0, 1]).max().groupby(level=0).sum()
    return float(of_step.quantile(QUIET))


def measure(model: str, ranks: int, rounds: int) -> Iterator[str]:
    """The table of predicted and measured steps."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        of_node = ("--ranks-per-node", str(ranks // 2))
        shape = ("--ep", str(ranks), *of_node, "--phase", "prefill")
        profile = ("profile", model, *shape, "--steps", "24", "--batch-size", "8", "--sequence-length", "128")
        observatory(*profile, "--sample-tokens", "512", "--out", "base", folder=folder)
        bench = ("bench", "alltoall", "--ranks", str(ranks), *of_node)
        observatory(*bench, "--algorithm", "all", "--repeats", "8", "--out", "bench.json", folder=folder)
        observatory("fit", "bench.json", "--out", "fit.json", folder=folder)
        for replicas, out in (("0", "placement.json"), ("4", "replicas.json")):
            place = ("place", "base", "--ranks", str(ranks), "--replicas", replicas, "--out", out)
            observatory(*place, folder=folder)
        advice = json.loads(observatory("advise", "base", "--network", "fit.json", "--json", folder=folder))
        rows = advice["runs"][0]["phases"][0]["verdicts"]
        predicted = {row["setting"] if row["change"] == "replicas" else row["change"]: row for row in rows}
        measured: dict[str, list[float]] = {change: [] for change in CHANGES}
        for number in range(rounds):
            order = list(CHANGES.items())[:: -1 if number % 2 else 1]
            for index, (change, options) in enumerate(order):
                run = f"run-{number}-{index}"
                observatory(*profile, *options, "--out", run, folder=folder)
                measured[change].append(step_ms(folder / run))
        yield from comparison(predicted, measured)


def comparison(predicted: dict[str, Any], measured: dict[str, list[float]]) -> Iterator[str]:
    """Both, as gains over today's, with the order of both."""
    today_us, today_ms = predicted["today"]["step_us"], float(np.mean(measured["today"]))
    yield "| change | predicted ms | measured ms (rounds) | predicted gain | measured gain | verdict |"
    yield "|---|--:|--:|--:|--:|---|"
    gains = {}
    for change, times_ms in measured.items():
        row = predicted[change]
        gain = 1 - float(np.mean(times_ms)) / today_ms
        gains[change] = (1 - row["step_us"] / today_us, gain)
        rounds = " / ".join(f"{ms:.1f}" for ms in times_ms)
        yield (
            f"| {change} | {row['step_us'] / 1e3:.1f} | {rounds} | {100 * gains[change][0]:+.1f} % "
            f"({100 * (row['gain_low'] or 0):.0f} to {100 * (row['gain_high'] or 0):.0f}) "
            f"| {100 * gain:+.1f} % | {row['verdict']} |"
        )
    pairs = [(a, b) for a in gains for b in gains if a < b]
    same = sum((gains[a][0] > gains[b][0]) == (gains[a][1] > gains[b][1]) for a, b in pairs)
    yield ""
    yield f"Pairs of changes in the predicted order: {same} of {len(pairs)}."


def models() -> Iterator[str]:
    """Verdicts on the bundled models."""
    changes = (
        "perfect balance", "ceiling", "placement", "replicas", "per-step dispatch", "activated dispatch",
        "least-loaded spill", "hierarchical", "deduplication", "route or fetch",
    )  # fmt: skip
    caches = {"cache, last used": "last used", "prefetch": "ahead"}
    yield "| model, phase, EP | " + " | ".join((*changes, *caches)) + " |"
    yield "|---" * (len(changes) + len(caches) + 1) + "|"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fits = []
        for ranks in (2, 4, 8):
            fits.append(f"bench-{ranks}.json")
            bench = ("bench", "alltoall", "--ranks", str(ranks), "--ranks-per-node", str(max(1, ranks // 2)))
            observatory(
                *bench, "--algorithm", "flat,hierarchical", "--repeats", "5", "--out", fits[-1], folder=folder
            )
        observatory("fit", *fits, "--out", "fit.json", folder=folder)
        for model in MODELS:
            profile = ("profile", model, "--phase", "both", "--steps", "32", "--batch-size", "16")
            observatory(
                *profile, "--sequence-length", "128", "--sample-tokens", "1024", "--out", model, folder=folder
            )
            experts = f"{model}.json"
            observatory("bench", "experts", model, "--ep", "8", "--out", experts, folder=folder)
            for ranks in (8, 32):
                advise = ("advise", model, "--ranks", str(ranks), "--gpus-per-node", str(ranks // 2))
                given = ("--network", "fit.json", "--experts", experts, "--json")
                (run,) = json.loads(observatory(*advise, *given, folder=folder))["runs"]
                topology = (
                    f"ranks = {ranks}\ngpus_per_node = {ranks // 2}\nhost_bytes_per_s = {HOST_BYTES_PER_S}\n"
                    f"memory_bytes = {half_of_experts(folder / model, ranks)}\n"
                )
                (folder / "half.toml").write_text(topology)
                half = ("advise", model, "--topology", "half.toml", *given)
                (short,) = json.loads(observatory(*half, folder=folder))["runs"]
                for phase, in_half in zip(run["phases"], short["phases"], strict=True):
                    gains: dict[str, dict[str, Any]] = {}
                    for row in phase["verdicts"]:
                        if row["gain"] is not None:
                            gains.setdefault(row["change"], row)
                    cells = [cell(gains[change]) if change in gains else NONE for change in changes]
                    for ending in caches.values():
                        rows = (row for row in in_half["verdicts"] if row["setting"].endswith(ending))
                        cells.append(next((cell(row, "beyond") for row in rows), NONE))
                    yield f"| {model}, {phase['phase']}, {ranks} | " + " | ".join(cells) + " |"


def half_of_experts(run: Path, ranks: int) -> int:
    """Bytes of half of the experts that a rank holds of the model of a run; of one of each layer at least."""
    model = open_run(run).manifest.model
    assert model.expert_bytes is not None
    return sum(max(1, layer.experts // ranks // 2) for layer in model.moe_layers) * model.expert_bytes


def cell(row: dict[str, Any], column: str = "gain") -> str:
    """Gain and verdict of one change."""
    if row[column] is None:
        return NONE
    marks = {"change": "**", "extrapolated": "*"}
    mark = marks.get(row["verdict"], "")
    return f"{mark}{100 * row[column]:+.1f} %{mark}"


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--models", action="store_true")
    parser.add_argument("--model", default="tiny-gqa")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    for line in measure(given.model, given.ranks, given.rounds) if given.measure else models():
        print(line, flush=True)


if __name__ == "__main__":
    main()
