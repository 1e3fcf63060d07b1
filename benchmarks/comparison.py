"""How often a comparison, or a history, sees a change that is none, and one that is there.

    OMP_NUM_THREADS=1 python benchmarks/comparison.py [rows | layers | series | runs DIR] [--trials 2000]

Protocol: generated series of known truth, first-order autoregressive with the given correlation of
neighbours, noise of one standard deviation of a step (5 % of the mean), the same for all methods.

* ``rows``: one row: share of trials called different at 5 % without a difference (false alarms), and with
  one; for the method of `observatory compare` and for Student's t on steps as if they were independent.
  "shared" are steps whose mean varies by 20 % alike in both runs, compared step by step and not.
* ``layers``: 61 layers, none or a fifth of them changed by one deviation: false discoveries over
  discoveries, and the share of the changed layers that is found.
* ``series``: false alarms, changes found and found within a tenth of the series, of `observatory history`.
* ``runs DIR``: runs of one set-up against each other, all pairs: how often a row is called changed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy import special

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from observatory.analysis.compare.change_points import best_split, level
from observatory.analysis.compare.collect import measure_run
from observatory.analysis.compare.comparing import compare_subjects
from observatory.analysis.compare.series import (
    Float64,
    Pooled,
    Series,
    difference_of,
    false_discovery,
    mean_series,
    pooled_correlation,
)
from observatory.run import open_run

NOISE = 0.05
#: Further runs of a baseline, drawn at random.
FURTHER_RUNS = 4


def walk(random: np.random.Generator, steps: int, correlation: float) -> Float64:
    """Series with mean 0 and deviation 1."""
    value_N = np.empty(steps)
    value_N[0] = random.normal()
    push_N = random.normal(size=steps) * np.sqrt(1 - correlation**2)
    for step in range(1, steps):
        value_N[step] = correlation * value_N[step - 1] + push_N[step]
    return value_N


def times(random: np.random.Generator, steps: int, kind: str) -> Float64:
    """Step times of mean 1: correlated noise, or one step in twelve takes twice as long."""
    if kind == "outliers":
        return 1 + NOISE * random.normal(size=steps) + (random.random(steps) < 1 / 12)
    return 1 + NOISE * walk(random, steps, float(kind))


def series(value_N: Float64) -> Series:
    """Of a time."""
    made = mean_series(value_N, np.arange(len(value_N)), trimmed=True)
    assert made is not None
    return made


def samples(of_layers: list[Series]) -> list[Float64]:
    """Values of the steps of each layer."""
    return [item.sample_N for item in of_layers if item.sample_N is not None]


def plain_p(base_N: Float64, other_N: Float64) -> float:
    """Welch's test on steps."""
    parts = [value_N.var(ddof=1) / len(value_N) for value_N in (base_N, other_N)]
    freedom = sum(parts) ** 2 / sum(part**2 / (len(base_N) - 1) for part in parts)
    t = (other_N.mean() - base_N.mean()) / np.sqrt(sum(parts))
    return float(2 * special.stdtr(freedom, -abs(t)))


def rows(trials: int) -> Iterator[str]:
    """False alarms and power of one row."""
    random = np.random.default_rng(1)
    yield (
        "| steps | correlation | no interval | false alarms | as if independent | holds +3 % | +3 % seen "
        "| +10 % seen |"
    )
    yield "|--:|--:|--:|--:|--:|--:|--:|--:|"
    for steps, kind in itertools.product((8, 12, 24, 100, 400), ("0", "0.3", "0.6", "0.8", "outliers")):
        counts = np.zeros(6)
        for _ in range(trials):
            base_N, other_N = times(random, steps, kind), times(random, steps, kind)
            none = difference_of(series(base_N), series(other_N), paired=False)
            some = difference_of(series(base_N), series(1.03 * other_N), paired=False)
            more = difference_of(series(base_N), series(1.1 * other_N), paired=False)
            low, high = some.relative_low, some.relative_high
            counts += (
                low is None,
                none.p is not None and none.p < 0.05,
                plain_p(base_N, other_N) < 0.05,
                low is not None and high is not None and low <= 0.03 <= high,
                some.p is not None and some.p < 0.05,
                more.p is not None and more.p < 0.05,
            )
        counts[3] *= trials / max(trials - counts[0], 1)  # of the intervals that there are
        shares = " | ".join(f"{share:.3f}" for share in counts[:4] / trials)
        power = " | ".join(f"{share:.2f}" for share in counts[4:] / trials)
        yield f"| {steps} | {kind} | {shares} | {power} |"
    yield ""
    yield "| steps, shared | paired: false alarms | +3 % seen | independent: false alarms | +3 % seen |"
    yield "|--:|--:|--:|--:|--:|"
    for steps in (12, 24, 100):
        counts = np.zeros(4)
        for _ in range(trials):
            common_N = 1 + 0.2 * random.normal(size=steps)
            base_N, other_N = (common_N * times(random, steps, "0.3") for _ in range(2))
            results = [
                difference_of(series(base_N), series(factor * other_N), paired=paired).p
                for paired in (True, False)
                for factor in (1.0, 1.03)
            ]
            counts += [p is not None and p < 0.05 for p in results]
        yield f"| {steps} | " + " | ".join(f"{share:.3f}" for share in counts / trials) + " |"


