"""The fit against devices whose truth is known: formulas of our own, and the driver in C."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from observatory.advice.frequency import recommend_clocks
from observatory.analysis.frequency import ClockModel, fit_clocks
from observatory.analysis.frequency.model import TIME_FORMS
from observatory.analysis.frequency.model_file import FitCode
from observatory.analysis.frequency.views import SeriesView
from observatory.errors import ClockError
from observatory.run.documents.clock_sweep import ClockPoint, ClockSweep
from tests.analysis.frequency.sweeps import CAPS_W, fitted, with_points
from tests.devices.driver import FakeDriver, why_not
from tests.devices.synthetic_device import DEVICES, LOCKS_MHZ, SyntheticDevice, made_sweep
from tests.paths import ROOT


def test_the_curves_at_one_clock_computed_by_hand() -> None:
    from observatory.analysis.frequency.model import critical_mhz, energy_mj, iteration_s, power_mw

    time_T = [0.001, 0.004, 0.001, 0.003, 0.0]
    power_T = [100e3, 50e3, 200.0, 100.0, 0.75, 1.0]
    # f = f0 / 2: x = 2, phi = 0.5, memory 0.004 + 2 * 0.001 = 0.006, compute 2 * 0.003 = 0.006, V = 0.75
    seconds = iteration_s(time_T, 2000, [1000.0])
    assert seconds[0, 0] == pytest.approx(0.007)
    # 100 W + 50 W * 0.5 * 0.5625 + (0.2 J + 0.1 J * 0.5625) / 7 ms
    watts = 100 + 14.0625 + 0.25625 / 0.007
    assert power_mw(power_T, 2000, [1000.0], seconds)[0, 0] == pytest.approx(1e3 * watts)
    assert energy_mj(time_T, power_T, 2000, [1000.0])[0, 0] == pytest.approx(7.0 * watts)
    assert critical_mhz(time_T, 2000)[0] == pytest.approx(1000.0)
    # (0.006^2 + 0.006^2)^(1/2) instead of the maximum
    soft = iteration_s([*time_T[:4], 2.0], 2000, [1000.0])
    assert soft[0, 0] == pytest.approx(0.001 + 0.006 * np.sqrt(2.0))


@pytest.mark.parametrize("name", sorted(set(DEVICES) - {"hunting"}))
def test_without_noise_time_and_energy_come_back_at_every_clock(name: str) -> None:
    device = DEVICES[name]
    fit = fitted(made_sweep([device], caps_w=CAPS_W, repeats=1))
    view = SeriesView(fit, None)
    clocks = np.arange(480.0, device.clock()[0] + 1, 15.0)
    seconds = np.array([device.iteration_s(mhz) for mhz in clocks])
    joules = np.array([device.energy_j(mhz) for mhz in clocks])
    assert view.seconds(clocks)[0] == pytest.approx(seconds, rel=0.01)
    assert 1e-3 * view.milliwatts(clocks)[0] * view.seconds(clocks)[0] == pytest.approx(joules, rel=0.012)


def test_parameters_come_back_where_the_points_can_tell_them() -> None:
    device = DEVICES["knee"]
    fit = fitted(made_sweep([device], repeats=3, time_noise=0.002, energy_noise=0.005), bootstrap=60)
    assert fit.time.form == "host-knee"
    found = {item.term: item for item in (*fit.time.coefficients, *fit.power.coefficients)}  # type: ignore[union-attr]
    for term, truth, tolerance in (
        ("compute_s", 0.0075, 0.02),
        ("memory_s", 0.0105, 0.05),
        ("static_mw", 90e3, 0.05),
        ("ridge", 0.6, 0.05),
    ):
        assert found[term].value == pytest.approx(truth, rel=tolerance), term
    assert found["host_s"].low is not None
    assert found["host_s"].high is not None
    assert found["host_s"].low <= 0.0005 <= found["host_s"].high
    assert fit.critical.mhz == pytest.approx(1830 * 0.0075 / 0.0105, rel=0.01)


def test_energy_per_iteration_is_not_distinguished_from_static_power_where_time_never_changes() -> None:
    flat = SyntheticDevice("flat", memory_s=0.02, compute_s=0.0001)
    fit = fitted(made_sweep([flat], repeats=2, time_noise=0.001, energy_noise=0.003))
    assert fit.time.form == "flat"
    assert (fit.critical.mhz, fit.critical.relation) == (480.0, "at most")
    assert fit.compute_optimum.mhz is None
    assert fit.compute_optimum.reason_code == FitCode.COMPUTE_HIDDEN
    reasons = {item.term: item.reason_code for item in (*fit.time.coefficients, *fit.power.coefficients)}  # type: ignore[union-attr]
    assert reasons["memory_mj"] == FitCode.NOT_SEPARABLE
    assert reasons["host_s"] == FitCode.TIME_IS_FLAT
    values = {item.term: item.value for item in fit.time.coefficients}
    assert values["host_s"] is None
    assert values["memory_s"] == pytest.approx(0.0205, rel=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_the_simplest_form_that_the_points_support_is_chosen(seed: int) -> None:
    cases = {
        "linear": SyntheticDevice("prefill", host_s=0.002, memory_s=0.0, compute_s=0.01),
        "knee": SyntheticDevice("knee", host_s=0.0, memory_s=0.01, compute_s=0.007),
        "host-knee": SyntheticDevice("host", host_s=0.004, memory_s=0.008, compute_s=0.006),
    }
    for form, device in cases.items():
        fit = fitted(made_sweep([device], time_noise=0.003, energy_noise=0.01, seed=seed))
        assert fit.time.form == form
        best = min(score.rms_error for score in fit.time.scores)
        chosen = next(score for score in fit.time.scores if score.form == form)
        assert chosen.as_good
        assert chosen.rms_error < 1.3 * best
        simpler = [item for item in fit.time.scores if item.parameters < TIME_FORMS[form].parameters]
        assert all(not item.as_good for item in simpler)


def test_a_knee_that_only_the_lowest_clock_shows_is_not_smoothed_away() -> None:
    device = SyntheticDevice(
        "low knee", memory_s=0.0105, compute_s=0.0031
    )  # f_crit 540, lowest locks 480, 600
    fit = fitted(made_sweep([device], time_noise=0.005, energy_noise=0.01), bootstrap=100)
    assert fit.time.form != "flat"
    slowdown = SeriesView(fit, None).choice(480.0).slowdown
    assert slowdown.value == pytest.approx(device.slowdown(480), abs=0.01)
    between = SeriesView(fit, None).choice(540.0).slowdown
    assert between.low is not None
    assert between.high is not None
    # Where between the two lowest clocks it bends is not known, and the interval says so.
    assert between.low <= device.slowdown(540) + 1e-3
    assert between.high - between.low > 0.01


def test_the_optimum_is_the_smaller_of_f_crit_and_f_energy_where_the_knee_is_sharp() -> None:
    for device in (DEVICES["knee"], DEVICES["memory-bound"], DEVICES["compute-bound"]):
        fit = fitted(made_sweep([device], repeats=1))
        bounds = [mhz for mhz in (fit.critical.mhz, fit.compute_optimum.mhz) if mhz is not None]
        assert fit.optimum.mhz == pytest.approx(min(bounds), abs=10)
        truth = min(range(480, device.clock()[0] + 1), key=device.energy_j)
        assert fit.optimum.mhz == pytest.approx(truth, abs=30)


@pytest.mark.slow
def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    inside: list[bool] = []
    for name in ("knee", "memory-bound", "compute-bound"):
        device = DEVICES[name]
        for seed in range(8):
            sweep = made_sweep(
                [device], repeats=3, time_noise=0.004, energy_noise=0.01, setting_noise=0.002, seed=seed
            )
            view = SeriesView(fitted(sweep, bootstrap=60), None)
            for mhz in (660.0, 990.0, 1350.0):
                choice = view.choice(mhz)
                for interval, truth in (
                    (choice.saving, device.saving(mhz)),
                    (choice.slowdown, device.slowdown(mhz)),
                ):
                    assert interval.low is not None
                    assert interval.high is not None
                    inside.append(interval.low - 5e-4 <= truth <= interval.high + 5e-4)
    # 144 correlated intervals of nominally 90 %
    assert np.mean(inside) > 0.82, np.mean(inside)


def test_more_repeats_make_intervals_narrower() -> None:
    def width(repeats: int) -> float:
        widths = []
        for seed in range(4):
            sweep = made_sweep(
                [DEVICES["knee"]], repeats=repeats, time_noise=0.01, energy_noise=0.02, seed=seed
            )
            view = SeriesView(fitted(sweep, bootstrap=80), None)
            for mhz in (690.0, 990.0, 1200.0):
                saving = view.choice(mhz).saving
                assert saving.low is not None
                assert saving.high is not None
                widths.append(saving.high - saving.low)
        return float(np.mean(widths))

    # The sampling error falls by sqrt(6); the rest is that clocks are few and the form was chosen.
    assert width(12) < 0.6 * width(2)


def test_small_non_negative_problems_are_solved_like_scipy_does() -> None:
    from scipy.optimize import nnls

    from observatory.analysis.frequency.curves import solve

    generator = np.random.default_rng(0)
    for terms in (1, 2, 3, 4):
        column_NK = generator.normal(size=(9, terms))
        weight_BN = generator.uniform(0.1, 3.0, size=(5, 9))
        target_BN = generator.normal(1.0, 1.0, size=(5, 9))
        found_BK, _ = solve(lambda _: column_NK[None], [], weight_BN, target_BN)  # noqa: B023 - called at once
        for found, weight, target in zip(found_BK, weight_BN, target_BN, strict=True):
            root = np.sqrt(weight)
            wanted = nnls(column_NK * root[:, None], target * root)[0]
            assert found == pytest.approx(wanted, abs=1e-6)


def test_a_curve_for_a_figure_spans_the_measured_range_and_holds_its_own_line() -> None:
    fit = fitted(made_sweep([DEVICES["knee"]], time_noise=0.003, energy_noise=0.01), bootstrap=30)
    curve = SeriesView(fit, None).curve(50)
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


def test_three_clocks_are_fitted_with_the_forms_they_can_pay_for() -> None:
    fit = fitted(made_sweep([DEVICES["compute-bound"]], locks_mhz=(780, 1290), repeats=2), bootstrap=20)
    assert {score.form for score in fit.time.scores} == {"flat", "linear"}
    assert fit.time.form == "linear"


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
    fit = fit_clocks([sweep], bootstrap=0).series[0]
    # The formula and defaults at the top of fake_nvml.c, f0 = 1830 MHz.
    truth = SyntheticDevice("C", op_j=0.2, memory_j=1.5)
    view = SeriesView(fit, None)
    clocks = np.arange(480.0, 1831.0, 30.0)
    assert view.seconds(clocks)[0] == pytest.approx([truth.iteration_s(mhz) for mhz in clocks], rel=0.005)
    assert 1e-3 * view.milliwatts(clocks)[0] == pytest.approx(
        [truth.power_w(mhz) for mhz in clocks], rel=0.01
    )
    assert fit.critical.mhz == pytest.approx(1830 * 0.004 / 0.01, rel=0.02)
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
    with pytest.raises(ClockError, match=r"follows no curve of the clock.*misses clocks that it did not see"):
        fit_clocks([sweep], bootstrap=0)
