"""``observatory power``: telemetry of devices into a run directory, with or without a program meanwhile."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from observatory.campaign.sampled_run import sampled_run
from observatory.devices.find import local_devices, readable_devices
from observatory.errors import DeviceError
from observatory.probes.power.sampler import PowerSampler
from observatory.run.manifest import RankPower
from observatory.run.masking import masked_arguments

_POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetryJob:
    """What to sample, and for how long.

    Attributes:
        selectors: devices (docs/power.md#selection); empty takes the GPUs this process may use, else all
            processors that can be read.
        command: program to run meanwhile; empty waits instead.
        seconds: how long to wait; None with a command lasts until it ends, without one until Ctrl-C or until
            all devices are lost.
        period_s: time between samples.
        calibrate_s: how long to calibrate before; 0 leaves it out.
    """

    selectors: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    seconds: float | None = None
    period_s: float = 0.05
    calibrate_s: float = 1.2


def run_telemetry(
    job: TelemetryJob,
    out: Path,
    *,
    overwrite: bool = False,
    started: Callable[[], None] | None = None,
) -> tuple[RankPower, int]:
    """Sample until the program ends, the time is up, or Ctrl-C; what was sampled is kept in any case.

    Without a program it also ends when no device is left: all were lost, or their recordings are over.

    Args:
        job: what to sample.
        out: run directory to make.
        overwrite: replace an existing run.
        started: called when sampling has begun.

    Returns:
        What was sampled, and the exit code of the command (0 without one).

    Raises:
        DeviceError: no device can be read, or the command cannot be started.
        RunError: the run directory cannot be made.
    """
    what = " ".join(masked_arguments(job.command)) if job.command else "nothing watched"
    code = 0
    with sampled_run(
        out,
        f"telemetry: {what}",
        job.selectors or _default_selectors(),
        period_s=job.period_s,
        calibrate_s=job.calibrate_s,
        notes=("power telemetry only",),
        overwrite=overwrite,
    ) as run:
        try:
            if started is not None:
                started()
            code = _wait(job, run.sampler)
        except KeyboardInterrupt:
            if job.command or job.seconds is not None:
                raise
    return run.power, code


def _default_selectors() -> tuple[str, ...]:
    local = local_devices()
    return local.selectors or readable_devices(no_gpu=local.reason)


def _wait(job: TelemetryJob, sampler: PowerSampler) -> int:
    deadline = None if job.seconds is None else time.monotonic() + job.seconds
    if not job.command:
        while sampler.sampling and (deadline is None or time.monotonic() < deadline):
            left_s = _POLL_S if deadline is None else max(0.0, deadline - time.monotonic())
            time.sleep(min(_POLL_S, left_s))
        return 0
    process = _start(job.command)
    try:
        return process.wait(job.seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        sys.stderr.write(f"{job.command[0]} was ended after {job.seconds:g} s, as asked for\n")
        return process.wait()
    except KeyboardInterrupt:  # the program got it as well
        process.wait()
        raise


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(list(command))
    except OSError as error:
        raise DeviceError(
            f"{command[0]} cannot be started: {error.strerror}", remedy="give a program on PATH"
        ) from error
