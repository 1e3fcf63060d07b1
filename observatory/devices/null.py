"""The device that tells nothing, and says why."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from observatory.devices.base import FIELDS, Gap, PowerDevice, Sample
from observatory.errors import DeviceError
from observatory.run.manifest import DeviceSpec


class NullDevice(PowerDevice):
    """Stands where a device is expected and there is none; every reading is None.

    Args:
        reason: why there is none, one sentence.
        clock_ns: monotonic time.
    """

    def __init__(self, reason: str, *, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._reason = reason
        self._clock_ns = clock_ns
        self._open = True

    @property
    def spec(self) -> DeviceSpec:
        """Kind and UUID are ``none``."""
        return DeviceSpec(kind="none", uuid="none")

    @property
    def gaps(self) -> Mapping[str, Gap]:
        """The reason, for every quantity."""
        return dict.fromkeys(FIELDS, Gap(kind="not supported", detail=self._reason))

    def read(self) -> Sample:
        """A sample without readings."""
        if not self._open:
            raise DeviceError("the null device was closed and cannot be read", remedy="open it again")
        return Sample(time_ns=self._clock_ns(), read_ns=0, device_uuid=self.uuid)

    def close(self) -> None:
        """Nothing is held."""
        self._open = False
