"""One contract, every implementation of a power device; and devices that break it, each caught."""

from __future__ import annotations

import dataclasses
import functools
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from observatory.devices.amd import AmdDevice
from observatory.devices.base import FIELDS, Gap, NullDevice, PowerDevice, Sample
from observatory.devices.nvml import NvmlDevice
from observatory.devices.rapl import RaplDevice
from observatory.devices.replay import ReplayDevice
from observatory.errors import DeviceError, DeviceLostError
from observatory.run.manifest import DeviceSpec
from tests.devices import amd_stand_in
from tests.devices.contract import CHECKS, Bench
from tests.devices.driver import FakeDriver
from tests.devices.recordings import write_recording
from tests.devices.scenes import needs_driver, play
from tests.devices.test_rapl import Zones

UUID = "GPU-fa4e0000-0000-4000-8000-000000000000"


def nvml_scene(driver: FakeDriver) -> dict[str, str]:
    """All checks on a busy GPU, and what went wrong in each."""
    outcome: dict[str, str] = {}
    for name, check in CHECKS.items():
        driver.set(busy=1, lost=0)
        bench = Bench(
            open=lambda: NvmlDevice(UUID), lose=lambda: driver.set(lost=1), step=lambda: time.sleep(0.005)
        )
        try:
            check(bench)
        except BaseException:
            outcome[name] = traceback.format_exc()
    return outcome


@functools.cache
def nvml_result() -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, str] = play(nvml_scene, Path(folder))
    return result


@needs_driver
@pytest.mark.parametrize("name", sorted(CHECKS))
def test_the_nvml_device_keeps_the_contract(name: str) -> None:
    assert nvml_result().get(name) is None, nvml_result()[name]


