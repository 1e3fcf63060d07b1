"""Energy of random loads of known power: how much is answered, how often intervals hold, what is off unseen.

Each load is written as a run directory and read back by ``energy_summary``, as ``observatory energy`` does.
Periodic loads: steps of 20 to 1,000 ms (log-uniform), 20 to 120 s, at any moment of the polls (every 50 ms);
one phase whose power swings within each step, two phases, or two phases and an idle gap; two thirds exactly
regular, the others with steps that vary by 1 %. Loads that are not periodic: random bursts of 20 to 500 ms,
a server's batches, phases of 6 to 12 s. Sensors by turns: instant power renewed every 100 ms as the mean of
25, 100 or 1,000 ms, with 1 % noise, read up to 20 ms late; every other one with an energy counter (100 ms).
The device of 1,000 ms is of a name whose averaging window the program does not know. No GPU takes part.

*Answered* are numbers of all that were asked, *held* of these the 90 % intervals that hold the truth;
*unseen* is off by more than 10 % without a flag.

    python -m benchmarks.energy_periodic [--loads 500] [--others 60] [--without PART] [--rows FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from observatory.analysis.energy import attribution, design, edges
from observatory.analysis.energy.codes import EnergyCode
from observatory.analysis.energy.run_energy import energy_summary
from observatory.reasons import Reason
from observatory.run import open_run
from observatory.run.manifest import DeviceCalibration, DeviceSpec, FieldCalibration
from tests.analysis.energy.runs import write_energy_run
from tests.devices.sensor import Load, SimulatedSensor, bursts, join, spans_of, steps

UUID = SimulatedSensor.device_uuid
#: Name of a device by what its instant power averages, in ms.
DEVICES = {25.0: "NVIDIA H100 80GB HBM3", 100.0: "NVIDIA L40S", 1000.0: "a device of no known sensor"}
POLL_MS, UPDATE_MS = 50.0, 100.0
_PERIODIC = ("one phase", "two phases", "two phases, gap")
#: Relative error that must not go unseen.
MOST_OFF = 0.1


@dataclass(frozen=True, kw_only=True)
class Case:
    """One load and the sensor that shows it; ``kind`` names the sort of load."""

    number: int
    kind: str
    load: Load
    sensor: SimulatedSensor
    offset_ms: float


def cases(periodic: int, others: int, seed: int = 0) -> Iterator[Case]:
    """All loads, periodic ones first; each depends on its own number only."""
    for number in range(periodic + others):
        is_periodic = number < periodic
        place = number if is_periodic else number - periodic
        random = np.random.default_rng([seed, int(is_periodic), place])
        kind, load = (_periodic if is_periodic else _other)(random)
        sensor = SimulatedSensor(
            window_ms=list(DEVICES)[place % 3], counter_ms=None if place // 3 % 2 else 100.0,
            latency_ms=random.uniform(0, 20), period_error=random.uniform(-5e-4, 5e-4),
        )  # fmt: skip
        yield Case(number=number, kind=kind, load=load, sensor=sensor, offset_ms=random.uniform(0, POLL_MS))


def _periodic(random: np.random.Generator) -> tuple[str, Load]:
    period_ms, seconds = np.exp(random.uniform(np.log([20, 20]), np.log([1000, 120])))
    high_w, low_w, share = random.uniform(400, 700), random.uniform(100, 350), random.uniform(0.2, 0.8)
    kind = _PERIODIC[int(random.integers(3))]
    gap = 0.25 * period_ms if kind == "two phases, gap" else 0.0
    busy = period_ms - gap
    stages = [("prefill", share * busy, high_w), ("decode", (1 - share) * busy, low_w)]
    if gap:
        stages.append(("", gap, 80.0))
    jitter = 0.01 if random.random() < 1 / 3 else 0.0
    return kind, steps(stages, seconds=seconds, step_jitter=jitter, seed=int(random.integers(1 << 30)))


def _other(random: np.random.Generator) -> tuple[str, Load]:
    seconds, seed = float(np.exp(random.uniform(np.log(20), np.log(120)))), int(random.integers(1 << 30))
    high_w, low_w = random.uniform(400, 700), random.uniform(100, 350)
    kind = ("bursts", "server", "phases alone")[int(random.integers(3))]
    if kind == "bursts":
        mean_ms = np.exp(random.uniform(np.log(20), np.log(500)))
        stages = [("prefill", mean_ms, high_w), ("decode", mean_ms, low_w), ("", 0.7 * mean_ms, 80.0)]
        return kind, bursts(stages, seconds=seconds, seed=seed)
    if kind == "server":
        stages = [("prefill", random.uniform(50, 300), high_w), *[("decode", 10.0, low_w)] * 30]
        return kind, steps([*stages, ("", 200.0, 80.0)], seconds=seconds, jitter=0.05, seed=seed)
    lengths = random.uniform(6, 12, 4)
    alone = [("prefill", 150.0, high_w), ("decode", 10.0, low_w)] * 2
    parts = [steps([one], seconds=s, jitter=0.05, seed=seed) for one, s in zip(alone, lengths, strict=True)]
    return kind, join(*parts, gap_ms=1500)


def measured(case: Case, folder: Path) -> list[dict[str, Any]]:
    """What the program answers of one load: a row for the device and one for each phase and idle."""
    load = case.load
    whole = case.kind == "one phase"
    spans = spans_of(load, phase="decode") if whole else spans_of(load)
    spans = spans[spans["name"] == "phase"]
    power = case.sensor.sample(load, poll_ms=POLL_MS, seed=case.number, offset_ms=case.offset_ms)
    path = write_energy_run(
        folder / f"run-{case.number}",
        power=power,
        spans=[spans],
        devices=(DeviceSpec(kind="gpu", name=DEVICES[case.sensor.window_ms], uuid=UUID),),
        own_devices=[(UUID,)],
        calibration=DeviceCalibration(
            fields={"power_mw": FieldCalibration(update_period_ms=UPDATE_MS)}, duration_s=1.2
        ),
    )
    summary = energy_summary(open_run(path))
    start_ns, end_ns = int(spans["start_ns"].min()), int(spans["end_ns"].max())
    device = summary.devices.iloc[0]
    true_mj = load.energy_mj(start_ns, end_ns)
    answers = [("device", true_mj, device.energy_mj, device.error * device.energy_mj, None, device)]
    truth = {name or "idle": watts * 1e3 for name, (watts, _) in load.truth().items()}
    if whole:
        parts = [part for name, part in load.truth().items() if name]
        truth["decode"] = 1e3 * sum(watts * s for watts, s in parts) / sum(s for _, s in parts)
    for row in summary.phases.itertuples():
        low_high = (row.power_low_mw, row.power_high_mw)
        answers.append((row.phase, truth[row.phase], row.power_mw, None, low_high, row))
    result = []
    for what, true, found, half, bounds, row in answers:
        low, high = (found - half, found + half) if bounds is None else bounds
        known = bool(np.isfinite(found))
        result.append(
            {
                "number": case.number, "kind": case.kind, "window_ms": case.sensor.window_ms,
                "counter": case.sensor.counter_ms is not None, "what": what, "answered": known,
                "held": known and bool(low <= true <= high),
                "error": float(found / true - 1) if known else None,
                "half": float((high - low) / 2 / true) if known else None,
                "flagged": bool(row.flag or row.energy_flag), "source": row.source,
                "method": getattr(row, "method", None), "reason": row.reason_code,
                "period_ms": float((load.edge_ns[-1] - load.edge_ns[0]) * 1e-6 / (load.step[-1] + 1)),
                "seconds": float((end_ns - start_ns) * 1e-9),
            }
        )  # fmt: skip
    return result


def _refused(*_: object) -> Reason:
    return Reason(EnergyCode.NOT_OBSERVED)


_AROUND = design._Tried.around
#: Parts of the attribution that may be left out, and what then stands in their place.
PARTS: dict[str, tuple[tuple[Any, str, Any], ...]] = {
    "least squares": ((attribution, "_solutions", lambda *_: []),),
    "least squares on power": ((attribution, "power_observations", _refused),),
    "least squares on the counter": ((attribution, "counter_observations", _refused),),
    "common period of updates": ((edges, "_fit_block", lambda *_: None),),
    "smear": (
        (design, "_SMEARS_NS", np.zeros(1)),
        (design._Tried, "around", lambda t, at, step, points: _AROUND(t, at, step, (*points[:2], 1))),
    ),
}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of the table: by sort of load and sensor, device and phases apart."""
    lines = [
        "| loads | sensor | counter | energy: answered | held | unseen | phases: answered | held | unseen |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in ("periodic", "not periodic"):
        of_sort = [row for row in rows if (row["kind"] in _PERIODIC) == (name == "periodic")]
        for window_ms in (*DEVICES, None):
            for counter in (True, False):
                chosen = [
                    row for row in of_sort
                    if window_ms in (None, row["window_ms"]) and row["counter"] == counter
                ]  # fmt: skip
                sensor = "all" if window_ms is None else f"{UPDATE_MS:g}/{window_ms:g}"
                parts = (
                    _counts([row for row in chosen if row["what"] == "device"]),
                    _counts([row for row in chosen if row["what"] != "device"]),
                )
                lines.append(f"| {name} | {sensor} | {'yes' if counter else 'no'} | {' | '.join(parts)} |")
    return lines


def _counts(rows: list[dict[str, Any]]) -> str:
    answered = [row for row in rows if row["answered"]]
    held = np.mean([row["held"] for row in answered]) if answered else np.nan
    unseen = sum(abs(row["error"]) > MOST_OFF and not row["flagged"] for row in answered)
    return f"{len(answered)} of {len(rows)} | {held:.0%} | {unseen}"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--loads", type=int, default=500, help="periodic loads")
    parser.add_argument("--others", type=int, default=60, help="loads that are not periodic")
    parser.add_argument("--without", action="append", default=[], choices=PARTS, help="a part to leave out")
    parser.add_argument("--rows", type=Path, help="keep every answer here, one JSON object a line")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for place, name, stand_in in (patch for part in options.without for patch in PARTS[part]):
            stack.enter_context(mock.patch.object(place, name, stand_in))
        for case in cases(options.loads, options.others):
            rows += measured(case, Path(folder))
            if options.rows is not None:
                options.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
