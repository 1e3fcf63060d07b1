"""What every power device must do: checks that take a bench, and run wherever the device lives."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pytest

from observatory.devices.base import FIELDS, PowerDevice, Sample
from observatory.errors import DeviceError, DeviceLostError
from observatory.run.checks import checked_rows
from observatory.run.manifest import DeviceSpec
from observatory.run.tables import POWER_SCHEMA

#: Least and most that a reading can be; a reading in other units falls out.
_POSSIBLE = {
    "power_mw": (1_000, 5_000_000),
    "average_power_mw": (1_000, 5_000_000),
    "energy_mj": (0, 1 << 53),
    "sm_clock_mhz": (50, 10_000),
    "memory_clock_mhz": (50, 20_000),
    "temperature_c": (-40, 150),
    "memory_temperature_c": (-40, 150),
    "event_reasons": (0, 0xFFFF),
    "enforced_limit_mw": (10_000, 10_000_000),
    "power_cap_ns": (0, 1 << 62),
    "thermal_ns": (0, 1 << 62),
}


@dataclass(kw_only=True)
class Bench:
    """A device on the bench.

    Attributes:
        open: makes the device, healthy.
        lose: makes it stop answering; None for one that cannot.
        step: lets the device have something new to tell.
        live: its times are this machine's monotonic clock.
        opened: devices to close in the end.
    """

    open: Callable[[], PowerDevice]
    lose: Callable[[], None] | None = None
    step: Callable[[], None] = field(default=lambda: None)
    live: bool = True
    opened: list[PowerDevice] = field(default_factory=list)

    @contextlib.contextmanager
    def device(self) -> Iterator[PowerDevice]:
        with self.open() as device:
            yield device

    def samples(self, device: PowerDevice, count: int) -> list[Sample]:
        found = []
        for _ in range(count):
            found.append(device.read())
            self.step()
        return found


Check = Callable[[Bench], None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


@check
def it_is_named_and_its_name_survives_a_manifest(bench: Bench) -> None:
    with bench.device() as device:
        spec = device.spec
        assert spec.uuid
        assert device.uuid == spec.uuid
        assert spec.kind
        assert DeviceSpec.model_validate_json(spec.model_dump_json()) == spec


@check
def every_reason_is_one_sentence_about_a_known_quantity(bench: Bench) -> None:
    with bench.device() as device:
        assert set(device.unavailable) <= set(FIELDS)
        for why in device.unavailable.values():
            assert why == " ".join(why.split())
            assert 10 < len(why) < 500
        assert set(device.gaps) == set(device.unavailable)
        for name, gap in device.gaps.items():
            assert gap.kind in ("not supported", "not permitted", "failed")
            assert gap.detail in device.unavailable[name]
            assert gap.remedy is None or gap.remedy in device.unavailable[name]


@check
def a_quantity_is_told_or_its_absence_explained(bench: Bench) -> None:
    with bench.device() as device:
        sample = device.read()
        for name in FIELDS:
            outcome = getattr(sample, name) is not None
            assert outcome != (name in device.unavailable), name


@check
def readings_are_whole_numbers_in_the_units_of_their_names(bench: Bench) -> None:
    with bench.device() as device:
        for sample in bench.samples(device, 3):
            for name in FIELDS:
                value = getattr(sample, name)
                assert value is None or type(value) is int, name
                least, most = _POSSIBLE[name]
                assert value is None or least <= value <= most, f"{name}={value}"


@check
def a_sample_has_its_device_and_the_time_just_before_it_was_asked(bench: Bench) -> None:
    with bench.device() as device:
        for _ in range(3):
            before_ns = time.monotonic_ns()
            sample = device.read()
            after_ns = time.monotonic_ns()
            assert sample.device_uuid == device.uuid
            assert sample.read_ns >= 0
            if bench.live:
                assert before_ns <= sample.time_ns
                assert sample.time_ns + sample.read_ns <= after_ns
            bench.step()


@check
def time_and_energy_never_run_backwards(bench: Bench) -> None:
    with bench.device() as device:
        samples = bench.samples(device, 5)
    times_ns = [sample.time_ns for sample in samples]
    assert times_ns == sorted(times_ns)
    counter_mj = [sample.energy_mj for sample in samples if sample.energy_mj is not None]
    assert counter_mj == sorted(counter_mj)


@check
def samples_fit_the_power_table(bench: Bench) -> None:
    with bench.device() as device:
        samples = bench.samples(device, 2)
    columns = {
        name: [getattr(sample, name, None) for sample in samples]
        for name in POWER_SCHEMA.names
        if name != "late_ns"
    }
    rows = checked_rows("power", pa.table(columns), rank=0)
    assert rows.num_rows == 2


@check
def what_it_tells_does_not_change_with_reading(bench: Bench) -> None:
    with bench.device() as device:
        spec, reasons = device.spec, dict(device.unavailable)
        bench.samples(device, 3)
        assert device.spec == spec
        assert dict(device.unavailable) == reasons


@check
def closing_twice_does_nothing_and_a_closed_device_is_not_read(bench: Bench) -> None:
    device = bench.open()
    device.read()
    device.close()
    device.close()
    with pytest.raises(DeviceError) as caught:
        device.read()
    assert not isinstance(caught.value, DeviceLostError)
    assert "closed" in str(caught.value)


@check
def closing_one_leaves_another_one_open(bench: Bench) -> None:
    with bench.device() as first:
        bench.open().close()
        first.read()


@check
def a_lost_device_says_so_and_stays_lost(bench: Bench) -> None:
    if bench.lose is None:
        return
    with bench.device() as device:
        device.read()
        bench.lose()
        for _ in range(2):
            with pytest.raises(DeviceLostError) as caught:
                device.read()
            assert len(str(caught.value).split()) > 5
        assert device.spec.uuid  # what it was is still known
