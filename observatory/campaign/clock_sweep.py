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
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd

from observatory.campaign.workloads import Window, Workload
from observatory.energy.traces import trace_of_frame
from observatory.energy.windows import energy_of_window
from observatory.errors import ClockError, ObservatoryError
from observatory.provenance import collect_provenance, new_manifest
from observatory.records import DeviceSpec, ModelSpec, RankPower
from observatory.records_clocks import ClockPoint, ClockSeries, ClockSweep, PointLabel
from observatory.store import RunWriter, open_run
from probes.power.device import PowerDevice
from probes.power.find import open_device
from probes.power.locking import ClockLease
from probes.power.sampler import PowerSampler

__all__ = ["Setting", "SweepJob", "plan_settings", "run_sweep"]

_CAP_BIT = 0x4
_THERMAL_BITS = 0x8 | 0x20 | 0x40
#: One step of the SM clock.
_STEP_MHZ = 15
#: A bit or a cap counts from this share of the window on.
_OFTEN = 0.1


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    setting: Setting
    series: int
    repeat: int
    order: int
    window: Window
    note: str | None


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
    telemetry, journal = out.with_suffix(".run"), out.with_suffix(".points.jsonl")
    manifest = new_manifest(model=ModelSpec(name=f"clock sweep into {out.name}"))
    measured: list[_Measured] = []
    problem: BaseException | None = None
    with (
        RunWriter.create(telemetry, manifest, overwrite=overwrite) as writer,
        open_device(job.device_uuid) as device,
        ClockLease.acquire(job.device_uuid, duration_s=job.longest_s) as lease,
    ):
        job = _snapped(job, lease)
        sampler = PowerSampler(
            telemetry, rank=0, ranks=1, selectors=[job.device_uuid], period_s=job.period_s, flush_s=5.0
        )
        sampler.start()
        try:
            _measure_all(job, workloads, lease, device, journal, measured, progress)
        except (ObservatoryError, KeyboardInterrupt) as error:
            problem = error
        finally:
            power = sampler.stop()
            writer.set_power(power)
            writer.update_manifest(devices=power.sampled)
        supported = lease.control.supported_sm_clocks_mhz
        limit_mw = lease.control.default_limit_mw
    if not measured:
        raise problem or ClockError("nothing was measured; see the messages above")
    sweep = _document(
        job,
        workloads,
        measured,
        power,
        open_run(telemetry).power(),
        argv=argv,
        supported=supported,
        default_limit_mw=limit_mw,
        problem=problem,
    )
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.write_text(sweep.model_dump_json(indent=1), encoding="utf-8")
    temporary.replace(out)
    journal.unlink(missing_ok=True)
    if problem is not None:
        raise problem
    return sweep


def _snapped(job: SweepJob, lease: ClockLease) -> SweepJob:
    """The job with clocks that the device supports."""
    return replace(job, clocks_mhz=tuple(lease.control.snap(clock) for clock in job.clocks_mhz))


def _measure_all(
    job: SweepJob,
    workloads: Sequence[Workload],
    lease: ClockLease,
    device: PowerDevice,
    journal: Path,
    measured: list[_Measured],
    progress: Callable[[int, int], None] | None,
) -> None:
    points = plan_settings(job, len(workloads))
    cool_c = device.read().temperature_c
    for order, (repeat, series, setting) in enumerate(points):
        note = _cool_down(device, cool_c, job)
        _apply(lease, setting)
        window = workloads[series].measure(settle_s=job.settle_s, window_s=job.window_s)
        point = _Measured(
            setting=setting, series=series, repeat=repeat, order=order, window=window, note=note
        )
        measured.append(point)
        with journal.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(asdict(point)) + "\n")
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


