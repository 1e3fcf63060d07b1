"""What a clock sweep measured: one JSON document, read back from files that may be damaged or made up.

A *series* is one phase of one model at one batch size and context. Its *points* are repeats at one requested
clock or power limit, in the order in which they ran. Points keep what was asked for apart from what was seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from observatory.errors import ClockError
from observatory.run.documents.versioned import load_document
from observatory.run.manifest import DeviceSpec, EnergyFlag, Phase
from observatory.run.provenance import HostSpec
from observatory.run.records import Count, Moment, Record, Text

CLOCKS_VERSION = "1.1"

_Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
_NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
_Mhz = Annotated[int, Field(ge=1, le=100_000)]
_Milliwatts = Annotated[int, Field(ge=0, le=10_000_000_000)]

#: ``ok``: ran as asked; ``power-capped``: the power limit held the clock below the request (event reason
#: 0x4); ``thermal``: heat did (0x20, 0x40); ``braked`` (since 1.1, ``thermal`` before): a hardware
#: slowdown or the power brake did (0x8, 0x80), without a thermal bit; ``clamped``: the clock seen
#: differs from the request for no stated reason; ``unverified``: the clock could not be sampled.
PointLabel = Literal["ok", "power-capped", "thermal", "braked", "clamped", "unverified"]


class ClockPoint(Record):
    """One measurement.

    Attributes:
        order: position in the sweep as it ran, from 0.
        repeat: which repeat of its setting, from 0.
        requested_sm_clock_mhz: the lock; None without one.
        requested_limit_mw: the power limit set for this point; None leaves the device's own.
        enforced_limit_mw: the limit in force as the device reported it; None when it does not.
        iterations: iterations of the phase in the measured window.
        duration_s: length of the window.
        energy_mj: energy of the device in the window; None when neither counter nor sensor gives it.
        energy_error: half-width of the 90 % interval of ``energy_mj``, relative; None like it.
        energy_source: ``counter`` or ``integral``; None like ``energy_mj``.
        energy_flag: what must be known of ``energy_mj``, or why it is None: its error allows for it up to
            +-25 %, beyond that there is no energy; None for nothing. Since 1.1.
        integral_energy_mj: the other source next to a counter; None where there is none.
        sm_clock_mhz: median clock sampled in the window; None when not sampled.
        sm_clock_low_mhz, sm_clock_high_mhz: 5th and 95th percentile.
        event_reasons: all bits seen in at least a tenth of the samples; None when not reported.
        power_cap_share: share of the window in which the power limit held the clock down; None likewise.
        start_temperature_c, end_temperature_c: of the chip; None when not reported.
        label: see :data:`PointLabel`.
        reason: the evidence for the label, for people.
    """

    order: Count
    repeat: Count = 0
    requested_sm_clock_mhz: _Mhz | None = None
    requested_limit_mw: _Milliwatts | None = None
    enforced_limit_mw: _Milliwatts | None = None
    iterations: Annotated[int, Field(ge=1)]
    duration_s: _Positive
    energy_mj: _Positive | None = None
    energy_error: _NotNegative | None = None
    energy_source: Literal["counter", "integral"] | None = None
    energy_flag: EnergyFlag | None = None
    integral_energy_mj: _Positive | None = None
    sm_clock_mhz: _Mhz | None = None
    sm_clock_low_mhz: _Mhz | None = None
    sm_clock_high_mhz: _Mhz | None = None
    event_reasons: Count | None = None
    power_cap_share: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    start_temperature_c: int | None = None
    end_temperature_c: int | None = None
    label: PointLabel
    reason: Text = ""

    @property
    def iteration_s(self) -> float:
        """Seconds of one iteration."""
        return self.duration_s / self.iterations


class ClockSeries(Record):
    """One phase at one batch and context.

    Attributes:
        name: what ran, for people: a model and phase, or a command.
        phase: phase of the model.
        batch_size: sequences; None where that has no meaning.
        context_tokens: tokens of context per sequence; None likewise.
        tokens_per_iteration: input tokens (prefill) or output tokens (decode) of one iteration; None
            likewise.
        points: the measurements.
    """

    name: Text
    phase: Phase = "unknown"
    batch_size: Count | None = None
    context_tokens: Count | None = None
    tokens_per_iteration: Count | None = None
    points: Annotated[tuple[ClockPoint, ...], Field(min_length=1, max_length=100_000)]


class ClockSweep(Record):
    """Result of ``observatory clocks sweep``.

    Attributes:
        schema_version: ``major.minor``; readers refuse a newer major.
        created_unix_s: wall-clock label.
        argv: command line.
        device: the device.
        max_sm_clock_mhz: highest supported clock; None when not reported.
        supported_sm_clocks_mhz: all clocks the device can be locked to; None when not reported.
        default_limit_mw: default power limit; None when not reported.
        idle_power_mw: power without load before the sweep; None when not reported.
        set_outside: locks and limits were set from outside; requests are what was stated about them.
        series: the measurements.
        seed: of the random order.
        git_sha, hosts, software: where it was measured.
        notes: what a reader must know.
    """

    schema_version: Annotated[str, Field(pattern=r"^\d{1,6}\.\d{1,6}$")] = CLOCKS_VERSION
    created_unix_s: Moment
    argv: tuple[Text, ...] = ()
    device: DeviceSpec
    max_sm_clock_mhz: _Mhz | None = None
    supported_sm_clocks_mhz: Annotated[tuple[_Mhz, ...], Field(max_length=4096)] | None = None
    default_limit_mw: _Milliwatts | None = None
    idle_power_mw: _Milliwatts | None = None
    set_outside: bool = False
    series: Annotated[tuple[ClockSeries, ...], Field(min_length=1, max_length=1000)]
    seed: int = 0
    git_sha: Text | None = None
    hosts: tuple[HostSpec, ...] = ()
    software: dict[str, Text] = Field(default_factory=dict)
    notes: tuple[Text, ...] = ()

    @model_validator(mode="after")
    def _orders_differ(self) -> ClockSweep:
        orders = [point.order for series in self.series for point in series.points]
        if len(set(orders)) != len(orders):
            raise ValueError("two points have the same place in the order")
        return self


def load_sweep(path: Path | str) -> ClockSweep:
    """Read and check a sweep.

    Raises:
        ClockError: not readable, too large, of a newer schema, or not what the schema says.
    """
    return load_document(
        ClockSweep,
        path,
        version=CLOCKS_VERSION,
        what="clock sweep",
        remedy="make one with `observatory clocks sweep`",
        failure=ClockError,
    )
