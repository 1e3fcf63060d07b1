"""AMD GPUs through amdsmi, the Python package of AMD SMI: written against 7.0, never tried on hardware.

What its functions give, and how it becomes a sample:

    amdsmi_get_power_info      watts: current_socket_power (MI300 and later) -> power_mw,
                               average_socket_power (MI200 and earlier, Navi) -> average_power_mw
    amdsmi_get_energy_count    energy_accumulator * counter_resolution, microjoules -> energy_mj
    amdsmi_get_clock_info      MHz, GFX and MEM
    amdsmi_get_temp_metric     degrees Celsius, HOTSPOT and VRAM. Its documentation says millidegrees; the
                               library divides by 1000 before it answers
    amdsmi_get_power_cap_info  microwatts: power_cap -> enforced_limit_mw

Event reasons are NVIDIA's, and the throttling counters of AMD are not in nanoseconds: neither is reported.
Not available is "N/A", 0xFFFF or 0xFFFFFFFF, depending on the version.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from observatory.devices.base import FIELDS, Gap, PowerDevice, Sample
from observatory.errors import DeviceError, DeviceLostError
from observatory.run.files import one_line
from observatory.run.manifest import DeviceSpec

_NOT_SUPPORTED = frozenset({2, 3})
_NO_PERMISSION = 10
#: Not found, not initialised, driver not loaded.
_GONE = frozenset({31, 32, 34})
_MISSING = frozenset({0xFFFF, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF})
_MAX_DEVICES = 64

_NOT_REPORTED = {
    "event_reasons": Gap(kind="not supported", detail="event reasons are NVIDIA's; AMD has no such bits"),
    "power_cap_ns": Gap(kind="not supported", detail="AMD counts power violations, not nanoseconds"),
    "thermal_ns": Gap(kind="not supported", detail="AMD counts thermal violations, not nanoseconds"),
}


def load_amdsmi() -> Any:
    """The initialised library; match every call with its ``amdsmi_shut_down``.

    Raises:
        DeviceError: the package or its library is not installed, or there is no AMD driver.
    """
    try:
        # Without its library the package prints that to stdout and fails with a KeyError.
        with contextlib.redirect_stdout(io.StringIO()):
            amdsmi = importlib.import_module("amdsmi")
    except ModuleNotFoundError as error:
        raise DeviceError(
            "AMD devices cannot be read: the package amdsmi is not installed",
            remedy="on a machine with AMD GPUs install the one that belongs to its ROCm (`pip install "
            "/opt/rocm/share/amd_smi`)",
        ) from error
    except Exception as error:
        raise DeviceError(
            f"AMD devices cannot be read: amdsmi does not load ({one_line(repr(error), 120)})",
            expected="libamd_smi.so of ROCm",
            remedy="install amd-smi-lib",
        ) from error
    try:
        amdsmi.amdsmi_init(amdsmi.AmdSmiInitFlags.INIT_AMD_GPUS)
    except Exception as error:
        raise DeviceError(
            f"AMD devices cannot be read: amdsmi does not start ({_words(error)})",
            remedy="check that the amdgpu driver is loaded and that this user is in the groups video and "
            "render",
        ) from error
    return amdsmi


def list_amd(amdsmi: Any) -> dict[str, Any]:
    """Handles of the GPUs by UUID, at most 64; one that does not report its UUID is left out.

    Raises:
        DeviceError: amdsmi does not list them.
    """
    try:
        handles = amdsmi.amdsmi_get_processor_handles()
    except amdsmi.AmdSmiException as error:
        raise DeviceError(
            f"AMD devices cannot be listed ({_words(error)})",
            remedy="check whether `amd-smi list` shows them",
        ) from error
    handle_of: dict[str, Any] = {}
    for handle in handles[:_MAX_DEVICES]:
        with contextlib.suppress(amdsmi.AmdSmiException):
            handle_of[f"amd:{one_line(amdsmi.amdsmi_get_gpu_device_uuid(handle), 200)}"] = handle
    return handle_of


class AmdDevice(PowerDevice):
    """One AMD GPU.

    Args:
        uuid: ``amd:`` and the UUID that amdsmi reports.
        clock_ns: monotonic time.

    Raises:
        DeviceError: amdsmi does not work here, or there is no such GPU.
    """

    def __init__(self, uuid: str, *, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock_ns = clock_ns
        self._amdsmi = load_amdsmi()
        try:
            handles = list_amd(self._amdsmi)
            if uuid not in handles:
                raise DeviceError(
                    f"there is no AMD GPU {one_line(uuid, 100)}",
                    expected=f"one of {', '.join(handles) or 'none: amdsmi lists no GPU'}",
                )
            self._handle = handles[uuid]
            self._spec = self._describe(uuid)
            readings, gaps = self._ask()
            self._gaps = {
                name: gaps[name] if name in gaps else _NOT_REPORTED[name]
                for name in FIELDS
                if readings.get(name) is None
            }
        except BaseException:
            self.close()
            raise

    @property
    def spec(self) -> DeviceSpec:
        """The GPU."""
        return self._spec

    @property
    def gaps(self) -> Mapping[str, Gap]:
        """Why amdsmi does not report a quantity."""
        return dict(self._gaps)

    def _read(self) -> Sample:
        """Ask amdsmi, a call per group of quantities."""
        start_ns = self._clock_ns()
        readings, _ = self._ask()
        return Sample(
            time_ns=start_ns,
            read_ns=self._clock_ns() - start_ns,
            device_uuid=self.uuid,
            **{name: value for name, value in readings.items() if name not in self._gaps},
        )

    def _release(self) -> None:
        with contextlib.suppress(self._amdsmi.AmdSmiException):
            self._amdsmi.amdsmi_shut_down()

    def _ask(self) -> tuple[dict[str, int | None], dict[str, Gap]]:
        """Readings, and why there is none."""
        smi, handle = self._amdsmi, self._handle
        clock, sensor, current = (
            smi.AmdSmiClkType,
            smi.AmdSmiTemperatureType,
            smi.AmdSmiTemperatureMetric.CURRENT,
        )
        answers: dict[str, tuple[Any, Gap | None]] = {}
        power, gap = self._call("amdsmi_get_power_info", handle)
        answers["power_mw"] = _entry(power, "current_socket_power", 1000.0), gap
        answers["average_power_mw"] = _entry(power, "average_socket_power", 1000.0), gap
        energy, gap = self._call("amdsmi_get_energy_count", handle)
        resolution_uj = _entry(energy, "counter_resolution", 1.0)
        answers["energy_mj"] = (
            None if resolution_uj is None else _entry(energy, "energy_accumulator", resolution_uj / 1000),
            gap,
        )
        for name, kind in (("sm_clock_mhz", clock.GFX), ("memory_clock_mhz", clock.MEM)):
            info, gap = self._call("amdsmi_get_clock_info", handle, kind)
            answers[name] = _entry(info, "clk", 1.0), gap
        for name, place in (("temperature_c", sensor.HOTSPOT), ("memory_temperature_c", sensor.VRAM)):
            value, gap = self._call("amdsmi_get_temp_metric", handle, place, current)
            answers[name] = _entry({"value": value}, "value", 1.0), gap
        cap, gap = self._call("amdsmi_get_power_cap_info", handle)
        answers["enforced_limit_mw"] = _entry(cap, "power_cap", 1 / 1000), gap
        readings = {name: None if value is None else round(value) for name, (value, _) in answers.items()}
        absent = Gap(kind="not supported", detail="this GPU does not report it: amdsmi answers N/A")
        return readings, {name: gap or absent for name, (value, gap) in answers.items() if value is None}

    def _call(self, function: str, *arguments: Any) -> tuple[Any, Gap | None]:
        try:
            return getattr(self._amdsmi, function)(*arguments), None
        except AttributeError:
            return None, Gap(kind="not supported", detail=f"this amdsmi has no {function}")
        except TypeError as error:
            words = one_line(error, 120)
            return None, Gap(kind="not supported", detail=f"{function} of this amdsmi is another ({words})")
        except self._amdsmi.AmdSmiException as error:
            code = getattr(error, "err_code", None)
            if code in _GONE:
                raise DeviceLostError(
                    f"AMD GPU {self.uuid} does not answer any more ({_words(error)})",
                    remedy="check the kernel log: it takes a reset of the GPU or a reboot to get it back",
                ) from error
            detail = f"{function} failed ({_words(error)})"
            if code == _NO_PERMISSION:
                remedy = "be in the groups video and render (docs/power.md#permissions)"
                return None, Gap(kind="not permitted", detail=detail, remedy=remedy)
            return None, Gap(kind="not supported" if code in _NOT_SUPPORTED else "failed", detail=detail)

    def _describe(self, uuid: str) -> DeviceSpec:
        self._spec = DeviceSpec(kind="amd", uuid=uuid)  # for messages, should the GPU be lost meanwhile
        asic, _ = self._call("amdsmi_get_gpu_asic_info", self._handle)
        driver, _ = self._call("amdsmi_get_gpu_driver_info", self._handle)
        bus_id, _ = self._call("amdsmi_get_gpu_device_bdf", self._handle)
        cap, _ = self._call("amdsmi_get_power_cap_info", self._handle)
        clock, _ = self._call("amdsmi_get_clock_info", self._handle, self._amdsmi.AmdSmiClkType.GFX)
        limit_mw, max_mhz = _entry(cap, "power_cap", 1 / 1000), _entry(clock, "max_clk", 1.0)
        return DeviceSpec(
            kind="amd",
            uuid=uuid,
            name=_text(asic, "market_name"),
            driver=_text(driver, "driver_version"),
            enforced_limit_mw=None if limit_mw is None else round(limit_mw),
            max_sm_clock_mhz=None if max_mhz is None else round(max_mhz),
            bus_id=one_line(bus_id, 40) if isinstance(bus_id, str) else None,
        )


def _entry(answer: Any, key: str, factor: float) -> float | None:
    """A number of an answer times a factor; None when it is not there, "N/A", or stands for that."""
    value = answer.get(key) if isinstance(answer, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return None if value in _MISSING or value < 0 else value * factor


def _text(answer: Any, key: str) -> str | None:
    value = one_line((answer or {}).get(key) or "", 255)
    return None if value in ("", "N/A") else value


def _words(error: Exception) -> str:
    describe = getattr(error, "get_error_info", None)
    return one_line(describe() if callable(describe) else error, 120)
