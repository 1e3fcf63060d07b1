"""NVIDIA GPUs through NVML.

A sample is one batched ``nvmlDeviceGetFieldValues`` and a few calls for what no field has. Every field and
call has a return code of its own, and each is looked at. Where there are two ways to a quantity, the first
that works when the device is opened is used from then on:

    power_mw              field 186 (the sensor's own short window). Never nvmlDeviceGetPowerUsage, which is a
                          1 s mean on Ampere (except GA100) and later: without the field there is no power now
    average_power_mw      field 185, else nvmlDeviceGetPowerUsage
    energy_mj             field 83, else nvmlDeviceGetTotalEnergyConsumption (Volta and later)
    enforced_limit_mw     field 190, else nvmlDeviceGetEnforcedPowerLimit
    memory_temperature_c  field 82
    power_cap_ns          field 74;   thermal_ns: fields 269 (software) + 270 (hardware)
    clocks, temperature_c, event_reasons: a call each

Sampling asks for the same things 20 times a second, on eight GPUs. Setting up each request and taking the
answer apart member by member, as nvidia-ml-py's own functions do, would be most of what that costs: calls are
prepared once and answered as bytes. Where nvidia-ml-py does not show the C library, or a function is not
listed here, its own function does the same.
"""

from __future__ import annotations

import ctypes
import math
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from observatory.devices.base import Gap, PowerDevice, Sample
from observatory.devices.nvml_library import (
    GONE,
    INVALID_ARGUMENT,
    NO_FUNCTION,
    NO_LIBRARY,
    NO_PERMISSION,
    NOT_SUPPORTED,
    SUCCESS,
    NvmlGpu,
    ask,
    code_text,
)
from observatory.run.manifest import DeviceSpec
from observatory.run.tables import POWER_SCHEMA


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """One way to a quantity: the sum of some fields, or one call."""

    fields: tuple[int, ...] = ()
    function: str = ""
    arguments: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        if self.function:
            return self.function
        word = "field" if len(self.fields) == 1 else "fields"
        return f"{word} {' + '.join(map(str, self.fields))}"


def _field(*numbers: int) -> _Source:
    return _Source(fields=numbers)


def _call(function: str, *arguments: int) -> _Source:
    return _Source(function=function, arguments=arguments)


_SOURCES: dict[str, tuple[_Source, ...]] = {
    "power_mw": (_field(186),),
    "average_power_mw": (_field(185), _call("nvmlDeviceGetPowerUsage")),
    "energy_mj": (_field(83), _call("nvmlDeviceGetTotalEnergyConsumption")),
    "sm_clock_mhz": (_call("nvmlDeviceGetClockInfo", 1),),
    "memory_clock_mhz": (_call("nvmlDeviceGetClockInfo", 2),),
    "temperature_c": (_call("nvmlDeviceGetTemperatureV", 0), _call("nvmlDeviceGetTemperature", 0)),
    "memory_temperature_c": (_field(82),),
    "event_reasons": (
        _call("nvmlDeviceGetCurrentClocksEventReasons"),
        _call("nvmlDeviceGetCurrentClocksThrottleReasons"),  # the name before driver 535
    ),
    "enforced_limit_mw": (_field(190), _call("nvmlDeviceGetEnforcedPowerLimit")),
    "power_cap_ns": (_field(74),),
    "thermal_ns": (_field(269, 270),),
}

#: What else to say where a quantity is not supported.
_HINTS = {
    "energy_mj": "GPUs before Volta have no energy counter",
    "memory_temperature_c": "only GPUs with HBM and some others have this sensor",
}

#: Asking once more does not change these answers.
_FINAL = GONE | {SUCCESS, INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, NO_LIBRARY, NO_FUNCTION}

#: Least value that a quantity may have, and the first that its column cannot hold.
_RANGES = {
    field.name: (
        -273 if field.name.endswith("temperature_c") else 0,
        1 << (31 if pa.types.is_int32(field.type) else 63),
    )
    for field in POWER_SCHEMA
    if field.name in _SOURCES
}

_FIELDS_FUNCTION = "nvmlDeviceGetFieldValues"
#: A ``nvmlFieldValue_t``: field, scope, timestamp, latency, type of the value, return code, value.
_FIELD = struct.Struct("@IIqqII8s")
#: By nvmlValueType_t: how the value lies in its union, and what stands for "not available".
_TYPES: dict[int, tuple[struct.Struct, int | None]] = {
    0: (struct.Struct("@d"), None),
    1: (struct.Struct("@I"), (1 << 32) - 1),
    2: (struct.Struct("@L"), (1 << 8 * struct.calcsize("@L")) - 1),
    3: (struct.Struct("@Q"), (1 << 64) - 1),
    4: (struct.Struct("@q"), None),
    5: (struct.Struct("@i"), None),
    6: (struct.Struct("@H"), None),
}

