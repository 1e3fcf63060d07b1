"""When a sensor renewed its value, as far as polling tells."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from observatory.analysis.energy.edges import _lowest_of_lines, _with_equal, find_updates


def polled(
    period_ms: float, poll_ms: float, *, seconds: float = 20.0, jitter_ms: float = 0.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Poll times, the counter's values, and the true moment of each value."""
    generator = np.random.default_rng(seed)
    tick_ns = 1e9 + 1e6 * period_ms * (np.arange(seconds * 1e3 / period_ms) + generator.random())
    tick_ns += 1e6 * jitter_ms * generator.standard_normal(len(tick_ns))
    tick_ns = np.sort(tick_ns)
    poll_ns = 1e9 + 1e6 * (np.arange(seconds * 1e3 / poll_ms) * poll_ms)
    poll_ns += 1e6 * np.abs(0.3 * generator.standard_normal(len(poll_ns)))
    value = np.searchsorted(tick_ns, poll_ns, side="right")
    return poll_ns.astype(np.int64), value.astype(np.float64), tick_ns


@settings(max_examples=40, deadline=None)
@given(
    period_ms=st.floats(60.0, 200.0),
    poll_ms=st.floats(5.0, 120.0),
    seed=st.integers(0, 1 << 16),
)
def test_every_update_lies_within_its_stated_error(period_ms: float, poll_ms: float, seed: int) -> None:
    poll_ns, value, tick_ns = polled(period_ms, poll_ms, seed=seed)
    found = find_updates(poll_ns, np.zeros_like(poll_ns), value, period_ns=period_ms * 1e6)
    true_ns = tick_ns[found.value_K.astype(int) - 1]
    assert (np.abs(found.time_ns_K - true_ns) <= found.error_ns_K + 1).all()
    assert (found.error_ns_K <= (poll_ms + 2.0) * 1e6).all()


def test_polls_that_drift_through_the_period_know_updates_to_two_milliseconds() -> None:
    poll_ns, value, tick_ns = polled(100.0, 53.0)
    found = find_updates(poll_ns, np.zeros_like(poll_ns), value, period_ns=100e6)
    true_ns = tick_ns[found.value_K.astype(int) - 1]
    assert found.regular
    assert np.abs(found.time_ns_K - true_ns).max() < 2e6
    assert found.error_ns_K.max() < 3e6
    assert found.period_ns == pytest.approx(100e6, rel=1e-4)


def test_polls_at_half_the_period_leave_one_common_shift() -> None:
    poll_ns, value, _ = polled(100.0, 50.0)
    found = find_updates(poll_ns, np.zeros_like(poll_ns), value, period_ns=100e6)
    assert found.shift_ns_K.min() > 10e6
    assert found.own_ns_K.max() < 2e6


def test_irregular_updates_keep_their_own_intervals() -> None:
    poll_ns, value, tick_ns = polled(100.0, 20.0, jitter_ms=30.0)
    found = find_updates(poll_ns, np.zeros_like(poll_ns), value, period_ns=100e6)
    true_ns = tick_ns[found.value_K.astype(int) - 1]
    assert not found.regular
    assert (np.abs(found.time_ns_K - true_ns) <= found.error_ns_K + 1).all()


def test_the_period_is_found_where_nobody_tells_it() -> None:
    poll_ns, value, _ = polled(100.0, 20.0)
    found = find_updates(poll_ns, np.zeros_like(poll_ns), value)
    assert found.period_ns == pytest.approx(100e6, rel=0.01)


def test_a_value_that_never_changes_has_no_updates() -> None:
    poll_ns = np.arange(100, dtype=np.int64) * 50_000_000
    found = find_updates(poll_ns, np.zeros_like(poll_ns), np.full(100, 7.0))
    assert len(found.value_K) == 0
    assert found.period_ns is None


def test_power_that_stays_the_same_is_still_renewed_every_period() -> None:
    poll_ns = np.arange(100, dtype=np.int64) * 50_000_000
    found = find_updates(
        poll_ns, np.zeros_like(poll_ns), np.full(100, 7.0), period_ns=100e6, equal_values=True
    )
    assert 30 <= len(found.value_K) <= 50


def test_missing_readings_and_a_slow_answer_widen_an_interval() -> None:
    time = np.array([0, 50, 100, 150, 200], dtype=np.int64) * 1_000_000
    read = np.array([0, 0, 0, 20, 0], dtype=np.int64) * 1_000_000
    value = np.array([1.0, 1.0, np.nan, 2.0, 2.0])
    found = find_updates(time, read, value)
    assert found.row_K.tolist() == [3]
    assert found.time_ns_K[0] - found.error_ns_K[0] == pytest.approx(50e6)
    assert found.time_ns_K[0] + found.error_ns_K[0] == pytest.approx(170e6)


@settings(max_examples=60, deadline=None)
@given(
    lines=st.integers(1, 300),
    places=st.integers(1, 300),
    falling=st.booleans(),
    whole=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
def test_the_lowest_line_at_each_place_is_that_of_all_lines(
    lines: int, places: int, falling: bool, whole: bool, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    level = generator.integers(0, 4, lines).astype(float) if whole else generator.standard_normal(lines)
    slope = np.cumsum(1.0 + generator.integers(0, 2, lines)) * (-1 if falling else 1)
    at = np.cumsum(generator.random(places)) / places - 0.3
    expected = (level[:, None] + slope[:, None] * at).min(axis=0)
    assert _lowest_of_lines(level, slope, at) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), count=st.integers(1, 60), period=st.floats(1.0, 9.0))
def test_without_a_change_a_period_brings_one_update(data: st.DataObject, count: int, period: float) -> None:
    time = np.cumsum(data.draw(st.lists(st.floats(0.5, 6.0), min_size=count, max_size=count)))
    changed = np.flatnonzero(data.draw(st.lists(st.booleans(), min_size=count - 1, max_size=count - 1))) + 1
    expected, last = [], time[0]
    for poll in range(1, count):
        if poll in changed or time[poll] >= last + 1.05 * period:
            expected.append(poll)
            last = time[poll]
    assert _with_equal(time, changed, period).tolist() == expected
