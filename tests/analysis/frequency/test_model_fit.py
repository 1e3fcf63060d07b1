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
from observatory.analysis.frequency.model_file import FitCode, SeriesFit
from observatory.analysis.frequency.views import SeriesView
from observatory.errors import ClockError
from observatory.run.documents.clock_sweep import ClockPoint, ClockSweep
from tests.devices.driver import FakeDriver, why_not
from tests.devices.synthetic_device import DEVICES, LOCKS_MHZ, SyntheticDevice, made_sweep
from tests.paths import ROOT

CAPS_W = (250.0, 300.0, 350.0, 400.0, 450.0)


def fitted(sweep: ClockSweep, bootstrap: int = 0) -> SeriesFit:
    return fit_clocks([sweep], bootstrap=bootstrap).series[0]


def changed(sweep: ClockSweep, **update: object) -> ClockSweep:
    return sweep.model_copy(update=update)


def with_points(sweep: ClockSweep, *points: ClockPoint) -> ClockSweep:
    """The sweep with its only series' points replaced."""
    series = sweep.series[0].model_copy(update={"points": points})
    return changed(sweep, series=(series,))


def map_points(sweep: ClockSweep, which: object, **update: object) -> ClockSweep:
    """The sweep with some points changed: those with this request, or this limit in mW."""
    points = [
        point.model_copy(update=update)
        if which in (point.requested_sm_clock_mhz, point.requested_limit_mw)
        else point
        for point in sweep.series[0].points
    ]
    return with_points(sweep, *points)


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


def test_the_sampled_clock_counts_and_not_the_request() -> None:
    device = DEVICES["knee"]
    honest = made_sweep([device], repeats=1)
    points = [
        # Everything was asked for 100 MHz too high; the clocks seen are the true ones.
        point.model_copy(
            update={
                "requested_sm_clock_mhz": point.requested_sm_clock_mhz and point.requested_sm_clock_mhz + 100,
                "label": "clamped",
            }
        )
        for point in honest.series[0].points
    ]
    first, second = fitted(honest), fitted(with_points(honest, *points))
    assert second.critical.mhz == pytest.approx(first.critical.mhz, abs=1)
    assert second.time.parameters == pytest.approx(first.time.parameters, rel=1e-6)


def test_a_capped_point_counts_where_its_clock_was_steady_and_not_where_it_wandered() -> None:
    device = DEVICES["compute-bound"]
    sweep = made_sweep([device], locks_mhz=(480, 780), caps_w=(250.0, 300.0, 350.0, 400.0), repeats=1)
    fit = fitted(sweep)
    assert fit.clocks == 7  # unlocked, two locks, four clocks that caps held
    assert SeriesView(fit, None).seconds(np.array([1100.0]))[0, 0] == pytest.approx(
        device.iteration_s(1100), rel=0.01
    )
    wandering = map_points(sweep, 300_000, sm_clock_low_mhz=900, sm_clock_high_mhz=1500)
    fit = fitted(wandering)
    assert fit.clocks == 6
    assert [(item.points, item.reason_code) for item in fit.left_out] == [(1, FitCode.WANDERED)]
    # Not known to be steady is not steady.
    fit = fitted(map_points(sweep, 300_000, sm_clock_low_mhz=None))
    assert fit.left_out[0].reason_code == FitCode.MAY_WANDER


