"""Rates of a device to plan with: what is likely, and how fast or slow it may be.

Shapes: a rate has three values, (3,): fast, likely, slow.

Data sheets give peaks. Where a profile has no achievable figure, a part of the peak is assumed:

    arithmetic  0.60  (0.35 to 0.85)   InferSim takes 0.35 to 0.6 of the peak by default (hardware/gpu.py)
    memory      0.80  (0.65 to 0.92)   aiconfigurator and InferSim take 0.8
    links       0.80  (0.50 to 0.95)   InferSim takes 0.8

An achievable figure that was measured is taken within a tenth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.hardware.profiles import Figure, HardwareProfile, Quantity
from observatory.errors import PlanError

Float64 = NDArray[np.float64]

#: What a number rests on, best first.
Grade = Literal["measured", "fitted", "published", "assumed"]
GRADES: tuple[Grade, ...] = ("measured", "fitted", "published", "assumed")

_ARITHMETIC = (0.85, 0.60, 0.35)
_MEMORY = (0.92, 0.80, 0.65)
_LINKS = (0.95, 0.80, 0.50)
_PARTS: dict[Quantity, tuple[float, float, float]] = {
    "bf16": _ARITHMETIC,
    "fp8": _ARITHMETIC,
    "fp4": _ARITHMETIC,
    "int8": _ARITHMETIC,
    "memory_bandwidth": _MEMORY,
    "link_bandwidth": _LINKS,
    "pcie_bandwidth": _LINKS,
    "nic_bandwidth": _LINKS,
}
_MEASURED = (1.1, 1.0, 0.9)
_PER_SECOND = {"TFLOP/s": 1e12, "TOP/s": 1e12, "GB/s": 1e9}
#: Quantities that compute with a data type, the fastest first; the first that a device has counts.
_OF_DTYPE: dict[str, tuple[Quantity, ...]] = {
    "bfloat16": ("bf16",),
    "float16": ("bf16",),
    "float8_e4m3fn": ("fp8", "bf16"),
    "float8_e5m2": ("fp8", "bf16"),
    # Devices without such arithmetic widen the weights.
    "float4": ("fp4", "bf16"),
}


@dataclass(frozen=True, slots=True, eq=False)
class Rate:
    """Something per second.

    Attributes:
        per_s_3: fast, likely, slow.
        grade: what it rests on.
        name: of the quantity in the profile.
    """

    per_s_3: Float64
    grade: Grade
    name: str


def rate(profile: HardwareProfile, quantity: Quantity) -> Rate:
    """Bytes or operations per second.

    Raises:
        PlanError: the profile does not have it.
    """
    achievable, peak = profile.achievable.get(quantity), profile.peak.get(quantity)
    if achievable is not None and not achievable.assumed:
        return Rate(_scaled(achievable, _MEASURED, peak), "published", quantity)
    if peak is None:
        if achievable is None:
            raise PlanError(
                f"the hardware profile of {profile.name} has no {quantity}",
                remedy=f"add [peak.{quantity}] with value, unit, source and date, or state it in --site",
            )
        return Rate(_scaled(achievable, _MEASURED, None), "assumed", quantity)
    return Rate(_scaled(peak, _PARTS[quantity], peak), "assumed", quantity)


def arithmetic_rate(profile: HardwareProfile, dtype: str) -> Rate:
    """Operations per second on numbers of a data type.

    Raises:
        PlanError: the profile has none, or none is kept for such numbers.
    """
    quantities = _OF_DTYPE.get(dtype)
    if quantities is None:
        raise PlanError(
            f"hardware profiles have no rate for {dtype}",
            expected=f"one of {', '.join(_OF_DTYPE)}",
            remedy="give the data type with --dtype",
        )
    known = [name for name in quantities if name in profile.peak or name in profile.achievable]
    return rate(profile, (known or quantities)[0])


def figure(profile: HardwareProfile, quantity: Quantity) -> Figure | None:
    """A figure that is no rate, such as the memory; None where the profile does not have it."""
    return profile.achievable.get(quantity) or profile.peak.get(quantity)


def _scaled(base: Figure, parts: tuple[float, float, float], peak: Figure | None) -> Float64:
    per_s_3 = base.value * _PER_SECOND[base.unit] * np.array(parts)
    return per_s_3 if peak is None else np.minimum(per_s_3, peak.value * _PER_SECOND[peak.unit])
