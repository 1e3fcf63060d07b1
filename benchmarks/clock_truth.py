"""How well fit and recommendation find the truth on random devices of eight classes, as a markdown table.

    python -m benchmarks.clock_truth [--devices 200] [--first 0] [--classes flat,knee] [--budget 0.02]

Every device is drawn from its class with its own sweep: 5 to 12 locks, an unlocked setting, now and then
power caps, 2 to 5 repeats, 0.4 to 3 % noise of energy, 0.3 to 0.5 of that for time, in random order. Half
have stepped voltages. Truth is the device's own formula (tests/devices/synthetic_device.py), which the fit
does not see; no hardware was measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from observatory.advice.frequency import ClockAdvice, recommend_clocks
from observatory.analysis.frequency import ClockModel, fit_clocks
from observatory.analysis.frequency.views import SeriesView
from observatory.analysis.statistics import Interval
from observatory.errors import ClockError
from observatory.run.documents.clock_sweep import ClockSweep
from tests.devices.synthetic_device import STEP_MHZ, SyntheticDevice, made_sweep

#: Of an H100 PCIe, as (up to MHz, mV); for orientation.
H100_MV = ((1005, 675), (1155, 685), (1305, 720), (1455, 750), (1605, 795), (1755, 850))
#: What no sensor resolves.
_NOTHING = 1e-4


def _uniform(generator: np.random.Generator, low: float, high: float) -> float:
    return float(generator.uniform(low, high))


def _base(
    name: str, generator: np.random.Generator, *, knee: float, host: float, slope: float
) -> SyntheticDevice:
    """A device whose compute takes as long as memory at ``knee`` of its highest clock.

    Args:
        name: of the class.
        generator: of all else.
        knee: of f0; above 1 memory never counts.
        host: share of an iteration at f0 that is the host's.
        slope: share of memory's time that follows the clock.
    """
    f0_mhz = int(generator.integers(94, 133)) * STEP_MHZ
    second = _uniform(generator, 0.003, 0.03)
    work_s = second * (1 - host)
    memory_s, compute_s = work_s * min(1.0, 1 / knee), work_s * min(1.0, knee)
    steps = generator.random() < 0.5
    return SyntheticDevice(
        name,
        host_s=second * host,
        memory_s=memory_s * (1 - slope),
        memory_slope_s=memory_s * slope,
        compute_s=compute_s,
        sharpness=_uniform(generator, 6, 40) if generator.random() < 0.4 else 0.0,
        static_w=_uniform(generator, 60, 180),
        clock_w=_uniform(generator, 40, 250),
        memory_j=_uniform(generator, 0, 80) * second,
        op_j=_uniform(generator, 0, 60) * second,
        ridge=_uniform(generator, 0.5, 0.75),
        voltage_slope=_uniform(generator, 0.5, 1.0),
        voltages=_voltages(f0_mhz, generator) if steps else (),
        f0_mhz=f0_mhz,
        max_mhz=f0_mhz,
        limit_w=2000.0,
        phase="unknown",
    )


def _voltages(f0_mhz: int, generator: np.random.Generator) -> tuple[tuple[int, float], ...]:
    """A table of five to eight steps, shaped like the H100's, which ends at f0."""
    mhz, millivolts = (np.array(column, dtype=float) for column in zip(*H100_MV, strict=True))
    ends = np.sort(generator.uniform(0.5, 0.97, size=int(generator.integers(4, 8))))
    volts = np.interp(np.append(ends, 1.0) * mhz[-1], mhz, millivolts) / millivolts[-1]
    return tuple((int(end * f0_mhz), float(v)) for end, v in zip([*ends, 1.0], volts, strict=True))


def flat(generator: np.random.Generator) -> SyntheticDevice:
    """Memory-bound down to the lowest clocks."""
    slope = _uniform(generator, 0, 0.015) if generator.random() < 0.5 else 0.0
    return _base(
        "flat", generator, knee=_uniform(generator, 0.15, 0.4), host=_uniform(generator, 0, 0.1), slope=slope
    )


def knee(generator: np.random.Generator) -> SyntheticDevice:
    """Memory-bound above a clock within the range."""
    slope = _uniform(generator, 0, 0.03) if generator.random() < 0.5 else 0.0
    return _base(
        "knee", generator, knee=_uniform(generator, 0.45, 0.92), host=_uniform(generator, 0, 0.2), slope=slope
    )


def compute_bound(generator: np.random.Generator) -> SyntheticDevice:
    """Slower at every lower clock."""
    return _base(
        "compute-bound",
        generator,
        knee=_uniform(generator, 1.05, 4),
        host=_uniform(generator, 0, 0.15),
        slope=0.0,
    )


