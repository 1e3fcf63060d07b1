"""Which points of a sweep count for what, and what a fit says of the others."""

from __future__ import annotations

import numpy as np
import pytest

from observatory.advice.frequency import recommend_clocks
from observatory.analysis.frequency import fit_clocks
from observatory.analysis.frequency.model_file import FitCode
from observatory.analysis.frequency.views import SeriesView
from observatory.errors import ClockError
from tests.analysis.frequency.sweeps import changed, fitted, map_points, with_points
from tests.devices.synthetic_device import DEVICES, made_sweep


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
    assert second.samples_B == first.samples_B


def test_a_capped_point_counts_where_its_clock_was_steady_and_not_where_it_wandered() -> None:
    device = DEVICES["compute-bound"]
    sweep = made_sweep([device], locks_mhz=(480, 780), caps_w=(250.0, 300.0, 350.0, 400.0), repeats=1)
    fit = fitted(sweep)
    assert len(fit.clock_mhz_K) == 7  # unlocked, two locks, four clocks that caps held
    at_1100 = np.median(SeriesView(fit).seconds(np.array([1100.0])))
    assert at_1100 == pytest.approx(device.iteration_s(1100), rel=0.03)
    wandering = map_points(sweep, 300_000, sm_clock_low_mhz=900, sm_clock_high_mhz=1500)
    fit = fitted(wandering)
    assert len(fit.clock_mhz_K) == 6
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
    assert fit.critical.mhz == pytest.approx(clean.critical.mhz, rel=0.02)
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
    assert fit.critical.mhz == pytest.approx(clean.critical.mhz, rel=0.02)
    assert fit.time_scatter == pytest.approx(clean.time_scatter, rel=0.3)


def test_without_energies_time_is_fitted_and_the_reason_stands_next_to_it() -> None:
    sweep = made_sweep([DEVICES["knee"]], repeats=1)
    points = [point.model_copy(update={"energy_mj": None}) for point in sweep.series[0].points]
    fit = fitted(with_points(sweep, *points))
    assert not fit.has_energy
    assert fit.no_power == "the energy of 16 of 16 points is not known"
    assert fit.no_power_code == FitCode.ENERGY_NOT_KNOWN
    assert fit.critical.mhz == pytest.approx(1307, rel=0.05)
    assert fit.optimum.mhz is None


def test_equal_series_of_several_sweeps_are_one() -> None:
    device = DEVICES["knee"]
    low = made_sweep([device], locks_mhz=(480, 600, 780, 990), repeats=1)
    high = made_sweep([device], locks_mhz=(1230, 1470, 1710), repeats=1)
    model = fit_clocks([low, high], bootstrap=20, sources=["low.json", "high.json"])
    assert len(model.series) == 1
    assert len(model.series[0].clock_mhz_K) == 8
    assert model.sources == ("low.json", "high.json")


def test_a_limit_that_somebody_had_lowered_before_is_noted() -> None:
    sweep = made_sweep([DEVICES["knee"]], repeats=1)
    points = [point.model_copy(update={"enforced_limit_mw": 500_000}) for point in sweep.series[0].points]
    model = fit_clocks([with_points(sweep, *points)], bootstrap=20)
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
    model = fit_clocks([mixed], bootstrap=20)
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