def test_hot_and_unverified_points_are_left_out_and_said_so() -> None:
    sweep = made_sweep([DEVICES["knee"]], caps_w=(300.0,), repeats=2)
    clean = fitted(sweep)
    hot = map_points(sweep, 990, label="thermal", duration_s=99.0, sm_clock_mhz=600)
    fit = fitted(hot)
    assert [item.reason for item in fit.left_out] == ["heat slowed the chip"]
    assert [item.reason_code for item in fit.left_out] == [FitCode.HEATED]
    assert fit.left_out[0].points == 2
    assert fit.critical.mhz == pytest.approx(clean.critical.mhz, abs=2)
    lock = next(item for item in fit.settings if item.requested_sm_clock_mhz == 990)
    assert lock.iteration_s_R == ()
    # An unseen clock counts neither for the curve nor for a lock, but a cap needs none.
    blind = map_points(sweep, 300_000, label="unverified", sm_clock_mhz=None)
    blind = map_points(blind, 990, label="unverified", sm_clock_mhz=None)
    fit = fitted(blind)
    assert fit.left_out[0].points == 4
    kinds = {item.kind: item for item in fit.settings if item.label == "unverified"}
    assert kinds["cap"].iteration_s_R
    assert not kinds["lock"].iteration_s_R


@pytest.mark.parametrize(
    ("bits", "kind", "cause"),
    [
        (0x8, "slowed by the brake", "1 points slowed by the power brake"),
        (0x80, "slowed by the brake", "1 points slowed by the power brake"),
        (0x40, "slowed by heat", "1 points slowed by thermal throttling"),
        (0x48, "slowed by heat", "1 points slowed by thermal throttling"),
    ],
)
def test_what_slowed_points_is_named_by_what_was_seen(bits: int, kind: str, cause: str) -> None:
    fit_model = fit_clocks(
        [map_points(made_sweep([DEVICES["knee"]], repeats=1), 990, event_reasons=bits, label="thermal")]
    )
    fit = fit_model.series[0]
    assert [item.kind for item in fit.confounds if item.kind.startswith("slowed")] == [kind]
    setting = next(item for item in fit.settings if item.requested_sm_clock_mhz == 990)
    assert (setting.heated, setting.braked) == ((1, 0) if kind == "slowed by heat" else (0, 1))
    assert setting.iteration_s_R == ()
    (advice,) = recommend_clocks(fit_model).series
    assert cause in advice.text


def test_caps_that_were_tried_and_do_not_count_are_not_said_to_be_missing() -> None:
    sweep = made_sweep([DEVICES["knee"]], caps_w=(300.0,), repeats=2)
    hot = map_points(sweep, 300_000, label="thermal")
    (advice,) = recommend_clocks(fit_clocks([hot])).series
    assert "no point under a cap counts" in advice.lock_against_cap.text


@pytest.mark.parametrize(
    ("update", "label"),
    [
        ({"event_reasons": 0x40}, "thermal"),
        ({"event_reasons": 0x80}, "braked"),
        ({"event_reasons": 0x8}, "braked"),
        ({"event_reasons": 0x48}, "thermal"),
        ({"label": "thermal", "event_reasons": 0x8}, "braked"),
        ({"label": "thermal", "event_reasons": None}, "thermal"),
        ({"event_reasons": 0x4, "sm_clock_mhz": 900}, "power-capped"),
        ({"power_cap_share": 0.5, "sm_clock_mhz": 900}, "power-capped"),
        ({"sm_clock_mhz": 900}, "clamped"),
        ({"sm_clock_mhz": None}, "unverified"),
        ({"event_reasons": 0x4}, "ok"),  # the limit was touched, and the clock held all the same
        ({"sm_clock_mhz": 975}, "ok"),  # one step
    ],
)
def test_labels_that_clock_and_event_reasons_contradict_are_corrected(
    update: dict[str, object], label: str
) -> None:
    sweep = map_points(made_sweep([DEVICES["knee"]], repeats=2), 990, **update)
    fit = fitted(sweep)
    assert next(item for item in fit.settings if item.requested_sm_clock_mhz == 990).label == label


def test_a_repeat_that_something_disturbed_does_not_bend_the_fit() -> None:
    sweep = made_sweep([DEVICES["knee"]], repeats=3, time_noise=0.003, energy_noise=0.01)
    points = list(sweep.series[0].points)
    victim = next(i for i, point in enumerate(points) if point.requested_sm_clock_mhz == 990)
    points[victim] = points[victim].model_copy(update={"duration_s": 1.4 * points[victim].duration_s})
    clean, fit = fitted(sweep), fitted(with_points(sweep, *points))
    assert [(item.points, item.reason_code) for item in fit.left_out] == [(1, FitCode.DISTURBED)]
    assert fit.critical.mhz == pytest.approx(clean.critical.mhz, rel=0.01)
    assert fit.time_scatter == pytest.approx(clean.time_scatter, rel=0.3)


