"""NVIDIA GPUs through the real pynvml, on a driver written in C that fails the way drivers fail."""

from __future__ import annotations

import time
import types
from pathlib import Path
from typing import Any

import pytest

from observatory.devices.base import PowerDevice
from observatory.devices.find import open_device, open_devices
from observatory.devices.nvml import FieldBatch, NvmlDevice, PreparedCall
from observatory.errors import DeviceError, DeviceLostError
from tests.devices.driver import FakeDriver
from tests.devices.scenes import needs_driver, play

pytestmark = needs_driver

FIRST, SECOND = (f"GPU-fa4e0000-0000-4000-8000-00000000000{number}" for number in (0, 1))


class Library:
    """The C library as pynvml holds it, with some functions in the place of its own."""

    def __init__(self, **instead: Any) -> None:
        import pynvml

        pynvml.nvmlInit()
        self._real, self._instead = pynvml.nvmlLib, instead
        pynvml.nvmlLib = self

    def __getattr__(self, name: str) -> Any:
        return self._instead.get(name) or getattr(self._real, name)


def gap_of(device: PowerDevice, name: str) -> list[str | None]:
    gap = device.gaps[name]
    return [gap.kind, gap.detail, gap.remedy]


def codes_scene(driver: FakeDriver) -> dict[str, Any]:
    """Field 186 with each return code, and what is reported instead."""
    outcome: dict[str, Any] = {}
    for code in (2, 3, 4, 10, 12, 13):
        driver.fail("field:186", code)
        with NvmlDevice(FIRST) as device:
            sample = device.read()
            outcome[str(code)] = [*gap_of(device, "power_mw"), sample.power_mw, sample.average_power_mw]
            assert set(device.unavailable) == {"power_mw"}
    return outcome


def test_each_return_code_is_a_reason_of_its_own_and_power_now_is_never_the_mean(tmp_path: Path) -> None:
    outcome = play(codes_scene, tmp_path)
    assert {code: kind for code, (kind, *_) in outcome.items()} == {
        "2": "not supported", "3": "not supported", "4": "not permitted", "10": "failed", "12": "failed",
        "13": "not supported",
    }  # fmt: skip
    for code, (_, detail, remedy, power_mw, average_power_mw) in outcome.items():
        assert detail.startswith(
            "only a 1 s mean (shorter before Ampere and on GA100), kept as average_power_mw: "
        )
        assert f"field 186 returned {code} (" in detail
        assert power_mw is None
        assert average_power_mw == 75_000
        assert (remedy is None) == (code == "3")
    assert len({detail.split(": ", 1)[1].split(":")[0] for _, detail, *_ in outcome.values()}) >= 5
    assert "update the driver" in outcome["2"][2]
    assert "docs/power.md#permissions" in outcome["4"][2]


def old_driver_scene(driver: FakeDriver) -> dict[str, Any]:
    """A driver without field values, event reasons and the newer temperature."""
    for function in (
        "nvmlDeviceGetFieldValues",
        "nvmlDeviceGetTemperatureV",
        "nvmlDeviceGetCurrentClocksEventReasons",
    ):
        driver.fail(function, 13)
    with NvmlDevice(FIRST) as device:
        sample = device.read()
        return {
            "outcome": [
                sample.average_power_mw,
                sample.energy_mj is not None,
                sample.temperature_c is not None,
            ],
            "limit": sample.enforced_limit_mw,
            "gaps": {name: gap_of(device, name) for name in device.unavailable},
        }


def test_an_old_driver_is_asked_the_old_way_and_says_what_it_lacks(tmp_path: Path) -> None:
    outcome = play(old_driver_scene, tmp_path)
    assert outcome["outcome"] == [75_000, True, True]
    assert outcome["limit"] == 700_000
    assert set(outcome["gaps"]) == {
        "power_mw", "memory_temperature_c", "event_reasons", "power_cap_ns", "thermal_ns"
    }  # fmt: skip
    for _, detail, remedy in outcome["gaps"].values():
        assert "returned 13 (function not found)" in detail
        assert remedy == "update the driver"


