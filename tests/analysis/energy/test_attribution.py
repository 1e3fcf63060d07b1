"""Powers of phases recovered from a simulated sensor, and refused where they cannot be."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from observatory.analysis.energy import Attribution, attribute, idle_power, make_timeline, sensor_of
from observatory.analysis.energy.codes import EnergyCode
from observatory.analysis.energy.design import IDLE
from observatory.analysis.energy.least_squares import solve_phases
from observatory.analysis.energy.observations import counter_observations
from observatory.analysis.energy.phases import rank_phases
from observatory.analysis.energy.repetition import repeated_stretches
from observatory.analysis.energy.traces import PowerTrace, trace_of_frame
from observatory.reasons import Reason
from tests.analysis.energy.runs import codes, timeline_of
from tests.devices.sensor import Load, SimulatedSensor, bursts, join, spans_of, steps

pytestmark = pytest.mark.slow

H100 = sensor_of("NVIDIA H100 80GB HBM3")
PREFILL, DECODE, WAIT = ("prefill", 150.0, 650.0), ("decode", 10.0, 310.0), ("", 200.0, 80.0)
SERVER = steps([PREFILL, *[DECODE] * 40, WAIT], seconds=16, jitter=0.05)
ALONE = join(steps([PREFILL], seconds=6), steps([DECODE], seconds=7), gap_ms=1500)


def trace(load: Load, sensor: SimulatedSensor | None = None, *, poll_ms: float = 53.0) -> PowerTrace:
    return trace_of_frame((sensor or SimulatedSensor()).sample(load, poll_ms=poll_ms))


def attributed(load: Load, sensor: SimulatedSensor | None = None, *, poll_ms: float = 53.0) -> Attribution:
    return attribute(trace(load, sensor, poll_ms=poll_ms), timeline_of(load), H100)


def check_recovered(found: Attribution, load: Load, *, within: float, method: str | None = None) -> None:
    for phase in found.phases:
        truth_w, seconds = load.truth()["" if phase.name == IDLE else phase.name]
        assert phase.power_mw == pytest.approx(truth_w * 1e3, rel=within), phase
        assert (phase.low_mw or 0) <= truth_w * 1e3 <= (phase.high_mw or 0), phase
        if phase.name != IDLE:  # idle time after the last phase is not the run's
            assert phase.seconds == pytest.approx(seconds, rel=1e-6)
        if method is not None and phase.name != IDLE:
            assert phase.method == method


def test_phases_that_run_alone_for_five_seconds_are_measured_and_not_solved() -> None:
    found = attributed(ALONE)
    check_recovered(found, ALONE, within=0.005, method="repetition")
    measured_s = sorted(phase.measured_s or 0 for phase in found.phases if phase.name != IDLE)
    assert measured_s == pytest.approx([6.0, 7.0], rel=0.02)


@pytest.mark.parametrize("poll_ms", [50.0, 53.0])
def test_a_servers_phases_are_recovered_with_its_idle_time(poll_ms: float) -> None:
    found = attributed(SERVER, poll_ms=poll_ms)
    check_recovered(found, SERVER, within=0.01, method="least squares")
    assert [phase.name for phase in found.phases] == ["decode", "prefill", IDLE]


def test_without_a_counter_the_25_ms_windows_of_the_power_serve() -> None:
    found = attributed(SERVER, SimulatedSensor(counter_ms=None))
    check_recovered(found, SERVER, within=0.02)
    assert {phase.source for phase in found.phases} == {"power"}


def test_values_that_come_late_are_put_back_where_they_belong() -> None:
    found = attributed(SERVER, SimulatedSensor(latency_ms=22.0))
    check_recovered(found, SERVER, within=0.01)
    lag_ms = found.solutions[0].lag_ms
    assert lag_ms is not None
    assert lag_ms[0] == pytest.approx(22.0, abs=1.5)


@pytest.mark.parametrize("smoothing_ms", [0.0, 3.0])
def test_phases_of_milliseconds_are_recovered_or_refused_and_never_wrong(smoothing_ms: float) -> None:
    load = steps(
        [("dispatch", 2.0, 250.0), ("experts", 5.0, 600.0), ("combine", 2.0, 300.0)], seconds=15, jitter=0.1
    )
    found = attributed(load, SimulatedSensor(smoothing_ms=smoothing_ms))
    answered = [phase for phase in found.phases if phase.power_mw is not None]
    for phase in answered:
        truth_mw = load.truth()[phase.name][0] * 1e3
        assert phase.power_mw == pytest.approx(truth_mw, rel=0.05)
        assert (phase.low_mw or 0) <= truth_mw <= (phase.high_mw or 0)
    assert "experts" in [phase.name for phase in answered] or smoothing_ms > 0


def test_what_capacitors_smear_is_distinguished() -> None:
    load = steps([("a", 20.0, 650.0), ("b", 30.0, 310.0)], seconds=15, jitter=0.2)
    found = attributed(load, SimulatedSensor(smoothing_ms=5.0))
    check_recovered(found, load, within=0.02)
    assert found.solutions[0].smear_ms == pytest.approx(5.0, abs=1.0)


def test_calibration_moves_all_powers_alike_and_is_in_no_interval() -> None:
    found = attributed(SERVER, SimulatedSensor(counter_gain=1.05, gain=1.05))
    for phase in found.phases:
        truth_w = SERVER.truth()["" if phase.name == IDLE else phase.name][0]
        assert phase.power_mw == pytest.approx(1.05 * truth_w * 1e3, rel=0.01)


CONSTANT: dict[str, Callable[[], Load]] = {
    "10 ms steps": lambda: steps([("a", 4.0, 650.0), ("b", 6.0, 310.0)], seconds=20),
    "50 ms steps": lambda: steps([("a", 20.0, 650.0), ("b", 30.0, 310.0)], seconds=20),
    "100 ms steps": lambda: steps([("a", 40.0, 650.0), ("b", 60.0, 310.0)], seconds=20),
}


@pytest.mark.parametrize("name", CONSTANT)
@pytest.mark.parametrize("poll_ms", [50.0, 53.0])
def test_a_constant_mix_is_refused_by_the_counter(name: str, poll_ms: float) -> None:
    load = CONSTANT[name]()
    seen = counter_observations(trace(load, poll_ms=poll_ms), H100)
    assert not isinstance(seen, Reason)
    found = solve_phases(seen, timeline_of(load))
    assert found.power_mw == (None, None)
    assert all(found.reasons)
    assert found.condition is not None


@pytest.mark.parametrize(
    ("seconds", "offset_ms", "sensor"),
    [
        (45, 10.0, SimulatedSensor(tick_ms=10.0)),
        (45, 20.0, SimulatedSensor(tick_ms=0.0, period_error=-5e-4)),
        (20, 10.0, SimulatedSensor(tick_ms=50.0, period_error=0.0)),
        (20, 10.0, SimulatedSensor(tick_ms=-10.0, period_error=0.0, latency_ms=100.0)),
        (20, 5.0, SimulatedSensor(tick_ms=28.0, period_error=0.0, latency_ms=75.0, counter_ms=None)),
    ],
    ids=["time reversed", "narrow valley", "same mix", "renewal late", "power late"],
)
def test_phases_of_constant_steps_are_never_exchanged(
    seconds: int, offset_ms: float, sensor: SimulatedSensor
) -> None:
    load = steps([("prefill", 100.0, 640.0), ("decode", 100.0, 290.0)], seconds=seconds)
    rows = sensor.sample(load, poll_ms=50.0, offset_ms=offset_ms, seed=10)
    found = attribute(trace_of_frame(rows), timeline_of(load), H100)
    for phase in found.phases:
        truth_mw = load.truth()[phase.name][0] * 1e3
        if phase.power_mw is None:
            assert "no least squares" in codes(phase.reason)
        else:
            assert (phase.low_mw or 0) <= truth_mw <= (phase.high_mw or 0), phase


def test_what_is_refused_says_why_and_what_to_do() -> None:
    load = CONSTANT["100 ms steps"]()
    found = attributed(load)
    refused = [phase for phase in found.phases if phase.power_mw is None]
    assert refused
    for phase in refused:
        assert "never alone" in codes(phase.reason)
        assert codes(phase.reason) & {"constant mix", "lag not known"}
        assert phase.low_mw is None
        assert phase.method is None
    assert found.energy_mj is None


def test_a_run_that_is_too_short_is_refused() -> None:
    found = attributed(steps([PREFILL, DECODE], seconds=1.0, jitter=0.2))
    assert all(phase.power_mw is None for phase in found.phases)
    assert "few updates inside" in codes(found.phases[0].reason)


def test_a_phase_that_is_hardly_there_is_refused_and_the_others_are_not() -> None:
    rare = join(SERVER, steps([("train_forward", 3.0, 500.0)], seconds=0.003), SERVER)
    found = {phase.name: phase for phase in attributed(rare).phases}
    assert found["train_forward"].power_mw is None
    assert "rare phase" in codes(found["train_forward"].reason)
    assert found["prefill"].power_mw == pytest.approx(650e3, rel=0.01)


def test_irregular_updates_that_are_too_coarse_for_a_phase_are_not_trusted() -> None:
    load = bursts([("a", 8.0, 650.0), ("b", 8.0, 310.0)], seconds=15)
    shaken = SimulatedSensor(tick_jitter_ms=40.0)
    found = attributed(load, shaken, poll_ms=50.0)
    for phase in found.phases:
        truth = load.truth()[phase.name][0] * 1e3
        if phase.power_mw is not None:
            assert (phase.low_mw or 0) <= truth <= (phase.high_mw or 0)
    assert any(phase.power_mw is None for phase in found.phases)


def test_a_reset_of_the_counter_costs_one_update_only() -> None:
    rows = SimulatedSensor().sample(SERVER, poll_ms=53.0)
    late = rows["time_ns"] > SERVER.start_ns + 8e9
    rows.loc[late, "energy_mj"] -= rows.loc[late, "energy_mj"].iloc[0]
    check_recovered(attribute(trace_of_frame(rows), timeline_of(SERVER), H100), SERVER, within=0.01)


def test_a_device_that_tells_nothing_has_no_powers_and_says_so() -> None:
    rows = SimulatedSensor().sample(SERVER).assign(power_mw=np.nan, energy_mj=np.nan)
    found = attribute(trace_of_frame(rows), timeline_of(SERVER), H100)
    assert {phase.power_mw for phase in found.phases} == {None}
    assert "no reading" in codes(found.phases[0].reason)
    assert "no reading" in codes(found.phases[0].reason)


def test_what_runs_inside_a_phase_is_attributed_from_that_phases_updates_only() -> None:
    inside = steps(
        [("dispatch", 30.0, 250.0), ("experts", 80.0, 600.0), ("combine", 25.0, 300.0)],
        seconds=3,
        jitter=0.15,
    )
    other = steps([("dispatch", 40.0, 700.0)], seconds=2)  # another phase, in which dispatch draws more
    load = join(inside, other, inside, other, inside, other, gap_ms=30)
    spans = spans_of(load, phase="prefill")
    spans.loc[spans["step"].isin(_steps_of(load, 700.0)), "phase"] = "decode"
    found = rank_phases(spans)
    assert not isinstance(found, Reason)
    answer = attribute(trace(load), found.inside["prefill"], H100, inside_only=True)
    powers = {phase.name: phase.power_mw for phase in answer.phases}
    assert powers["dispatch"] == pytest.approx(250e3, rel=0.03)
    assert powers["experts"] == pytest.approx(600e3, rel=0.02)
    assert powers["combine"] == pytest.approx(300e3, rel=0.03)


def _steps_of(load: Load, watts: float) -> set[int]:
    return set(load.step[load.power_w == watts].tolist())


def test_idle_power_comes_from_idle_windows_then_least_squares_then_calibration() -> None:
    windows = idle_power(trace(ALONE), timeline_of(ALONE), H100, attributed(ALONE), 50e3)
    assert windows.power_mw == pytest.approx(80e3, rel=0.02)
    assert "idle windows" in codes(windows.source)
    gaps = idle_power(trace(SERVER), timeline_of(SERVER), H100, attributed(SERVER), 50e3)
    assert gaps.power_mw == pytest.approx(80e3, rel=0.02)
    assert "idle by least squares" in codes(gaps.source)
    busy = steps([DECODE], seconds=6)
    outcome = idle_power(trace(busy), timeline_of(busy), H100, attributed(busy), 50e3)
    assert (outcome.power_mw, outcome.source) == (50e3, Reason(EnergyCode.IDLE_BY_CALIBRATION))
    unknown = idle_power(trace(busy), timeline_of(busy), H100, attributed(busy), None)
    assert unknown.power_mw is None
    assert "idle not known" in codes(unknown.source)


def test_a_stretch_is_alone_with_less_than_a_hundredth_of_anything_else() -> None:
    second = 1_000_000_000
    start = np.array([0, 3, 6, 20, 30]) * second
    end = np.array([3, 6, 9, 23, 36]) * second
    timeline = make_timeline(["a", "b", "a", "a", "a"], start, end)
    assert repeated_stretches(timeline, "a") == [(30 * second, 36 * second)]
    assert repeated_stretches(timeline, "b", shortest_s=2) == [(3 * second, 6 * second)]
    small = make_timeline(
        ["a", "(rest)", "a"], np.array([0, 30, 31]) * second // 10, np.array([30, 31, 70]) * second // 10
    )
    assert repeated_stretches(small, "a") == []
    assert repeated_stretches(small, "a", fillers=("(rest)",)) == []  # a tenth of a second in seven is more
    assert repeated_stretches(timeline, "nobody") == []
