"""``observatory clocks sweep``: one phase at several SM clocks and power limits.

Protocol:

    idle power watched, lease taken, watchdog ready              nothing is changed yet
    first lock or limit set                                      a driver that refuses says so now
    program started or model loaded, sampler started
    for setting in all settings x repeats, in random order:      drift and order cannot look like clocks
        rest until the chip is as cool as at the beginning       equal temperature, or a note why not
        limit set, clock locked                                  or neither, for the reference
        run `settle`, then measure whole iterations for `window`
            keep the window in the journal (OUT.points.jsonl)        a crash loses one point at the most
    lease released: everything undone
    energy, sampled clock and event reasons of every window from the telemetry; labels

Requests are kept apart from what was sampled. Nothing is locked without ``apply``. Where the setting was made
outside there is no lease, and nothing is set.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from observatory.campaign.sampled_run import SampledRun, sampled_run
from observatory.campaign.sweep.document import sweep_document, write_sweep
from observatory.campaign.sweep.journal import (
    JournalHead,
    JournalPoint,
    JournalSeries,
    append_line,
    claimed,
    holds_points,
    journal_path,
)
from observatory.campaign.sweep.settings import HeldDevice, SweepJob, hold_device, plan_settings
from observatory.campaign.workloads import Workload
from observatory.devices.base import PowerDevice
from observatory.devices.calibration import calibrate
from observatory.devices.find import open_device
from observatory.errors import ClockError, ObservatoryError
from observatory.run.documents.clock_sweep import ClockSweep

#: Samples are on disk after so long: a kill loses no more of them.
_FLUSH_S = 2.0


def run_sweep(
    job: SweepJob,
    workloads: contextlib.AbstractContextManager[Sequence[Workload]],
    out: Path,
    *,
    series: int,
    overwrite: bool = False,
    argv: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> ClockSweep:
    """Sweep, and write the result and its raw telemetry (``OUT`` with the ending ``.run``).

    Args:
        job: how.
        workloads: one series each, all measured in one random order; entered, that is loaded and started,
            only when the device is ours and the first setting is made.
        out: result file.
        series: how many workloads there will be.
        overwrite: replace both.
        argv: command line, for the document.
        progress: called after every finished point: how many, of how many.

    Raises:
        LockRefusedError: the driver, the site or our own rules do not allow it.
        ClockError: a workload ended, nothing was measured, or another sweep writes the same result.
        DeviceError: the GPU cannot be read.
        RunError: the telemetry cannot be kept.
    """
    with claimed(journal_path(out)):
        return _run(job, workloads, out, series, overwrite, argv, progress)


def _run(
    job: SweepJob,
    workloads: contextlib.AbstractContextManager[Sequence[Workload]],
    out: Path,
    series: int,
    overwrite: bool,
    argv: Sequence[str],
    progress: Callable[[int, int], None] | None,
) -> ClockSweep:
    telemetry, journal = out.with_suffix(".run"), journal_path(out)
    if not overwrite and holds_points(journal):
        raise ClockError(
            f"{journal} is what a sweep that was killed has left: `observatory clocks recover {journal} "
            "--out FILE` makes a result of it",
            remedy="give another --out, or --force to discard it",
        )
    if not overwrite and telemetry.exists():
        raise ClockError(
            f"{telemetry} is there already", remedy="give another --out, or --force to replace it"
        )
    measured: list[JournalPoint] = []
    run: SampledRun | None = None
    head: JournalHead | None = None
    begun = False
    problem: BaseException | None = None
    try:
        with contextlib.ExitStack() as stack:
            device = stack.enter_context(open_device(job.device_uuid))
            watched = calibrate([device]).get(device.uuid)
            held = stack.enter_context(hold_device(job, series))
            held.ask(plan_settings(held.job, series)[0][2])
            started = stack.enter_context(workloads)
            head = JournalHead(
                device=device.spec,
                series=tuple(JournalSeries(**asdict(workload.facts)) for workload in started),
                supported_sm_clocks_mhz=held.control.supported_sm_clocks_mhz,
                default_limit_mw=held.control.default_limit_mw,
                idle_power_mw=None if watched is None else watched.idle_power_mw,
                set_outside=job.set_outside,
                note=held.note,
                seed=job.seed,
                argv=tuple(argv),
            )

            def begin(head: JournalHead = head) -> None:
                nonlocal begun
                begun = True
                append_line(journal, head, fresh=True)

            # Only now, when nothing speaks against it, may an older result be replaced.
            run = stack.enter_context(
                sampled_run(
                    telemetry, f"clock sweep into {out.name}", [job.device_uuid], period_s=job.period_s,
                    flush_s=_FLUSH_S, overwrite=overwrite, created=begin,
                )
            )  # fmt: skip
            _measure_all(held, started, device, journal, measured, progress)
    except (ObservatoryError, KeyboardInterrupt) as error:
        problem = error
    if head is None or run is None or not measured:
        if begun:
            # Telemetry of no window is worth nothing, and would be in the way of the next try.
            journal.unlink(missing_ok=True)
            shutil.rmtree(telemetry, ignore_errors=True)
        raise problem or ClockError("nothing was measured", remedy="see the messages above")
    ended = None if problem is None else f"{type(problem).__name__}: {problem}".rstrip(": ")
    sweep = sweep_document(head, measured, run.power, telemetry, ended=ended)
    write_sweep(sweep, out)
    journal.unlink(missing_ok=True)
    if problem is not None:
        raise problem
    return sweep


def _measure_all(
    held: HeldDevice,
    workloads: Sequence[Workload],
    device: PowerDevice,
    journal: Path,
    measured: list[JournalPoint],
    progress: Callable[[int, int], None] | None,
) -> None:
    job = held.job
    points = plan_settings(job, len(workloads))
    cool_c = device.read().temperature_c
    for order, (repeat, series, setting) in enumerate(points):
        note = _cool_down(device, cool_c, job)
        held.ask(setting)
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


def _cool_down(device: PowerDevice, cool_c: int | None, job: SweepJob) -> str | None:
    """Rest until the chip is cool; a note when it is not, or its temperature is unknown."""
    if cool_c is None:
        return "the chip does not report its temperature: points may begin warm"
    deadline = time.monotonic() + job.cool_s
    while True:
        now_c = device.read().temperature_c
        if now_c is None or now_c <= cool_c + job.cool_c:
            return None
        if time.monotonic() >= deadline:
            return f"began at {now_c} C, {now_c - cool_c} above the beginning, after {job.cool_s:g} s of rest"
        time.sleep(0.2)