def _document(
    job: SweepJob,
    workloads: Sequence[Workload],
    measured: Sequence[_Measured],
    power: RankPower,
    samples: pd.DataFrame,
    *,
    argv: Sequence[str],
    supported: Sequence[int],
    default_limit_mw: int | None,
    problem: BaseException | None,
) -> ClockSweep:
    origin = collect_provenance()
    notes = [*power.notes, *dict.fromkeys(point.note for point in measured if point.note)]
    if problem is not None:
        notes.append(f"ended early, after {len(measured)} points: {type(problem).__name__}: {problem}"[:4000])
    calibration = power.calibration.get(job.device_uuid)
    spec = next((spec for spec in power.sampled if spec.uuid == job.device_uuid), None)
    series = []
    for index, workload in enumerate(workloads):
        points = tuple(_point(item, samples) for item in measured if item.series == index)
        if points:
            series.append(ClockSeries(**asdict(workload.facts), points=points))
    return ClockSweep(
        created_unix_s=time.time(),
        argv=tuple(argv),
        device=spec or DeviceSpec(kind="nvidia", uuid=job.device_uuid),
        max_sm_clock_mhz=supported[-1],
        supported_sm_clocks_mhz=tuple(supported),
        default_limit_mw=default_limit_mw,
        idle_power_mw=None if calibration is None else calibration.idle_power_mw,
        series=tuple(series),
        seed=job.seed,
        git_sha=origin["git_sha"],
        hosts=origin["hosts"],
        software=origin["software"],
        notes=tuple(notes),
    )


def _point(measured: _Measured, samples: pd.DataFrame) -> ClockPoint:
    """What the telemetry says of one window."""
    window = measured.window
    inside = samples[(samples["time_ns"] >= window.start_ns) & (samples["time_ns"] <= window.end_ns)]
    clock = inside["sm_clock_mhz"].dropna()
    reasons = inside["event_reasons"].dropna().astype("int64")
    often = 0
    for bit in (1 << position for position in range(16)):
        if len(reasons) and ((reasons & bit) > 0).mean() >= _OFTEN:
            often |= bit
    energy = energy_of_window(trace_of_frame(samples), window.start_ns, window.end_ns)
    label, reason = _label(measured.setting, clock, often if len(reasons) else None)
    temperature = inside["temperature_c"].dropna()
    return ClockPoint(
        order=measured.order,
        repeat=measured.repeat,
        requested_sm_clock_mhz=measured.setting.sm_clock_mhz,
        requested_limit_mw=measured.setting.limit_mw,
        enforced_limit_mw=_last(inside["enforced_limit_mw"]),
        iterations=max(window.iterations, 1),
        duration_s=(window.end_ns - window.start_ns) / 1e9,
        energy_mj=energy.energy_mj,
        energy_error=energy.relative_error,
        energy_source=energy.source,
        integral_energy_mj=energy.integral_mj,
        sm_clock_mhz=None if clock.empty else round(clock.median()),
        sm_clock_low_mhz=None if clock.empty else round(clock.quantile(0.05)),
        sm_clock_high_mhz=None if clock.empty else round(clock.quantile(0.95)),
        event_reasons=often if len(reasons) else None,
        power_cap_share=_cap_share(inside),
        start_temperature_c=None if temperature.empty else int(temperature.iloc[0]),
        end_temperature_c=None if temperature.empty else int(temperature.iloc[-1]),
        label=label,
        reason=reason if energy.flag is None else f"{reason}; {energy.flag}",
    )


def _label(setting: Setting, clock: pd.Series[float], reasons: int | None) -> tuple[PointLabel, str]:
    """What became of the request, and the evidence."""
    if clock.empty:
        return "unverified", "the clock was not sampled in the window"
    seen = round(float(clock.median()))
    wanted = setting.sm_clock_mhz
    met = wanted is None or abs(seen - wanted) <= _STEP_MHZ
    what = f"{seen} MHz sampled" + ("" if wanted is None else f", {wanted} asked for")
    if reasons is not None and reasons & _THERMAL_BITS:
        return "thermal", f"{what}; the driver names heat or a hardware slowdown"
    if reasons is not None and reasons & _CAP_BIT:
        return "power-capped", f"{what}; the driver names the power limit"
    return ("ok", what) if met else ("clamped", f"{what}; the driver names no reason")


def _cap_share(inside: pd.DataFrame) -> float | None:
    """Share of the window in which the limit held the clock: by the driver's counter, else by samples."""
    counter = inside["power_cap_ns"].dropna()
    lasted_ns = float(inside["time_ns"].max() - inside["time_ns"].min()) if len(inside) > 1 else 0.0
    if len(counter) > 1 and lasted_ns > 0:
        return min(1.0, max(0.0, float(counter.iloc[-1] - counter.iloc[0]) / lasted_ns))
    reasons = inside["event_reasons"].dropna().astype("int64")
    return float(((reasons & _CAP_BIT) > 0).mean()) if len(reasons) else None


def _last(values: pd.Series[float]) -> int | None:
    told = values.dropna()
    return None if told.empty else int(told.iloc[-1])
