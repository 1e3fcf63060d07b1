"""Time, power and energy of one iteration against the SM clock, and the forms that a fit may choose from.

Shapes: B sets of parameters, F clocks.

With x = f0 / f, phi = f / f0 and f0 the highest clock that was fitted (arXiv 2605.11999 measures such curves;
the form is the usual one of dynamic voltage and frequency scaling):

    t(f) = host + softmax(memory + memory_slope * x, compute * x)
    V(f) = 1 - voltage_slope * (1 - max(phi, ridge))
    P(f) = static + clock * phi * V^2 + (memory_energy + op_energy * V^2) / t(f)
    E(f) = P(f) * t(f)

``host`` is what never overlaps with the device's work. ``softmax(a, b)`` is (a^s + b^s)^(1/s) with sharpness
s; s = 0 stands for the plain maximum. ``memory_slope`` lets the memory's time grow as the SM clock falls.
V is relative to the voltage at f0 and flat below the ridge. Nothing here is ever negative.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]

#: Parameters of t(f), in this order wherever they are kept as numbers.
TIME_TERMS: tuple[str, ...] = ("host_s", "memory_s", "memory_slope_s", "compute_s", "sharpness")
#: Parameters of P(f), likewise.
POWER_TERMS: tuple[str, ...] = ("static_mw", "clock_mw", "memory_mj", "op_mj", "ridge", "voltage_slope")


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeForm:
    """One documented form of t(f).

    Attributes:
        name: its name in files.
        meaning: one sentence.
        terms: parameters that it has; all others are 0.
    """

    name: str
    meaning: str
    terms: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """How many numbers it takes from the data."""
        return len(self.terms)

    @property
    def has_knee(self) -> bool:
        """Whether it separates memory from compute."""
        return "memory_s" in self.terms and "compute_s" in self.terms


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerForm:
    """One documented form of P(f); ``terms`` at most, as terms that cannot be separated are left out."""

    name: str
    meaning: str
    terms: tuple[str, ...]


#: Simplest first.
TIME_FORMS: dict[str, TimeForm] = {
    form.name: form
    for form in (
        TimeForm(name="flat", meaning="the clock does not matter", terms=("memory_s",)),
        TimeForm(
            name="linear",
            meaning="a part that follows the clock and a part that does not, one after the other",
            terms=("host_s", "compute_s"),
        ),
        TimeForm(
            name="knee",
            meaning="the longer of memory and compute counts; no host part",
            terms=("memory_s", "compute_s"),
        ),
        TimeForm(
            name="host-knee",
            meaning="knee plus a host part",
            terms=("host_s", "memory_s", "compute_s"),
        ),
        TimeForm(
            name="sloped-knee",
            meaning="host-knee whose memory time grows as the clock falls",
            terms=("host_s", "memory_s", "memory_slope_s", "compute_s"),
        ),
        TimeForm(
            name="soft-knee",
            meaning="host-knee that goes over smoothly from memory to compute",
            terms=("host_s", "memory_s", "compute_s", "sharpness"),
        ),
        TimeForm(
            name="soft-sloped-knee",
            meaning="soft-knee whose memory time grows as the clock falls",
            terms=TIME_TERMS,
        ),
    )
}

#: Simplest first.
POWER_FORMS: dict[str, PowerForm] = {
    form.name: form
    for form in (
        PowerForm(
            name="constant",
            meaning="the clock does not matter",
            terms=("static_mw", "memory_mj"),
        ),
        PowerForm(
            name="constant-voltage",
            meaning="power grows with the clock, the voltage stays",
            terms=("static_mw", "clock_mw", "memory_mj"),
        ),
        PowerForm(
            name="proportional-voltage",
            meaning="voltage flat below a ridge, above it in proportion to the clock",
            terms=("static_mw", "clock_mw", "memory_mj", "op_mj", "ridge"),
        ),
        PowerForm(
            name="sloped-voltage",
            meaning="voltage flat below a ridge, above it a straight line",
            terms=POWER_TERMS,
        ),
    )
}


def softmax(first: Float64, second: Float64, sharpness: Float64) -> Float64:
    """(first^s + second^s)^(1/s); the larger where s is 0. Arrays broadcast."""
    most = np.maximum(first, second)
    ratio = np.divide(np.minimum(first, second), most, out=np.zeros_like(most), where=most > 0)
    exponent = np.where(sharpness > 0, sharpness, 1.0)
    soft: Float64 = most * np.where(sharpness > 0, (1.0 + ratio**exponent) ** (1.0 / exponent), 1.0)
    return soft


def voltage(phi: Float64, ridge: Float64, slope: Float64) -> Float64:
    """V relative to that at f0. Arrays broadcast."""
    volts: Float64 = 1.0 - slope * (1.0 - np.maximum(phi, ridge))
    return volts


def iteration_s(time_BT: ArrayLike, f0_mhz: float, mhz_F: ArrayLike) -> Float64:
    """t(f), (B, F), for parameters in the order of ``TIME_TERMS``."""
    host, memory, slope, compute, sharpness = _columns(time_BT)
    x = f0_mhz / np.asarray(mhz_F, dtype=np.float64)
    return host + softmax(memory + slope * x, compute * x, sharpness)


def compute_branch_s(time_BT: ArrayLike, f0_mhz: float, mhz_F: ArrayLike) -> Float64:
    """What t(f) would be if compute were always the longer, (B, F)."""
    host, _, _, compute, _ = _columns(time_BT)
    return host + compute * f0_mhz / np.asarray(mhz_F, dtype=np.float64)


def power_mw(power_BT: ArrayLike, f0_mhz: float, mhz_F: ArrayLike, iteration_s_BF: ArrayLike) -> Float64:
    """P(f), (B, F), for parameters in the order of ``POWER_TERMS`` and times of an iteration."""
    static, clock, memory, operations, ridge, slope = _columns(power_BT)
    phi = np.asarray(mhz_F, dtype=np.float64) / f0_mhz
    squared = voltage(phi, ridge, slope) ** 2
    per_iteration = (memory + operations * squared) / np.asarray(iteration_s_BF, dtype=np.float64)
    power: Float64 = static + clock * phi * squared + per_iteration
    return power


def energy_mj(time_BT: ArrayLike, power_BT: ArrayLike, f0_mhz: float, mhz_F: ArrayLike) -> Float64:
    """E(f) of one iteration, (B, F)."""
    seconds = iteration_s(time_BT, f0_mhz, mhz_F)
    return power_mw(power_BT, f0_mhz, mhz_F, seconds) * seconds


def critical_mhz(time_BT: ArrayLike, f0_mhz: float) -> Float64:
    """f_crit, (B,): the clock at which memory and compute take equally long; NaN where one of them is not.

    memory + memory_slope * x = compute * x, so f = f0 (compute - memory_slope) / memory.
    """
    _, memory, slope, compute, _ = (column[:, 0] for column in _columns(time_BT))
    crosses = (memory > 0) & (compute > slope)
    return np.divide(f0_mhz * (compute - slope), memory, out=np.full_like(memory, np.nan), where=crosses)


def _columns(values_BT: ArrayLike) -> list[Float64]:
    """Parameters as columns of shape (B, 1)."""
    array = np.atleast_2d(np.asarray(values_BT, dtype=np.float64))
    return [array[:, index, None] for index in range(array.shape[1])]