_UINT, _ULONGLONG = struct.Struct("@I"), struct.Struct("@Q")
#: Functions that give one number, and how it lies in what their last argument points to.
_OUTPUTS = {
    "nvmlDeviceGetClockInfo": _UINT,
    "nvmlDeviceGetCurrentClocksEventReasons": _ULONGLONG,
    "nvmlDeviceGetCurrentClocksThrottleReasons": _ULONGLONG,
    "nvmlDeviceGetEnforcedPowerLimit": _UINT,
    "nvmlDeviceGetPowerUsage": _UINT,
    "nvmlDeviceGetTemperature": _UINT,
    "nvmlDeviceGetTotalEnergyConsumption": _ULONGLONG,
}
#: ``nvmlTemperature_v1_t``: version, sensor, temperature; the sensor is in it and no argument.
_TEMPERATURE_FUNCTION, _TEMPERATURE = "nvmlDeviceGetTemperatureV", struct.Struct("@IIi")


class NvmlDevice(PowerDevice):
    """One NVIDIA GPU, named by its UUID.

    Args:
        uuid: as the driver reports it, ``GPU-...``, in full.
        clock_ns: monotonic time.

    Raises:
        DeviceError: there is no driver, or no GPU of this name.
        DeviceLostError: the GPU is there and does not answer.
    """

    def __init__(self, uuid: str, *, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock_ns = clock_ns
        self._gpu = NvmlGpu(uuid)
        try:
            self._sources, self._gaps = self._find_sources()
        except BaseException:
            self.close()
            raise
        self._plan = [(name, source, self._call(source)) for name, source in self._sources.items()]
        numbers = [number for source in self._sources.values() for number in source.fields]
        self._fields = FieldBatch(self._gpu.nvml, self._gpu.handle, numbers)

    @property
    def spec(self) -> DeviceSpec:
        """The GPU."""
        return self._gpu.spec

    @property
    def gaps(self) -> Mapping[str, Gap]:
        """Why the driver does not report a quantity, with its return code."""
        return dict(self._gaps)

    def _read(self) -> Sample:
        """Ask the driver for everything it reports."""
        start_ns = self._clock_ns()
        answers = self._ask_fields(self._fields)
        readings = {name: self._value(name, source, call, answers)[0] for name, source, call in self._plan}
        return Sample(
            time_ns=start_ns, read_ns=self._clock_ns() - start_ns, device_uuid=self.uuid, **readings
        )  # fmt: skip

    def _release(self) -> None:
        self._gpu.close()

    def _find_sources(self) -> tuple[dict[str, _Source], dict[str, Gap]]:
        """The first way to each quantity that works, and why there is none."""
        numbers = sorted({n for ways in _SOURCES.values() for way in ways for n in way.fields})
        answers = self._ask_fields(FieldBatch(self._gpu.nvml, self._gpu.handle, numbers))
        refused = all(code for _, code in answers.values())
        for number, (_, code) in list(answers.items()):
            # One field that an old driver does not know can make it refuse the whole batch.
            if refused or code not in _FINAL:
                answers |= self._ask_fields(FieldBatch(self._gpu.nvml, self._gpu.handle, [number]))
        sources: dict[str, _Source] = {}
        gaps: dict[str, Gap] = {}
        for name, ways in _SOURCES.items():
            failed: list[Gap] = []
            for way in ways:
                call = self._call(way)
                value, code = self._value(name, way, call, answers)
                if code not in _FINAL:
                    value, code = self._value(name, way, call, answers)
                if value is not None:
                    sources[name] = way
                    break
                failed.append(explain(self._gpu.nvml, way.name, code, _HINTS.get(name)))
            else:
                denied = [gap for gap in failed if gap.kind == "not permitted"]
                gaps[name] = (denied or failed)[0]
        if "power_mw" in gaps and "average_power_mw" in sources:
            gap = gaps["power_mw"]
            gaps["power_mw"] = Gap(
                kind=gap.kind,
                detail="only a 1 s mean (shorter before Ampere and on GA100), kept as average_power_mw: "
                f"{gap.detail}",
                remedy=gap.remedy,
            )
        return sources, gaps

    def _ask_fields(self, fields: FieldBatch) -> dict[int, tuple[int | float | None, int]]:
        """Value and return code of each field, from one call."""
        answers, code = fields.ask()
        self._gpu.checked(code)
        return answers

    def _call(self, source: _Source) -> PreparedCall | None:
        """The call of a way that has one."""
        if not source.function:
            return None
        return PreparedCall(self._gpu.nvml, self._gpu.handle, source.function, source.arguments)

    def _value(
        self, name: str, source: _Source, call: PreparedCall | None, answers: Mapping[int, tuple[Any, int]]
    ) -> tuple[int | None, int]:
        """Value of a quantity and the first return code that is not 0; None also for an impossible value."""
        if call is not None:
            value, code = call.ask()
            self._gpu.checked(code)
            return _whole(name, value), code
        total = 0
        for number in source.fields:
            value, code = answers[number]
            self._gpu.checked(code)
            whole = _whole(name, value)
            if whole is None:
                return None, code
            total += whole
        return total, SUCCESS


def _whole(name: str, value: int | float | None) -> int | None:
    """A reading as the table keeps it; None when it cannot be one."""
    if value is None or not math.isfinite(value):
        return None
    least, end = _RANGES[name]
    return round(value) if least <= value < end else None


def explain(nvml: Any, what: str, code: int, hint: str | None = None) -> Gap:
    """A return code as a reason.

    Args:
        nvml: the library.
        what: the field or function that was asked for.
        code: what it returned; 0 when it succeeded with a value that cannot be true.
        hint: what else to say where the device does not support it.
    """
    answer = f"{what} returned {code} ({code_text(nvml, code)})"
    if code == SUCCESS:
        return Gap(kind="failed", detail=f"{what} succeeded with a value that cannot be a reading")
    if code == INVALID_ARGUMENT:
        return Gap(
            kind="not supported", detail=f"this driver does not know it: {answer}", remedy="update the driver"
        )
    if code == NOT_SUPPORTED:
        return Gap(
            kind="not supported", detail=f"this GPU does not report it: {answer}{f'; {hint}' if hint else ''}"
        )
    if code == NO_PERMISSION:
        return Gap(
            kind="not permitted",
            detail=f"this user may not read it: {answer}",
            remedy="ask the site to allow it (docs/power.md#permissions)",
        )
    if code == NO_FUNCTION:
        return Gap(
            kind="not supported",
            detail=f"this driver, or this nvidia-ml-py, is older than the function: {answer}",
            remedy="update the driver",
        )
    return Gap(kind="failed", detail=answer, remedy="open the device again")


class PreparedCall:
    """A function of NVML that gives one number of one GPU.

    Args:
        nvml: the library, loaded.
        handle: of the GPU.
        function: its name.
        arguments: between the handle and the answer.
    """

    def __init__(self, nvml: Any, handle: Any, function: str, arguments: Sequence[int] = ()) -> None:
        self._call = (nvml, function, handle, *arguments)
        self._layout: struct.Struct | None = None
        library = getattr(nvml, "nvmlLib", None)
        if function == _TEMPERATURE_FUNCTION:
            self._layout = _TEMPERATURE
            content = _TEMPERATURE.pack(_TEMPERATURE.size | 1 << 24, *arguments, 0)
            arguments = ()
        elif function in _OUTPUTS:
            self._layout = _OUTPUTS[function]
            content = bytes(self._layout.size)
        self._function = None if self._layout is None else getattr(library, function, None)
        if self._function is not None:
            self._answer = ctypes.create_string_buffer(content, len(content))
            self._arguments = (handle, *map(ctypes.c_uint, arguments), self._answer)

    def ask(self) -> tuple[Any, int]:
        """The number and the return code; None where the code is not 0."""
        if self._function is None or self._layout is None:
            return ask(*self._call)
        code = int(self._function(*self._arguments))
        return (None, code) if code else (self._layout.unpack(self._answer)[-1], SUCCESS)


class FieldBatch:
    """The same fields of one GPU.

    Args:
        nvml: the library, loaded.
        handle: of the GPU.
        numbers: of the fields.
    """

    def __init__(self, nvml: Any, handle: Any, numbers: Sequence[int]) -> None:
        self._nvml, self._handle, self._numbers = nvml, handle, list(numbers)
        self._function = getattr(getattr(nvml, "nvmlLib", None), _FIELDS_FUNCTION, None)
        if self._function is not None and self._numbers:
            self._values = (nvml.c_nvmlFieldValue_t * len(self._numbers))()
            for value, number in zip(self._values, self._numbers, strict=True):
                value.fieldId = number
            self._answer = memoryview(self._values).cast("B")
            self._arguments = (handle, ctypes.c_int32(len(self._numbers)), ctypes.byref(self._values))

    def ask(self) -> tuple[dict[int, tuple[int | float | None, int]], int]:
        """Value and return code of each field, and the return code of the call."""
        if not self._numbers:
            return {}, SUCCESS
        if self._function is None:
            values, code = ask(self._nvml, _FIELDS_FUNCTION, self._handle, self._numbers)
            answer = memoryview(b"" if code else values).cast("B")
        else:
            code, answer = int(self._function(*self._arguments)), self._answer
        if code:
            return dict.fromkeys(self._numbers, (None, code)), code
        fields = _FIELD.iter_unpack(answer)
        return {
            number: (None, refused) if refused else (decode_value(kind, value), SUCCESS)
            for number, (_, _, _, _, kind, refused, value) in zip(self._numbers, fields, strict=True)
        }, SUCCESS


def decode_value(kind: int, content: bytes) -> int | float | None:
    """The value of a ``nvmlFieldValue_t``, read as the type that it says it has.

    None for a type that is not known here, and for the values that stand for "not available".
    """
    if kind not in _TYPES:
        return None
    layout, missing = _TYPES[kind]
    value: int | float = layout.unpack_from(content)[0]
    return None if value == missing else value
