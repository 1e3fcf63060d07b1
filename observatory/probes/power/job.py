"""The messages between the watched process and its sampling process.

One JSON object a line. The watched process sends a :class:`SamplerJob`, then the line ``stop``; the sampling
process answers with a :class:`SamplerReady` when its first sample is taken, and with a :class:`SamplerReport`
when it has written everything.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from observatory.run.manifest import DeviceCalibration, DeviceSpec, SamplerCost
from observatory.run.records import Count, Record, Text


class SamplerJob(Record):
    """What to sample.

    Attributes:
        run: existing run directory.
        rank: rank whose folder takes the rows.
        ranks: ranks of the run.
        selectors: devices, as ``observatory.devices.find.open_device`` understands them.
        period_s: time between samples.
        calibrate_s: how long to calibrate before; 0 leaves it out.
        flush_s: seconds after which samples are on disk.
        parent: process that asks; when it is gone, sampling ends.
    """

    run: str
    rank: Count
    ranks: Annotated[int, Field(ge=1)]
    selectors: Annotated[tuple[Text, ...], Field(min_length=1, max_length=256)]
    period_s: Annotated[float, Field(ge=0.001, le=60.0)]
    calibrate_s: Annotated[float, Field(ge=0.0, le=60.0)]
    flush_s: Annotated[float, Field(gt=0.0, le=3600.0)]
    parent: Annotated[int, Field(ge=1)]


class SamplerReady(Record):
    """Sampling has started, or why it cannot.

    Attributes:
        error: one sentence; None when sampling has started.
        devices: what is sampled.
        unavailable: per device UUID and quantity, why it is unavailable.
        calibration: per device UUID.
    """

    error: Text | None = None
    devices: tuple[DeviceSpec, ...] = ()
    unavailable: dict[str, dict[str, Text]] = Field(default_factory=dict)
    calibration: dict[str, DeviceCalibration] = Field(default_factory=dict)


class SamplerReport(Record):
    """Sampling has ended.

    Attributes:
        cost: what it cost.
        notes: devices that were lost, rows that could not be written.
    """

    cost: SamplerCost
    notes: tuple[Text, ...] = ()
