"""Starts and ends the sampling process of a node, from inside the process that is watched."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from pydantic import ValidationError

from observatory.errors import DeviceError
from observatory.host.children import python_module
from observatory.probes.power.job import SamplerJob, SamplerReady, SamplerReport
from observatory.run.manifest import DeviceSpec, RankPower
from observatory.run.records import Record

#: How long the process may take to start: a cold driver takes several seconds to be opened.
_START_S = 90.0
#: How long it may take to write what it has, on a slow file system, before it is ended.
_END_S = 15.0
#: Room for the calibration of 256 devices.
_MOST_ANSWER_BYTES = 4 << 20

Answer = TypeVar("Answer", bound=Record)


class PowerSampler:
    """One sampling process, from ``start`` to ``stop``; also a context manager.

    Nothing of it runs in the watched process while it samples. A process forked from the watched one may call
    ``abandon`` and leaves the sampling to its parent.
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        *,
        rank: int,
        ranks: int,
        selectors: Sequence[str],
        own_devices: Sequence[str] = (),
        period_s: float = 0.05,
        calibrate_s: float = 1.2,
        flush_s: float = 10.0,
    ) -> None:
        """Describe what to sample.

        Args:
            run: run directory, which exists.
            rank: rank whose folder takes the rows.
            ranks: ranks of the run.
            selectors: devices (docs/power.md#selection).
            own_devices: UUIDs of the devices that this rank itself computes on.
            period_s: time between samples, seconds.
            calibrate_s: how long to calibrate at the start; 0 leaves it out.
            flush_s: seconds after which samples are on disk.

        Raises:
            DeviceError: an option that does not fit.
        """
        try:
            self._job = SamplerJob(
                run=str(Path(run).absolute()),
                rank=rank,
                ranks=ranks,
                selectors=tuple(selectors),
                period_s=period_s,
                calibrate_s=calibrate_s,
                flush_s=flush_s,
                parent=os.getpid(),
            )
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            raise DeviceError(
                f"power cannot be sampled with {problem['loc'][0]} = {str(problem['input'])[:80]!r}: "
                f"{problem['msg']}"
            ) from error
        self._own_devices = tuple(own_devices)
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self._ready = SamplerReady()

    def start(self) -> None:
        """Start sampling and wait until it has begun, calibration included.

        Raises:
            DeviceError: a device cannot be opened, or the process does not start.
        """
        self._process = subprocess.Popen(
            python_module("observatory.probes.power.sampling"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        try:
            self._send(self._job.model_dump_json().encode() + b"\n")
            self._ready = self._answer(SamplerReady, _START_S + self._job.calibrate_s)
        except BaseException:
            self._end_process()
            raise
        if self._ready.error is not None:
            self._end_process()
            raise DeviceError(self._ready.error)

    @property
    def devices(self) -> tuple[DeviceSpec, ...]:
        """What is sampled; empty before ``start``."""
        return self._ready.devices

    def begun(self) -> RankPower:
        """What is sampled and how, before anything of it is known to have ended."""
        return RankPower(
            own_devices=self._own_devices,
            sampled=self._ready.devices,
            period_s=self._job.period_s,
            unavailable=self._ready.unavailable,
            calibration=self._ready.calibration,
        )

    @property
    def sampling(self) -> bool:
        """Whether the process still samples: it ends by itself when all its devices are lost."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> RankPower:
        """End sampling, and say what was sampled; what was written before is kept whatever happens here."""
        notes: tuple[str, ...] = ()
        report: SamplerReport | None = None
        if self._process is not None:
            try:
                with contextlib.suppress(BrokenPipeError):
                    self._send(b"stop\n")
                report = self._answer(SamplerReport, _END_S)
                notes = report.notes
            except DeviceError as error:
                notes = (f"power sampling did not end in order: {error}",)
            finally:
                self._end_process()
        cost = None if report is None else report.cost
        return self.begun().model_copy(update={"cost": cost, "notes": notes})

    def abandon(self) -> None:
        """Forget the process without ending it: what a forked child does with its parent's."""
        if self._process is not None:
            _close(self._process)
            self._process.returncode = 0  # not ours to wait for
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _send(self, line: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(line)
        self._process.stdin.flush()

    def _answer(self, kind: type[Answer], timeout_s: float) -> Answer:
        """The next line of the process as a record."""
        assert self._process is not None
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            left_s = deadline - time.monotonic()
            if left_s <= 0.0 or len(self._unread) > _MOST_ANSWER_BYTES:
                raise DeviceError(
                    f"the sampling process did not answer within {timeout_s:g} s; a driver that hangs does "
                    "this: try `observatory doctor`, or run without power"
                )
            readable, _, _ = select.select([descriptor], [], [], left_s)
            if readable:
                piece = os.read(descriptor, 1 << 16)
                if not piece:
                    code = self._process.wait(_END_S)
                    raise DeviceError(
                        f"the sampling process ended with exit code {code}; its message is above"
                    )
                self._unread += piece
        line, self._unread = self._unread.split(b"\n", 1)
        try:
            return kind.model_validate_json(line)
        except ValidationError as error:
            raise DeviceError(f"the sampling process answered something else: {line[:200]!r}") from error

    def _end_process(self) -> None:
        """Ask, then terminate, then kill, by its id."""
        process = self._process
        if process is None:
            return
        self._process = None
        _close(process)
        for end in (process.terminate, process.kill):
            try:
                process.wait(_END_S / 3)
                return
            except subprocess.TimeoutExpired:
                end()
        process.wait()


def _close(process: subprocess.Popen[bytes]) -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
