"""What the advice of telemetry says of a state is computed from the samples in that state."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest

from observatory.analysis.frequency.points import corrected_label
from observatory.analysis.frequency.telemetry import DeviceTelemetry, telemetry_advice
from observatory.analysis.frequency.telemetry_records import FindingCode
from observatory.campaign.sweep.document import sweep_document
from observatory.campaign.sweep.journal import JournalHead, JournalPoint, JournalSeries
from observatory.cli import main
from observatory.devices.event_reasons import THERMAL_BITS
from observatory.run import open_run
from observatory.run.manifest import DeviceSpec, RankPower
from tests.analysis.frequency.test_telemetry import PERIOD_NS, UUID, first, write_run

#: Bits, SM clock in MHz and power in mW of the samples of a state.
IDLE, FREE, CAPPED = (0x1, 885, 90_000), (0, 1980, 500_000), (0x4, 1800, 690_000)
HOT, BRAKED = (0x40, 1200, 300_000), (0x80, 990, 250_000)


def columns(*states: tuple[tuple[int, int, int], int], limit_mw: int = 700_000) -> dict[str, object]:
    """Samples of states, each with how many, in an order that mixes them."""
    rows = np.concatenate([np.tile(state, (count, 1)) for state, count in states])
    rows = rows[np.random.default_rng(0).permutation(len(rows))]
    return {
        "event_reasons": rows[:, 0],
        "sm_clock_mhz": rows[:, 1],
        "power_mw": rows[:, 2],
        "enforced_limit_mw": np.full(len(rows), limit_mw),
    }


def seen(path: Path, power: dict[str, object]) -> DeviceTelemetry:
    lengths = [len(column) for column in power.values() if isinstance(column, np.ndarray)]
    return first(write_run(path, power, samples=max(lengths, default=200)))


def said(device: DeviceTelemetry, code: FindingCode) -> str:
    """The one sentence of a code."""
    (text,) = (text for own, text in zip(device.finding_codes, device.findings, strict=True) if own == code)
    return text


def without(power: dict[str, object], *names: str) -> dict[str, object]:
    return {name: column for name, column in power.items() if name not in names}


@pytest.mark.parametrize(("idle", "of_busy"), [(20, "11 %"), (100, "20 %"), (179, "95 %")])
def test_the_clock_where_the_limit_holds_is_that_of_the_samples_it_holds(
    tmp_path: Path, idle: int, of_busy: str
) -> None:
    found = seen(tmp_path / "run", columns((IDLE, idle), (CAPPED, 20), (FREE, 180 - idle)))
    text = said(found, "limit binds")
    assert f"for 10 % of the time, {of_busy} of the busy time" in text
    assert "where it holds (20 samples), the SM clock is 1800 MHz: a lock above 1800 MHz" in text
    assert "885" not in " ".join(found.findings), "the clock of an idle device is no clock to lock"
    assert found.states is not None
    assert found.states["busy"].samples == 200 - idle
    assert found.states["busy"].power_over_limit is not None
    assert found.states["busy"].power_over_limit > 0.7, "of busy samples, however many are idle"


@pytest.mark.parametrize(("capped", "cap"), [(2, "does not bind"), (3, "binds")])
def test_a_limit_binds_by_its_share_of_the_busy_time(tmp_path: Path, capped: int, cap: str) -> None:
    power = columns((IDLE, 1750), (CAPPED, capped), (FREE, 250 - capped))
    found = seen(tmp_path / "run", power)
    assert found.power_cap_share == pytest.approx(capped / 2000), "less than a hundredth of all time"
    assert found.power_cap_busy_share == pytest.approx(capped / 250)
    assert found.cap == cap
    if cap == "does not bind":
        text = said(found, "limit does not bind")
        assert "holding the clock down for 0.1 % of the time, 0.8 % of the busy time only" in text
        assert "a cap above 690 W changes nothing" in text


def test_a_limit_that_binds_is_the_one_in_force_then(tmp_path: Path) -> None:
    power = columns((IDLE, 40), (FREE, 120), (CAPPED, 40))
    capped = np.asarray(power["event_reasons"]) == 0x4
    power |= {"enforced_limit_mw": np.where(capped, 450_000, 700_000), "power_mw": 440_000}
    text = said(seen(tmp_path / "run", power), "limit binds")
    assert "changed between 450 and 700 W, binds" in text
    assert "where it holds (40 samples, at 450 W), the SM clock is 1800 MHz" in text


def test_a_clock_that_hunts_under_the_limit_leaves_locks_above_all_of_it_without_effect(
    tmp_path: Path,
) -> None:
    power = columns((IDLE, 100), (CAPPED, 100))
    capped = np.asarray(power["event_reasons"]) == 0x4
    hunting = np.array([1500, 1560, 1620])[np.cumsum(capped) % 3]
    hunting[np.flatnonzero(capped)[0]] = 1650
    power["sm_clock_mhz"] = np.where(capped, hunting, 885)
    text = said(seen(tmp_path / "run", power), "limit binds")
    assert "the SM clock is 1500 to 1620 MHz (median 1560)" in text
    assert "a lock above 1650 MHz would do nothing there" in text


def test_a_busy_clock_is_steady_however_often_the_device_idles(tmp_path: Path) -> None:
    locked = (0, 1830, 300_000)
    found = seen(tmp_path / "run", columns((IDLE, 100), (locked, 100)))
    text = said(found, "SM clock below the highest")
    assert "in 100 busy samples, the SM clock stood at 1830 MHz, below the highest of 1980" in text
    assert said(found, "limit does not bind").endswith(
        "(95 % of the busy samples stay below 300 W, 43 % of it): a cap above 300 W changes nothing, locking "
        "the clock would"
    )


def test_a_lock_is_suspected_only_where_nothing_else_holds_the_clock(tmp_path: Path) -> None:
    hot = seen(tmp_path / "hot", columns((HOT, 100), (IDLE, 20)))
    assert not any("locked" in text for text in hot.findings), "heat explains the clock"
    both = seen(tmp_path / "both", columns((HOT, 100), ((0, 1830, 300_000), 100)))
    text = said(both, "SM clock below the highest")
    assert "in the 100 busy samples in which no event reason holds it down" in text
    assert "stood at 1830 MHz, below the highest of 1980: it is locked or clamped" in text


def test_heat_and_brake_are_shares_of_the_busy_time_too_and_heat_has_its_own_clock(tmp_path: Path) -> None:
    found = seen(tmp_path / "run", columns((IDLE, 100), (HOT, 20), (BRAKED, 10), (FREE, 70)))
    text = said(found, "slowed by heat")
    assert "for 10 % of the time, 20 % of the busy time (to 1200 MHz, 20 samples)" in text
    assert "for 5 % of the time, 10 % of the busy time" in said(found, "slowed by the brake")
    rare = seen(tmp_path / "rare", columns((IDLE, 1900), (HOT, 2), (FREE, 98)))
    assert "0.1 % of the time, 2 % of the busy time" in said(rare, "slowed by heat")


def test_without_event_reasons_a_counter_gives_a_share_and_no_clock(tmp_path: Path) -> None:
    power = columns((IDLE, 100), (CAPPED, 100))
    counted = {"power_cap_ns": np.arange(200) * (PERIOD_NS // 4), "thermal_ns": np.arange(200) * PERIOD_NS}
    found = seen(tmp_path / "run", without(power, "event_reasons") | counted)
    assert found.states is None
    assert (found.power_cap_busy_share, found.missing) == (None, ("event reasons",))
    text = said(found, "limit binds")
    assert "holds the clock down for 25 % of the time (95 % of the samples, busy or idle," in text
    assert text.endswith(
        "the clock at which it holds is not known: without event reasons its samples cannot be picked out"
    )
    assert "lock above" not in text
    assert "to which clock is not known: without event reasons" in said(found, "slowed by heat")
    assert "over all samples, busy or idle, the SM clock moved" in said(found, "SM clock")
    assert "which samples are busy is not known" in said(found, "states not known")


def test_with_event_reasons_a_counter_is_a_share_of_the_busy_time_too(tmp_path: Path) -> None:
    counted = {"power_cap_ns": np.arange(200) * (PERIOD_NS // 10)}
    found = seen(tmp_path / "bits", columns((IDLE, 100), (CAPPED, 20), (FREE, 80)) | counted)
    assert found.power_cap_source == "counter"
    assert found.power_cap_busy_share == pytest.approx(0.2)
    assert "the SM clock is 1800 MHz" in said(found, "limit binds")
    between = seen(tmp_path / "none", columns((IDLE, 100), (FREE, 100)) | counted)
    text = said(between, "limit binds")
    assert text.endswith(
        "the clock at which it holds is not known: no busy sample has a bit of the power limit"
    )


def test_a_small_share_of_all_time_does_not_say_how_much_of_the_busy_time_it_is(tmp_path: Path) -> None:
    power = without(columns((IDLE, 190), (FREE, 10)), "event_reasons")
    little = seen(tmp_path / "little", power | {"power_cap_ns": np.arange(200) * (PERIOD_NS // 200)})
    assert little.cap is None
    assert "0.5 % of the time, and which part of the busy time" in said(little, "limit not known")
    never = seen(tmp_path / "never", power | {"power_cap_ns": 7})
    assert never.cap == "does not bind"


def test_without_event_reasons_a_limit_that_power_once_came_near_may_act(tmp_path: Path) -> None:
    power = without(columns((IDLE, 195), (CAPPED, 5)), "event_reasons")
    near = seen(tmp_path / "near", power)
    assert near.power_over_limit is not None
    assert near.power_over_limit < 0.2, "of all samples, of which few are busy"
    assert near.cap is None
    text = said(near, "limit not known")
    assert "no sample has a valid reading of event reasons, and power reaches 99 % of it" in text
    far = seen(tmp_path / "far", power | {"power_mw": 300_000})
    assert far.cap == "does not bind"


@pytest.mark.parametrize(
    ("left_out", "missing", "code", "words"),
    [
        (("power_mw",), "power", "power over limit not known", "instant power"),
        (("enforced_limit_mw",), "power limit", "power over limit not known", "the power limit"),
        (("sm_clock_mhz",), "SM clock", "SM clock not known", "SM clock was not sampled"),
        (("event_reasons",), "event reasons", "states not known", "event reasons"),
    ],
)
def test_what_is_missing_is_named_and_nothing_else(
    tmp_path: Path, left_out: tuple[str, ...], missing: str, code: FindingCode, words: str
) -> None:
    found = seen(tmp_path / "run", without(columns((IDLE, 100), (CAPPED, 20), (FREE, 80)), *left_out))
    assert found.missing == (missing,)
    absent = {"power": "reading of instant power", "power limit": "reading of the power limit"}
    assert words in said(found, code)
    text = " ".join(found.findings)
    for name, sentence in absent.items():
        assert (sentence in text) == (name == missing)
    assert ("SM clock was not sampled" in text) == (missing == "SM clock")
    assert ("reading of event reasons" in text) == (missing == "event reasons")


def test_a_limit_that_was_not_sampled_is_not_called_missing_power(tmp_path: Path) -> None:
    power = columns((IDLE, 100), (FREE, 100))
    for name, own in (
        ("none", without(power, "enforced_limit_mw")),
        ("zero", power | {"enforced_limit_mw": 0}),
    ):
        found = seen(tmp_path / name, without(own, "event_reasons"))
        assert found.cap is None
        assert said(found, "limit not known") == (
            "whether its power limit binds is not known: no sample has a valid reading of event reasons "
            "or the power limit"
        )


def test_a_limit_that_is_read_now_and_then_is_in_force_until_the_next_reading(tmp_path: Path) -> None:
    every = np.arange(200)
    limit_mw = np.where(every % 50 == 0, np.where(every < 100, 700_000, 350_000), None)
    power = columns((FREE, 200)) | {"power_mw": 315_000, "enforced_limit_mw": limit_mw}
    power["power_mw"] = np.where(every % 50 == 0, None, 315_000)
    found = seen(tmp_path / "run", power)
    assert found.missing == ()
    assert found.power_over_limit == pytest.approx(0.9)
    assert (found.limit_mw, found.highest_limit_mw) == (350_000, 700_000)


def test_power_that_ended_before_the_first_limit_is_next_to_none(tmp_path: Path) -> None:
    early = np.arange(200) < 100
    power = columns((FREE, 200)) | {
        "power_mw": np.where(early, 300_000, None),
        "enforced_limit_mw": np.where(early, None, 700_000),
    }
    found = seen(tmp_path / "run", power)
    assert found.missing == ("power beside a limit",)
    assert "instant power and the limit in force at the same time" in said(
        found, "power over limit not known"
    )


def test_a_device_that_only_idled_says_nothing_of_load(tmp_path: Path) -> None:
    found = seen(tmp_path / "run", columns((IDLE, 200)))
    assert found.cap is None
    assert said(found, "limit not known") == (
        "whether the power limit of 700 W binds under load is not known: none of 200 samples with event "
        "reasons is busy"
    )
    assert "the SM clock under load is not known: no sample is busy" in said(found, "SM clock not known")
    assert found.power_cap_busy_share is None
    assert not any("885" in text or "draws" in text for text in found.findings)


def test_one_sample_is_one_sample(tmp_path: Path) -> None:
    found = seen(tmp_path / "run", columns((CAPPED, 1)))
    assert "where it holds (1 sample), the SM clock is 1800 MHz" in said(found, "limit binds")
    assert said(found, "SM clock") == "in 1 busy sample, the SM clock was 1800 MHz"
    free = seen(tmp_path / "free", columns(((0, 1500, 300_000), 1)))
    assert not any("locked" in text for text in free.findings), "one reading is not a clock that stands"


def test_readings_that_are_missing_here_and_there_leave_their_samples_out(tmp_path: Path) -> None:
    power = columns((IDLE, 100), (CAPPED, 40), (FREE, 60))
    reasons, every = np.asarray(power["event_reasons"]), np.arange(200)
    power["event_reasons"] = np.where(every % 2, reasons, None)
    power["sm_clock_mhz"] = np.where(every % 4 == 1, None, np.asarray(power["sm_clock_mhz"]))
    power["power_mw"] = np.where(every % 5 == 1, None, np.asarray(power["power_mw"]))
    found = seen(tmp_path / "run", power)
    assert found.states is not None
    held = found.states["power cap"]
    assert held.samples == np.sum((reasons == 0x4) & (every % 2 == 1))
    assert held.clock_samples == np.sum((reasons == 0x4) & (every % 4 == 3))
    assert held.power_samples == np.sum((reasons == 0x4) & (every % 2 == 1) & (every % 5 != 1))
    assert f"where it holds ({held.clock_samples} samples)" in said(found, "limit binds")
    assert said(found, "states in part").startswith("event reasons stand in 100 of 200 samples")
    assert f"{found.states['busy'].power_samples} busy samples with power" in said(found, "limit binds")
    power["sm_clock_mhz"] = np.where(reasons == 0x4, None, 1980)
    text = said(seen(tmp_path / "none", power), "limit binds")
    assert re.search(r"none of \d+ busy samples with a bit of the power limit has an SM clock$", text)


def test_every_device_and_every_phase_has_its_own_states(tmp_path: Path) -> None:
    power = columns((IDLE, 100), (CAPPED, 20), (FREE, 80))
    order = np.argsort(np.asarray(power["event_reasons"]) == 0x4, kind="stable")
    power = {name: np.asarray(column)[order] for name, column in power.items()}
    phases = telemetry_advice(open_run(write_run(tmp_path / "phases", power, phases=True))).devices
    assert [(item.phase, item.cap) for item in phases] == [
        (None, "binds"),
        ("decode", "binds"),
        ("prefill", "does not bind"),
    ]
    assert "where it holds (20 samples), the SM clock is 1800 MHz" in said(phases[1], "limit binds")
    power["device_uuid"] = np.where(np.arange(200) < 100, UUID, "other")
    devices = telemetry_advice(open_run(write_run(tmp_path / "devices", power))).devices
    assert [(item.device_uuid, item.cap) for item in devices] == [
        (UUID, "does not bind"),
        ("other", "binds"),
    ]


def test_power_of_a_phase_that_may_be_of_what_ran_before_is_named_so(tmp_path: Path) -> None:
    early = np.arange(200) < 102  # the phase changes at 100, the sensor is renewed two samples later
    power: dict[str, object] = {
        "power_mw": np.where(early, 500_000, None),
        "enforced_limit_mw": 700_000,
    }
    devices = telemetry_advice(open_run(write_run(tmp_path / "run", power, phases=True))).devices
    decode = next(item for item in devices if item.phase == "decode")
    assert decode.missing == ("event reasons", "power of the phase", "SM clock")
    assert "instant power that is surely of this phase" in said(decode, "limit not known")


@pytest.mark.parametrize(
    ("bits", "label"),
    [
        (0x8, "braked"),
        (0x80, "braked"),
        (0x88, "braked"),
        (0x20, "thermal"),
        (0x40, "thermal"),
        (0x48, "thermal"),
    ],
)
def test_thermal_means_the_same_to_sweep_fit_and_telemetry(tmp_path: Path, bits: int, label: str) -> None:
    path = write_run(tmp_path / "run", columns(((bits, 1500, 300_000), 200)))
    device = DeviceSpec(kind="gpu", name="Fake", uuid=UUID)
    head = JournalHead(device=device, series=(JournalSeries(name="one"),), supported_sm_clocks_mhz=(1500,))
    window = JournalPoint(
        order=0, repeat=0, series=0, sm_clock_mhz=1500, start_ns=0, end_ns=199 * PERIOD_NS, iterations=10
    )
    point = sweep_document(head, [window], RankPower(), path).series[0].points[0]
    assert point.label == label
    assert ("names heat" in point.reason) == (label == "thermal")
    for stored in ("ok", "unverified", "thermal", "braked"):
        assert corrected_label(point.model_copy(update={"label": stored})) == label
    unread = point.model_copy(update={"label": "thermal", "event_reasons": None})
    assert corrected_label(unread) == "thermal", "nothing says that it was the brake"
    found = first(path)
    assert found.thermal_share == (1.0 if bits & THERMAL_BITS else 0.0)
    assert ("slowed by heat" in found.finding_codes) == (label == "thermal")
    assert ("slowed by the brake" in found.finding_codes) == bool(bits & 0x88)
    thermal = found.in_state("thermal")
    assert thermal is not None
    assert thermal.samples == (200 if label == "thermal" else 0)


@pytest.mark.parametrize("sampled", [True, False])
def test_a_point_of_which_no_event_reasons_were_sampled_is_not_one_for_which_the_driver_names_no_reason(
    tmp_path: Path, sampled: bool
) -> None:
    power = columns((FREE, 200))
    path = write_run(tmp_path / "run", power if sampled else without(power, "event_reasons"))
    device = DeviceSpec(kind="gpu", name="Fake", uuid=UUID)
    head = JournalHead(device=device, series=(JournalSeries(name="one"),), supported_sm_clocks_mhz=(1500,))
    window = JournalPoint(
        order=0, repeat=0, series=0, sm_clock_mhz=1500, start_ns=0, end_ns=199 * PERIOD_NS, iterations=10
    )
    point = sweep_document(head, [window], RankPower(), path).series[0].points[0]
    assert point.label == "clamped"
    assert ("the driver names no reason" in point.reason) == sampled
    assert ("event reasons were not sampled" in point.reason) != sampled


def test_the_command_prints_sentences_and_numbers_of_each_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", columns((IDLE, 100), (CAPPED, 20), (FREE, 80)))
    assert main(["clocks", "recommend", "--telemetry", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "a lock above 1800 MHz would do nothing there" in printed
    row = next(line for line in printed.splitlines() if line.startswith(UUID[:12]))
    assert row.split()[4:] == ["10.0", "50", "1342", "1980"]
    assert main(["clocks", "recommend", "--telemetry", str(run), "--csv"]) == 0
    (values,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert values["device_uuid"] == UUID
    assert (float(values["power_cap_busy_share"]), float(values["capped_sm_clock_mhz"])) == (0.2, 1800)
    assert main(["clocks", "recommend", "--telemetry", str(run), "--json"]) == 0
    (device,) = json.loads(capsys.readouterr().out)["telemetry"]["devices"]
    assert device["states"]["power cap"]["sm_clock_mhz"] == 1800
    assert device["states"]["idle"]["sm_clock_mhz"] == 885
    assert device["finding_codes"] == ["limit binds", "SM clock", "idle"]
