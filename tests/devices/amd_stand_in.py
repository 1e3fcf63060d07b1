"""A stand-in for the package amdsmi 7.0: its names, signatures, units and ways to fail, with one GPU.

The package itself cannot be imported without ROCm's library. ``stand_in()`` gives an autospecced module: a
call with other arguments than the real function takes fails.
"""

# ruff: noqa: ARG001, ARG002 (signatures are those of amdsmi)

from __future__ import annotations

import enum
import types
from typing import Any
from unittest import mock

UUID = "4cff74a1-0000-1000-8000-000000000001"
_NAMES = {
    2: "Feature not supported",
    10: "Permission Denied",
    31: "Device Not found",
    34: "Driver not loaded",
}


class AmdSmiException(Exception):  # noqa: N818 (its name there)
    pass


class AmdSmiLibraryException(AmdSmiException):
    def __init__(self, err_code: int) -> None:
        super().__init__(err_code)
        self.err_code = err_code

    def get_error_info(self, detailed: bool = True) -> str:
        return f"AMDSMI_STATUS {self.err_code} - {_NAMES[self.err_code]}"


class AmdSmiInitFlags(enum.IntEnum):
    INIT_AMD_GPUS = 2


class AmdSmiClkType(enum.IntEnum):
    GFX = 0
    MEM = 4


class AmdSmiTemperatureType(enum.IntEnum):
    EDGE = 0
    HOTSPOT = 1
    VRAM = 2


class AmdSmiTemperatureMetric(enum.IntEnum):
    CURRENT = 0


def amdsmi_init(flag: AmdSmiInitFlags = AmdSmiInitFlags.INIT_AMD_GPUS) -> None:
    pass


def amdsmi_shut_down() -> None:
    pass


def amdsmi_get_processor_handles() -> list[Any]:
    return ["gpu"]


def amdsmi_get_gpu_device_uuid(processor_handle: Any) -> str:
    return UUID


def amdsmi_get_gpu_device_bdf(processor_handle: Any) -> str:
    return "0000:c1:00.0"


def amdsmi_get_gpu_asic_info(processor_handle: Any) -> dict[str, Any]:
    return {"market_name": "AMD Instinct MI300X", "asic_serial": "0x00"}


def amdsmi_get_gpu_driver_info(processor_handle: Any) -> dict[str, Any]:
    return {"driver_name": "amdgpu", "driver_version": "6.12.12"}


def amdsmi_get_power_info(processor_handle: Any) -> dict[str, Any]:
    return {
        "socket_power": 412,
        "current_socket_power": 412,
        "average_socket_power": 0xFFFFFFFF,
        "power_limit": 750_000_000,
    }


def amdsmi_get_energy_count(processor_handle: Any) -> dict[str, Any]:
    return {"energy_accumulator": 1_000_000, "counter_resolution": 15.259, "timestamp": 1}


def amdsmi_get_clock_info(processor_handle: Any, clock_type: AmdSmiClkType) -> dict[str, Any]:
    return {"clk": 1300 if clock_type is AmdSmiClkType.MEM else 2100, "min_clk": 500, "max_clk": 2100}


def amdsmi_get_temp_metric(
    processor_handle: Any, sensor_type: AmdSmiTemperatureType, metric: AmdSmiTemperatureMetric
) -> int:
    return 61 if sensor_type is AmdSmiTemperatureType.HOTSPOT else 48


def amdsmi_get_power_cap_info(processor_handle: Any) -> dict[str, Any]:
    return {"power_cap": 750_000_000, "min_power_cap": 0, "max_power_cap": 750_000_000}


def stand_in() -> Any:
    """A module whose functions are autospecced mocks that answer like those above."""
    module: Any = types.ModuleType("amdsmi")
    for name, value in globals().items():
        if name.startswith("AmdSmi"):
            setattr(module, name, value)
        elif name.startswith("amdsmi_"):
            setattr(module, name, mock.create_autospec(value, side_effect=value))
    return module
