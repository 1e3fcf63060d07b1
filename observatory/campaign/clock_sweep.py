"""``observatory clocks sweep``: one phase at several SM clocks and power limits.

Protocol:

    lease taken, watchdog ready                                  nothing is changed yet
    sampler started, idle power calibrated
    for setting in all settings x repeats, in random order:      drift and order cannot look like clocks
        rest until the chip is as cool as at the beginning       equal temperature, or a note why not
        limit set, clock locked                                  or neither, for the reference
        run `settle`, then measure whole iterations for `window`
            keep the window in the journal (OUT.points.jsonl)        a crash loses one point at the most
    lease released: everything undone
    energy, sampled clock and event reasons of every window from the telemetry; labels

Requests are kept apart from what was sampled. Nothing is locked without ``apply``.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from observatory.campaign.sweep_document import sweep_document, write_sweep
from observatory.campaign.sweep_journal import (
    JournalHead,
    JournalPoint,
    JournalSeries,
    append_line,
    holds_points,
    journal_path,
)
from observatory.campaign.workloads import Workload
from observatory.errors import ClockError, ObservatoryError
from observatory.provenance import new_manifest
from observatory.records import ModelSpec, RankPower
from observatory.records_clocks import ClockSweep
from observatory.store import RunWriter
from probes.power.device import PowerDevice
from probes.power.find import open_device
from probes.power.locking import ClockLease
from probes.power.sampler import PowerSampler

__all__ = ["Setting", "SweepJob", "plan_settings", "run_sweep"]

#: Samples are on disk after so long: a kill loses no more of them.
_FLUSH_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is asked of the device; None leaves it to the driver."""

    sm_clock_mhz: int | None = None
    limit_mw: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepJob:
    """How to sweep.

    Attributes:
        device_uuid: the GPU.
        clocks_mhz: locks to try; snapped to supported clocks.
        limits_mw: power limits to try, without a lock.
        repeats: measurements of each setting.
        settle_s: run before each window.
        window_s: length of each window; the counter's error is D / (sqrt(6) T): 1 % at 4 s and 100 ms.
        cool_c: how far above its temperature at the beginning the chip may be when a point begins.
        cool_s: longest rest for that.
        period_s: time between samples.
        seed: of the order.
    """

    device_uuid: str
    clocks_mhz: tuple[int, ...] = ()
    limits_mw: tuple[int, ...] = ()
    repeats: int = 3
    settle_s: float = 1.0
    window_s: float = 5.0
    cool_c: int = 5
    cool_s: float = 60.0
    period_s: float = 0.05
    seed: int = 0

    @property
    def longest_s(self) -> float:
        """An upper bound of how long it takes, with half as much again: when the lease expires."""
        settings = len(self.clocks_mhz) + len(self.limits_mw) + 1
        return 60.0 + 1.5 * settings * self.repeats * (self.settle_s + self.window_s + self.cool_s)


def plan_settings(job: SweepJob, series: int) -> list[tuple[int, int, Setting]]:
    """Repeat, series and setting of every point, in the order in which they run; the reference among them."""
    settings = [
        Setting(),
        *(Setting(sm_clock_mhz=clock) for clock in dict.fromkeys(job.clocks_mhz)),
        *(Setting(limit_mw=limit) for limit in dict.fromkeys(job.limits_mw)),
    ]
    points = list(itertools.product(range(job.repeats), range(series), settings))
    random.Random(job.seed).shuffle(points)
    return points