@pytest.fixture
def amd(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = amd_stand_in.stand_in()
    monkeypatch.setitem(sys.modules, "amdsmi", module)
    return module


def rapl_bench(folder: Path, _: Any) -> Bench:
    zones = Zones(folder / "powercap")
    package = zones.add("intel-rapl:0", "package-0", energy_uj=5_000_000)

    def step() -> None:
        zones.spend(package, 1_500_000)

    return Bench(
        open=lambda: RaplDevice("package-0", root=zones.root),
        lose=(package / "energy_uj").unlink,
        step=step,
    )


def amd_bench(_: Path, amd: Any) -> Bench:
    def lose() -> None:
        for name in ("amdsmi_get_power_info", "amdsmi_get_energy_count"):
            getattr(amd, name).side_effect = amd.AmdSmiLibraryException(31)

    return Bench(open=lambda: AmdDevice(f"amd:{amd_stand_in.UUID}"), lose=lose)


def replay_bench(folder: Path, _: Any) -> Bench:
    """Played to this machine's clock, which the bench can set forward past the end."""
    recording = write_recording(folder / "recording.parquet", samples=200_000, period_ns=1_000_000)
    ahead_ns = 0

    def lose() -> None:
        nonlocal ahead_ns
        ahead_ns = 3_600_000_000_000

    return Bench(
        open=lambda: ReplayDevice(recording, clock_ns=lambda: time.monotonic_ns() + ahead_ns),
        lose=lose,
        step=lambda: time.sleep(0.002),
    )


def recorded_replay_bench(folder: Path, _: Any) -> Bench:
    recording = write_recording(folder / "recording.parquet", samples=6)
    opened: list[ReplayDevice] = []

    def play_it() -> ReplayDevice:
        opened.append(ReplayDevice(recording, pace="recorded"))
        return opened[-1]

    def lose() -> None:
        for _ in range(5):
            opened[-1].read()

    return Bench(open=play_it, lose=lose, live=False)


def null_bench(_: Path, __: Any) -> Bench:
    return Bench(open=lambda: NullDevice("there is no device to be read here"))


BENCHES: dict[str, Callable[[Path, Any], Bench]] = {
    "rapl": rapl_bench,
    "amd": amd_bench,
    "replay": replay_bench,
    "recorded replay": recorded_replay_bench,
    "null": null_bench,
}


@pytest.mark.parametrize("name", sorted(CHECKS))
@pytest.mark.parametrize("kind", BENCHES)
def test_every_other_device_keeps_the_contract(kind: str, name: str, tmp_path: Path, amd: Any) -> None:
    CHECKS[name](BENCHES[kind](tmp_path, amd))


def test_every_implementation_is_on_a_bench() -> None:
    tried = {NvmlDevice, RaplDevice, AmdDevice, ReplayDevice, NullDevice}
    kinds = PowerDevice.__subclasses__()
    assert {kind for kind in kinds if kind.__module__.startswith("observatory.")} == tried


class Honest(PowerDevice):
    """Keeps the contract; its subclasses each break one clause."""

    lost = False

    def __init__(self) -> None:
        self.reads = 0

    @property
    def spec(self) -> DeviceSpec:
        return DeviceSpec(kind="test", uuid="GPU-1")

    @property
    def gaps(self) -> Mapping[str, Gap]:
        gap = Gap(kind="not supported", detail="this device has no such sensor")
        return {name: gap for name in FIELDS if name not in ("power_mw", "energy_mj")}

    def _read(self) -> Sample:
        if type(self).lost:
            raise DeviceLostError("GPU-1 does not answer any more", remedy="reset it")
        self.reads += 1
        return Sample(
            time_ns=time.monotonic_ns(), read_ns=0, device_uuid="GPU-1",
            power_mw=250_000, energy_mj=1000 * self.reads,
        )  # fmt: skip


class TellsWatts(Honest):
    def read(self) -> Sample:
        return dataclasses.replace(super().read(), power_mw=250)


class TellsZeroForMissing(Honest):
    def read(self) -> Sample:
        return dataclasses.replace(super().read(), sm_clock_mhz=0)


class KeepsQuiet(Honest):
    @property
    def gaps(self) -> Mapping[str, Gap]:
        return {}


class HasNoName(Honest):
    @property
    def spec(self) -> DeviceSpec:
        return DeviceSpec(kind="test")


class GivesABareCode(Honest):
    @property
    def gaps(self) -> Mapping[str, Gap]:
        return dict.fromkeys(super().gaps, Gap(kind="failed", detail="3"))


class TellsFractions(Honest):
    def read(self) -> Sample:
        return dataclasses.replace(super().read(), power_mw=250_000.5)  # type: ignore[arg-type]


class StampsAfterwards(Honest):
    def read(self) -> Sample:
        return dataclasses.replace(super().read(), time_ns=time.monotonic_ns() + 1_000_000_000)


class NamesAnother(Honest):
    def read(self) -> Sample:
        return dataclasses.replace(super().read(), device_uuid="GPU-2")


class WrapsItsCounter(Honest):
    def read(self) -> Sample:
        sample = super().read()
        return dataclasses.replace(sample, energy_mj=2000 - 1000 * (self.reads % 2))


class LearnsWhileReading(Honest):
    @property
    def gaps(self) -> Mapping[str, Gap]:
        found = dict(super().gaps)
        if self.reads:
            found.pop("temperature_c")
        return found


class ReadsWhenClosed(Honest):
    def close(self) -> None:
        pass


class GuessesWhenLost(Honest):
    def read(self) -> Sample:
        return Sample(
            time_ns=time.monotonic_ns(), read_ns=0, device_uuid="GPU-1", power_mw=250_000, energy_mj=1
        )


class OverflowsTheTable(Honest):
    def read(self) -> Sample:
        return dataclasses.replace(super().read(), energy_mj=1 << 63)


class SharesItsLibrary(Honest):
    """Closing one closes all."""

    users = 0

    def read(self) -> Sample:
        if type(self).users < 1:
            raise DeviceError("the library was closed; open it again")
        return super().read()

    def __init__(self) -> None:
        super().__init__()
        type(self).users = 1

    def close(self) -> None:
        super().close()
        type(self).users = 0


BROKEN: dict[type[Honest], str] = {
    TellsWatts: "readings_are_whole_numbers_in_the_units_of_their_names",
    TellsFractions: "readings_are_whole_numbers_in_the_units_of_their_names",
    TellsZeroForMissing: "a_quantity_is_told_or_its_absence_explained",
    KeepsQuiet: "a_quantity_is_told_or_its_absence_explained",
    HasNoName: "it_is_named_and_its_name_survives_a_manifest",
    GivesABareCode: "every_reason_is_one_sentence_about_a_known_quantity",
    StampsAfterwards: "a_sample_has_its_device_and_the_time_just_before_it_was_asked",
    NamesAnother: "a_sample_has_its_device_and_the_time_just_before_it_was_asked",
    WrapsItsCounter: "time_and_energy_never_run_backwards",
    LearnsWhileReading: "what_it_tells_does_not_change_with_reading",
    ReadsWhenClosed: "closing_twice_does_nothing_and_a_closed_device_is_not_read",
    GuessesWhenLost: "a_lost_device_says_so_and_stays_lost",
    OverflowsTheTable: "samples_fit_the_power_table",
    SharesItsLibrary: "closing_one_leaves_another_one_open",
}


@pytest.fixture
def found_again() -> Iterator[None]:
    Honest.lost = False
    yield
    Honest.lost = False


def bench_of(kind: type[Honest]) -> Bench:
    return Bench(open=kind, lose=lambda: setattr(Honest, "lost", True))


@pytest.mark.usefixtures("found_again")
@pytest.mark.parametrize("name", sorted(CHECKS))
def test_an_honest_device_passes(name: str) -> None:
    CHECKS[name](bench_of(Honest))


@pytest.mark.usefixtures("found_again")
@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_device_that_breaks_the_contract_is_caught(kind: type[Honest]) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception, OverflowError, DeviceError)):
        CHECKS[BROKEN[kind]](bench_of(kind))


def test_every_check_catches_something() -> None:
    assert set(BROKEN.values()) == set(CHECKS)
