"""The plan of a clock sweep: what would be done, whether it may be, and how others do it. Sets nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from observatory.campaign.sweep.settings import SweepJob, checked_job, plan_settings
from observatory.devices.base import Sample
from observatory.devices.event_reasons import reason_bits, reason_name
from observatory.devices.find import open_device
from observatory.errors import ClockError
from observatory.locks.commands import plan_commands
from observatory.locks.control import ClockControl
from observatory.locks.locking import refuse_leased
from observatory.locks.status import lock_outlook
from observatory.locks.words import LockCode, outlook_words
from observatory.reasons import Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """What a sweep would do.

    Attributes:
        job: with clocks that the device supports.
        measurements: how many windows.
        outlook: whether the clocks may be locked (:func:`observatory.locks.status.lock_outlook`).
        now: what the device reports at this moment.
        commands: lines by what they do; empty where clocks may be locked, or must not be.
    """

    job: SweepJob
    measurements: int
    outlook: Reason
    now: str
    commands: dict[str, list[str]]

    def sentences(self, *, refused: str | None = None) -> list[str]:
        """For people; after a refusal only what still holds."""
        job = self.job
        clocks = ", ".join(map(str, job.clocks_mhz))
        limits = ", ".join(f"{limit / 1e3:g}" for limit in job.limits_mw)
        settings = [
            "unlocked",
            *([f"locked to {clocks} MHz"] if clocks else []),
            *([f"limited to {limits} W"] if limits else []),
        ]
        least_s = self.measurements * (job.settle_s + job.window_s)
        lines = [
            f"{self.measurements} measurements of {job.window_s:g} s on {job.device_uuid}, in random order: "
            f"{', '.join(settings)}; {least_s:.0f} s and rests between; nothing was touched: --apply does it",
            f"clocks: {outlook_words(self.outlook)}",
        ]
        telemetry = (
            "what telemetry alone shows of the program, at the clock it has: observatory power --out RUN -- "
            "PROGRAM, then observatory clocks recommend --telemetry RUN"
        )
        return [*(lines if refused is None else []), f"now: {self.now}", *([telemetry] if refused else [])]

    def document(self) -> dict[str, Any]:
        """For programs."""
        return {
            "device_uuid": self.job.device_uuid,
            "clocks_mhz": list(self.job.clocks_mhz),
            "limits_mw": list(self.job.limits_mw),
            "measurements": self.measurements,
            "window_s": self.job.window_s,
            "locking": outlook_words(self.outlook),
            "locking_reason": self.outlook.document(),
            "now": self.now,
            "commands": self.commands,
        }


def make_plan(
    job: SweepJob,
    series: int,
    *,
    options: Mapping[str, object],
    out: Path,
    program: Sequence[str] = (),
    wrapper: str | None = None,
    refused: bool = False,
) -> SweepPlan:
    """Plan a sweep; the device is read, nothing is set.

    Args:
        job: how to sweep.
        series: how many series.
        options: of the command line, which the commands repeat; None for those that were not given.
        out: result file.
        program: the user's own.
        wrapper: the site's own command.
        refused: the driver has refused already, whatever it looks like.

    Raises:
        ClockError: a clock or a limit is out of its range, or the wrapper is none.
        LockRefusedError: it is no NVIDIA GPU.
        DeviceError: the GPU cannot be read.
    """
    with ClockControl(job.device_uuid) as control, open_device(job.device_uuid) as device:
        job = checked_job(job, control)
        default_limit_mw = control.default_limit_mw
        now = device.read()
    try:
        refuse_leased(job.device_uuid)
        outlook = lock_outlook(job.device_uuid)
    except ClockError as error:
        outlook = Reason(LockCode.UNAVAILABLE, {"error": str(error)})
    kept = [
        word
        for name, value in options.items()
        if value is not None
        for word in (name, f"{value:g}" if isinstance(value, float) else str(value))
    ]
    commands: dict[str, list[str]] = {}
    if outlook.code is LockCode.NOT_PERMITTED or refused or wrapper is not None:
        commands = plan_commands(
            job.device_uuid,
            job.clocks_mhz,
            job.limits_mw,
            sweep=["observatory", "clocks", "sweep", "--device", job.device_uuid, *kept],
            program=program,
            stem=str(out.with_suffix("")),
            default_limit_mw=default_limit_mw,
            wrapper=wrapper,
        )
    return SweepPlan(
        job=job,
        measurements=len(plan_settings(job, series)),
        outlook=outlook,
        now=_now(now, default_limit_mw),
        commands=commands,
    )


def _now(sample: Sample, default_limit_mw: int | None) -> str:
    """A reading in words."""
    parts = []
    if sample.sm_clock_mhz is not None:
        parts.append(f"{sample.sm_clock_mhz} MHz")
    power_mw = sample.power_mw if sample.power_mw is not None else sample.average_power_mw
    if power_mw is not None:
        parts.append(f"{power_mw / 1e3:.0f} W")
    if sample.enforced_limit_mw is not None:
        lowered = default_limit_mw is not None and sample.enforced_limit_mw < default_limit_mw
        default = f", below the default of {(default_limit_mw or 0) / 1e3:g} W" if lowered else ""
        parts.append(f"power limit {sample.enforced_limit_mw / 1e3:g} W{default}")
    if sample.temperature_c is not None:
        parts.append(f"{sample.temperature_c} C")
    if sample.event_reasons is not None:
        names = ", ".join(map(reason_name, reason_bits(sample.event_reasons)))
        parts.append(f"event reasons: {names or 'none'}")
    return "; ".join(parts) or "the device reports nothing"
