"""How well fit and recommendation find the truth on synthetic devices, as a markdown table.

    python -m benchmarks.clock_truth [--seeds 20] [--devices knee,soft] [--cases usual,noisy]

Every row is of one device and one kind of sweep, over many seeds of noise and order. Truth is the device's
own formula (tests/devices/synthetic_device.py), which the fit does not see; no hardware was measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from observatory.advice.frequency import SeriesAdvice, recommend_clocks
from observatory.analysis.frequency import fit_clocks
from observatory.analysis.frequency.views import SeriesView
from observatory.errors import ClockError
from tests.devices.synthetic_device import DEVICES, LOCKS_MHZ, SyntheticDevice, made_sweep

BUDGET = 0.02
CAPS_W = (250.0, 300.0, 350.0, 400.0, 450.0)


@dataclass(frozen=True)
class Case:
    """A kind of sweep."""

    name: str
    time_noise: float
    energy_noise: float
    locks_mhz: Sequence[int] = LOCKS_MHZ
    repeats: int = 3
    setting_noise: float = 0.0


CASES = {
    case.name: case
    for case in (
        Case("quiet", 0.001, 0.003),
        Case("usual", 0.003, 0.01),
        Case("noisy", 0.015, 0.03),
        Case("blocked", 0.002, 0.005, setting_noise=0.005),
        Case("few", 0.003, 0.01, locks_mhz=(480, 780, 1110, 1470, 1830), repeats=2),
    )
}


@dataclass
class Score:
    """What happened over the seeds of one row."""

    kept: list[bool] = field(default_factory=list)
    regret: list[float] = field(default_factory=list)
    slowdown_held: list[bool] = field(default_factory=list)
    saving_held: list[bool] = field(default_factory=list)
    saving_error: list[float] = field(default_factory=list)
    critical_error: list[float] = field(default_factory=list)
    verdict: list[bool] = field(default_factory=list)
    behaviour: list[bool] = field(default_factory=list)
    clocks: list[float] = field(default_factory=list)


def true_class(device: SyntheticDevice) -> str:
    """The class by the documented rules, from the true curve."""
    if device.clock()[1]:
        return "capped"
    if device.idles:
        return "host-bound"
    unlocked = device.clock()[0]
    free = min(mhz for mhz in range(480, unlocked + 1) if device.slowdown(mhz) <= 0.02)
    ratio = free / unlocked
    return "memory-bound flat" if ratio <= 0.6 else "knee" if ratio <= 0.9 else "compute-proportional"


def true_critical(device: SyntheticDevice) -> float | None:
    """f_crit where it lies within the sweep."""
    mhz = device.f0_mhz * (device.compute_s - device.memory_slope_s) / device.memory_s
    return mhz if 480 < mhz < device.clock()[0] else None


def add(score: Score, device: SyntheticDevice, case: Case, seed: int) -> None:
    """One sweep, fitted and judged."""
    sweep = made_sweep(
        [device],
        locks_mhz=case.locks_mhz,
        caps_w=CAPS_W,
        repeats=case.repeats,
        time_noise=case.time_noise,
        energy_noise=case.energy_noise,
        setting_noise=case.setting_noise,
        seed=seed,
    )
    model = fit_clocks([sweep], bootstrap=100, seed=seed)
    advice = recommend_clocks(model, max_slowdown=BUDGET).series[0]
    clock = advice.choice.sm_clock_mhz if advice.choice else advice.reference_mhz
    score.clocks.append(clock)
    score.kept.append(device.slowdown(clock) <= BUDGET + 5e-4)
    best = device.best_mhz(BUDGET, min(case.locks_mhz))
    score.regret.append(device.saving(best) - device.saving(clock))
    view = SeriesView(model.series[0], model.supported_sm_clocks_mhz)
    for mhz in (clock, 1350.0, 990.0, 690.0):
        if mhz >= view.reference_mhz:
            continue
        said = view.choice(mhz)
        pairs = (
            (said.slowdown, device.slowdown(mhz), score.slowdown_held),
            (said.saving, device.saving(mhz), score.saving_held),
        )
        for interval, truth, held in pairs:
            assert interval.low is not None
            assert interval.high is not None
            # Half a thousandth is below anything that a sweep could resolve.
            held.append(interval.low - 5e-4 <= truth <= interval.high + 5e-4)
        score.saving_error.append(said.saving.value - device.saving(mhz))
    critical = true_critical(device)
    if critical is not None and advice.critical.mhz is not None:
        score.critical_error.append(advice.critical.mhz / critical - 1)
    score.verdict.append(_right(advice, device, case))
    score.behaviour.append(advice.behaviour.name == true_class(device))


def _right(advice: SeriesAdvice, device: SyntheticDevice, case: Case) -> bool:
    """Whether the verdict on locks and caps is right; silence where the difference is plain is wrong too."""
    truth = device.lock_over_cap(BUDGET, CAPS_W, min(case.locks_mhz))
    verdict = advice.lock_against_cap.verdict
    if verdict == "capping beats locking":
        return False
    if verdict == "locking beats capping":
        return truth > 0.005
    return truth < 0.03


def row(device: SyntheticDevice, case: Case, seeds: int) -> str:
    """One markdown row."""
    score = Score()
    refused = 0
    for seed in range(seeds):
        try:
            add(score, device, case, seed)
        except ClockError:
            refused += 1
    if not score.kept:
        return f"| {device.name} | {case.name} | refused {refused} of {seeds} | | | | | | | | |"
    critical = f"{np.median(np.abs(score.critical_error)):.1%}" if score.critical_error else "none"
    return (
        f"| {device.name} | {case.name} | {device.best_mhz(BUDGET, min(case.locks_mhz))} "
        f"| {np.median(score.clocks):.0f} | {np.mean(score.kept):.0%} "
        f"| {np.median(score.regret):.1%} / {np.max(score.regret):.1%} "
        f"| {np.sqrt(np.mean(np.square(score.saving_error))):.2%} "
        f"| {np.mean(score.saving_held):.0%} | {np.mean(score.slowdown_held):.0%} | {critical} "
        f"| {np.mean(score.verdict):.0%} | {np.mean(score.behaviour):.0%} |"
    )


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--devices", default=",".join(DEVICES))
    parser.add_argument("--cases", default=",".join(CASES))
    options = parser.parse_args()
    print(
        "| device | sweep | true best MHz | advised MHz (median) | budget kept | saving missed (median / "
        "worst) "
        "| error of savings (rms) | savings inside 90 % | slowdowns inside 90 % | error of f_crit (median) "
        "| lock or cap right | class right |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name in options.devices.split(","):
        for case in options.cases.split(","):
            print(row(DEVICES[name], CASES[case], options.seeds), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
