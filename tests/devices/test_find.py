"""Which device a name means, and which GPUs a process may use."""

from __future__ import annotations

import random
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from observatory.devices import find
from observatory.devices.find import all_selectors, local_devices, open_device, open_devices
from observatory.devices.visible import PciGpu, parse_bus_id, visible_gpus
from observatory.devices.words import GpuCode, gpu_words
from observatory.errors import DeviceError
from observatory.reasons import Reason
from tests.devices import amd_stand_in
from tests.devices.driver import FakeDriver
from tests.devices.recordings import UUID as RECORDED
from tests.devices.recordings import write_recording
from tests.devices.scenes import needs_driver, play
from tests.devices.test_rapl import Zones

#: The driver's own order is neither that of the bus nor that of the names.
NAMES = ("GPU-cc000000-1", "GPU-aa000000-2", "GPU-aabb0000-3", "GPU-dd000000-4")
BUSES = ("00000000:A1:00.0", "00000000:21:00.0", "00000000:61:00.0", "00000001:01:00.0")
GPUS = [PciGpu(uuid=uuid, bus_id=bus_id) for uuid, bus_id in zip(NAMES, BUSES, strict=True)]
ON_THE_BUS = ("GPU-aa000000-2", "GPU-aabb0000-3", "GPU-cc000000-1", "GPU-dd000000-4")
BY_BUS = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def visible(wanted: str | None, **others: str) -> tuple[tuple[str, ...], Reason | None]:
    environment = dict(others) if wanted is None else {"CUDA_VISIBLE_DEVICES": wanted, **others}
    shuffled = random.Random(wanted).sample(GPUS, len(GPUS))
    gpus = visible_gpus(environment, shuffled)
    return gpus.uuids, gpus.reason


def test_without_the_variable_all_gpus_are_visible_in_the_order_of_the_bus() -> None:
    assert visible(None) == (ON_THE_BUS, None)


@pytest.mark.parametrize(
    ("wanted", "uuids"),
    [
        ("GPU-cc000000-1", ("GPU-cc000000-1",)),
        ("GPU-dd,GPU-cc", ("GPU-cc000000-1", "GPU-dd000000-4")),
        ("gpu-AABB", ("GPU-aabb0000-3",)),
        (" GPU-aa000000-2 , GPU-cc", ("GPU-aa000000-2", "GPU-cc000000-1")),
        ("3,0,1,2", ON_THE_BUS),  # all of them, whatever their order
    ],
)
def test_names_and_beginnings_of_names_are_understood(wanted: str, uuids: tuple[str, ...]) -> None:
    assert visible(wanted) == (uuids, None)


@pytest.mark.parametrize(("wanted", "places"), [("0", (0,)), ("3,1", (1, 3)), ("2", (2,))])
def test_ordinals_count_along_the_bus_where_cuda_does(wanted: str, places: tuple[int, ...]) -> None:
    assert visible(wanted, **BY_BUS) == (tuple(ON_THE_BUS[place] for place in places), None)


@pytest.mark.parametrize("order", [{}, {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}])
@pytest.mark.parametrize("wanted", ["0", "1,2", "GPU-cc,0"])
def test_ordinals_in_an_order_that_only_cuda_knows_are_refused(wanted: str, order: dict[str, str]) -> None:
    uuids, reason = visible(wanted, **order)
    assert uuids == ()
    assert reason is not None
    assert reason.code is GpuCode.CUDA_ORDER