def test_without_energies_time_is_fitted_and_the_reason_stands_next_to_it() -> None:
    sweep = made_sweep([DEVICES["knee"]], repeats=1)
    points = [point.model_copy(update={"energy_mj": None}) for point in sweep.series[0].points]
    fit = fitted(with_points(sweep, *points))
    assert fit.power is None
    assert fit.no_power == "the energy of 16 of 16 points is not known"
    assert fit.no_power_code == FitCode.ENERGY_NOT_KNOWN
    assert fit.critical.mhz == pytest.approx(1307, rel=0.01)
    assert fit.optimum.mhz is None


def test_equal_series_of_several_sweeps_are_one() -> None:
    device = DEVICES["knee"]
    low = made_sweep([device], locks_mhz=(480, 600, 780, 990), repeats=1)
    high = made_sweep([device], locks_mhz=(1230, 1470, 1710), repeats=1)
    model = fit_clocks([low, high], bootstrap=0, sources=["low.json", "high.json"])
    assert len(model.series) == 1
    assert model.series[0].clocks == 8
    assert model.sources == ("low.json", "high.json")


def test_a_limit_that_somebody_had_lowered_before_is_noted() -> None:
    sweep = made_sweep([DEVICES["knee"]], repeats=1)
    points = [point.model_copy(update={"enforced_limit_mw": 500_000}) for point in sweep.series[0].points]
    model = fit_clocks([with_points(sweep, *points)], bootstrap=0)
    assert any("stood at 500 W" in note and "default of 700 W" in note for note in model.notes)


def test_what_cannot_be_fitted_is_refused_with_the_reason() -> None:
    with pytest.raises(ClockError, match="no clock sweep was given"):
        fit_clocks([])
    knee = DEVICES["knee"]
    few = made_sweep([knee], locks_mhz=(780,), repeats=3)
    with pytest.raises(ClockError, match=r"points at 2 different clocks can be used, 3 at least are needed"):
        fit_clocks([few])
    sweep = made_sweep([knee], repeats=1)
    blind = [point.model_copy(update={"label": "unverified"}) for point in sweep.series[0].points]
    with pytest.raises(ClockError, match=r"0 different clocks .*the clock was not sampled"):
        fit_clocks([with_points(sweep, *blind)])
    many = made_sweep([knee], repeats=70)
    with pytest.raises(ClockError, match="1120 points are more than"):
        fit_clocks([many])
    other = changed(sweep, device=sweep.device.model_copy(update={"uuid": "GPU-other"}))
    with pytest.raises(ClockError, match="of 2 devices"):
        fit_clocks([sweep, other])
    # One bad series does not take the others with it.
    mixed = changed(sweep, series=(*sweep.series, few.series[0].model_copy(update={"name": "short"})))
    model = fit_clocks([mixed], bootstrap=0)
    assert [series.name for series in model.series] == ["knee"]
    assert any("short" in note for note in model.notes)


def test_times_and_powers_that_no_device_has_are_left_out() -> None:
    sweep = made_sweep([DEVICES["knee"]], repeats=2)
    for update in (
        {"iterations": 10**400},
        {"duration_s": 1e300},
        {"duration_s": 1e-300},
        {"energy_mj": 1e300},
        {"energy_mj": 1e-300},
    ):
        fit = fitted(map_points(sweep, 990, **update))
        assert [(item.points, item.reason_code) for item in fit.left_out] == [(2, FitCode.IMPOSSIBLE)]


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
    from observatory.advice.frequency import recommend_clocks

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
        env=driver.environment(), capture_output=True, check=True, timeout=120, text=True,
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