def before_volta_scene(driver: FakeDriver) -> list[Any]:
    driver.fail("field:83", 3)
    driver.fail("nvmlDeviceGetTotalEnergyConsumption", 3)
    with NvmlDevice(FIRST) as device:
        return [*gap_of(device, "energy_mj"), device.read().energy_mj]


def test_a_gpu_without_an_energy_counter_has_none_and_not_zero(tmp_path: Path) -> None:
    kind, detail, _, energy_mj = play(before_volta_scene, tmp_path)
    assert energy_mj is None
    assert kind == "not supported"
    assert "before Volta" in detail


def half_thermal_scene(driver: FakeDriver) -> list[Any]:
    driver.fail("field:270", 3)
    with NvmlDevice(FIRST) as device:
        return [device.read().thermal_ns, device.unavailable["thermal_ns"]]


def test_half_a_sum_is_no_sum(tmp_path: Path) -> None:
    thermal_ns, why = play(half_thermal_scene, tmp_path)
    assert thermal_ns is None
    assert "269 + 270" in why


def whole_batch_scene(driver: FakeDriver) -> list[Any]:
    """A driver that refuses a batch with a field it does not know, but answers single ones."""
    batches: list[int] = []

    def picky(handle: Any, count: Any, values: Any) -> int:
        batches.append(count.value)
        if count.value > 1 and any(value.fieldId == 186 for value in values._obj):
            return 2
        return int(real(handle, count, values))

    real = Library(nvmlDeviceGetFieldValues=picky)._real.nvmlDeviceGetFieldValues
    driver.fail("field:186", 2)
    with NvmlDevice(FIRST) as device:
        before = len(batches)
        sample = device.read()
        return [sorted(device.unavailable), sample.energy_mj is not None, batches[before:]]


def test_a_batch_refused_for_one_field_does_not_cost_the_others(tmp_path: Path) -> None:
    unavailable, has_energy, batches = play(whole_batch_scene, tmp_path)
    assert unavailable == ["power_mw"]
    assert has_energy
    assert len(batches) == 1, "one call for all fields"


def types_scene(driver: FakeDriver) -> dict[str, Any]:
    """The same power as each value type, and values that are none."""
    outcome: dict[str, Any] = {}
    for kind in range(9):
        driver.set(**{"type:186": kind, "value:186": 30_000.4 if kind == 0 else 30_000})
        with NvmlDevice(FIRST) as device:
            outcome[str(kind)] = [device.read().power_mw, device.unavailable.get("power_mw")]
    for name, kind, value in (
        ("nan", 0, float("nan")), ("infinite", 0, float("inf")), ("negative", 5, -1),
        ("no uint", 1, 2.0**32 - 1), ("no ulonglong", 3, 2.0**64),
    ):  # fmt: skip
        driver.set(**{"type:186": kind, "value:186": value})
        with NvmlDevice(FIRST) as device:
            outcome[name] = [device.read().power_mw, device.unavailable.get("power_mw")]
    driver.set(**{"type:186": 1, "value:186": 30_000, "type:82": 5, "value:82": -5})
    with NvmlDevice(FIRST) as device:
        outcome["cold"] = device.read().memory_temperature_c
    return outcome


def test_a_value_is_read_as_the_type_that_it_says_it_has(tmp_path: Path) -> None:
    outcome = play(types_scene, tmp_path)
    for kind in range(7):
        assert outcome[str(kind)] == [30_000, None], kind
    for kind in ("7", "8", "nan", "infinite", "negative", "no uint", "no ulonglong"):
        power_mw, why = outcome[kind]
        assert power_mw is None, kind
        assert "a value that cannot be a reading" in why, kind
    assert outcome["cold"] == -5