def mixed_kernels(generator: np.random.Generator) -> SyntheticDevice:
    """Three to six kernels, each with its own knee."""
    device = _base(
        "mixed kernels",
        generator,
        knee=_uniform(generator, 0.3, 1.5),
        host=_uniform(generator, 0, 0.1),
        slope=0.0,
    )
    kernels = []
    for _ in range(int(generator.integers(2, 6))):
        longer_s, ratio = (
            _uniform(generator, 0.2, 1) * device.iteration_s(device.f0_mhz),
            _uniform(generator, 0.2, 2),
        )
        kernels.append((longer_s * min(1, 1 / ratio), longer_s * min(1, ratio)))
    return replace(device, kernels=tuple(kernels))


def any_of(generator: np.random.Generator) -> SyntheticDevice:
    """A flat, knee, compute-bound or mixed one."""
    kinds = (flat, knee, compute_bound, mixed_kernels)
    return kinds[int(generator.integers(len(kinds)))](generator)


def capped(generator: np.random.Generator) -> SyntheticDevice:
    """Its power limit holds the unlocked clock."""
    device = any_of(generator)
    hunting = _uniform(generator, 0.01, 0.08) if generator.random() < 0.5 else 0.0
    held_mhz = _uniform(generator, 0.7, 0.95) * device.f0_mhz
    return replace(device, name="capped", limit_w=device.power_w(held_mhz), hunting=hunting)


def clamped(generator: np.random.Generator) -> SyntheticDevice:
    """It accepts clocks that it does not run at: above what the chip allows, and at times below a floor."""
    device = any_of(generator)
    top = int(_uniform(generator, 1.05, 1.3) * device.f0_mhz / STEP_MHZ) * STEP_MHZ
    floor = int(_uniform(generator, 0.3, 0.55) * device.f0_mhz / STEP_MHZ) * STEP_MHZ
    return replace(device, name="clamped", max_mhz=top, floor_mhz=floor if generator.random() < 0.5 else 0)


def throttled(generator: np.random.Generator) -> SyntheticDevice:
    """Heat slows it in some or all repeats at its highest powers."""
    device = any_of(generator)
    hot_mhz = _uniform(generator, 0.75, 0.97) * device.f0_mhz
    share = 1.0 if generator.random() < 0.3 else _uniform(generator, 0.2, 0.9)
    return replace(device, name="throttled", hot_w=device.power_w(hot_mhz), hot_share=share)


def host_bound(generator: np.random.Generator) -> SyntheticDevice:
    """At least half of an iteration is the host's."""
    device = _base(
        "host-bound",
        generator,
        knee=_uniform(generator, 0.2, 1.5),
        host=_uniform(generator, 0.5, 0.9),
        slope=0.0,
    )
    return replace(device, idles=bool(generator.random() < 0.5))


CLASSES: dict[str, Callable[[np.random.Generator], SyntheticDevice]] = {
    "flat": flat,
    "knee": knee,
    "compute-bound": compute_bound,
    "mixed kernels": mixed_kernels,
    "capped": capped,
    "clamped": clamped,
    "throttled": throttled,
    "host-bound": host_bound,
}


@dataclass(frozen=True)
class Case:
    """A device with its sweep."""

    device: SyntheticDevice
    sweep: ClockSweep
    locks_mhz: tuple[int, ...]


def draw(kind: str, seed: int) -> Case:
    """A random device of a class and a random sweep of it."""
    generator = np.random.default_rng([list(CLASSES).index(kind), seed])
    device = CLASSES[kind](generator)
    low = _uniform(generator, 0.25, 0.5) * device.f0_mhz
    grid = np.linspace(low, device.max_mhz, int(generator.integers(5, 13)))
    grid[1:-1] += generator.uniform(-0.3, 0.3, size=len(grid) - 2) * (grid[1] - grid[0])
    locks = tuple(sorted({round(mhz / STEP_MHZ) * STEP_MHZ for mhz in grid}))
    unlocked_w = device.power_w(device.clock()[0])
    caps = (
        tuple(float(round(part * unlocked_w)) for part in (0.6, 0.75, 0.9))
        if generator.random() < 0.3
        else ()
    )
    energy_noise = float(np.exp(generator.uniform(np.log(0.004), np.log(0.03))))
    sweep = made_sweep(
        [device],
        locks_mhz=locks,
        caps_w=caps,
        repeats=int(generator.integers(2, 6)),
        time_noise=energy_noise * _uniform(generator, 0.3, 0.5),
        energy_noise=energy_noise,
        supported=bool(generator.random() < 0.8),
        seed=seed,
    )
    return Case(device=device, sweep=sweep, locks_mhz=locks)


