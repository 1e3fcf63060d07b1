"""How well the energy of phases is recovered: loads of known power through a simulated 100/25 ms sensor.

Every scenario is run with several seeds (the sensor's phase, its noise, the polls' jitter, the load's own
randomness). Relative errors are those of each phase's mean power; *held* is the share of 90 % intervals that
hold the truth; *answered* how many of the runs gave a number instead of a reason, with polls every 50 ms and
every 53 ms.

    python -m benchmarks.energy_truth [--seeds 20] [--only TEXT] [--section phases|windows|aliasing]
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from observatory.analysis.energy import attribute, energy_of_window, make_timeline, reason_words, sensor_of
from observatory.analysis.energy.design import IDLE
from observatory.analysis.energy.traces import trace_of_frame
from observatory.devices.aliasing import missed_error
from observatory.devices.sensors import SensorModel
from tests.devices.sensor import Load, SimulatedSensor, bursts, join, spans_of, steps

H100 = sensor_of("NVIDIA H100 80GB HBM3")
V100 = sensor_of("Tesla V100-SXM2-32GB")
PLAIN = SimulatedSensor()


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A load and the device that shows it."""

    name: str
    load: Callable[[int], Load]
    sensor: SimulatedSensor = PLAIN
    model: SensorModel = H100
    polls_ms: tuple[float, ...] = (50.0, 53.0)


PREFILL, DECODE, WAIT = ("prefill", 150.0, 650.0), ("decode", 10.0, 310.0), ("", 200.0, 80.0)
MOE = [("dispatch", 2.0, 250.0), ("experts", 5.0, 600.0), ("combine", 2.0, 300.0)]
SERVER = [PREFILL, *[DECODE] * 40, WAIT]


def _random(*stages: tuple[str, float, float], seconds: float = 30.0) -> Callable[[int], Load]:
    return lambda seed: bursts(stages, seconds=seconds, seed=seed)


def _steps(
    stages: Sequence[tuple[str, float, float]], seconds: float = 20.0, **more: float
) -> Callable[[int], Load]:
    return lambda seed: steps(stages, seconds=seconds, seed=seed, **more)


SCENARIOS = (
    Scenario(
        name="each phase alone, 6 to 8 s",
        load=lambda seed: join(
            *[
                steps([stage], seconds=6 + 0.5 * k, seed=seed)
                for k, stage in enumerate([PREFILL, DECODE] * 2)
            ],
            gap_ms=1500,
        ),
    ),
    Scenario(
        name="random bursts, about 5 s",
        load=_random(("prefill", 4000, 650), ("decode", 5000, 310), seconds=90),
    ),
    Scenario(name="random bursts, about 500 ms", load=_random(("prefill", 400, 650), ("decode", 600, 310))),
    Scenario(
        name="random bursts, about 100 ms, idle gaps",
        load=_random(("prefill", 100, 650), ("decode", 100, 310), ("", 80, 80)),
    ),
    Scenario(
        name="random bursts, about 20 ms, idle gaps",
        load=_random(("prefill", 20, 650), ("decode", 20, 310), ("", 15, 80)),
    ),
    Scenario(name="random bursts, about 5 ms", load=_random(("prefill", 5, 650), ("decode", 5, 310))),
    Scenario(
        name="server: prefill, 40 decode steps of 10 ms, idle gap", load=_steps(SERVER, 30, jitter=0.05)
    ),
    Scenario(
        name="the same, every stage's power off by 10 %",
        load=_steps(SERVER, 30, jitter=0.05, power_jitter=0.1),
    ),
    Scenario(
        name="the same, no counter",
        load=_steps(SERVER, 30, jitter=0.05),
        sensor=SimulatedSensor(counter_ms=None),
    ),
    Scenario(
        name="the same, values 20 ms late, updates off by 1 ms",
        load=_steps(SERVER, 30, jitter=0.05),
        sensor=SimulatedSensor(latency_ms=20.0, tick_jitter_ms=1.0),
    ),
    Scenario(
        name="the same, 5 ms capacitors",
        load=_steps(SERVER, 30, jitter=0.05),
        sensor=SimulatedSensor(smoothing_ms=5.0),
    ),
    Scenario(
        name="the same, calibration +5 %",
        load=_steps(SERVER, 30, jitter=0.05),
        sensor=SimulatedSensor(gain=1.05, counter_gain=1.05),
    ),
    Scenario(
        name="the same, V100 (20/10 ms)",
        load=_steps(SERVER, 30, jitter=0.05),
        sensor=SimulatedSensor(update_ms=20.0, window_ms=10.0, counter_ms=20.0),
        model=V100,
    ),
    Scenario(name="MoE layers of 9 ms, lengths vary by 10 %", load=_steps(MOE, 20, jitter=0.1)),
    Scenario(
        name="the same, 3 ms capacitors",
        load=_steps(MOE, 20, jitter=0.1),
        sensor=SimulatedSensor(smoothing_ms=3.0),
    ),
    Scenario(name="MoE layers of 9 ms, constant", load=_steps(MOE)),
    Scenario(name="two phases in 10 ms steps, constant mix", load=_steps([("a", 4, 650), ("b", 6, 310)])),
    Scenario(name="two phases in 50 ms steps, constant", load=_steps([("a", 20, 650), ("b", 30, 310)])),
    Scenario(name="two phases in 100 ms steps, constant", load=_steps([("a", 40, 650), ("b", 60, 310)])),
    Scenario(name="two phases in 200 ms steps, constant", load=_steps([("a", 80, 650), ("b", 120, 310)])),
    Scenario(name="two phases in 130 ms steps, constant", load=_steps([("a", 50, 650), ("b", 80, 310)])),
)


