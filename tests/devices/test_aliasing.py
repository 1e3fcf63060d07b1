"""Steps that move in time with the sensor: found, predicted, cured."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from observatory.analysis.energy import find_aliasing, phase_shifts_ms, predicted_error, rhythm_of
from observatory.devices.aliasing import StepRhythm, locked_positions
from observatory.errors import EnergyError
from tests.devices.sensor import Load, paused, steps

PART_TIME = {"update_ms": 100.0, "window_ms": 25.0}


def square(period_ms: float, *, seconds: float = 5.0, duty: float = 0.5) -> Load:
    """On at 600 W and off at 150 W: mean 375 W, 1.6 and 0.4 of it, for a duty of a half."""
    return steps([("on", period_ms * duty, 600.0), ("off", period_ms * (1 - duty), 150.0)], seconds=seconds)


def seen_errors(load: Load, *, positions: int = 100) -> np.ndarray:
    """Relative errors of the mean that a 100/25 ms sensor shows, over its positions against the load."""
    errors = []
    for k in range(positions):
        tick_ns = np.arange(load.start_ns + 25e6 + 1e8 * k / positions, load.end_ns, 1e8)
        seen_w = (load.energy_until_mj(tick_ns) - load.energy_until_mj(tick_ns - 25e6)) / 25.0
        true_w = load.energy_mj(load.start_ns, load.end_ns) / ((load.end_ns - load.start_ns) * 1e-6)
        errors.append(seen_w.mean() / true_w - 1)
    return np.array(errors)


def rms(errors: np.ndarray) -> float:
    return float(np.sqrt((errors**2).mean()))


@pytest.mark.parametrize(("period_ms", "low", "high"), [(50.0, 0.33, 0.36), (100.0, 0.47, 0.50)])
def test_steps_that_divide_the_sensors_period_are_off_by_a_third_to_a_half(
    period_ms: float, low: float, high: float
) -> None:
    assert low < rms(seen_errors(square(period_ms))) < high
    predicted = predicted_error(period_ms, **PART_TIME, samples=50, swing=0.6, duty=0.5)
    assert predicted == pytest.approx(rms(seen_errors(square(period_ms))), rel=0.03)


@pytest.mark.parametrize(("period_ms", "pauses"), [(50.0, 1), (100.0, 3)])
def test_pauses_of_25_ms_bring_it_to_one_percent(period_ms: float, pauses: int) -> None:
    shifts = phase_shifts_ms(period_ms)
    assert shifts == (25.0,) * pauses
    cured = seen_errors(paused(square(period_ms), shifts))
    assert rms(cured) < 0.012
    assert np.abs(cured).max() < 0.03


@settings(max_examples=30, deadline=None)
@given(period_ms=st.floats(8.0, 300.0), duty=st.floats(0.15, 0.85))
def test_the_predicted_error_is_the_one_a_simulated_sensor_has(period_ms: float, duty: float) -> None:
    load = square(period_ms, seconds=20.0, duty=duty)
    mean_w = 150.0 + 450.0 * duty
    predicted = predicted_error(period_ms, **PART_TIME, samples=200, duty=duty, swing=600.0 / mean_w - 1)
    # Steps are whole, samples are not: the ends of a load weigh a little differently.
    assert rms(seen_errors(load, positions=60)) == pytest.approx(predicted, rel=0.1, abs=0.012)


def test_steps_that_visit_the_whole_sensor_period_need_no_pause() -> None:
    assert phase_shifts_ms(75.0) == ()
    assert locked_positions(75.0, **PART_TIME, samples=50) == 3
    assert rms(seen_errors(square(75.0))) < 0.02


def test_places_in_a_step_follow_from_the_ratio_of_the_periods() -> None:
    places = {p: locked_positions(p, **PART_TIME, samples=50) for p in (10.0, 40.0, 60.0, 100.0, 200.0)}
    assert places == {10.0: 1, 40.0: 2, 60.0: 3, 100.0: 1, 200.0: 2}
    assert locked_positions(99.0, **PART_TIME, samples=50) is None
    assert locked_positions(99.0, **PART_TIME, samples=10) == 1  # too short to wander


def test_jitter_of_the_steps_is_a_cure_of_its_own() -> None:
    steady = predicted_error(100.0, **PART_TIME, samples=50)
    shaken = predicted_error(100.0, **PART_TIME, samples=50, jitter_ms=60.0)
    assert shaken < 0.3 * steady


def test_a_longer_run_helps_where_samples_wander_and_not_where_they_are_locked() -> None:
    short, long = (predicted_error(99.0, **PART_TIME, samples=n) for n in (50, 1000))
    assert long < 0.1 * short
    short, long = (predicted_error(100.0, **PART_TIME, samples=n) for n in (50, 1000))
    assert long == pytest.approx(short)


def test_a_sensor_that_sees_all_the_time_has_nothing_to_cure() -> None:
    assert phase_shifts_ms(100.0, update_ms=100.0, window_ms=100.0) == ()


def test_the_rhythm_is_the_median_gap_and_irregular_steps_have_none() -> None:
    starts = np.cumsum(np.array([0, 100, 100, 102, 98, 500, 100])) * 1_000_000
    rhythm = rhythm_of(starts)
    assert rhythm is not None
    assert rhythm.period_ms == 100.0
    assert rhythm.jitter_ms == pytest.approx(1.4826)
    assert rhythm_of(np.array([0, 1])) is None
    assert rhythm_of(np.cumsum(np.array([0, 10, 90, 30, 200, 60, 5])) * 1_000_000) is None


def test_an_aliased_run_is_told_with_its_cure() -> None:
    found = find_aliasing(StepRhythm(period_ms=100.0, jitter_ms=0.0, steps=50), **PART_TIME, duration_s=5.0)
    assert found.positions == 1
    assert found.error > 0.7  # of a load that draws nothing for half of its step
    assert found.shifts_ms == (25.0, 25.0, 25.0)
    assert found.error_after < 0.02


def test_times_that_are_none_are_an_error() -> None:
    with pytest.raises(EnergyError, match="make no rhythm"):
        phase_shifts_ms(0.0)
    with pytest.raises(EnergyError, match="make no rhythm"):
        predicted_error(10.0, update_ms=100.0, window_ms=25.0, samples=0)
