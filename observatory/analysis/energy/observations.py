"""What the sensors measured, as windows of time with an energy each.

Shapes: N observations.

The counter gives one observation per update, [update before, update], and covers all of the time. Instant
power gives [update - W, update] with the averaging window W: 25 of every 100 ms on A100 and H100. Nothing is
interpolated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue

from observatory.analysis.energy.codes import EnergyCode
from observatory.analysis.energy.edges import find_updates
from observatory.analysis.energy.estimators import MOST_COUNTED_MW, Quantity, counted_mw
from observatory.analysis.energy.traces import PowerTrace
from observatory.devices.sensors import SensorModel
from observatory.reasons import Reason

Float64 = npt.NDArray[np.float64]

#: Longer observations, in update periods, bridge missing samples or a counter that stood still.
_LONGEST_PERIODS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observations:
    """Windows of time and their energy.

    Attributes:
        source: ``counter`` or ``power``.
        start_ns_N, end_ns_N: the windows, in time order.
        energy_mj_N: energy in each.
        shift_ns: all windows may be off by one common shift of at most this.
        own_ns: and each edge on its own by this.
        lag_low_ns, lag_high_ns: bounds of how much later than its window a value is read: what the sensor
            takes, and one update more, as some publish a value when they have measured the next.
    """

    source: Literal["counter", "power"]
    start_ns_N: Float64
    end_ns_N: Float64
    energy_mj_N: Float64
    shift_ns: float
    own_ns: float
    lag_low_ns: float
    lag_high_ns: float

    def __len__(self) -> int:
        return len(self.energy_mj_N)

    def chosen(self, which_N: npt.NDArray[np.bool_]) -> Observations:
        """Some of the observations."""
        return Observations(
            source=self.source,
            start_ns_N=self.start_ns_N[which_N],
            end_ns_N=self.end_ns_N[which_N],
            energy_mj_N=self.energy_mj_N[which_N],
            shift_ns=self.shift_ns,
            own_ns=self.own_ns,
            lag_low_ns=self.lag_low_ns,
            lag_high_ns=self.lag_high_ns,
        )


def counter_observations(trace: PowerTrace, sensor: SensorModel) -> Observations | Reason:
    """One observation per update of the counter, or why there are none."""
    if np.isnan(trace.energy_mj_N).all():
        return Reason(EnergyCode.NO_READING, {"quantity": "energy counter"})
    period_ns = None if sensor.counter_ms is None else sensor.counter_ms * 1e6
    updates = find_updates(trace.time_ns_N, trace.read_ns_N, trace.energy_mj_N, period_ns=period_ns)
    if len(updates.value_K) < 2 or updates.period_ns is None:
        return _too_few(trace.energy_mj_N, "energy counter", len(updates.value_K))
    energy, length = np.diff(updates.value_K), np.diff(updates.time_ns_K)
    fits = (energy > 0) & (length > 0) & (length <= _LONGEST_PERIODS * updates.period_ns)
    # A leap is no energy of any phase.
    fits &= counted_mw(energy, length) <= MOST_COUNTED_MW
    return Observations(
        source="counter",
        start_ns_N=updates.time_ns_K[:-1][fits],
        end_ns_N=updates.time_ns_K[1:][fits],
        energy_mj_N=energy[fits],
        shift_ns=float(np.median(updates.shift_ns_K)),
        own_ns=float(np.median(updates.own_ns_K)),
        lag_low_ns=sensor.lag_low_ms * 1e6,
        lag_high_ns=sensor.lag_high_ms * 1e6 + updates.period_ns,
    )


def power_observations(trace: PowerTrace, sensor: SensorModel) -> Observations | Reason:
    """One observation per update of instant power, or why there are none."""
    if np.isnan(trace.power_mw_N).all():
        return Reason(EnergyCode.NO_READING, {"quantity": "instant power"})
    if sensor.window_ms is None:
        return Reason(EnergyCode.AVERAGING_WINDOW_UNKNOWN)
    period_ns = None if sensor.update_ms is None else sensor.update_ms * 1e6
    updates = find_updates(
        trace.time_ns_N, trace.read_ns_N, trace.power_mw_N, period_ns=period_ns, equal_values=True
    )
    if len(updates.value_K) < 2:
        return _too_few(trace.power_mw_N, "instant power", len(updates.value_K))
    width_ns = sensor.window_ms * 1e6
    return Observations(
        source="power",
        start_ns_N=updates.time_ns_K - width_ns,
        end_ns_N=updates.time_ns_K,
        energy_mj_N=updates.value_K * width_ns * 1e-9,
        shift_ns=float(np.median(updates.shift_ns_K)),
        own_ns=float(np.median(updates.own_ns_K)),
        lag_low_ns=sensor.lag_low_ms * 1e6,
        lag_high_ns=sensor.lag_high_ms * 1e6 + (updates.period_ns or 0.0),
    )


def _too_few(value_N: Float64, quantity: Quantity, updates: int) -> Reason:
    """Why there are so few updates of a quantity: few readings, or readings that do not change."""
    readings = int((~np.isnan(value_N)).sum())
    if updates == 0 and readings > 1:
        return Reason(EnergyCode.NEVER_CHANGED, {"quantity": quantity, "readings": readings})
    values: dict[str, JsonValue] = {"quantity": quantity, "updates": updates, "readings": readings}
    return Reason(EnergyCode.FEW_UPDATES_SEEN, values)