@dataclass(kw_only=True)
class Recovered:
    """What became of one phase of a scenario, over all seeds and polls.

    Attributes:
        true_w: its power.
        found_w: powers that were given.
        held: whether the 90 % interval of each held the truth.
        answered: per poll period, how many gave one.
        methods: by which method.
    """

    true_w: float
    found_w: list[float] = field(default_factory=list)
    held: list[bool] = field(default_factory=list)
    answered: Counter[float] = field(default_factory=Counter)
    methods: Counter[str] = field(default_factory=Counter)

    @property
    def errors(self) -> list[float]:
        """Relative errors of the powers."""
        return [abs(watts / self.true_w - 1) for watts in self.found_w]


def phases(seeds: int, only: str) -> None:
    """Table of recovered powers."""
    print("| load | phase | true W | recovered W (median) | error: median | largest | held | answered | by |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---|")
    reasons: Counter[str] = Counter()
    rows: list[Recovered] = []
    for scenario in SCENARIOS:
        if only not in scenario.name:
            continue
        found = _recovered(scenario, seeds, reasons)
        for name, row in sorted(found.items()):
            print(_line(scenario, name, row, seeds), flush=True)
        if scenario.sensor.gain == 1.0:
            rows += found.values()
    _print_total(rows)
    print("\nReasons given instead of numbers:\n")
    for reason, count in reasons.most_common(12):
        print(f"* {count} x {reason}")


def _recovered(scenario: Scenario, seeds: int, reasons: Counter[str]) -> dict[str, Recovered]:
    """Every phase of a scenario with every seed and poll."""
    result: dict[str, Recovered] = {}
    for poll_ms, seed in itertools.product(scenario.polls_ms, range(seeds)):
        load = scenario.load(seed)
        spans = spans_of(load)
        timeline = make_timeline(
            spans["phase"].tolist(), spans["start_ns"].to_numpy(), spans["end_ns"].to_numpy()
        )
        trace = trace_of_frame(scenario.sensor.sample(load, poll_ms=poll_ms, seed=seed))
        truth = {name or IDLE: watts for name, (watts, _) in load.truth().items()}
        for found in attribute(trace, timeline, scenario.model, seed=seed).phases:
            true_w = truth[found.name]
            row = result.setdefault(found.name, Recovered(true_w=true_w))
            if found.power_mw is None or found.low_mw is None or found.high_mw is None:
                causes = found.reason.because if found.reason else ()
                reasons.update(re.sub(r"[0-9.]*[0-9]", "#", reason_words(cause)) for cause in causes)
                continue
            # Powers of a load may differ from seed to seed; the table shows them at the first one's.
            row.found_w.append(found.power_mw * 1e-3 / true_w * row.true_w)
            row.held.append(found.low_mw <= true_w * 1e3 <= found.high_mw)
            row.answered[poll_ms] += 1
            row.methods[f"{found.method} ({found.source})"] += 1
    return result


def _line(scenario: Scenario, name: str, row: Recovered, seeds: int) -> str:
    numbers = "- | - | - | -"
    if row.found_w:
        numbers = (
            f"{np.median(row.found_w):.1f} | {np.median(row.errors):.2%} | {max(row.errors):.2%} "
            f"| {np.mean(row.held):.0%}"
        )
    answered = " + ".join(str(row.answered[poll_ms]) for poll_ms in scenario.polls_ms)
    method = row.methods.most_common(1)[0][0] if row.methods else "refused"
    return (
        f"| {scenario.name} | {name} | {row.true_w:.0f} | {numbers} | {answered} of {seeds} each | {method} |"
    )


