"""The sampling process: one per node, which reads its job from standard input.

It reads every device once a period and writes the rows into the run. It ends at ``stop``, when its
input is closed, at SIGTERM, or when the process that started it is gone; then it writes what it has. Ctrl-C
goes to the whole terminal: the program that is watched decides what becomes of it, so it is ignored here.

Schedule: instant k is due at start + k x period on the monotonic clock. An instant that comes late by a
period or more is left out rather than made up for, so that a slow driver is not asked more often.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import pyarrow as pa

from observatory.devices.base import PowerDevice, Sample
from observatory.devices.calibration import calibrate
from observatory.devices.find import open_device
from observatory.errors import DeviceLostError, ObservatoryError
from observatory.probes.power.job import SamplerJob, SamplerReady, SamplerReport
from observatory.run import TableAppender
from observatory.run.manifest import SamplerCost
from observatory.run.tables import POWER_SCHEMA

_COLUMNS = tuple(field.name for field in fields(Sample))
#: Latencies kept for the percentiles of the report; at 20 samples a second over half a day of one device.
_MOST_LATENCIES = 1 << 20


def sample_rows(samples: Sequence[Sample], late_ns: Sequence[int]) -> pa.Table:
    """Samples as rows of the power table; ``late_ns`` is how late each was against its schedule."""
    columns = {name: [getattr(sample, name) for sample in samples] for name in _COLUMNS}
    columns["late_ns"] = list(late_ns)
    return pa.Table.from_arrays(
        [pa.array(columns[field.name], field.type) for field in POWER_SCHEMA], schema=POWER_SCHEMA
    )


class Sampling:
    """Samples devices into a run until it is stopped.

    Attributes:
        notes: devices that were lost, rows that could not be written.
    """

    def __init__(self, job: SamplerJob, devices: Sequence[PowerDevice]) -> None:
        self.notes: list[str] = []
        self._job = job
        self._devices = list(devices)
        self._appender = TableAppender(job.run, rank=job.rank, ranks=job.ranks)
        self._samples: list[Sample] = []
        self._late_ns: list[int] = []
        self._read_us: list[float] = []
        self._late_us: list[float] = []
        self._instants = self._missed = 0
        self._is_ending = False

    def end(self) -> None:
        """End at the next instant; may be called by a signal handler."""
        self._is_ending = True

    def run(self) -> SamplerReport:
        """Sample until the end, write everything, and say what it cost."""
        cpu_s, began_ns = time.process_time(), time.monotonic_ns()
        period_ns = round(self._job.period_s * 1e9)
        due_ns = flushed_ns = began_ns
        while self._devices and not self._ended(due_ns):
            self._take(due_ns)
            if time.monotonic_ns() - flushed_ns > self._job.flush_s * 1e9:
                self._write()
                flushed_ns = time.monotonic_ns()
            behind = max(0, (time.monotonic_ns() - due_ns) // period_ns)
            self._missed += behind
            due_ns += period_ns * (1 + behind)
        self._write()
        for device in self._devices:
            device.close()
        lasted_s = (time.monotonic_ns() - began_ns) / 1e9
        return SamplerReport(
            cost=SamplerCost(
                samples=self._instants,
                missed=self._missed,
                cpu_share=round((time.process_time() - cpu_s) / lasted_s, 5) if lasted_s else None,
                **_percentiles("read_us", self._read_us),
                **_percentiles("late_us", self._late_us),
            ),
            notes=tuple(dict.fromkeys(self.notes)),
        )

    def _ended(self, due_ns: int) -> bool:
        """Wait for the next instant; whether sampling is over."""
        while True:
            left_s = (due_ns - time.monotonic_ns()) / 1e9
            readable, _, _ = select.select([sys.stdin], [], [], max(0.0, left_s))
            if readable or self._is_ending or os.getppid() != self._job.parent:
                return True
            if left_s <= 0.0:
                return False

    def _take(self, due_ns: int) -> None:
        self._instants += 1
        for device in list(self._devices):
            late_ns = max(0, time.monotonic_ns() - due_ns)
            try:
                sample = device.read()
            except DeviceLostError as error:
                self._devices.remove(device)
                self.notes.append(f"{device.uuid} was lost after {self._instants - 1} samples: {error}")
                continue
            self._samples.append(sample)
            self._late_ns.append(late_ns)
            if len(self._read_us) < _MOST_LATENCIES:
                self._read_us.append(sample.read_ns / 1e3)
                self._late_us.append(late_ns / 1e3)

    def _write(self) -> None:
        """Write what has gathered; a full disk loses these rows, is stated, and sampling goes on."""
        if not self._samples:
            return
        try:
            self._appender.append("power", sample_rows(self._samples, self._late_ns))
            self._appender.flush()
        except ObservatoryError as error:
            self.notes.append(str(error))
        self._samples, self._late_ns = [], []


def main() -> int:
    """Take the job from standard input, answer on standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    job = SamplerJob.model_validate_json(sys.stdin.readline())
    devices: list[PowerDevice] = []
    try:
        # One by one, so that those opened before one that fails are known and closed.
        for selector in job.selectors:
            devices.append(open_device(selector))  # noqa: PERF401
        calibration = calibrate(devices, duration_s=job.calibrate_s) if job.calibrate_s > 0 else {}
    except ObservatoryError as error:
        for device in devices:
            device.close()
        _answer(SamplerReady(error=str(error)))
        return 1
    sampling = Sampling(job, devices)
    sample_rows((), ())  # the first table loads what pyarrow puts off, pandas too: now, not while it samples
    signal.signal(signal.SIGTERM, lambda *_: sampling.end())
    _answer(
        SamplerReady(
            devices=tuple(device.spec for device in devices),
            unavailable={device.uuid: dict(device.unavailable) for device in devices},
            calibration=calibration,
        )
    )
    _answer(sampling.run())
    return 0


def _answer(record: SamplerReady | SamplerReport) -> None:
    try:
        sys.stdout.write(record.model_dump_json() + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # who asked is gone; the rows are written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _percentiles(name: str, values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    middle, high = np.quantile(values, [0.5, 0.99])
    return {f"{name}_p50": round(float(middle), 1), f"{name}_p99": round(float(high), 1)}


if __name__ == "__main__":
    sys.exit(main())