@dataclass
class Score:
    """What happened over the devices of a class."""

    devices: int = 0
    refused: int = 0
    advised: int = 0
    broken: int = 0
    worse: int = 0
    left: list[float] = field(default_factory=list)
    held: dict[str, list[bool]] = field(default_factory=dict)

    def hold(self, name: str, interval: Interval, truth: float) -> None:
        """Count whether an interval holds the truth."""
        low, high = interval.low, interval.high
        held = low is not None and high is not None and low - _NOTHING <= truth <= high + _NOTHING
        self.held.setdefault(name, []).append(held)


def add(score: Score, case: Case, budget: float, seed: int) -> None:
    """One sweep, fitted and judged."""
    score.devices += 1
    try:
        model = fit_clocks([case.sweep], bootstrap=200, seed=seed)
    except ClockError:
        score.refused += 1
        return
    judge(score, case, model, recommend_clocks(model, max_slowdown=budget), budget)


def judge(score: Score, case: Case, model: ClockModel, advice: ClockAdvice, budget: float) -> None:
    """Compare the advice with the device's own formula."""
    device, series = case.device, advice.series[0]
    fit = model.series[0]
    view = SeriesView(fit)
    reference = device.clock()[0] if series.reference_how == "unlocked" else series.reference_mhz
    excess = 1 + device.hunting * (series.reference_how == "unlocked" and device.clock()[1])

    def slowdown(mhz: float) -> float:
        return device.iteration_s(mhz) / device.iteration_s(reference) - 1

    def saving(mhz: float) -> float:
        return 1 - device.energy_j(mhz) / device.energy_j(reference) / excess

    # Clocks that a lock was seen to reach, cool, below the reference.
    measured = sorted(
        {
            device.clock(lock_mhz=int(item.requested_sm_clock_mhz))[0]
            for item in fit.settings
            if item.kind == "lock" and item.iteration_s_R and item.requested_sm_clock_mhz
        }
    )
    measured = [mhz for mhz in measured if mhz < reference]
    allowed = [saving(mhz) for mhz in measured if slowdown(mhz) <= budget]
    choice = series.choice
    if choice is None:
        score.left.append(max([0.0, *allowed]))
    else:
        ran = device.clock(lock_mhz=int(choice.sm_clock_mhz))[0]
        score.advised += 1
        score.broken += slowdown(ran) > budget + _NOTHING
        score.worse += saving(ran) < -_NOTHING
        score.left.append(max([0.0, *allowed]) - saving(ran))
        score.hold("slowdown, advised", choice.slowdown, slowdown(ran))
        score.hold("saving, advised", choice.saving, saving(ran))
    between = [(low + high) / 2 for low, high in pairwise(measured)]
    for where, clocks in (("measured", measured), ("between", between)):
        for mhz in clocks:
            said = view.choice(mhz)
            score.hold(f"slowdown, {where}", said.slowdown, slowdown(mhz))
            score.hold(f"saving, {where}", said.saving, saving(mhz))


COLUMNS = tuple(
    f"{name}, {where}" for where in ("measured", "advised", "between") for name in ("slowdown", "saving")
)


def row(kind: str, score: Score) -> str:
    """One markdown row."""
    left = np.array(score.left or [np.nan])
    held = " | ".join(f"{np.mean(score.held[name]):.0%}" if score.held.get(name) else "-" for name in COLUMNS)
    cells = [
        kind,
        f"{score.devices}",
        f"{score.refused}",
        f"{score.advised}",
        held,
        f"{score.broken / score.devices:.1%}",
        f"{score.worse / score.devices:.1%}",
        f"{np.median(left):.2%}",
        f"{np.quantile(left, 0.9):.2%}",
        f"{left.max():.1%}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--devices", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="seed of the first device of each class")
    parser.add_argument("--classes", default=",".join(CLASSES))
    parser.add_argument("--budget", type=float, default=0.02)
    options = parser.parse_args()
    titles = ("class", "devices", "refused", "advised", *COLUMNS, "budget broken", "worse than unlocked")
    print(f"| {' | '.join(titles)} | left: median | left: p90 | left: most |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for kind in options.classes.split(","):
        score = Score()
        for seed in range(options.first, options.first + options.devices):
            add(score, draw(kind, seed), options.budget, seed)
        print(row(kind, score), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
