"""Hardware profiles: what a device can do, from published figures.

One TOML file per device in ``profiles/``, or a user's own of the same form::

    name = "H100 SXM"

    [peak.bf16]
    value = 989
    unit = "TFLOP/s"
    source = "where it was read"
    date = "2026-08-21"

    [achievable.memory_bandwidth]
    value = 2680
    unit = "GB/s"
    source = "how it was measured or derived"
    date = "2026-08-21"
    assumed = true

Peak and achievable are apart, and what is not known is absent. Rates are dense (no sparsity), bandwidths of
links are of one direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from observatory.errors import BenchmarkError
from observatory.run.bounded import read_toml

#: Quantities of a profile with the unit in which each is given.
UNITS = {
    "bf16": "TFLOP/s",
    "fp8": "TFLOP/s",
    "fp4": "TFLOP/s",
    "int8": "TOP/s",
    "memory_bandwidth": "GB/s",
    "memory": "GB",
    "link_bandwidth": "GB/s",
    "pcie_bandwidth": "GB/s",
    "nic_bandwidth": "GB/s",
    "power_limit": "W",
    "sm_clock": "MHz",
    "launch": "us",
    "scale_up_devices": "devices",
}

_MOST_BYTES = 64 << 10
#: Names of quantities; ``link_bandwidth`` is that within the ``scale_up_devices`` of a node or rack.
Quantity = Literal[
    "bf16", "fp8", "fp4", "int8", "memory_bandwidth", "memory", "link_bandwidth", "pcie_bandwidth",
    "nic_bandwidth", "power_limit", "sm_clock", "launch", "scale_up_devices",
]  # fmt: skip
_RATE_OF_DTYPE: dict[str, Quantity] = {
    "bfloat16": "bf16",
    "float16": "bf16",
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8",
    "float8_e4m3fnuz": "fp8",
    "float8_e5m2fnuz": "fp8",
}
_Words = Annotated[str, Field(min_length=1, max_length=500, pattern=r"^[^\x00-\x1f\x7f]*$")]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Figure(_Strict):
    """One figure.

    Attributes:
        value: in ``unit``.
        unit: as in ``UNITS``.
        source: where it was read, or how it was derived.
        date: of the source, ``YYYY-MM-DD``.
        assumed: it was not measured: a rule of thumb or an assumption of the source.
    """

    value: Annotated[float, Field(ge=1e-6, le=1e9)]
    unit: _Words
    source: _Words
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    assumed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A rate to compute with.

    Attributes:
        name: its quantity.
        value: bytes or operations per second.
        assumed: it is no measured figure.
        peak: nothing achievable is known, so it is the peak; times from it are lower bounds.
    """

    name: str
    value: float
    assumed: bool
    peak: bool


class HardwareProfile(_Strict):
    """What one device can do.

    Attributes:
        name: of the device.
        peak: figures of data sheets.
        achievable: what programs reach.
    """

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]*$")]
    peak: dict[Quantity, Figure]
    achievable: dict[Quantity, Figure] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _units_fit(self) -> HardwareProfile:
        for quantity, figure in (*self.peak.items(), *self.achievable.items()):
            if figure.unit != UNITS[quantity]:
                raise ValueError(f"{quantity} is in {figure.unit}, expected {UNITS[quantity]}")
        for quantity, figure in self.achievable.items():
            if quantity in self.peak and figure.value > self.peak[quantity].value:
                raise ValueError(f"achievable {quantity} is above its peak")
        return self

    def memory_bandwidth(self) -> Rate:
        """Bytes per second from the device's memory.

        Raises:
            BenchmarkError: the profile has none.
        """
        return self._rate("memory_bandwidth", per_second=1e9)

    def rate(self, dtype: str) -> Rate:
        """Operations per second on numbers of a dtype, as torch names it.

        Raises:
            BenchmarkError: the profile has none, or none is kept for such numbers.
        """
        quantity = _RATE_OF_DTYPE.get(dtype.removeprefix("torch."))
        if quantity is None:
            raise BenchmarkError(
                f"hardware profiles have no rate for {dtype}",
                expected=f"one of {', '.join(_RATE_OF_DTYPE)}",
                remedy="measure the experts with `observatory bench experts`",
            )
        return self._rate(quantity, per_second=1e12)

    @property
    def launch_s(self) -> float:
        """Seconds that an operation takes besides its work; 0 where the profile has none."""
        figure = self.achievable.get("launch")
        return 0.0 if figure is None else figure.value * 1e-6

    def _rate(self, quantity: Quantity, *, per_second: float) -> Rate:
        figure = self.achievable.get(quantity) or self.peak.get(quantity)
        if figure is None:
            raise BenchmarkError(
                f"the hardware profile of {self.name} has no {quantity}",
                remedy=f"add [peak.{quantity}] with value, unit, source and date to a profile of your own",
            )
        peak = quantity not in self.achievable
        return Rate(name=quantity, value=figure.value * per_second, assumed=figure.assumed or peak, peak=peak)


def profile_names() -> list[str]:
    """Names of the bundled profiles."""
    folder = resources.files(__package__) / "profiles"
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml"))


def load_profile(name: str | Path) -> HardwareProfile:
    """A bundled profile by name, or a user's own by its path, which ends in ``.toml``.

    Raises:
        BenchmarkError: there is no such profile, or the file is not one.
    """
    bundled = isinstance(name, str) and not name.endswith(".toml")
    if bundled and name not in profile_names():
        raise BenchmarkError(
            f"hardware profile {str(name)[:80]!r} does not exist",
            expected=f"one of {', '.join(profile_names())}, or a TOML file",
        )
    path = Path(str(resources.files(__package__) / "profiles" / f"{name}.toml")) if bundled else Path(name)
    return read_toml(
        path,
        HardwareProfile,
        most_bytes=_MOST_BYTES,
        failure=BenchmarkError,
        what="hardware profile",
        remedy="docs/step-time.md has the form of a profile",
    )
