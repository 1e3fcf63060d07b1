"""Advice from fits of devices whose best clock is known."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest

from observatory.advice.frequency import recommend_clocks
from observatory.analysis.frequency import ClockModel
from observatory.analysis.frequency.views import SeriesView, highest_of_ties
from observatory.errors import ClockError
from tests.advice.clocks import CAPS_W, advice_of, fit, model_of, only
from tests.devices.synthetic_device import (
    DEVICES,
    LOCKS_MHZ,
    SyntheticDevice,
    h200_like_decode,
    made_sweep,
)


@pytest.mark.parametrize("name", sorted(DEVICES))
@pytest.mark.parametrize("budget", [0.01, 0.05])
def test_the_clock_keeps_the_true_budget_and_comes_near_the_true_best(name: str, budget: float) -> None:
    device = DEVICES[name]
    advice = advice_of(name, budget)
    clock = advice.choice.sm_clock_mhz if advice.choice else advice.reference_mhz
    assert clock in device.supported_mhz
    assert device.slowdown(clock) <= budget + 5e-4
    measured = [device.clock(lock_mhz=mhz)[0] for mhz in LOCKS_MHZ]
    best = max(device.saving(mhz) for mhz in measured if device.slowdown(mhz) <= budget)
    # A smooth knee gives the budget away slowly, and its intervals cost some of it.
    assert device.saving(clock) >= best - (0.06 if name == "soft" else 0.02)
    if advice.choice:
        saving = advice.choice.saving
        assert saving.low is not None
        assert saving.low > 0
        assert saving.value == pytest.approx(device.saving(clock), abs=0.01)


def test_a_larger_budget_never_saves_less() -> None:
    for name in ("knee", "compute-bound", "soft"):
        savings = []
        for budget in (0.0, 0.01, 0.05, 0.3):
            choice = advice_of(name, budget).choice
            savings.append(choice.saving.value if choice else 0.0)
        assert savings == sorted(savings)
        assert savings[-1] > savings[0]


def test_a_budget_of_nothing_leaves_a_compute_bound_phase_alone() -> None:
    advice = advice_of("compute-bound", 0.0)
    assert advice.verdict == "leave unlocked"
    assert advice.choice is None
    assert "no lower clock keeps the budget of" in advice.text


def test_among_ties_the_highest_clock_is_taken() -> None:
    # Power hardly follows the clock and time does not: all clocks cost the same within half a percent.
    level = SyntheticDevice("level", memory_s=0.02, compute_s=0.0001, clock_w=0.5, op_j=0.0)
    advice = only(recommend_clocks(fit(made_sweep([level], repeats=2))))
    assert advice.verdict == "leave unlocked"
    # Here they differ by more, and the least lies between clocks that tie with it.
    device = replace(DEVICES["knee"], voltage_slope=0.0, clock_w=40.0)
    advice = only(recommend_clocks(fit(made_sweep([device], repeats=2)), max_slowdown=1.0))
    assert advice.choice is not None
    clock = advice.choice.sm_clock_mhz
    energies = {mhz: device.energy_j(mhz) for mhz in LOCKS_MHZ if mhz <= 1830}
    assert clock == max(mhz for mhz in energies if energies[mhz] <= 1.005 * min(energies.values()))


def test_a_budget_that_noise_alone_forbids_is_named() -> None:
    noisy = advice_of("knee", 0.01, time_noise=0.03, energy_noise=0.01)
    clock = noisy.choice.sm_clock_mhz if noisy.choice else noisy.reference_mhz
    assert noisy.unsure_mhz is not None
    assert noisy.unsure_mhz < clock
    assert advice_of("knee", 0.01).unsure_mhz is None


def test_only_measured_locks_are_advised() -> None:
    sweep = made_sweep([DEVICES["memory-bound"]], time_noise=0.003, energy_noise=0.01)
    advice = only(recommend_clocks(fit(sweep)))
    assert advice.choice is not None
    assert advice.choice.sm_clock_mhz in LOCKS_MHZ
    assert advice.measured is not None
    assert "measured there" in advice.text


def test_nothing_below_the_lowest_measured_clock_is_advised() -> None:
    sweep = made_sweep(
        [DEVICES["memory-bound"]], locks_mhz=(990, 1230, 1470, 1710), time_noise=0.003, energy_noise=0.01
    )
    choice = only(recommend_clocks(fit(sweep), max_slowdown=0.5)).choice
    assert choice is not None
    assert choice.sm_clock_mhz >= 990


def test_the_repeats_of_the_lock_must_bear_the_curves_out() -> None:
    model = model_of("memory-bound")
    choice = only(recommend_clocks(model)).choice
    assert choice is not None
    advised = choice.sm_clock_mhz
    series = model.series[0]
    wrong = [
        item.model_copy(update={"energy_mj_R": tuple(1.3 * energy for energy in item.energy_mj_R)})
        if item.requested_sm_clock_mhz == advised
        else item
        for item in series.settings
    ]
    lying = model.model_copy(update={"series": (series.model_copy(update={"settings": tuple(wrong)}),)})
    advice = only(recommend_clocks(lying))
    assert advice.measured is not None
    assert not advice.measured.agrees
    assert "distrust it" in advice.text


def test_edp_and_ed2p_lie_between_the_least_energy_and_the_highest_clock() -> None:
    device = DEVICES["compute-bound"]
    advice = advice_of("compute-bound")
    assert advice.edp is not None
    assert advice.ed2p is not None

    def cost(mhz: float, power: int) -> float:
        return device.energy_j(mhz) * device.iteration_s(mhz) ** power

    for choice, power in ((advice.edp, 1), (advice.ed2p, 2)):
        least = min(cost(mhz, power) for mhz in LOCKS_MHZ if mhz <= 1830)
        # The valley is flat, and ties go to the highest clock.
        assert cost(choice.sm_clock_mhz, power) <= 1.015 * least
    assert advice.optimum.mhz is not None
    assert advice.optimum.mhz < advice.edp.sm_clock_mhz < advice.ed2p.sm_clock_mhz


def test_the_pareto_front_is_the_one_drawn_by_hand() -> None:
    # No noise: below the least energy (1100 MHz) and at equal clocks nothing is on the front but one of each.
    sweep = made_sweep([DEVICES["compute-bound"]], caps_w=(300.0,), repeats=1)
    points = only(recommend_clocks(fit(sweep))).points
    front = {point.requested_sm_clock_mhz or point.limit_mw for point in points if point.on_front}
    assert 1110 in front
    assert not front & {480, 600, 690, 780, 870}
    assert 300_000 in front  # holds 1275 MHz, which no lock asked for
    dominated = [point for point in points if not point.on_front]
    for point in dominated:
        assert any(
            other.slowdown.value <= point.slowdown.value and other.saving.value >= point.saving.value
            for other in points
            if other is not point
        )


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("memory-bound", "locking beats capping"),  # draws less than any cap tried
        ("host-bound", "locking beats capping"),
        ("knee", "not told apart"),  # a cap between two that were tried holds the same clock
        ("compute-bound", "not told apart"),
        ("capped", "not told apart"),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_locking_beats_capping_where_it_does_and_nowhere_else(name: str, verdict: str, seed: int) -> None:
    truth = DEVICES[name].lock_over_cap(0.02, CAPS_W, min(LOCKS_MHZ))
    assert (truth > 0.01) == (verdict == "locking beats capping"), truth
    found = advice_of(name, seed=seed).lock_against_cap
    assert found.verdict == verdict
    assert found.advantage is not None
    assert found.advantage.value == pytest.approx(truth, abs=0.012)


def test_locking_beats_capping_where_the_caps_themselves_cost_energy() -> None:
    assert advice_of("hunting", 0.1).lock_against_cap.verdict == "locking beats capping"


def test_caps_that_reach_below_what_the_phase_draws_are_as_good_as_locks() -> None:
    device = replace(DEVICES["memory-bound"], min_limit_w=100.0)
    sweep = made_sweep(
        [device], caps_w=(135.0, 150.0, 180.0, 220.0, 400.0), time_noise=0.003, energy_noise=0.01
    )
    found = only(recommend_clocks(fit(sweep))).lock_against_cap
    assert device.lock_over_cap(0.02, (135.0, 400.0), 480) < 0.002
    assert found.verdict == "not told apart"
    assert "a cap near" in found.text


def test_without_caps_or_repeats_no_verdict_is_given() -> None:
    device = DEVICES["memory-bound"]
    assert only(recommend_clocks(fit(made_sweep([device])))).lock_against_cap.verdict == "not measured"
    once = made_sweep([device], caps_w=CAPS_W, repeats=1, time_noise=0.003, energy_noise=0.01)
    assert only(recommend_clocks(fit(once))).lock_against_cap.verdict == "not measured"


def test_capping_beats_locking_where_caps_cost_less_than_locks() -> None:
    # A limit may let the clock fall just where the phase waits: the cap's energy lies below the locks' curve.
    device = replace(DEVICES["compute-bound"], hunting=-0.12)
    sweep = made_sweep([device], caps_w=CAPS_W, time_noise=0.003, energy_noise=0.01)
    found = only(recommend_clocks(fit(sweep), max_slowdown=0.1)).lock_against_cap
    assert found.verdict == "capping beats locking"


def test_the_shape_of_the_papers_decode_comes_out_of_a_synthetic_device() -> None:
    """SYNTHETIC: our parameters, see ``h200_like_decode``; it reproduces a shape and measures nothing."""
    devices = [h200_like_decode(batch) for batch in (1, 4, 8, 32)]
    draws = [device.power_w(device.clock()[0]) for device in devices]
    assert min(draws) == pytest.approx(137, abs=3)
    assert max(draws) == pytest.approx(300, abs=3)
    sweep = made_sweep(
        devices, caps_w=(320.0, 400.0, 500.0, 600.0), time_noise=0.002, energy_noise=0.008, seed=1
    )
    advice = recommend_clocks(fit(sweep, bootstrap=100), max_slowdown=0.01)
    for device, series in zip(devices, advice.series, strict=True):
        assert series.choice is not None
        assert 690 <= series.choice.sm_clock_mhz <= 870
        assert 0.24 <= series.choice.saving.value <= 0.32
        assert series.choice.slowdown.high is not None
        assert series.choice.slowdown.high <= 0.01
        assert device.slowdown(series.choice.sm_clock_mhz) < 0.01
        assert series.lock_against_cap.verdict == "locking beats capping"
        cap = next(item for item in series.confounds if item.kind == "cap never binds")
        spread = cap.numbers["throughput_spread"]
        assert spread is not None
        assert spread < 0.028
        assert any("1905 to 1980" in item.text for item in series.confounds)
        assert series.behaviour.name == "memory-bound flat"
        # From 1590 to 1830 MHz power grows by 7 to 13 % for nothing.
        assert 1.07 <= device.power_w(1830) / device.power_w(1590) <= 1.145
    assert advice.common is not None
    assert advice.common.sm_clock_mhz is not None
    assert 690 <= advice.common.sm_clock_mhz <= 870
    assert max(advice.common.lost) < 0.01


def test_one_clock_for_several_phases_keeps_every_budget() -> None:
    decode, prefill = h200_like_decode(8), replace(DEVICES["knee"], name="prefill", phase="prefill")
    sweep = made_sweep([decode, prefill], time_noise=0.003, energy_noise=0.01)
    advice = recommend_clocks(fit(sweep))
    common = advice.common
    assert common is not None
    assert common.sm_clock_mhz is not None
    for device in (decode, prefill):
        assert device.slowdown(common.sm_clock_mhz) <= 0.0205
    assert common.saving is not None
    truth = np.mean([device.saving(common.sm_clock_mhz) for device in (decode, prefill)])
    assert common.saving.value == pytest.approx(truth, abs=0.01)
    assert common.lost[1] == pytest.approx(0.0, abs=0.005)
    assert "do not lock and unlock around phases or steps" in common.text


def test_phases_that_want_different_clocks_are_told_to_get_devices_of_their_own() -> None:
    sweep = made_sweep([h200_like_decode(8), DEVICES["compute-bound"]], time_noise=0.003, energy_noise=0.01)
    advice = recommend_clocks(fit(sweep), max_slowdown=0.005)
    assert advice.common is not None
    assert "give it devices of its own" in advice.common.text
    assert "synthetic H200-like decode" in advice.common.text
    alone = recommend_clocks(model_of("knee"))
    assert alone.common is None


def test_a_phase_that_the_limit_holds_lower_is_not_slowed_by_a_lock_above() -> None:
    decode = replace(h200_like_decode(8), limit_w=450.0)
    sweep = made_sweep([decode, DEVICES["capped"]], time_noise=0.003, energy_noise=0.01)
    advice = recommend_clocks(fit(sweep))
    common = advice.common
    assert common is not None
    assert advice.series[1].reference_mhz == 1575
    if common.sm_clock_mhz is not None:
        assert DEVICES["capped"].slowdown(min(common.sm_clock_mhz, 1575)) <= 0.0205


def test_a_lock_above_the_clock_that_a_phase_reaches_changes_nothing() -> None:
    view = SeriesView(model_of("capped").series[0])
    time_BF, energy_BF = view.ratios(np.array([1575.0, 1700.0, 1830.0]))
    assert (time_BF == 1.0).all()
    assert (energy_BF == 1.0).all()


def test_a_saving_that_may_be_nothing_is_no_reason_to_lock() -> None:
    device = SyntheticDevice("level", memory_s=0.02, compute_s=0.0001, clock_w=0.5, op_j=0.0)
    locks = (480, 780, 1110, 1470)
    sweep = made_sweep([device], locks_mhz=locks, repeats=2, time_noise=0.001, energy_noise=0.02, seed=1)
    found = only(recommend_clocks(fit(sweep)))
    assert found.verdict == "leave unlocked"
    assert found.choice is None
    assert "is not surely more than the 0.5 %" in found.text


@functools.cache
def nearly_level() -> ClockModel:
    """Two phases whose clock saves as good as nothing, measured almost without noise."""
    device = SyntheticDevice("level", memory_s=0.02, compute_s=0.0001, clock_w=1.4, op_j=0.0)
    devices = [device, replace(device, name="level too")]
    sweep = made_sweep(devices, caps_w=CAPS_W, time_noise=1e-5, energy_noise=1e-5, seed=1)
    return fit(sweep, bootstrap=30)


def test_a_saving_within_the_tie_is_no_reason_to_lock_one_phase_or_all_or_to_cap() -> None:
    advice = recommend_clocks(nearly_level())
    (first, _), common = advice.series, advice.common
    view = SeriesView(nearly_level().series[0])
    _, energy_BF = view.ratios(view.candidate_F)
    chosen = view.choice(highest_of_ties(view.candidate_F, np.median(energy_BF, axis=0)))
    assert chosen.sm_clock_mhz < view.reference_mhz
    assert chosen.saving.low is not None
    assert 0.0 < chosen.saving.low < 0.005  # surely more than nothing, and less than a tie
    assert (first.verdict, first.choice, first.measured) == ("leave unlocked", None, None)
    assert common is not None
    assert common.sm_clock_mhz is None
    assert common.saving is None
    assert first.lock_against_cap.verdict == "not told apart"
    assert "leave both as they are" in first.lock_against_cap.text
    assert "would hold" not in first.lock_against_cap.text


def test_the_cap_next_to_a_recommended_clock_names_that_clock() -> None:
    device = replace(DEVICES["knee"], voltage_slope=0.0, clock_w=40.0)
    sweep = made_sweep([device], caps_w=(150.0, 200.0, 250.0), repeats=2)
    advice = only(recommend_clocks(fit(sweep), max_slowdown=1.0))
    assert advice.choice is not None
    assert "would hold" in advice.lock_against_cap.text
    assert f"the same {advice.choice.sm_clock_mhz:.0f} MHz" in advice.lock_against_cap.text


def test_energy_per_token_is_that_of_an_iteration_over_its_tokens() -> None:
    advice = advice_of("memory-bound")
    assert advice.reference_mj_per_token == pytest.approx(
        1e3 * DEVICES["memory-bound"].energy_j(1830) / 8, rel=0.02
    )
    assert advice.choice is not None
    assert advice.choice.mj_per_token == pytest.approx(
        1e3 * DEVICES["memory-bound"].energy_j(advice.choice.sm_clock_mhz) / 8, rel=0.03
    )


def test_without_energy_the_advice_says_what_time_alone_allows() -> None:
    sweep = made_sweep([DEVICES["knee"]], repeats=2, time_noise=0.002)
    points = [point.model_copy(update={"energy_mj": None}) for point in sweep.series[0].points]
    series = sweep.series[0].model_copy(update={"points": tuple(points)})
    advice = only(recommend_clocks(fit(sweep.model_copy(update={"series": (series,)}))))
    assert advice.verdict == "no energy"
    assert advice.choice is None
    assert advice.points == ()
    assert "no saving can be stated" in advice.text


def test_without_an_unlocked_point_the_highest_clock_is_the_reference_and_said_to_be() -> None:
    sweep = made_sweep([DEVICES["knee"]], time_noise=0.003, energy_noise=0.01)
    points = [point for point in sweep.series[0].points if point.requested_sm_clock_mhz is not None]
    series = sweep.series[0].model_copy(update={"points": tuple(points)})
    model = fit(sweep.model_copy(update={"series": (series,)}))
    assert model.series[0].reference.how == "highest clock"
    advice = only(recommend_clocks(model))
    assert advice.reference_mhz == 1830
    assert "against running unlocked is not known" in advice.text
    assert "unlocked energy" not in advice.lock_against_cap.text


@pytest.mark.parametrize("budget", [-0.01, float("nan"), 11.0])
def test_a_budget_that_is_none_is_refused(budget: float) -> None:
    with pytest.raises(ClockError, match="is no budget"):
        recommend_clocks(model_of("knee"), max_slowdown=budget)


def test_a_series_that_cannot_be_fitted_is_named_with_its_batch_and_context() -> None:
    sweep = made_sweep([DEVICES["knee"]], time_noise=0.003, energy_noise=0.01)
    poor = sweep.series[0].model_copy(
        update={"batch_size": 77, "context_tokens": 4321, "points": sweep.series[0].points[:1]}
    )
    model = fit(sweep.model_copy(update={"series": (sweep.series[0], poor)}), bootstrap=5)
    (note,) = [note for note in model.notes if "are needed" in note]
    assert note.startswith("knee, decode, batch 77, context 4321: ")
