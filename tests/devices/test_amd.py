"""AMD GPUs, on an autospecced stand-in for amdsmi: no hardware has been tried."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from observatory.devices.amd import AmdDevice, load_amdsmi
from observatory.errors import DeviceError, DeviceLostError
from tests.devices import amd_stand_in
from tests.paths import ROOT

UUID = f"amd:{amd_stand_in.UUID}"


@pytest.fixture
def smi(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = amd_stand_in.stand_in()
    monkeypatch.setitem(sys.modules, "amdsmi", module)
    return module


def test_every_unit_of_amdsmi_becomes_ours(smi: Any) -> None:
    with AmdDevice(UUID) as device:
        sample = device.read()
        assert sample.power_mw == 412_000
        assert sample.energy_mj == 15_259  # 1,000,000 * 15.259 uJ
        assert (sample.sm_clock_mhz, sample.memory_clock_mhz) == (2100, 1300)
        assert (sample.temperature_c, sample.memory_temperature_c) == (61, 48)
        assert sample.enforced_limit_mw == 750_000
        assert device.spec.name == "AMD Instinct MI300X"
        assert device.spec.enforced_limit_mw == 750_000
        assert "answers N/A" in device.unavailable["average_power_mw"]
        assert "NVIDIA's" in device.unavailable["event_reasons"]
    smi.amdsmi_shut_down.assert_called_once_with()


@pytest.mark.parametrize("missing", ["N/A", 0xFFFF, 0xFFFFFFFF, None, float("nan"), True])
def test_not_available_in_every_form_is_no_reading(smi: Any, missing: object) -> None:
    smi.amdsmi_get_power_info.side_effect = lambda _: {"current_socket_power": missing}
    with AmdDevice(UUID) as device:
        assert device.read().power_mw is None
        assert "N/A" in device.unavailable["power_mw"]


def test_older_gpus_tell_a_mean_and_no_power_now(smi: Any) -> None:
    smi.amdsmi_get_power_info.side_effect = lambda _: {
        "current_socket_power": "N/A",
        "average_socket_power": 290,
    }
    with AmdDevice(UUID) as device:
        assert (device.read().power_mw, device.read().average_power_mw) == (None, 290_000)


@pytest.mark.parametrize(("code", "kind"), [(2, "not supported"), (10, "not permitted")])
def test_each_call_fails_for_itself_and_with_its_reason(smi: Any, code: int, kind: str) -> None:
    smi.amdsmi_get_energy_count.side_effect = smi.AmdSmiLibraryException(code)
    with AmdDevice(UUID) as device:
        sample = device.read()
        assert sample.energy_mj is None
        assert sample.power_mw == 412_000
        gap = device.gaps["energy_mj"]
        assert gap.kind == kind
        assert f"AMDSMI_STATUS {code}" in gap.detail


def test_a_function_with_other_arguments_is_a_reason(smi: Any) -> None:
    def later(_: Any, sensor: int) -> dict[str, int]:
        return {"power_cap": sensor}

    smi.amdsmi_get_power_cap_info = later
    del smi.amdsmi_get_temp_metric
    with AmdDevice(UUID) as device:
        assert device.read().power_mw == 412_000
        assert "of this amdsmi is another" in device.unavailable["enforced_limit_mw"]
        assert "has no amdsmi_get_temp_metric" in device.unavailable["temperature_c"]


def test_a_lost_gpu_is_lost(smi: Any) -> None:
    with AmdDevice(UUID) as device:
        smi.amdsmi_get_clock_info.side_effect = smi.AmdSmiLibraryException(34)
        with pytest.raises(DeviceLostError, match="does not answer any more"):
            device.read()


def test_another_gpus_name_is_refused_and_gives_the_library_back(smi: Any) -> None:
    with pytest.raises(DeviceError, match=f"no AMD GPU amd:other; expected one of {UUID}"):
        AmdDevice("amd:other")
    smi.amdsmi_shut_down.assert_called_once_with()


def test_a_driver_that_does_not_start_says_whom_to_ask(smi: Any) -> None:
    smi.amdsmi_init.side_effect = smi.AmdSmiLibraryException(34)
    with pytest.raises(DeviceError, match="groups video and render"):
        load_amdsmi()


def test_a_package_without_its_library_keeps_stdout_clean(tmp_path: Path) -> None:
    package = tmp_path / "amdsmi"
    package.mkdir()
    (package / "__init__.py").write_text("print('Unable to find libamd_smi.so')\n{}['libamd_smi.so']\n")
    code = "from observatory.devices.find import local_devices; print(local_devices({}).reason)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=400,
    )  # fmt: skip
    assert "Unable to find" not in done.stdout
    assert "amdsmi does not load (KeyError('libamd_smi.so'))" in done.stdout