def flicker_scene(driver: FakeDriver) -> list[Any]:
    """Single failures while it runs."""
    with NvmlDevice(FIRST) as device:
        reasons = dict(device.unavailable)
        driver.fail("field:186", 999)
        driver.fail("nvmlDeviceGetClockInfo", 10)
        failing = device.read()
        driver.fail("field:186", 0)
        driver.fail("nvmlDeviceGetClockInfo", 0)
        again = device.read()
        driver.fail("nvmlDeviceGetFieldValues", 999)
        no_fields = device.read()
        return [
            [failing.power_mw, failing.sm_clock_mhz, failing.energy_mj is not None],
            [again.power_mw, again.sm_clock_mhz],
            [no_fields.power_mw, no_fields.energy_mj, no_fields.sm_clock_mhz],
            reasons == dict(device.unavailable) == {},
        ]


def test_a_field_that_fails_once_is_missing_from_that_sample_only(tmp_path: Path) -> None:
    failing, again, no_fields, unchanged = play(flicker_scene, tmp_path)
    assert failing == [None, None, True]
    assert again == [75_000, 345]
    assert no_fields == [None, None, 345]
    assert unchanged


def retry_scene(driver: FakeDriver) -> list[Any]:
    """The driver times out once for each question, just when the device is opened."""
    asked: list[int] = []

    def late(handle: Any, count: Any, values: Any) -> int:
        code = int(real(handle, count, values))
        for value in values._obj:
            if value.fieldId not in asked:
                value.nvmlReturn = 10
            asked.append(value.fieldId)
        return code

    real = Library(nvmlDeviceGetFieldValues=late)._real.nvmlDeviceGetFieldValues
    del driver
    with NvmlDevice(FIRST) as device:
        return [sorted(device.unavailable), asked.count(186)]


def test_one_timeout_at_the_start_does_not_cost_a_field_for_good(tmp_path: Path) -> None:
    unavailable, asked = play(retry_scene, tmp_path)
    assert unavailable == []
    assert asked == 2


def prepared_scene(driver: FakeDriver) -> list[Any]:
    """The same readings with the C library in sight, without it, and by nvidia-ml-py's own functions."""
    import pynvml

    driver.fail("nvmlDeviceGetPowerUsage", 10)
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(FIRST)
    hidden = types.SimpleNamespace(**{k: v for k, v in vars(pynvml).items() if k != "nvmlLib"})
    calls = (
        ("nvmlDeviceGetClockInfo", (1,)),
        ("nvmlDeviceGetTemperatureV", (0,)),
        ("nvmlDeviceGetTemperature", (0,)),
        ("nvmlDeviceGetEnforcedPowerLimit", ()),
        ("nvmlDeviceGetPowerUsage", ()),
        ("nvmlDeviceGetNothing", ()),
    )
    outcome: list[Any] = []
    for nvml in (pynvml, hidden):
        fields, code = FieldBatch(nvml, handle, [190, 82, 9999, 74]).ask()
        outcome.append(
            [code, sorted(fields.items()), *[PreparedCall(nvml, handle, *call).ask() for call in calls]]
        )
    return outcome


def test_prepared_calls_tell_what_the_bindings_own_functions_tell(tmp_path: Path) -> None:
    fast, slow = play(prepared_scene, tmp_path)
    assert fast == slow
    code, fields, clock, temperature, older, limit, wrong, unknown = fast
    assert code == 0
    assert [[number, outcome[1]] for number, outcome in fields] == [[74, 0], [82, 0], [190, 0], [9999, 3]]
    assert dict(fields)[190][0] == 700_000
    assert clock[1] == 0
    assert clock[0] > 300
    assert temperature == older
    assert limit == [700_000, 0]
    assert wrong == [None, 10]
    assert unknown == [None, 13]


def lost_scene(driver: FakeDriver) -> dict[str, Any]:
    """Two GPUs, of which one falls off the bus in the middle, in each of three ways."""
    outcome: dict[str, Any] = {}
    driver.devices(2)
    for name, switch in (
        ("all", lambda code: driver.set(0, lost=float(code > 0))),
        ("a call", lambda code: driver.fail("nvmlDeviceGetClockInfo", code)),
        ("a field", lambda code: driver.fail("field:186", code)),
    ):
        with NvmlDevice(FIRST) as lost, NvmlDevice(SECOND) as other:
            lost.read()
            switch(15)
            try:
                lost.read()
            except DeviceLostError as error:
                outcome[name] = str(error)
            assert other.read().power_mw == 75_000
            switch(0)
            with pytest.raises(DeviceLostError):
                lost.read()
    driver.set(0, lost=1)
    with pytest.raises(DeviceLostError):
        NvmlDevice(FIRST)
    outcome["found"] = [device.uuid for device in open_devices()]
    return outcome


