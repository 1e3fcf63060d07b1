"""Steps that move in time with the sensor: found, and what is missed of them predicted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from observatory.analysis.energy import missed_error, rhythm_of
from observatory.errors import EnergyError
from tests.devices.sensor import Load, steps

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


def missed(period_ms: float, *, seconds: float = 5.0, **more: float) -> float:
    starts_ns = np.arange(0, seconds * 1e9, period_ms * 1e6).astype(np.int64)
    return missed_error(starts_ns, period_ms, **{**PART_TIME, **more})


@pytest.mark.parametrize(("period_ms", "low", "high"), [(50.0, 0.33, 0.36), (100.0, 0.47, 0.50)])
def test_steps_that_divide_the_sensors_period_are_off_by_a_third_to_a_half(
    period_ms: float, low: float, high: float
) -> None:
    assert low < rms(seen_errors(square(period_ms))) < high
    assert missed(period_ms, swing=0.6, duty=0.5) == pytest.approx(
        rms(seen_errors(square(period_ms))), rel=0.03
    )


@settings(max_examples=30, deadline=None)
@given(period_ms=st.floats(8.0, 300.0), duty=st.floats(0.15, 0.85))
def test_the_predicted_error_is_the_one_a_simulated_sensor_has(period_ms: float, duty: float) -> None:
    load = square(period_ms, seconds=20.0, duty=duty)
    mean_w = 150.0 + 450.0 * duty
    predicted = missed_error(load.edge_ns[:-1:2], period_ms, **PART_TIME, duty=duty, swing=600.0 / mean_w - 1)
    # Steps are whole, samples are not: the ends of a load weigh a little differently.
    assert rms(seen_errors(load, positions=60)) == pytest.approx(predicted, rel=0.1, abs=0.012)


def test_steps_that_visit_the_whole_sensor_period_are_seen() -> None:
    assert missed(75.0, swing=0.6, duty=0.5) < 0.02
    assert rms(seen_errors(square(75.0))) < 0.02


def test_jitter_of_the_steps_removes_what_is_missed() -> None:
    shaken_ns = np.cumsum(np.random.default_rng(0).normal(100e6, 8e6, 500)).astype(np.int64)
    shaken = missed_error(shaken_ns, 100.0, **PART_TIME)
    assert shaken < 0.3 * missed(100.0, seconds=50.0)


def test_a_longer_run_helps_where_samples_wander_and_not_where_they_are_locked() -> None:
    short, long = (missed(99.0, seconds=seconds) for seconds in (5.0, 100.0))
    assert long < 0.1 * short
    short, long = (missed(100.0, seconds=seconds) for seconds in (5.0, 100.0))
    assert long == pytest.approx(short)


def test_a_sensor_that_sees_all_the_time_misses_nothing() -> None:
    assert missed(100.0, window_ms=100.0) < 1e-9


def test_the_rhythm_is_the_median_gap_and_irregular_steps_have_none() -> None:
    starts = np.cumsum(np.array([0, 100, 100, 102, 98, 500, 100])) * 1_000_000
    rhythm = rhythm_of(starts)
    assert rhythm is not None
    assert rhythm.period_ms == 100.0
    assert rhythm.jitter_ms == pytest.approx(1.4826)
    assert rhythm_of(np.array([0, 1])) is None
    assert rhythm_of(np.cumsum(np.array([0, 10, 90, 30, 200, 60, 5])) * 1_000_000) is None


def test_times_that_are_none_are_an_error() -> None:
    with pytest.raises(EnergyError, match="make no rhythm"):
        missed_error(np.array([0]), 0.0, **PART_TIME)
    with pytest.raises(EnergyError, match="make no rhythm"):
        missed_error(np.zeros(0, dtype=np.int64), 10.0, **PART_TIME)
