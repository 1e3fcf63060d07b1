"""What every power device is to the rest: a name, what it reports, and one reading at a time.

A device never guesses: a quantity that it does not report is None in every sample, and ``unavailable`` says
why.
"""

from __future__ import annotations

import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from observatory.errors import DeviceError, DeviceLostError
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
    """Why a device does not report a quantity.

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


#: Quantities a device may report.
FIELDS: tuple[str, ...] = tuple(
    field.name
    for field in dataclasses.fields(Sample)
    if field.name not in ("time_ns", "read_ns", "device_uuid")
)


class Closable:
    """Something that is open until it is closed; also a context manager that closes it."""

    _open = True

    def close(self) -> None:
        """Give back what was opened; closing twice does nothing."""
        if self._open:
            self._open = False
            self._release()

    def _release(self) -> None:
        """Give back what was opened; called once."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class PowerDevice(Closable, ABC):
    """One device.

    What it reports is determined once, when it is opened, and does not change: a field that worked and then
    fails is None in that sample.
    """

    _lost: DeviceLostError | None = None

    @property
    @abstractmethod
    def spec(self) -> DeviceSpec:
        """The device as a manifest names it; ``uuid`` is never None."""

    @property
    @abstractmethod
    def gaps(self) -> Mapping[str, Gap]:
        """Why, for each of ``FIELDS`` that this device does not report."""

    @abstractmethod
    def _read(self) -> Sample:
        """Ask the device now; it is open and was not lost before."""

    @property
    def unavailable(self) -> Mapping[str, str]:
        """``gaps``, each as one sentence for people."""
        return {name: str(gap) for name, gap in self.gaps.items()}

    def read(self) -> Sample:
        """Ask the device now.

        Raises:
            DeviceLostError: it does not answer any more, and will not again.
            DeviceError: it was closed.
        """
        if self._lost is not None:
            raise DeviceLostError(self._lost.what, expected=self._lost.expected, remedy=self._lost.remedy)
        if not self._open:
            name = self.spec.name or self.spec.kind
            raise DeviceError(f"{name} ({self.uuid}) was closed and cannot be read", remedy="open it again")
        try:
            return self._read()
        except DeviceLostError as error:
            self._lost = error
            raise

    @property
    def uuid(self) -> str:
        """What names the device, across reboots."""
        uuid = self.spec.uuid
        assert uuid is not None
        return uuid


class NullDevice(PowerDevice):
    """Stands where a device is expected and there is none; every reading is None.

    Args:
        reason: why there is none, one sentence.
        clock_ns: monotonic time.
    """

    def __init__(self, reason: str, *, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._reason = reason
        self._clock_ns = clock_ns

    @property
    def spec(self) -> DeviceSpec:
        """Kind and UUID are ``none``."""
        return DeviceSpec(kind="none", uuid="none")

    @property
    def gaps(self) -> Mapping[str, Gap]:
        """The reason, for every quantity."""
        return dict.fromkeys(FIELDS, Gap(kind="not supported", detail=self._reason))

    def _read(self) -> Sample:
        return Sample(time_ns=self._clock_ns(), read_ns=0, device_uuid=self.uuid)
