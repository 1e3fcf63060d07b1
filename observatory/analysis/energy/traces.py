"""Samples of one device, cleaned: what every energy here is computed from.

Shapes: N samples.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

#: A reading outside these cannot be true of one device and is taken as missing: 1 MW, and 10^15 mJ (a GPU of
#: 700 W needs 45 years for it).
_MOST_MW, _MOST_MJ = 1e9, 1e15


class Reading(Protocol):
    """One sample as a device gives it; ``observatory.devices.base.Sample`` is one."""

    @property
    def time_ns(self) -> int:
        """Monotonic time just before the device was asked."""

    @property
    def read_ns(self) -> int | None:
        """How long it took to answer."""

    @property
    def power_mw(self) -> int | None:
        """Power over the sensor's own window."""

    @property
    def energy_mj(self) -> int | None:
        """Counter of energy."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PowerTrace:
    """Samples of one device in time order, each moment once.

    Attributes:
        device_uuid: the device.
        time_ns_N: monotonic times just before the device was asked, ascending.
        read_ns_N: how long it took to answer; 0 where that is not known.
        power_mw_N: power; NaN where the device did not report it.
        energy_mj_N: counter; likewise.
        repeated: samples left out because another had the same time.
        impossible: readings taken as missing because they cannot be true.
    """

    device_uuid: str
    time_ns_N: Int64
    read_ns_N: Int64
    power_mw_N: Float64
    energy_mj_N: Float64
    repeated: int = 0
    impossible: int = 0

    @cached_property
    def poll_ns(self) -> float | None:
        """Median time between samples; None with fewer than two."""
        return float(np.median(np.diff(self.time_ns_N))) if len(self.time_ns_N) > 1 else None

    def within(self, start_ns: int, end_ns: int, *, margin_ns: int = 0) -> slice:
        """Which samples lie in a window or in a margin on both sides."""
        low, high = np.searchsorted(self.time_ns_N, [start_ns - margin_ns, end_ns + margin_ns + 1])
        return slice(int(low), int(high))

    def between(self, start_ns: int, end_ns: int, *, margin_ns: int = 0) -> PowerTrace:
        """The samples of a window, with a margin on both sides."""
        chosen = self.within(start_ns, end_ns, margin_ns=margin_ns)
        return PowerTrace(
            device_uuid=self.device_uuid,
            time_ns_N=self.time_ns_N[chosen],
            read_ns_N=self.read_ns_N[chosen],
            power_mw_N=self.power_mw_N[chosen],
            energy_mj_N=self.energy_mj_N[chosen],
            repeated=self.repeated,
            impossible=self.impossible,
        )


def trace_of_readings(readings: Iterable[Reading], *, device_uuid: str = "") -> PowerTrace:
    """A trace of samples of one device."""
    rows = [(item.time_ns, item.read_ns, item.power_mw, item.energy_mj) for item in readings]
    columns = pd.DataFrame(rows, columns=["time_ns", "read_ns", "power_mw", "energy_mj"], dtype=object)
    return trace_of_frame(columns, device_uuid=device_uuid)


def trace_of_frame(rows: pd.DataFrame, *, device_uuid: str = "") -> PowerTrace:
    """A trace of rows of one device; columns of ``tables.POWER_SCHEMA``, nullable ones may be missing."""
    time = rows["time_ns"].to_numpy(np.int64)
    order = np.argsort(time, kind="stable")
    time = time[order]
    first = np.ones(len(time), dtype=bool)
    first[1:] = time[1:] != time[:-1]
    kept = order[first]
    power, wrong_power = _possible(_column(rows, "power_mw")[kept], _MOST_MW)
    energy, wrong_energy = _possible(_column(rows, "energy_mj")[kept], _MOST_MJ)
    return PowerTrace(
        device_uuid=device_uuid,
        time_ns_N=time[first],
        read_ns_N=np.nan_to_num(np.clip(_column(rows, "read_ns")[kept], 0, 1e12)).astype(np.int64),
        power_mw_N=power,
        energy_mj_N=energy,
        repeated=int((~first).sum()),
        impossible=wrong_power + wrong_energy,
    )


def _column(rows: pd.DataFrame, name: str) -> Float64:
    if name not in rows:
        return np.full(len(rows), np.nan)
    return pd.to_numeric(rows[name], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)


def _possible(values: Float64, most: float) -> tuple[Float64, int]:
    """Values with the impossible ones as NaN, and how many these were."""
    wrong = (values < 0) | (values > most)
    return np.where(wrong, np.nan, values), int(wrong.sum())