@pytest.mark.parametrize(
    ("wanted", "uuids", "why"),
    [
        ("", (), GpuCode.HIDDEN),
        ("-1", (), GpuCode.NO_SUCH_GPU),
        ("NoDevFiles", (), GpuCode.NO_SUCH_GPU),
        ("0,2,-1,1", (0, 2), GpuCode.NO_SUCH_GPU),
        ("0,7,1", (0,), GpuCode.NO_SUCH_ORDINAL),
        ("9", (), GpuCode.NO_SUCH_ORDINAL),
        ("0,0", (), GpuCode.NAMED_TWICE),
        ("GPU-cc,GPU-cc000000-1", (), GpuCode.NAMED_TWICE),
        ("GPU-a", (), GpuCode.AMBIGUOUS),
        ("GPU-cc,GPU-ee,GPU-dd", (2,), GpuCode.NO_SUCH_GPU),
        ("GPU-", (), GpuCode.NO_SUCH_GPU),
        ("MIG-GPU-cc000000-1/1/0", (), GpuCode.INSTANCES_NAMED),
        ("GPU-cc,\x1b[31m", (2,), GpuCode.NO_SUCH_GPU),
    ],
)
def test_what_cuda_would_not_take_is_not_taken(wanted: str, uuids: tuple[int, ...], why: GpuCode) -> None:
    named, reason = visible(wanted, **BY_BUS)
    assert named == tuple(ON_THE_BUS[place] for place in uuids)
    assert reason is not None
    assert reason.code is why
    assert gpu_words(reason).isprintable()


def test_a_partitioned_gpu_is_left_out_and_makes_ordinals_useless() -> None:
    gpus = [PciGpu(uuid="GPU-a", bus_id="0:1:0.0", mig=True), PciGpu(uuid="GPU-b", bus_id="0:2:0.0")]
    whole = visible_gpus({}, gpus)
    assert whole.uuids == ("GPU-b",)
    assert whole.reason == Reason(GpuCode.PARTITIONED, {"gpu": "GPU-a"})
    counted = visible_gpus({"CUDA_VISIBLE_DEVICES": "0,1", **BY_BUS}, gpus)
    assert counted.uuids == ()
    assert counted.reason is not None
    assert counted.reason.code is GpuCode.INSTANCES_COUNTED


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("00000000:10:00.0", (0, 16, 0, 0)),
        ("0000:c1:00.0", (0, 0xC1, 0, 0)),
        ("C1:1f.7", (0, 0xC1, 0x1F, 7)),
        ("10:00", None),
        ("GPU-1", None),
        ("10:00.8", None),
    ],
)
def test_bus_ids_are_told_from_other_names(text: str, place: tuple[int, ...] | None) -> None:
    assert parse_bus_id(text) == place