def layers(trials: int) -> Iterator[str]:
    """False discoveries over 61 layers."""
    random = np.random.default_rng(2)
    yield "| steps | correlation | changed layers | false discoveries | any without a change | found |"
    yield "|--:|--:|--:|--:|--:|--:|"
    for steps, correlation, changed in itertools.product((24, 100), (0.0, 0.6), (0, 12)):
        false, power, any_false = [], [], []
        for _ in range(max(trials // 20, 20)):
            shift_L = np.where(np.arange(61) < changed, 1.0, 0.0)
            base_L = [series(10 + walk(random, steps, correlation)) for _ in shift_L]
            other_L = [series(10 + walk(random, steps, correlation) + shift) for shift in shift_L]
            pooled = Pooled(
                base=pooled_correlation(samples(base_L)), other=pooled_correlation(samples(other_L))
            )
            p_L = [
                difference_of(base, other, paired=False, pooled=pooled).p
                for base, other in zip(base_L, other_L, strict=True)
            ]
            p_L = [1.0 if p is None else p for p in p_L]
            called_L = false_discovery(np.array(p_L, dtype=np.float64)) <= 0.05
            false.append((called_L & (shift_L == 0)).sum() / max(called_L.sum(), 1))
            any_false.append(bool((called_L & (shift_L == 0)).any()))
            power.append(called_L[:changed].mean() if changed else np.nan)
        share = f"{np.mean(power):.2f}" if changed else "-"
        never = "-" if changed else f"{np.mean(any_false):.3f}"
        yield f"| {steps} | {correlation} | {changed} of 61 | {np.mean(false):.3f} | {never} | {share} |"


def histories(trials: int) -> Iterator[str]:
    """False alarms and power of a series."""
    random = np.random.default_rng(3)
    yield "| points | correlation | false alarms | +2 deviations found | placed | +4 found | placed |"
    yield "|--:|--:|--:|--:|--:|--:|--:|"
    settings = [(points, 0.0, False) for points in (8, 12, 20, 50)]
    settings += [(steps, r, True) for steps in (40, 100, 200, 1000) for r in (0.0, 0.3, 0.6, 0.8, 0.9)]
    for points, correlation, alike in settings:
        counts = np.zeros(6)
        at = points * 3 // 5
        for _ in range(trials):
            value_N = walk(random, points, correlation)
            for place, shift in enumerate((0, 2, 4)):
                split = best_split(value_N + shift * (np.arange(points) >= at), alike=alike)
                assert split is not None
                is_change = split.p <= level(alike=alike)
                counts[max(2 * place - 1, 0)] += is_change
                if place:
                    counts[2 * place] += is_change and abs(split.at - at) <= points / 10
        shares = " | ".join(f"{share:.2f}" for share in counts[1:] / trials)
        what = f"{points} steps of a run" if alike else f"{points} runs"
        yield f"| {what} | {correlation} | {counts[0] / trials:.3f} | {shares} |"


def same_runs(folder: Path) -> Iterator[str]:
    """All pairs of runs of one set-up."""
    subjects = [
        measure_run(open_run(path)) for path in sorted(folder.iterdir()) if (path / "run.json").is_file()
    ]
    random = np.random.default_rng(4)
    verdicts: dict[str, list[str]] = {}
    repeated: dict[str, list[str]] = {}
    sizes: dict[str, list[float]] = {}
    for base, other in itertools.combinations(subjects, 2):
        for row in compare_subjects(base, other).rows:
            verdicts.setdefault(row.key.name, []).append(row.verdict)
            if row.difference is not None and row.difference.relative is not None:
                sizes.setdefault(row.key.name, []).append(abs(row.difference.relative))
        rest = [subject for subject in subjects if subject not in (base, other)]
        drawn = random.permutation(len(rest))[:FURTHER_RUNS]
        for row in compare_subjects(base, other, repeats=[rest[at] for at in drawn]).rows:
            repeated.setdefault(row.key.name, []).append(row.verdict)
    several = f"with {1 + FURTHER_RUNS} runs of the baseline"
    yield f"| metric, {len(subjects)} runs | changed, one run each | {several} | median | largest |"
    yield "|---|--:|--:|--:|--:|"
    for name, single in verdicts.items():
        called, again = (
            sum(verdict in ("higher", "lower") for verdict in which) for which in (single, repeated[name])
        )
        shares = sizes.get(name, [0.0])
        typical, largest = 100 * np.median(shares), 100 * max(shares)
        counts = f"{called} of {len(single)} | {again} of {len(single)}"
        yield f"| `{name}` | {counts} | {typical:.1f} % | {largest:.1f} % |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("rows", "layers", "series", "runs"))
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--trials", type=int, default=2000)
    given = parser.parse_args()
    if given.what == "runs":
        lines = same_runs(given.folder)
    else:
        lines = {"rows": rows, "layers": layers, "series": histories}[given.what](given.trials)
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    main()
