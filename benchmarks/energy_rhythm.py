"""Steps that never vary against a sensor and its polls: how many powers are right, refused, or missed.

Constant steps are the hard case of attribution: a sensor in time with them may show the phases exchanged, or
one mix for ever. Each row is one load and sensor, tried at many moments of the steps against the polls and of
the sensor's updates against the steps, with several errors of the device's clock. *Right* is a power whose
90 % interval holds the truth, *missed* one whose does not; *flagged* are missed ones that carry a warning.

    python -m benchmarks.energy_rhythm [--offsets 6] [--only TEXT]
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from observatory.analysis.energy import SensorModel, attribute, make_timeline, sensor_of
from observatory.analysis.energy.design import IDLE
from observatory.analysis.energy.traces import trace_of_frame
from tests.devices.sensor import SimulatedSensor, spans_of, steps

H100 = sensor_of("NVIDIA H100 80GB HBM3")
PLAIN = SimulatedSensor()
NO_COUNTER = SimulatedSensor(counter_ms=None)
#: Errors of the device's clock, relative, and when its updates come after a poll; None: at random.
CLOCKS = ((0.0, 0.0), (4e-4, None), (4e-4, 10.0))
#: When steps begin after a poll, as shares of the time between polls.
OFFSETS = (0.2, 0.5, 0.04, 0.9)

Stage = tuple[str, float, float]


@dataclass(frozen=True, kw_only=True)
class Rhythm:
    """Steps of one length, and the sensor that looks at them."""

    name: str
    stages: tuple[Stage, ...]
    seconds: float = 20.0
    sensor: SimulatedSensor = PLAIN
    model: SensorModel = H100
    poll_ms: float = 50.0


def _two(
    period_ms: float, share: float = 0.5, watts: tuple[float, float] = (640.0, 290.0)
) -> tuple[Stage, ...]:
    return ("prefill", period_ms * share, watts[0]), ("decode", period_ms * (1 - share), watts[1])


def _shown(update_ms: float, window_ms: float) -> tuple[SimulatedSensor, SensorModel]:
    """A sensor without a counter that is renewed and averages so, and what is known of it."""
    return (
        replace(NO_COUNTER, update_ms=update_ms, window_ms=window_ms),
        SensorModel(update_ms=update_ms, window_ms=window_ms),
    )


def rhythms() -> Iterator[Rhythm]:
    """All rows."""
    for period_ms in (200, 100, 300, 400, 150, 250, 199, 201, 50):
        yield Rhythm(name=f"{period_ms:g} ms", stages=_two(period_ms))
    yield Rhythm(name="200 ms, prefill 30 %", stages=_two(200, 0.3))
    three = (("prefill", 60.0, 640.0), ("decode", 100.0, 290.0), ("verify", 40.0, 420.0))
    yield Rhythm(name="200 ms, three phases", stages=three)
    yield Rhythm(name="200 ms, 300 and 290 W", stages=_two(200, watts=(300.0, 290.0)))
    gap = ("prefill", 80.0, 640.0), ("decode", 80.0, 290.0), ("", 40.0, 80.0)
    yield Rhythm(name="200 ms with an idle gap", stages=gap)
    for seconds in (4.0, 45.0):
        yield Rhythm(name=f"200 ms, {seconds:g} s", stages=_two(200), seconds=seconds)
    for poll_ms in (20.0, 53.0, 100.0):
        yield Rhythm(name=f"200 ms, polls every {poll_ms:g} ms", stages=_two(200), poll_ms=poll_ms)
    for update_ms, window_ms in ((100.0, 100.0), (20.0, 20.0), (50.0, 25.0)):
        sensor, model = _shown(update_ms, window_ms)
        yield Rhythm(
            name=f"{2 * update_ms:g} ms, sensor {window_ms:g} of {update_ms:g} ms, no counter",
            stages=_two(2 * update_ms), sensor=sensor, model=model,
            poll_ms=50.0 if update_ms > 50 else update_ms / 2,
        )  # fmt: skip
    for late_ms in (20.0, 50.0, 75.0, 100.0):
        yield Rhythm(
            name=f"200 ms, values {late_ms:g} ms late",
            stages=_two(200), sensor=replace(PLAIN, latency_ms=late_ms),
        )  # fmt: skip
    for name, sensor in (
        ("5 ms capacitors", replace(PLAIN, smoothing_ms=5.0)),
        ("updates off by 1 ms", replace(PLAIN, tick_jitter_ms=1.0)),
    ):
        yield Rhythm(name=f"200 ms, {name}", stages=_two(200), sensor=sensor)


def tried(rhythm: Rhythm, offsets: int) -> Counter[str]:
    """What became of the powers of one row."""
    load = steps(rhythm.stages, seconds=rhythm.seconds)
    spans = spans_of(load)
    timeline = make_timeline(
        spans["phase"].tolist(), spans["start_ns"].to_numpy(), spans["end_ns"].to_numpy()
    )
    truth_mw = {name or IDLE: watts * 1e3 for name, (watts, _) in load.truth().items()}
    result: Counter[str] = Counter()
    moments = itertools.product(OFFSETS[:offsets], CLOCKS)
    for number, (share, (clock, after_ms)) in enumerate(moments):
        offset_ms = share * rhythm.poll_ms
        tick_ms = None if after_ms is None else after_ms - offset_ms
        sensor = replace(rhythm.sensor, period_error=clock, tick_ms=tick_ms)
        rows = sensor.sample(load, poll_ms=rhythm.poll_ms, seed=number, offset_ms=offset_ms)
        for found in attribute(trace_of_frame(rows), timeline, rhythm.model, seed=number).phases:
            if found.power_mw is None or found.low_mw is None or found.high_mw is None:
                result["refused"] += 1
            elif found.low_mw <= truth_mw[found.name] <= found.high_mw:
                result["right"] += 1
            else:
                result["missed"] += 1
                result["flagged"] += bool(found.flags)
    return result


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--offsets", type=int, default=len(OFFSETS), help="moments of the steps against the polls"
    )
    parser.add_argument("--only", default="", help="rows whose name holds this")
    options = parser.parse_args()
    total: Counter[str] = Counter()
    print("| steps | right | refused | missed | flagged |\n|---|---:|---:|---:|---:|")
    for rhythm in rhythms():
        if options.only not in rhythm.name:
            continue
        found = tried(rhythm, options.offsets)
        total += found
        print(_line(rhythm.name, found), flush=True)
    print(_line("all", total))
    return 0


def _line(name: str, found: Counter[str]) -> str:
    return f"| {name} | {found['right']} | {found['refused']} | {found['missed']} | {found['flagged']} |"


if __name__ == "__main__":
    raise SystemExit(main())