def _print_total(rows: list[Recovered]) -> None:
    errors = [error for row in rows for error in row.errors]
    held = [one for row in rows for one in row.held]
    if errors:
        print(
            f"\nAll but the miscalibrated: {len(errors)} powers given, error median {np.median(errors):.2%}, "
            f"95th percentile {np.quantile(errors, 0.95):.2%}, largest {max(errors):.2%}; "
            f"{np.mean(held):.0%} of the 90 % intervals hold the truth."
        )


def windows(seeds: int) -> None:
    """Table of windows: error of counter and integral against the stated bars."""
    print("| window | counter: std | stated | largest | stated | power: known | std | stated | flagged |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for seconds in (0.3, 0.5, 1.0, 2.0, 5.0, 20.0):
        rows = []
        for seed in range(seeds):
            load = steps([("a", 8.3, 300.0), ("b", 5.1, 600.0)], seconds=seconds, jitter=0.1, seed=seed)
            trace = trace_of_frame(PLAIN.sample(load, seed=seed))
            found = energy_of_window(trace, load.start_ns, load.end_ns, sensor=H100)
            true_mj = load.energy_mj(load.start_ns, load.end_ns)
            values = (
                found.counter_mj, found.counter_std_mj, found.counter_most_mj, found.integral_mj,
                found.integral_std_mj,
            )  # fmt: skip
            rows.append([np.nan if value is None else value / true_mj for value in values])
            rows[-1].append(float(found.flag is not None))
        table = np.array(rows)
        known = int(np.isfinite(table[:, 3]).sum())
        print(
            f"| {seconds:g} s | {np.nanstd(table[:, 0]):.2%} | {np.nanmean(table[:, 1]):.2%} "
            f"| {np.nanmax(abs(table[:, 0] - 1)):.2%} | {np.nanmean(table[:, 2]):.2%} "
            f"| {known} of {seeds} | {np.nanstd(table[:, 3]):.2%} | {np.nanmean(table[:, 4]):.2%} "
            f"| {int(table[:, 5].sum())} |",
            flush=True,
        )


def aliasing(seeds: int) -> None:
    """Table of steps against the sensor: error of integrated power over 5 s, made and predicted."""
    print("| step | error rms | predicted | largest |\n|---:|---:|---:|---:|")
    for period_ms in (10, 20, 25, 33.3, 40, 50, 60, 70, 75, 80, 90, 95, 99, 100, 101, 110, 125, 150, 200):
        stages = [("on", period_ms / 2, 600.0), ("off", period_ms / 2, 150.0)]
        load = steps(stages, seconds=5.0)
        found = _integrated_errors(load, seeds)
        predicted = missed_error(
            load.edge_ns[:-1:2], period_ms, update_ms=100.0, window_ms=25.0, swing=0.6, duty=0.5
        )
        rms = np.sqrt(np.mean(found**2))
        print(f"| {period_ms:g} ms | {rms:.1%} | {predicted:.1%} | {abs(found).max():.1%} |", flush=True)


def _integrated_errors(load: Load, seeds: int) -> np.ndarray:
    """Relative errors of the mean of a 100/25 ms sensor's values over a load, over its positions."""
    quiet = SimulatedSensor(noise=0.0, period_error=0.0, counter_ms=None)
    errors = []
    for k in range(seeds):
        tick_ns = np.arange(load.start_ns + 1e6 * (25 + 100 * k / seeds), load.end_ns, quiet.update_ms * 1e6)
        seen_mj = load.energy_until_mj(tick_ns) - load.energy_until_mj(tick_ns - quiet.window_ms * 1e6)
        true_w = load.energy_mj(load.start_ns, load.end_ns) / ((load.end_ns - load.start_ns) * 1e-6)
        errors.append(seen_mj.mean() / quiet.window_ms / true_w - 1)
    return np.array(errors)


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--only", default="", help="scenarios whose name holds this")
    parser.add_argument("--section", choices=["phases", "windows", "aliasing"], help="one of the tables")
    options = parser.parse_args()
    if options.section in (None, "windows"):
        windows(10 * options.seeds)
        print()
    if options.section in (None, "aliasing"):
        aliasing(10 * options.seeds)
        print()
    if options.section in (None, "phases"):
        phases(options.seeds, options.only)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
