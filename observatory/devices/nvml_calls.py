"""Calls of NVML that are made again and again: prepared once, answered as bytes.

Sampling asks for the same things 20 times a second, on eight GPUs. Setting up each request and taking the
answer apart member by member, as nvidia-ml-py's own functions do, would be most of what that costs. Where
nvidia-ml-py does not show the C library, or a function is not listed here, its own function does the same.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any

from observatory.devices.nvml_library import SUCCESS, ask

_FUNCTION = "nvmlDeviceGetFieldValues"
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


class PreparedCall:
    """A function of NVML that gives one number of one GPU.

    Args:
        nvml: the library, loaded.
        handle: of the GPU.
        function: its name.
        arguments: between the handle and the answer.
    """

    def __init__(self, nvml: Any, handle: Any, function: str, arguments: Sequence[int] = ()) -> None:
        self._own = (nvml, function, handle, *arguments)
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
            return ask(*self._own)
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
        self._function = getattr(getattr(nvml, "nvmlLib", None), _FUNCTION, None)
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
            values, code = ask(self._nvml, _FUNCTION, self._handle, self._numbers)
            answer = memoryview(b"" if code else values).cast("B")
        else:
            code, answer = int(self._function(*self._arguments)), self._answer
        if code:
            return dict.fromkeys(self._numbers, (None, code)), code
        told = _FIELD.iter_unpack(answer)
        return {
            number: (None, refused) if refused else (decode_value(kind, value), SUCCESS)
            for number, (_, _, _, _, kind, refused, value) in zip(self._numbers, told, strict=True)
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
