"""A reason names exactly what is missing: one thing at a time is taken from complete samples."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from observatory.analysis.energy import energy_of_window, reason_words, sensor_of
from observatory.analysis.energy.attribution import Attribution, idle_power
from observatory.analysis.energy.codes import EnergyCode
from observatory.analysis.energy.observations import counter_observations, power_observations
from observatory.analysis.energy.traces import trace_of_frame
from observatory.analysis.frequency.telemetry import telemetry_advice
from observatory.devices.sensors import SensorModel
from observatory.reasons import Reason
from observatory.reports.frames.power import collect_power
from observatory.run import Run, open_run
from tests.analysis.energy.runs import codes, timeline_of
from tests.reports.sample_power import DEVICE, UUID, a_load, a_power_run, samples_of

#: Thing -> words by which a sentence names it.
WORDS = {
    "power_mw": r"instant power",
    "energy_mj": r"energy counter|\bcounter\b",
    "enforced_limit_mw": r"power limit",
    "event_reasons": r"event reasons",
    "sm_clock_mhz": r"(?<!highest )SM clock",
    "max_sm_clock_mhz": r"highest SM clock",
    "temperature_c": r"temperature",
    "memory_clock_mhz": r"memory clock",
    "average_power_mw": r"average power",
    "power_cap_ns": r"power cap counter",
    "thermal_ns": r"thermal counter",
    "read_ns": r"read time",
}
#: Things that other readings stand in for: nothing is left open without them.
REPLACED = ("average_power_mw", "power_cap_ns", "thermal_ns", "read_ns", "energy_mj")
#: What a sentence says of something that is missing, up to the end of the clause.
ABSENT = re.compile(
    r"no sample \w+ a (?:valid )?reading of (?P<a>[^:;(]*)"
    r"|(?:device reported|device reports) no (?P<b>[^:;(]*)"
    r"|(?P<c>[\w ]*) (?:was|were) not (?:sampled|read)|without (?P<d>event reasons)"
    r"|readings of the (?P<e>[\w ]*) (?:start|end)"
)


def complete() -> pd.DataFrame:
    """Samples that hold every column; the counters of nanoseconds agree with the event reasons."""
    rows = samples_of(a_load())
    capped = rows["event_reasons"].to_numpy() == 0x4
    return rows.assign(
        average_power_mw=rows["power_mw"].astype("Int64"),
        power_cap_ns=pd.array(np.cumsum(np.where(capped, 50_000_000, 0)), "Int64"),
        thermal_ns=pd.array(np.zeros(len(rows), dtype=np.int64), "Int64"),
    )


def without(rows: pd.DataFrame, column: str, part: slice) -> pd.DataFrame:
    values = rows[column].astype("Int64").copy()
    values[part] = pd.NA
    return rows.assign(**{column: values})


def write(path: Path, rows: pd.DataFrame, *, lacks: str | None = None, highest: bool = True) -> Run:
    """A run of these samples; ``lacks``: a column of which it says that the device does not report it."""
    a_power_run(
        path, power=rows, devices=(DEVICE.model_copy(update={"max_sm_clock_mhz": 1980 if highest else None}),)
    )
    if lacks is not None:
        status = path / "ranks" / "rank-00000.json"
        power = {"unavailable": {UUID: {lacks: "this GPU does not report it: returned 3"}}}
        status.write_text(json.dumps({**json.loads(status.read_text()), "power": power}))
    return open_run(path)


def telemetry_sentences(run: Run) -> Iterator[str]:
    for device in telemetry_advice(run).devices:
        yield from device.findings


def energy_sentences(run: Run) -> Iterator[str]:
    """What ``observatory energy`` and the report say of a run."""
    found = collect_power([run])
    for frame in (found.devices, found.phases, found.tokens):
        yield from frame["reason"].dropna()
    yield from (text for _, text in found.gaps)
    for row in found.traces[found.traces["reason"].notna()].itertuples():
        yield f"no sample holds a reading of {str(row.quantity).replace('_', ' ').replace('sm ', 'SM ')}"


def named(texts: Iterator[str]) -> set[str]:
    """Things that the sentences say are missing."""
    found = set()
    for text in texts:
        for match in ABSENT.finditer(text):
            clause = next(group for group in match.groups() if group is not None)
            clause = {"limit": "power limit"}.get(clause.strip(), clause)
            found |= {thing for thing, words in WORDS.items() if re.search(words, clause)}
    return found


@pytest.mark.parametrize("column", [*WORDS, None])
@pytest.mark.parametrize("how", ["everywhere", "by a stated gap", "late", "early"])
def test_what_is_missing_is_named_and_nothing_else(tmp_path: Path, column: str | None, how: str) -> None:
    rows = complete()
    half = len(rows) // 2
    if column in rows:
        part = {"late": slice(half, None), "early": slice(half)}.get(how, slice(None))
        rows = without(rows, str(column), part)
    run = write(
        tmp_path / "run", rows, lacks=column if how == "by a stated gap" else None,
        highest=column != "max_sm_clock_mhz",
    )  # fmt: skip
    found = named(telemetry_sentences(run))
    if how == "everywhere":
        found |= named(energy_sentences(run))
    if column is None or column in REPLACED:
        assert found == set()
    elif how == "everywhere" or column == "max_sm_clock_mhz":
        assert found == {column}
    else:
        assert found <= {column}


@pytest.mark.parametrize("how", ["everywhere", "late", "early", "the window", "most of the window"])
@pytest.mark.parametrize(
    ("column", "own", "other"),
    [("energy_mj", "counter_reason", "integral_reason"), ("power_mw", "integral_reason", "counter_reason")],
)
def test_a_window_without_readings_of_one_kind_says_of_which(
    column: str, own: str, other: str, how: str
) -> None:
    rows, load = complete(), a_load()
    start_ns, end_ns = load.start_ns, load.start_ns + 5_000_000_000
    time_ns = rows["time_ns"].to_numpy()
    lost = {
        "everywhere": time_ns > 0,
        "late": time_ns > start_ns + 2_500_000_000,
        "early": time_ns < start_ns + 2_500_000_000,
        "the window": (time_ns > start_ns - 20_000_000) & (time_ns < end_ns + 20_000_000),
        "most of the window": (time_ns > start_ns + 200_000_000) & (time_ns < end_ns - 200_000_000),
    }[how]
    rows[column] = rows[column].astype("Int64").mask(lost)
    found = energy_of_window(trace_of_frame(rows), start_ns, end_ns, sensor=sensor_of(DEVICE.name))
    assert getattr(found, other) is None
    reason = reason_words(getattr(found, own)) if getattr(found, own) else ""
    if column == "energy_mj" and how == "most of the window":
        assert found.counter_mj == pytest.approx(load.energy_mj(start_ns, end_ns), rel=0.02)
        return  # a counter bridges what was not read
    assert re.search(WORDS[column], reason)
    assert not re.search("stood still|[0-9] update|repeat what|device was lost|sampler ended", reason), reason
    assert "samples start" not in reason


def test_power_that_is_read_and_not_renewed_is_not_said_to_be_unread() -> None:
    rows, load = complete(), a_load()
    start_ns, end_ns = load.start_ns, load.start_ns + 5_000_000_000
    inside = rows["time_ns"].between(start_ns + 500_000_000, end_ns)
    rows.loc[inside, "power_mw"] = int(rows.loc[inside, "power_mw"].iloc[0])
    rows = rows.assign(power_mw=rows["power_mw"].astype("Int64"))
    found = energy_of_window(trace_of_frame(rows), start_ns, end_ns, sensor=SensorModel())
    assert "not read" not in codes(found.integral_reason)


@pytest.mark.parametrize(
    ("column", "observe", "what"),
    [
        ("energy_mj", counter_observations, "energy counter"),
        ("power_mw", power_observations, "instant power"),
    ],
)
def test_observations_tell_few_readings_from_readings_that_do_not_change(
    column: str, observe: Callable[..., object], what: str
) -> None:
    rows, sensor = complete(), SensorModel(window_ms=25.0)
    readings = rows[column].astype("Int64")
    few = readings.mask(np.arange(len(rows)) != 40)
    still = readings.where(readings.isna(), int(readings.iloc[0]))
    for values, expected in (
        (few, Reason(EnergyCode.FEW_UPDATES_SEEN, {"quantity": what, "updates": 0, "readings": 1})),
        (still, Reason(EnergyCode.NEVER_CHANGED, {"quantity": what, "readings": len(rows)})),
        (readings.mask(readings.notna()), Reason(EnergyCode.NO_READING, {"quantity": what})),
    ):
        assert observe(trace_of_frame(rows.assign(**{column: values})), sensor) == expected


def test_idle_windows_without_readings_are_not_said_to_be_absent() -> None:
    rows, timeline = complete(), timeline_of(a_load())
    gap = [7.5e9, 6e9]
    inside = rows["time_ns"].between(a_load().start_ns + gap[1], a_load().start_ns + gap[0])
    rows = rows.assign(
        **{name: rows[name].astype("Int64").mask(inside) for name in ("power_mw", "energy_mj")}
    )
    found = idle_power(trace_of_frame(rows), timeline, SensorModel(), Attribution(phases=()), None)
    assert found.power_mw is None
    assert "no idle windows" not in codes(found.source)
    assert "idle windows unmeasured" in codes(found.source)


@pytest.mark.parametrize("part", [slice(100, None), slice(100)])
def test_a_counter_that_was_read_half_of_the_time_is_not_taken_for_all_of_it(
    tmp_path: Path, part: slice
) -> None:
    rows = complete()
    whole = telemetry_advice(write(tmp_path / "whole", rows)).devices[0]
    half = telemetry_advice(write(tmp_path / "half", without(rows, "power_cap_ns", part))).devices[0]
    assert (whole.power_cap_source, half.power_cap_source) == ("counter", "event reasons")
    assert half.power_cap_share == pytest.approx(whole.power_cap_share, abs=0.02)
