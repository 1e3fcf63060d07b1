"""The fit against devices whose truth is known: formulas of our own, and the driver in C."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.clock_truth import CLASSES, Score, add, draw
from observatory.advice.frequency import recommend_clocks
from observatory.analysis.frequency import ClockModel, fit_clocks
from observatory.analysis.frequency.curves import energy_of, knees_mhz, seconds_of
from observatory.analysis.frequency.views import SeriesView
from observatory.errors import ClockError
from observatory.run.documents.clock_sweep import ClockPoint, ClockSweep
from tests.analysis.frequency.sweeps import CAPS_W, fitted, with_points
from tests.devices.driver import FakeDriver, why_not
from tests.devices.synthetic_device import DEVICES, LOCKS_MHZ, SyntheticDevice, made_sweep
from tests.paths import ROOT


def test_the_curves_at_one_clock_computed_by_hand() -> None:
    # 1 ms of host, 4 ms with a knee at f0 / 1.5, 2 ms of compute; clocks of 1000 and 2000 MHz
    row_T = [0.001, 0.004, 0.002, 2.0, 1.5, 1.0, 300.0, 50e3, 80e3, 40e3]
    # x = 2: 0.001 + 0.004 * 2 / 1.5 + 0.002 * 2
    seconds = 0.001 + 0.004 * 2 / 1.5 + 0.004
    assert seconds_of(row_T, 2000, [1000.0])[0, 0] == pytest.approx(seconds)
    # phi = 0.5, no step above the lowest clock; at f0 both steps
    assert energy_of(row_T, [1000.0, 2000.0], [1000.0])[0, 0] == pytest.approx(
        300 + (50e3 + 0.5 * 80e3) * seconds
    )
    assert energy_of(row_T, [1000.0, 2000.0], [2000.0])[0, 0] == pytest.approx(300 + (50e3 + 120e3) * 0.007)
    # 4 / 1.5 ms per x of the knee against 2 of compute: half of all is reached at the knee
    assert knees_mhz(row_T, 1000.0, 2000.0)[0] == pytest.approx(2000 / 1.5)


@pytest.mark.parametrize("name", sorted(set(DEVICES) - {"hunting"}))
def test_without_noise_time_and_energy_come_back_at_every_measured_clock(name: str) -> None:
    device = DEVICES[name]
    fit = fitted(made_sweep([device], caps_w=CAPS_W, repeats=2))
    view = SeriesView(fit)
    clocks = np.array(fit.clock_mhz_K)
    seconds = np.array([device.iteration_s(mhz) for mhz in clocks])
    joules = np.array([device.energy_j(mhz) for mhz in clocks])
    assert np.median(view.seconds(clocks), axis=0) == pytest.approx(seconds, rel=0.01)
    assert 1e-3 * np.median(view.millijoules(clocks), axis=0) == pytest.approx(joules, rel=0.01)


def test_the_knee_comes_back_with_its_interval() -> None:
    fit = fitted(made_sweep([DEVICES["knee"]], repeats=3, time_noise=0.002, energy_noise=0.005))
    assert fit.critical.mhz == pytest.approx(1830 * 0.0075 / 0.0105, rel=0.03)
    assert fit.critical.relation == "at"
    flat = SyntheticDevice("flat", memory_s=0.02, compute_s=0.0001)
    low = fitted(made_sweep([flat], repeats=2)).critical
    assert (low.mhz, low.relation) == (480.0, "at most")


def test_a_knee_that_only_the_lowest_clock_shows_is_not_smoothed_away() -> None:
    device = SyntheticDevice(
        "low knee", memory_s=0.0105, compute_s=0.0031
    )  # f_crit 540, lowest locks 480, 600
    fit = fitted(made_sweep([device], time_noise=0.005, energy_noise=0.01), bootstrap=100)
    view = SeriesView(fit)
    slowdown = view.choice(480.0).slowdown
    assert slowdown.value == pytest.approx(device.slowdown(480), abs=0.01)
    between = view.choice(540.0).slowdown
    assert between.low is not None
    assert between.high is not None
    # Where between the two lowest clocks it bends is not known, and the interval says so.
    assert between.low <= device.slowdown(540) + 1e-3
    assert between.high - between.low > 0.01


def test_the_optimum_is_the_measured_clock_of_least_energy() -> None:
    for device in (DEVICES["knee"], DEVICES["memory-bound"], DEVICES["compute-bound"]):
        fit = fitted(made_sweep([device], repeats=2))
        assert fit.optimum.mhz == min(fit.clock_mhz_K, key=device.energy_j)


def test_random_devices_of_every_class_are_advised_well() -> None:
    """Two of each class; ``python -m benchmarks.clock_truth`` has more."""
    score = Score()
    for kind in CLASSES:
        for seed in range(2):
            add(score, draw(kind, seed), 0.02, seed)
    assert (score.devices, score.refused, score.broken, score.worse) == (16, 0, 0, 0)
    assert np.median(score.left) < 0.01
    # Nominally 90 % of correlated intervals.
    for name in ("slowdown, measured", "saving, measured"):
        assert np.mean(score.held[name]) > 0.75, name


def test_more_repeats_make_intervals_narrower() -> None:
    def width(repeats: int) -> float:
        widths = []
        for seed in range(4):
            sweep = made_sweep(
                [DEVICES["knee"]], repeats=repeats, time_noise=0.01, energy_noise=0.02, seed=seed
            )
            view = SeriesView(fitted(sweep, bootstrap=80))
            for mhz in (690.0, 990.0, 1200.0):
                saving = view.choice(mhz).saving
                assert saving.low is not None
                assert saving.high is not None
                widths.append(saving.high - saving.low)
        return float(np.mean(widths))

    # The sampling error falls by sqrt(6).
    assert width(12) < 0.6 * width(2)


def test_a_curve_for_a_figure_spans_the_measured_range_and_holds_its_own_line() -> None:
    fit = fitted(made_sweep([DEVICES["knee"]], time_noise=0.003, energy_noise=0.01), bootstrap=30)
    curve = SeriesView(fit).curve(50)
    assert len(curve) == 50
    assert (curve["sm_clock_mhz"].iloc[0], curve["sm_clock_mhz"].iloc[-1]) == (480, 1830)
    for name in ("iteration_s", "energy_mj", "slowdown", "saving"):
        assert (curve[f"{name}_low"] <= curve[name]).all()
        assert (curve[name] <= curve[f"{name}_high"]).all()
    assert curve["saving"].iloc[-1] == pytest.approx(0.0)
    assert curve["iteration_s"].is_monotonic_decreasing


@pytest.mark.parametrize("seed", range(24))
def test_any_sweep_is_fitted_or_refused_and_never_anything_else(seed: int) -> None:
    generator = np.random.default_rng(seed)

    def point(order: int) -> ClockPoint:
        lock = int(generator.choice([1, 300, 780, 1830, 100_000]))
        seen = int(np.clip(lock + generator.integers(-50, 50), 1, 100_000))
        return ClockPoint(
            order=order,
            requested_sm_clock_mhz=lock if generator.random() < 0.8 else None,
            requested_limit_mw=int(generator.choice([0, 1, 300_000])) if generator.random() < 0.3 else None,
            iterations=int(10 ** generator.uniform(0, 6)),
            duration_s=float(10 ** generator.uniform(-9, 9)),
            energy_mj=float(10 ** generator.uniform(-9, 12)) if generator.random() < 0.9 else None,
            energy_error=float(10 ** generator.uniform(-3, 300)),
            sm_clock_mhz=seen if generator.random() < 0.9 else None,
            power_cap_share=float(generator.random()) if generator.random() < 0.5 else None,
            event_reasons=int(generator.integers(0, 0x800)) if generator.random() < 0.3 else None,
            label="ok",
        )

    sweep = with_points(
        made_sweep([DEVICES["knee"]], repeats=1),
        *(point(order) for order in range(int(generator.integers(1, 40)))),
    )
    try:
        model = fit_clocks([sweep], bootstrap=10)
    except ClockError:
        return

    again = ClockModel.model_validate_json(model.model_dump_json())
    assert again == model
    assert recommend_clocks(again).series


def test_three_clocks_are_enough() -> None:
    fit = fitted(made_sweep([DEVICES["compute-bound"]], locks_mhz=(780, 1290), repeats=2), bootstrap=20)
    assert fit.clock_mhz_K == (780.0, 1290.0, 1830.0)


def test_a_model_is_the_same_every_time_it_is_fitted() -> None:
    sweep = made_sweep([DEVICES["soft"]], time_noise=0.01, energy_noise=0.01)
    first, second = fit_clocks([sweep], bootstrap=20), fit_clocks([sweep], bootstrap=20)
    assert first.series == second.series


@pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
def test_the_driver_in_c_gives_points_whose_fit_is_its_own_formula(tmp_path: Path) -> None:
    driver = FakeDriver(tmp_path / "state")
    printed = subprocess.run(
        [sys.executable, "-m", "tests.campaign.sweep.driver_sweep", str(driver.state)],
        env=driver.environment(), capture_output=True, check=True, timeout=400, text=True,
        cwd=ROOT,
    )  # fmt: skip
    sweep = ClockSweep.model_validate_json(printed.stdout)
    fit = fit_clocks([sweep]).series[0]
    # The formula and defaults at the top of fake_nvml.c, f0 = 1830 MHz.
    truth = SyntheticDevice("C", op_j=0.2, memory_j=1.5)
    view = SeriesView(fit)
    clocks = np.array(fit.clock_mhz_K)
    seconds, watts = (
        np.median(view.seconds(clocks), axis=0),
        1e-3 * np.median(view.milliwatts(clocks), axis=0),
    )
    assert seconds == pytest.approx([truth.iteration_s(mhz) for mhz in clocks], rel=0.005)
    assert watts == pytest.approx([truth.power_w(mhz) for mhz in clocks], rel=0.01)
    assert fit.critical.mhz == pytest.approx(1830 * 0.004 / 0.01, rel=0.05)
    clamp = next(item for item in fit.confounds if item.kind == "clock not as requested")
    assert (clamp.numbers["requested_low_mhz"], clamp.numbers["sm_clock_mhz"]) == (1905, 1830)
    assert any(item.kind == "some caps do not bind" for item in fit.confounds)


def test_a_model_survives_its_file(tmp_path: Path) -> None:
    from observatory.analysis.frequency import load_clock_model

    model = fit_clocks([made_sweep([DEVICES["knee"]], time_noise=0.01, energy_noise=0.01)], bootstrap=5)
    path = tmp_path / "fit.json"
    path.write_text(model.model_dump_json())
    assert load_clock_model(path) == model
    assert ClockModel.model_validate_json(path.read_bytes()).series[0].title == "knee, decode"


def test_locks_of_a_usual_sweep_reach_above_the_clamp() -> None:
    # Several tests count on it.
    assert max(LOCKS_MHZ) > DEVICES["knee"].f0_mhz


def test_times_that_follow_no_curve_get_no_model() -> None:
    sweep = made_sweep([DEVICES["knee"]], repeats=1, time_noise=1.0)
    with pytest.raises(ClockError, match=r"follows no curve of the clock: points lie"):
        fit_clocks([sweep], bootstrap=20)
