"""Classes of behaviour and confounds of sweeps, as the advice on clocks names them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from observatory.advice.frequency import recommend_clocks
from tests.advice.clocks import advice_of, fit, only
from tests.devices.synthetic_device import (
    DEVICES,
    h200_like_decode,
    made_sweep,
)


@pytest.mark.parametrize("name", sorted(DEVICES))
def test_the_behaviour_class_follows_the_documented_thresholds(name: str) -> None:
    device = DEVICES[name]
    found = advice_of(name).behaviour
    unlocked = device.clock()[0]
    free = min(mhz for mhz in range(480, unlocked + 1) if device.slowdown(mhz) <= 0.02)
    ratio = free / unlocked
    curve = "memory-bound flat" if ratio <= 0.6 else "knee" if ratio <= 0.9 else "compute-proportional"
    assert found.curve == curve
    assert found.free_mhz == pytest.approx(free, rel=0.04)
    assert found.name == {"capped": "capped", "host-bound": "host-bound"}.get(name, curve)
    assert bool(found.fix_first) == (name in ("capped", "host-bound"))
    assert found.agreement is not None
    assert found.agreement > 0.9


def test_without_the_driver_saying_so_nothing_is_called_host_bound() -> None:
    # Host and memory, which no clock changes, look alike in times.
    device = replace(DEVICES["host-bound"], idles=False)
    sweep = made_sweep([device], time_noise=0.001, energy_noise=0.005)
    found = only(recommend_clocks(fit(sweep))).behaviour
    assert found.name == found.curve


def test_a_sweep_that_does_not_reach_low_enough_has_no_class() -> None:
    sweep = made_sweep(
        [DEVICES["memory-bound"]], locks_mhz=(1350, 1470, 1590, 1710), time_noise=0.003, energy_noise=0.01
    )
    found = only(recommend_clocks(fit(sweep))).behaviour
    assert found.name is None
    assert "no lower clock was measured" in found.text


def test_little_power_makes_a_flat_phase_suspect_of_waiting_for_the_host() -> None:
    quiet = fit(made_sweep([h200_like_decode(1)], time_noise=0.003, energy_noise=0.01))
    assert only(recommend_clocks(quiet)).behaviour.evidence == "little power"
    busy = fit(made_sweep([h200_like_decode(32)], time_noise=0.003, energy_noise=0.01))
    assert only(recommend_clocks(busy)).behaviour.evidence is None


def test_a_cap_that_never_binds_is_named_with_its_evidence() -> None:
    confounds = {item.kind: item for item in advice_of("host-bound").confounds}
    cap = confounds["cap never binds"]
    device = DEVICES["host-bound"]
    ratio = cap.numbers["highest_power_over_limit"]
    spread = cap.numbers["throughput_spread"]
    assert ratio == pytest.approx(device.power_w(1830) / 250, abs=0.02)
    assert spread is not None
    assert spread < 0.02
    assert "none of the 5 power caps from 250 to 450 W" in cap.text
    # Where some bind and some do not, each is named.
    some = {item.kind: item for item in advice_of("knee").confounds}["some caps do not bind"]
    assert some.numbers["lowest_loose_cap_mw"] == 450_000
    assert some.numbers["highest_binding_cap_mw"] == 400_000
    assert not {item.kind for item in advice_of("compute-bound").confounds} & {
        "cap never binds",
        "some caps do not bind",
    }


def test_a_cap_without_event_reasons_is_judged_by_the_power_it_leaves_unused() -> None:
    sweep = made_sweep([DEVICES["host-bound"]], caps_w=(300.0, 400.0), repeats=2)
    points = [
        point.model_copy(update={"event_reasons": None, "power_cap_share": None})
        for point in sweep.series[0].points
    ]
    series = sweep.series[0].model_copy(update={"points": tuple(points)})
    kinds = {item.kind for item in fit(sweep.model_copy(update={"series": (series,)})).series[0].confounds}
    assert "cap never binds" in kinds


def test_a_clock_that_is_not_the_requested_one_is_named() -> None:
    clamp = {item.kind: item for item in advice_of("memory-bound").confounds}["clock not as requested"]
    assert (clamp.numbers["requested_low_mhz"], clamp.numbers["requested_high_mhz"]) == (1905, 1980)
    assert clamp.numbers["sm_clock_mhz"] == 1830
    assert not clamp.numbers["capped"]
    held = {item.kind: item for item in advice_of("capped").confounds}
    assert held["clock not as requested"].numbers["capped"]
    assert held["unlocked is capped"].numbers["sm_clock_mhz"] == 1575
    assert "the median clock over all of it is 1575 MHz" in held["unlocked is capped"].text


def test_the_class_of_the_curve_stands_next_to_a_cause_that_comes_first() -> None:
    for name in ("capped", "host-bound"):
        behaviour = advice_of(name).behaviour
        assert behaviour.name == name
        assert behaviour.words == f"{name} (curve: {behaviour.curve})"
    assert advice_of("memory-bound").behaviour.words == "memory-bound flat"


def test_the_limit_that_holds_the_unlocked_clock_is_the_one_in_force_not_the_default() -> None:
    sweep = made_sweep([DEVICES["capped"]], repeats=2)
    in_force_mw = sweep.series[0].points[0].enforced_limit_mw or 0
    found = fit(sweep.model_copy(update={"default_limit_mw": 2 * in_force_mw})).series[0]
    assert found.reference.limit_mw == in_force_mw
    held = {item.kind: item for item in found.confounds}["unlocked is capped"]
    assert held.numbers["limit_mw"] == in_force_mw


def test_a_limit_that_is_not_the_requested_one_is_named() -> None:
    sweep = made_sweep([DEVICES["knee"]], caps_w=(300.0, 400.0), repeats=2)
    points = [
        point.model_copy(update={"enforced_limit_mw": 350_000})
        if point.requested_limit_mw == 300_000
        else point
        for point in sweep.series[0].points
    ]
    series = sweep.series[0].model_copy(update={"points": tuple(points)})
    model = fit(sweep.model_copy(update={"series": (series,)}))
    found = {item.kind: item for item in model.series[0].confounds}
    assert found["limit not as requested"].numbers == {"requested_limit_mw": 300_000, "limit_mw": 350_000}