@pytest.mark.parametrize(
    ("selector", "why"),
    [
        ("0", "ordinal"),
        ("cuda:0", "names no device"),
        ("", "names no device"),
        ("\x1b[2J", "names no device"),
        ("rapl:package-0", "no RAPL domain"),
        ("rapl:package-0@elsewhere", "another machine"),
        ("replay:/nowhere/at/all", "neither a run directory nor a file"),
        ("amd:1", "AMD devices cannot be read"),
        ("GPU-1", "is no GPU of this machine"),
        ("00000000:10:00.0", "no GPU at PCI"),
        ("MIG-1", "whole GPUs only"),
    ],
)
def test_a_name_of_nothing_is_one_clear_sentence(
    selector: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(find, "POWERCAP", tmp_path)
    with pytest.raises(DeviceError, match=why) as caught:
        open_device(selector)
    assert str(caught.value).isprintable()


def test_none_is_a_device_that_says_why() -> None:
    with open_device("none") as device:
        assert device.read().power_mw is None
        assert "no device was asked for" in device.unavailable["power_mw"]


def test_a_recording_is_opened_by_its_file_and_by_a_device_in_it(tmp_path: Path) -> None:
    recording = write_recording(tmp_path / "a#b.parquet")
    with open_device(f"replay:{recording}") as device:
        assert device.uuid == RECORDED
    with open_device(f"replay:{recording}#{RECORDED}") as device:
        assert device.uuid == RECORDED
    with pytest.raises(DeviceError, match="holds no device GPU-2"):
        open_device(f"replay:{recording}#GPU-2")


def test_processors_and_amd_gpus_are_found_and_their_own_names_open_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zones = Zones(tmp_path / "powercap")
    zones.add("intel-rapl:0", "package-0", energy_uj=5)
    (zones.add("intel-rapl:1", "package-1") / "energy_uj").write_text("none")
    for file in ("energy_uj", "constraint_0_power_limit_uw"):
        (zones.root / "intel-rapl:1" / file).unlink()
    monkeypatch.setattr(find, "POWERCAP", zones.root)
    monkeypatch.setitem(sys.modules, "amdsmi", amd_stand_in.stand_in())
    amd = f"amd:{amd_stand_in.UUID}"
    assert all_selectors() == [amd, "rapl:package-0", "rapl:package-1"]
    devices = open_devices()
    assert [device.uuid for device in devices] == [amd, f"rapl:package-0@{socket.gethostname()}"]
    for device in devices:
        with open_device(device.uuid) as again:
            assert again.uuid == device.uuid
        device.close()
    with open_device("c1:00.0") as device:
        assert device.uuid == amd
    assert local_devices({}).selectors == (amd,)
    hidden = local_devices({"ROCR_VISIBLE_DEVICES": "0"})
    assert hidden.selectors == ()
    assert hidden.reason == Reason(GpuCode.AMD_ORDER, {"variable": "ROCR_VISIBLE_DEVICES=0", "gpus": amd})


def test_without_any_gpu_the_reasons_of_both_drivers_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "amdsmi", None)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    local = local_devices({})
    assert local.selectors == ()
    assert local.reason is not None
    assert "nvidia-ml-py is not installed" in gpu_words(local.reason)
    assert "amdsmi is not installed" in gpu_words(local.reason)


def order_scene(driver: FakeDriver) -> dict[str, Any]:
    """Four GPUs listed by the driver in two orders."""
    outcome: dict[str, Any] = {"listed": [], "opened": []}
    uuids = [f"GPU-{digit * 8}-0000-4000-8000-000000000000" for digit in "abcd"]
    for order in ((0, 1, 2, 3), (2, 0, 3, 1)):
        driver.devices(4)
        for index, number in enumerate(order):
            driver.name(uuids[number], f"00000000:{0x81 - number:02X}:00.0", f"GPU {number}", index)
        devices = open_devices()
        outcome["listed"].append([device.uuid for device in devices])
        for device in devices:
            device.close()
        opened = []
        for selector in ("GPU-cccc", "00000000:81:00.0", "81:00.0", uuids[3].upper().replace("GPU", "gpu")):
            with open_device(selector) as device:
                opened.append(device.spec.name)
        outcome["opened"].append(opened)
    outcome["local"] = local_devices({"CUDA_VISIBLE_DEVICES": "0,1", **BY_BUS}).selectors
    for selector in ("GPU-e", "GPU-0", "82:00.0", "1"):
        with pytest.raises(DeviceError) as caught:
            open_device(selector)
        outcome[selector] = str(caught.value)
    driver.name(uuids[1].replace("bbbb", "aaaa", 1), "00000000:80:00.0", "twin", 3)
    with pytest.raises(DeviceError, match="fits 2 GPUs"):
        open_device("GPU-aaaa")
    return outcome


@needs_driver
def test_devices_are_found_by_name_and_place_whatever_the_drivers_order(tmp_path: Path) -> None:
    outcome = play(order_scene, tmp_path)
    first, second = outcome["listed"]
    assert first == second
    assert [uuid[4] for uuid in first] == ["d", "c", "b", "a"], "the order of the bus"
    assert outcome["opened"] == [["GPU 2", "GPU 0", "GPU 0", "GPU 3"]] * 2
    assert [uuid[4] for uuid in outcome["local"]] == ["d", "c"]
    assert "GPU-aaaaaaaa" in outcome["GPU-0"]
    assert "00000000:81:00.0" in outcome["82:00.0"]
    assert "ordinal" in outcome["1"]