def run_sweep(
    job: SweepJob,
    workloads: Sequence[Workload],
    out: Path,
    *,
    overwrite: bool = False,
    argv: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> ClockSweep:
    """Sweep, and write the result and its raw telemetry (``OUT`` with the ending ``.run``).

    Args:
        job: how.
        workloads: one series each; all are measured in one random order.
        out: result file.
        overwrite: replace both.
        argv: command line, for the document.
        progress: told about every finished point: how many, of how many.

    Raises:
        LockRefusedError: the driver, the site or our own rules do not allow it.
        ClockError: a workload ended, or nothing was measured.
        DeviceError: the GPU cannot be read.
        RunError: the telemetry cannot be kept.
    """
    telemetry, journal = out.with_suffix(".run"), journal_path(out)
    if not overwrite and holds_points(journal):
        raise ClockError(
            f"{journal} is what a sweep that was killed has left: `observatory clocks recover {journal} "
            "--out FILE` makes a result of it; give another --out, or --force to discard it"
        )
    measured: list[JournalPoint] = []
    power: RankPower | None = None
    head: JournalHead | None = None
    problem: BaseException | None = None
    try:
        with (
            open_device(job.device_uuid) as device,
            ClockLease.acquire(job.device_uuid, duration_s=job.longest_s) as lease,
        ):
            job = _checked(job, lease)
            head = JournalHead(
                device=device.spec,
                series=tuple(JournalSeries(**asdict(workload.facts)) for workload in workloads),
                supported_sm_clocks_mhz=lease.control.supported_sm_clocks_mhz,
                default_limit_mw=lease.control.default_limit_mw,
                seed=job.seed,
                argv=tuple(argv),
            )
            # Only now, when nothing speaks against it, may an older result be replaced.
            manifest = new_manifest(model=ModelSpec(name=f"clock sweep into {out.name}"))
            with RunWriter.create(telemetry, manifest, overwrite=overwrite) as writer:
                append_line(journal, head, fresh=True)
                sampler = PowerSampler(
                    telemetry, rank=0, ranks=1, selectors=[job.device_uuid], period_s=job.period_s,
                    flush_s=_FLUSH_S,
                )  # fmt: skip
                sampler.start()
                try:
                    _measure_all(job, workloads, lease, device, journal, measured, progress)
                finally:
                    power = sampler.stop()
                    writer.set_power(power)
                    writer.update_manifest(devices=power.sampled)
    except (ObservatoryError, KeyboardInterrupt) as error:
        problem = error
    if head is None or power is None or not measured:
        if head is not None:
            journal.unlink(missing_ok=True)
        raise problem or ClockError("nothing was measured; see the messages above")
    ended = None if problem is None else f"{type(problem).__name__}: {problem}".rstrip(": ")
    sweep = sweep_document(head, measured, power, telemetry, ended=ended)
    write_sweep(sweep, out)
    journal.unlink(missing_ok=True)
    if problem is not None:
        raise problem
    return sweep


def _checked(job: SweepJob, lease: ClockLease) -> SweepJob:
    """The job with clocks that the device supports.

    Raises:
        ClockError: a clock or a limit is out of its range: better now than in the middle.
    """
    limits = lease.control.limit_range_mw
    for limit_mw in job.limits_mw:
        if limits is not None and not limits[0] <= limit_mw <= limits[1]:
            raise ClockError(
                f"{limit_mw / 1e3:g} W is no power limit of {lease.control.name}; expected "
                f"{limits[0] / 1e3:g} to {limits[1] / 1e3:g} W"
            )
    return replace(job, clocks_mhz=tuple(lease.control.snap(clock) for clock in job.clocks_mhz))


def _measure_all(
    job: SweepJob,
    workloads: Sequence[Workload],
    lease: ClockLease,
    device: PowerDevice,
    journal: Path,
    measured: list[JournalPoint],
    progress: Callable[[int, int], None] | None,
) -> None:
    points = plan_settings(job, len(workloads))
    cool_c = device.read().temperature_c
    for order, (repeat, series, setting) in enumerate(points):
        note = _cool_down(device, cool_c, job)
        _apply(lease, setting)
        window = workloads[series].measure(settle_s=job.settle_s, window_s=job.window_s)
        point = JournalPoint(
            order=order, repeat=repeat, series=series, sm_clock_mhz=setting.sm_clock_mhz,
            limit_mw=setting.limit_mw, start_ns=window.start_ns, end_ns=window.end_ns,
            iterations=window.iterations, note=note,
        )  # fmt: skip
        measured.append(point)
        append_line(journal, point)
        if progress is not None:
            progress(len(measured), len(points))


def _apply(lease: ClockLease, setting: Setting) -> None:
    """Ask for a setting, from whatever was asked for before."""
    lease.restore_limit()
    if setting.sm_clock_mhz is None:
        lease.unlock()
    else:
        lease.lock(setting.sm_clock_mhz)
    if setting.limit_mw is not None:
        lease.limit(setting.limit_mw)


def _cool_down(device: PowerDevice, cool_c: int | None, job: SweepJob) -> str | None:
    """Rest until the chip is cool; a note when it is not, or nobody knows."""
    if cool_c is None:
        return "the chip's temperature is not told: points may begin warm"
    deadline = time.monotonic() + job.cool_s
    while True:
        now_c = device.read().temperature_c
        if now_c is None or now_c <= cool_c + job.cool_c:
            return None
        if time.monotonic() >= deadline:
            return f"began at {now_c} C, {now_c - cool_c} above the beginning, after {job.cool_s:g} s of rest"
        time.sleep(0.2)
