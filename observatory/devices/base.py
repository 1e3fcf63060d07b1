"""What every power device is to the rest: a name, what it can tell, and one reading at a time.

A device never guesses: a quantity that it cannot tell is None in every sample, and ``unavailable`` says why.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from observatory.run.manifest import DeviceSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One reading of a device, all fields asked for in one batch.

    Attributes:
        time_ns: monotonic time just before the device was asked.
        read_ns: how long the device took to answer.
        device_uuid: which device.
        power_mw: power now, over the sensor's own short window (25 ms on A100 and H100), never a 1 s mean.
        average_power_mw: mean power as the device averages it, over 1 s on most.
        energy_mj: a counter of energy since some moment in the past.
        sm_clock_mhz: clock of the multiprocessors.
        memory_clock_mhz: clock of the memory.
        temperature_c: of the chip.
        memory_temperature_c: of the memory.
        event_reasons: NVML's bits of why the clock is what it is.
        enforced_limit_mw: the power limit in force.
        power_cap_ns: counter of the time that the power limit held the clock down.
        thermal_ns: likewise for heat, software's and hardware's slowdown together.
    """

    time_ns: int
    read_ns: int
    device_uuid: str
    power_mw: int | None = None
    average_power_mw: int | None = None
    energy_mj: int | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    temperature_c: int | None = None
    memory_temperature_c: int | None = None
    event_reasons: int | None = None
    enforced_limit_mw: int | None = None
    power_cap_ns: int | None = None
    thermal_ns: int | None = None


#: The device or its driver has it not, this user may not read it, or asking failed.
GapKind = Literal["not supported", "not permitted", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Why a device does not tell a quantity.

    Attributes:
        kind: see :data:`GapKind`.
        detail: what was asked and what came back.
        remedy: how to get it; None when it cannot be had here.
    """

    kind: GapKind
    detail: str
    remedy: str | None = None

    def __str__(self) -> str:
        return f"{self.detail}; {self.remedy}" if self.remedy else self.detail


#: Quantities a device may tell.
FIELDS: tuple[str, ...] = tuple(
    field.name
    for field in dataclasses.fields(Sample)
    if field.name not in ("time_ns", "read_ns", "device_uuid")
)


class PowerDevice(ABC):
    """One device; also a context manager that closes it.

    What it can tell is found out once, when it is opened, and does not change: a field that worked and then
    fails is None in that sample.
    """

    @property
    @abstractmethod
    def spec(self) -> DeviceSpec:
        """The device as a manifest names it; ``uuid`` is never None."""

    @property
    @abstractmethod
    def gaps(self) -> Mapping[str, Gap]:
        """Why, for each of ``FIELDS`` that this device cannot tell."""

    @property
    def unavailable(self) -> Mapping[str, str]:
        """``gaps``, each as one sentence for people."""
        return {name: str(gap) for name, gap in self.gaps.items()}

    @abstractmethod
    def read(self) -> Sample:
        """Ask the device now.

        Raises:
            DeviceLostError: it does not answer any more, and will not again.
            DeviceError: it was closed.
        """

    @abstractmethod
    def close(self) -> None:
        """Give back what was opened; closing twice does nothing."""

    @property
    def uuid(self) -> str:
        """What names the device, across reboots."""
        uuid = self.spec.uuid
        assert uuid is not None
        return uuid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
