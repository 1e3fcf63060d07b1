"""What a run's power samples alone say of a device: readings of all, of each state, what is missing."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from observatory.run.records import Count, Record, Text

#: By the event reasons of a sample: ``idle`` has the idle bit, ``busy`` has it not. Among the busy ones:
#: ``power cap``, ``thermal`` and ``brake`` have a bit of that, ``free`` has none that holds a clock down.
StateName = Literal["busy", "free", "power cap", "thermal", "brake", "idle"]
#: Of what no sample holds a valid reading. ``power of the phase``: there is power, but all of it may be that
#: of what ran before; ``power beside a limit``: there are both, but no power after the first limit.
#: ``highest SM clock`` is of the device, not of samples.
Missing = Literal[
    "event reasons",
    "power",
    "power of the phase",
    "power limit",
    "power beside a limit",
    "SM clock",
    "highest SM clock",
]
#: Where a share of time comes from: the driver's counter of nanoseconds, or the bits of the samples.
ShareSource = Literal["counter", "event reasons"]
FindingCode = Literal[
    "limit binds",
    "limit does not bind",
    "limit not known",
    "SM clock",
    "SM clock below the highest",
    "SM clock not known",
    "slowed by heat",
    "slowed by the brake",
    "idle",
    "little power",
    "states in part",
    "states not known",
    "power over limit not known",
]

#: A clock within this range is steady: two steps of NVIDIA devices.
STEADY_MHZ = 30.0
#: A limit was changed when its lowest and highest reading differ by more than this: drivers round limits.
_CHANGED = 1.01

_Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Readings(Record):
    """Of some samples of a device; None where none of them holds a valid reading.

    Attributes:
        samples: how many.
        power_samples, clock_samples: how many of them hold a valid power, a valid clock.
        power_median_mw, power_p95_mw, power_highest_mw: of the instant power.
        power_over_limit: 95 % of power over the limit in force at the time.
        highest_power_over_limit: the highest of it.
        limit_mw, highest_limit_mw: the lowest and the highest limit in force.
        sm_clock_low_mhz, sm_clock_mhz, sm_clock_high_mhz: 5 %, median and 95 % of the clock.
        sm_clock_highest_mhz: the highest of it.
    """

    samples: Count
    power_samples: Count = 0
    clock_samples: Count = 0
    power_median_mw: float | None = None
    power_p95_mw: float | None = None
    power_highest_mw: float | None = None
    power_over_limit: float | None = None
    highest_power_over_limit: float | None = None
    limit_mw: float | None = None
    highest_limit_mw: float | None = None
    sm_clock_low_mhz: float | None = None
    sm_clock_mhz: float | None = None
    sm_clock_high_mhz: float | None = None
    sm_clock_highest_mhz: float | None = None

    @property
    def is_steady(self) -> bool:
        """Whether the clock hardly moves."""
        low_mhz, high_mhz = self.sm_clock_low_mhz, self.sm_clock_high_mhz
        return low_mhz is not None and high_mhz is not None and high_mhz - low_mhz <= STEADY_MHZ

    @property
    def limit_changed(self) -> bool:
        """Whether the limit in force was changed."""
        low_mw, high_mw = self.limit_mw, self.highest_limit_mw
        return low_mw is not None and high_mw is not None and high_mw > _CHANGED * low_mw


class DeviceTelemetry(Readings):
    """One device, or one phase on it; the readings are those of all its samples, idle ones among them.

    Attributes:
        device_uuid: the device.
        phase: the phase; None for the whole run.
        duration_s: from the first sample to the last.
        reason_samples: samples that hold event reasons.
        states: readings of the samples in each state; None where no sample holds event reasons.
        power_cap_share, thermal_share, brake_share: share of all time in which the limit, heat, and hardware
            slowdown or the power brake held the clock down; None when not known.
        power_cap_busy_share, thermal_busy_share, brake_busy_share: that as a share of the busy time; None
            where no sample is known to be busy.
        power_cap_source, thermal_source: where those come from; the brake's from event reasons.
        idle_share: share of the samples with event reasons that the driver calls idle; None without any.
        max_sm_clock_mhz: highest clock of the device.
        idle_power_mw: power of the idle device, found when sampling began.
        cap: whether the limit binds while the device is busy; None when that is not known.
        missing: what no sample holds, or the device does not report.
        findings: sentences.
        finding_codes: the code of each sentence, in the same order.
    """

    device_uuid: Text
    phase: Text | None = None
    duration_s: float
    reason_samples: Count = 0
    states: dict[StateName, Readings] | None = None
    power_cap_share: _Share | None = None
    power_cap_busy_share: _Share | None = None
    power_cap_source: ShareSource | None = None
    thermal_share: _Share | None = None
    thermal_busy_share: _Share | None = None
    thermal_source: ShareSource | None = None
    brake_share: _Share | None = None
    brake_busy_share: _Share | None = None
    idle_share: _Share | None = None
    max_sm_clock_mhz: float | None = None
    idle_power_mw: float | None = None
    cap: Literal["binds", "does not bind"] | None = None
    missing: tuple[Missing, ...] = ()
    findings: tuple[Text, ...] = ()
    finding_codes: tuple[FindingCode, ...] = ()

    @property
    def busy(self) -> Readings:
        """Readings of the busy samples; of all where they cannot be selected."""
        return self if self.states is None else self.states["busy"]

    @property
    def limit_needs_readings(self) -> bool:
        """Whether nothing is known about the limit because power or the limit itself is missing."""
        no_share = self.states is None and self.power_cap_share is None
        return self.cap is None and no_share and self.highest_power_over_limit is None

    @property
    def missing_for_limit(self) -> tuple[Missing, ...]:
        """What is missing for statements on power and limit."""
        return tuple(name for name in self.missing if name not in ("SM clock", "highest SM clock"))

    def is_below_highest(self, readings: Readings) -> bool:
        """Whether the clock of these readings is steady and lower than the device's highest."""
        most_mhz, clock_mhz = self.max_sm_clock_mhz, readings.sm_clock_mhz
        if most_mhz is None or clock_mhz is None or readings.clock_samples < 2 or not readings.is_steady:
            return False
        return clock_mhz < most_mhz - STEADY_MHZ

    def in_state(self, name: StateName) -> Readings | None:
        """Readings of the samples in a state; None where no sample holds event reasons."""
        return None if self.states is None else self.states[name]


class TelemetryAdvice(Record):
    """What ``observatory clocks recommend --telemetry RUN`` prints.

    Attributes:
        run: its directory.
        devices: every device, then its phases.
        cannot: what telemetry does not show and a sweep does.
        next_steps: commands.
    """

    run: Text
    devices: tuple[DeviceTelemetry, ...]
    cannot: Text
    next_steps: tuple[Text, ...]