def test_a_gpu_lost_in_the_middle_ends_alone(tmp_path: Path) -> None:
    outcome = play(lost_scene, tmp_path)
    for way in ("all", "a call", "a field"):
        assert FIRST in outcome[way]
        assert "NVML 15, GPU is lost" in outcome[way]
        assert "Xid" in outcome[way]
    assert outcome["found"] == [SECOND]


def stale_scene(driver: FakeDriver) -> list[Any]:
    driver.set(counter_stuck=1)
    with NvmlDevice(FIRST) as device:
        first = last = device.read()
        driver.set(busy=1, update_ms=5)
        deadline_ns = first.time_ns + 60_000_000_000
        while last.power_mw == first.power_mw and last.time_ns < deadline_ns:
            time.sleep(0.01)
            last = device.read()
        return [first.energy_mj, last.energy_mj, first.power_mw, last.power_mw]


def test_a_stuck_counter_is_told_as_it_stands(tmp_path: Path) -> None:
    first_mj, last_mj, first_mw, last_mw = play(stale_scene, tmp_path)
    assert first_mj == last_mj
    assert last_mw > first_mw


def slow_scene(driver: FakeDriver) -> list[Any]:
    """Each call takes 20 ms; how many there are is counted."""
    calls: list[str] = []

    class Counting(Library):
        def __getattr__(self, name: str) -> Any:
            real = super().__getattr__(name)
            return lambda *arguments: (calls.append(name), real(*arguments))[1]

    Counting()
    with NvmlDevice(FIRST) as device:
        driver.set(call_us=20_000)
        calls.clear()
        sample = device.read()
        return [sample.read_ns, sorted(calls)]


def test_a_sample_takes_five_calls_and_tells_how_long_they_took(tmp_path: Path) -> None:
    read_ns, calls = play(slow_scene, tmp_path)
    assert calls == [
        "nvmlDeviceGetClockInfo", "nvmlDeviceGetClockInfo", "nvmlDeviceGetCurrentClocksEventReasons",
        "nvmlDeviceGetFieldValues", "nvmlDeviceGetTemperatureV",
    ]  # fmt: skip
    assert read_ns >= 5 * 20_000_000


def partitioned_scene(driver: FakeDriver) -> list[Any]:
    driver.set(mig=1)
    with NvmlDevice(FIRST) as device:
        outcome = [device.spec.mig, device.read().power_mw]
    with pytest.raises(DeviceError) as caught:
        open_device("MIG-12345678-1234-1234-1234-123456789abc")
    return [*outcome, str(caught.value)]


def test_a_partitioned_gpu_says_so_and_an_instance_has_no_power(tmp_path: Path) -> None:
    mig, power_mw, why = play(partitioned_scene, tmp_path)
    assert mig is True
    assert power_mw == 75_000
    assert "whole GPUs only" in why


def closing_scene(driver: FakeDriver) -> int:
    """Whether opening and closing, and failing to open, give the library back as often as it was taken."""
    import pynvml

    driver.fail("nvmlDeviceGetUUID", 15)
    for _ in range(3):
        with pytest.raises(DeviceLostError):
            NvmlDevice(FIRST)
        with pytest.raises(DeviceError, match="cannot be opened"):
            NvmlDevice("GPU-none")
    driver.fail("nvmlDeviceGetUUID", 0)
    for _ in range(3):
        NvmlDevice(FIRST).close()
    return int(pynvml._nvmlLib_refcount)


def test_nothing_stays_open(tmp_path: Path) -> None:
    assert play(closing_scene, tmp_path) == 0
