"""Energy of a window: right within its error, or None with a reason, never 0."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from observatory.analysis.energy import (
    SensorModel,
    WindowEnergy,
    energy_of_window,
    reason_words,
    sensor_of,
)
from observatory.analysis.energy.codes import EnergyCode
from observatory.analysis.energy.repetition import MOST_WINDOWS, measure_repeated
from observatory.analysis.energy.traces import PowerTrace, trace_of_frame
from observatory.devices.base import Sample
from observatory.errors import EnergyError
from observatory.reasons import Reason
from tests.analysis.energy.runs import codes
from tests.devices.sensor import EPOCH_NS, Load, SimulatedSensor, power_frame, steps

H100 = sensor_of("NVIDIA H100 80GB HBM3")
BUSY = steps([("a", 8.3, 300.0), ("b", 5.1, 600.0)], seconds=4.0, jitter=0.1)


def flat(watts: float, seconds: float = 4.0) -> Load:
    return steps([("a", seconds * 1e3, watts)], seconds=seconds)


def measured(rows: pd.DataFrame, load: Load = BUSY, **more: object) -> WindowEnergy:
    trace = trace_of_frame(rows)
    return energy_of_window(trace, load.start_ns, load.end_ns, sensor=more.get("sensor", H100))  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(
    watts=st.floats(50, 1000),
    seconds=st.floats(0.6, 8.0),
    idle=st.floats(20, 200),
    poll_ms=st.sampled_from([20.0, 47.0, 50.0, 53.0]),
    seed=st.integers(0, 1 << 16),
)
@example(watts=50.0, seconds=0.629, idle=20.0, poll_ms=50.0, seed=357)
def test_steady_power_is_found_within_the_stated_errors_whatever_lies_next_to_the_window(
    watts: float, seconds: float, idle: float, poll_ms: float, seed: int
) -> None:
    load = dataclasses.replace(flat(watts, seconds), idle_w=idle)
    found = measured(SimulatedSensor().sample(load, poll_ms=poll_ms, seed=seed), load)
    truth = load.energy_mj(load.start_ns, load.end_ns)
    assert found.counter_mj is not None
    assert found.counter_most_mj is not None
    # An update that seems to lie inside may lie outside by half a poll, at both ends.
    open_mj = abs(watts - idle) * poll_ms
    assert abs(found.counter_mj - truth) <= found.counter_most_mj + open_mj
    if found.integral_mj is not None:
        assert abs(found.integral_mj - truth) <= 0.03 * truth


def test_error_bars_are_those_of_window_length_and_update_period() -> None:
    sensor = SimulatedSensor(period_error=0.0, noise=0.0)
    found = measured(sensor.sample(flat(500.0, 5.0)), flat(500.0, 5.0))
    assert found.counter_mj == pytest.approx(2.5e6, rel=1e-3)
    assert found.counter_std_mj == pytest.approx(found.counter_mj * 0.1 / (math.sqrt(6) * 5.0), rel=0.03)
    assert found.counter_most_mj == pytest.approx(found.counter_mj * 0.1 / 5.0, rel=0.03)
    assert found.relative_error == pytest.approx(1.645 * 0.1 / (math.sqrt(6) * 5.0), rel=0.03)
    assert found.source == "counter"
    assert found.power_mw == pytest.approx(5e5, rel=1e-3)


def test_a_window_whose_ends_draw_more_than_its_middle_has_a_wider_error() -> None:
    load = steps([("a", 300.0, 700.0), ("b", 3400.0, 200.0), ("a", 300.0, 700.0)], seconds=4.0)
    for seed in range(10):
        found = measured(SimulatedSensor().sample(load, seed=seed), load)
        assert found.counter_mj is not None
        assert found.counter_most_mj is not None
        error_mj = abs(found.counter_mj - load.energy_mj(load.start_ns, load.end_ns))
        assert error_mj <= found.counter_most_mj
        assert found.counter_most_mj > 1.5 * found.counter_mj * 0.1 / 4.0


def test_the_integrals_stated_error_is_the_one_it_has() -> None:
    scores = []
    for seed in range(40):
        load = steps([("a", 8.3, 300.0), ("b", 5.1, 600.0)], seconds=3.0, jitter=0.1, seed=seed)
        found = measured(SimulatedSensor().sample(load, seed=seed), load)
        assert found.integral_mj is not None
        assert found.integral_std_mj is not None
        scores.append(
            (found.integral_mj - load.energy_mj(load.start_ns, load.end_ns)) / found.integral_std_mj
        )
    assert 0.6 < float(np.std(scores)) < 1.5


def test_a_window_before_the_first_update_has_no_energy_and_says_no_update_yet() -> None:
    load = flat(500.0, 0.06)
    found = measured(SimulatedSensor().sample(load, poll_ms=20.0), load)
    assert found.energy_mj is None
    assert found.counter_mj is None
    assert "too few updates" in codes(found.counter_reason)
    assert "too few updates" in codes(found.integral_reason)
    assert found.source is None
    assert found.reason


def test_a_counter_that_was_reset_gives_no_energy() -> None:
    rows = SimulatedSensor().sample(BUSY)
    late = rows["time_ns"] > BUSY.start_ns + 2e9
    rows.loc[late, "energy_mj"] -= rows.loc[late, "energy_mj"].iloc[0]
    found = measured(rows)
    assert found.counter_mj is None
    assert "counter went back" in codes(found.counter_reason)
    assert found.source == "integral"


def test_a_counter_that_stands_still_under_load_is_stale() -> None:
    rows = SimulatedSensor().sample(BUSY)
    found = measured(rows.assign(energy_mj=rows["energy_mj"].iloc[0]))
    assert found.counter_mj is None
    assert "counter stale" in codes(found.counter_reason)
    assert found.source == "integral"


@pytest.mark.parametrize("begin_s", [0.0, 1.5, 2.9])
def test_a_counter_that_stands_still_for_a_part_of_the_window_is_stale_too(begin_s: float) -> None:
    rows = SimulatedSensor().sample(BUSY)
    stuck = rows["time_ns"].between(BUSY.start_ns + begin_s * 1e9, BUSY.start_ns + (begin_s + 1.1) * 1e9)
    rows.loc[stuck, "energy_mj"] = rows.loc[stuck, "energy_mj"].iloc[0]
    assert "counter stale" in codes(measured(rows).counter_reason)


def test_a_counter_faster_than_any_device_is_broken() -> None:
    rows = SimulatedSensor().sample(BUSY)
    rows.loc[rows["time_ns"] > BUSY.start_ns + 2e9, "energy_mj"] += 1e12
    assert "counter broken" in codes(measured(rows).counter_reason)


def test_one_leap_of_a_counter_is_broken_though_its_mean_could_be_a_devices() -> None:
    rows = SimulatedSensor().sample(BUSY)
    steady = measured(rows)
    rows.loc[rows["time_ns"] > BUSY.start_ns + 2e9, "energy_mj"] += 2e7
    found = measured(rows)
    assert steady.counter_reason is None
    assert "counter broken" in codes(found.counter_reason)
    assert found.source == "integral"
    assert found.power_mw == pytest.approx(steady.power_mw, rel=0.05)


def test_many_windows_that_disagree_have_one_flag_with_the_largest_difference() -> None:
    load = flat(500.0, 40.0)
    rows = SimulatedSensor().sample(load)
    late = rows["time_ns"] > load.start_ns + 20e9
    rows["power_mw"] = rows["power_mw"] * np.where(late, 0.8, 0.9)
    windows = [(load.start_ns + int(k * 5e9), load.start_ns + int((k + 1) * 5e9)) for k in range(8)]
    found = measure_repeated(trace_of_frame(rows), windows, H100)
    assert not isinstance(found, Reason)
    (flag,) = found.flags
    assert flag.values == {"flagged": 8, "windows": 8}
    assert flag.because[0].values["difference"] == pytest.approx(0.25, abs=0.01)
    assert "(the largest of 8 of 8 windows" in reason_words(flag)


def test_of_very_many_windows_a_part_spread_over_the_run_is_measured() -> None:
    load = flat(500.0, 700.0)
    windows = [(load.start_ns + int(k * 1e9), load.start_ns + int((k + 1) * 1e9)) for k in range(700)]
    found = measure_repeated(trace_of_frame(SimulatedSensor().sample(load)), windows, H100)
    assert not isinstance(found, Reason)
    assert found.windows == MOST_WINDOWS < len(windows)
    assert found.measured_s == pytest.approx(MOST_WINDOWS)
    assert found.low_mw <= 500e3 <= found.high_mw
    assert found.power_mw == pytest.approx(500e3, rel=0.002)


def test_a_device_lost_before_the_window_ends_has_no_energy() -> None:
    rows = SimulatedSensor().sample(BUSY)
    found = measured(rows[rows["time_ns"] < BUSY.start_ns + 3e9])
    assert found.energy_mj is None
    assert "samples end early" in codes(found.counter_reason)
    assert "samples end early" in codes(found.integral_reason)


def test_samples_that_begin_inside_the_window_give_no_energy() -> None:
    rows = SimulatedSensor().sample(BUSY)
    found = measured(rows[rows["time_ns"] > BUSY.start_ns + 1e9])
    assert found.energy_mj is None
    assert "samples start late" in codes(found.counter_reason)


def test_a_gap_in_the_samples_is_bridged_by_the_counter_and_not_by_the_integral() -> None:
    rows = SimulatedSensor().sample(BUSY)
    gap = rows["time_ns"].between(BUSY.start_ns + 1e9, BUSY.start_ns + 2e9)
    found = measured(rows[~gap])
    assert found.counter_mj == pytest.approx(BUSY.energy_mj(BUSY.start_ns, BUSY.end_ns), rel=0.02)
    assert found.integral_mj is None
    assert "not read" in codes(found.integral_reason)


def test_samples_that_are_there_twice_or_out_of_order_change_nothing() -> None:
    rows = SimulatedSensor().sample(BUSY)
    twice = pd.concat([rows, rows.iloc[10:60]]).sample(frac=1.0, random_state=0)
    assert measured(twice) == measured(rows)
    assert trace_of_frame(twice).repeated == 50


def test_impossible_readings_are_missing_ones() -> None:
    rows = SimulatedSensor().sample(BUSY)
    rows.loc[40, "power_mw"], rows.loc[41, "energy_mj"] = -5.0, 1e30
    trace = trace_of_frame(rows)
    assert trace.impossible == 2
    assert np.isnan(trace.power_mw_N[40])
    assert measured(rows).flag is None


def test_a_device_without_a_sensor_says_so() -> None:
    rows = SimulatedSensor(counter_ms=None).sample(BUSY)
    assert measured(rows).counter_reason == Reason(EnergyCode.NOT_REPORTED, {"quantity": "energy counter"})
    found = measured(rows.drop(columns="power_mw"))
    assert found.energy_mj is None
    assert found.integral_reason == Reason(EnergyCode.NOT_REPORTED, {"quantity": "instant power"})


def test_counter_and_power_that_differ_by_more_than_five_percent_are_flagged() -> None:
    assert measured(SimulatedSensor().sample(BUSY)).flag is None
    found = measured(SimulatedSensor(counter_gain=1.09).sample(BUSY))
    assert found.disagreement == pytest.approx(0.09, abs=0.02)
    assert "sensors disagree" in codes(found.flag)
    known = dataclasses.replace(H100, counter_over_integral=1.09)
    assert measured(SimulatedSensor(counter_gain=1.09).sample(BUSY), sensor=known).flag is None


def test_a_difference_beyond_the_errors_is_flagged_even_below_five_percent() -> None:
    load = flat(400.0, 30.0)
    found = measured(SimulatedSensor(counter_gain=1.03, noise=0.002).sample(load), load)
    assert abs(found.disagreement or 0) < 0.05
    assert "sensors disagree" in codes(found.flag)


def test_readings_of_a_device_serve_as_samples() -> None:
    rows = SimulatedSensor().sample(BUSY)
    readings = [
        Sample(
            time_ns=int(row.time_ns), read_ns=int(row.read_ns), device_uuid="GPU-0",
            power_mw=int(row.power_mw), energy_mj=int(row.energy_mj),
        )
        for row in rows.itertuples()
    ]  # fmt: skip
    found = energy_of_window(readings, BUSY.start_ns, BUSY.end_ns, sensor=H100)
    assert found == measured(rows)
    silent = [dataclasses.replace(reading, power_mw=None, energy_mj=None) for reading in readings]
    assert energy_of_window(silent, BUSY.start_ns, BUSY.end_ns).energy_mj is None


def test_an_unknown_sensor_is_found_from_the_samples() -> None:
    found = measured(SimulatedSensor().sample(BUSY), sensor=SensorModel())
    truth = BUSY.energy_mj(BUSY.start_ns, BUSY.end_ns)
    assert found.counter_mj == pytest.approx(truth, rel=0.02)
    assert found.integral_mj == pytest.approx(truth, rel=0.03)
    known = measured(SimulatedSensor().sample(BUSY))
    assert (found.integral_std_mj or 0) > (known.integral_std_mj or 1)  # it may have seen less of the time


def test_a_window_without_length_is_an_error() -> None:
    trace = trace_of_frame(SimulatedSensor().sample(BUSY))
    with pytest.raises(EnergyError, match="no length"):
        energy_of_window(trace, EPOCH_NS, EPOCH_NS)


def test_no_samples_at_all_give_no_energy() -> None:
    empty: PowerTrace = trace_of_frame(power_frame([]))
    found = energy_of_window(empty, EPOCH_NS, EPOCH_NS + 10**9)
    assert found.energy_mj is None
    assert found.reason


def test_power_that_never_changes_is_no_missing_power() -> None:
    """An idle GPU may show the same milliwatts for minutes, which tells no period."""
    time_ns = np.arange(0, 4_000_000_000, 50_000_000) + 10**12
    trace = trace_of_frame(pd.DataFrame({"time_ns": time_ns, "read_ns": 300_000, "power_mw": 75_000}))
    found = energy_of_window(trace, int(time_ns[10]), int(time_ns[70]))
    assert found.counter_mj is None
    assert found.integral_mj == pytest.approx(75_000 * 3.0, rel=1e-6)


def test_power_that_never_changes_is_known_as_finely_as_the_sensor_counts_and_no_better() -> None:
    time_ns = np.arange(0, 40_000_000_000, 50_000_000) + 10**12
    for watts, half_mw in ((75.0, 450.0), (400.0, 800.0), (75.1234, 150.2468)):
        rows = pd.DataFrame({"time_ns": time_ns, "read_ns": 300_000, "power_mw": watts * 1e3})
        trace = trace_of_frame(rows)
        windows = [(int(time_ns[at]), int(time_ns[at + 120])) for at in (10, 150, 290, 430, 570)]
        found = energy_of_window(trace, *windows[0])
        assert found.relative_error == pytest.approx(half_mw / (watts * 1e3), rel=1e-3)
        many = measure_repeated(trace, windows, SensorModel())
        assert not isinstance(many, Reason)
        assert many.high_mw - many.power_mw == pytest.approx(half_mw, rel=1e-3)
        assert many.power_mw - many.low_mw == pytest.approx(half_mw, rel=1e-3)


def test_a_counter_of_an_hour_is_not_exact() -> None:
    load = flat(500.0, 400.0)
    found = measured(SimulatedSensor(noise=0.0).sample(load), load)
    assert found.source == "counter"
    assert found.relative_error == pytest.approx(0.002, rel=0.01)


def test_an_update_at_the_end_that_may_have_averaged_what_comes_after_is_left_out() -> None:
    """Polls of 50 ms leave the moments of 100 ms updates open by a quarter of a period."""
    errors, scores = [], []
    for seed in range(120):
        generator = np.random.default_rng(seed)
        watts, idle = generator.uniform(50, 1000), generator.uniform(20, 200)
        load = dataclasses.replace(flat(watts, generator.uniform(0.6, 2.0)), idle_w=idle)
        poll_ms = float(generator.choice([20.0, 47.0, 50.0, 53.0]))
        found = measured(SimulatedSensor().sample(load, poll_ms=poll_ms, seed=seed), load)
        if found.integral_mj is None or found.integral_std_mj is None:
            continue
        errors.append(abs(found.integral_mj / load.energy_mj(load.start_ns, load.end_ns) - 1))
        scores.append(errors[-1] * found.integral_mj / found.integral_std_mj)
    assert len(errors) > 100
    assert max(errors) < 0.015
    # Short windows have few readings: the stated interval holds nine of ten all the same.
    assert float(np.mean(np.array(scores) > 1.645)) < 0.15
