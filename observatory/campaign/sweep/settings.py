"""What is asked of the device in a clock sweep, in which order, and by whom it is set.

Without the right to lock clocks, they are set from outside before the sweep starts: `srun --gpu-freq`, an
administrator, zeusd, a site's wrapper. The sweep then only states what was set, measures, and lets the
sampled clock verify it, one setting a result file; `clocks fit` joins the files.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from observatory.errors import ClockError
from observatory.locks.control import ClockControl
from observatory.locks.locking import ClockLease, refuse_leased
from observatory.locks.words import refusal_words

#: A limit in force may differ from the stated one by so much.
_SAME_LIMIT = 0.01
#: Loading a model, or a program's first line, may take so long while the first lock is held.
_LOADING_S = 660.0


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
        set_outside: the clock and the limit, one of each at most, were set from outside: nothing is set.
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
    set_outside: bool = False
    repeats: int = 3
    settle_s: float = 1.0
    window_s: float = 5.0
    cool_c: int = 5
    cool_s: float = 60.0
    period_s: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be one state of a device.

        Raises:
            ClockError: several clocks or limits that are stated as set at once.
        """
        if self.set_outside and max(len(self.clocks_mhz), len(self.limits_mw)) > 1:
            raise ClockError(
                f"set outside are {len(self.clocks_mhz)} clocks and {len(self.limits_mw)} limits",
                expected="one of each at most: sweep once per setting, and give all results to `clocks fit`",
            )

    def longest_s(self, series: int) -> float:
        """An upper bound of how long it takes, with half as much again: when the lease expires."""
        points = len(plan_settings(self, series))
        return _LOADING_S + 1.5 * points * (self.settle_s + self.window_s + self.cool_s)


def plan_settings(job: SweepJob, series: int) -> list[tuple[int, int, Setting]]:
    """Repeat, series and setting of every point, in the order in which they run; the reference among them.

    A lock or a limit comes first, so that a driver that does not permit it says so before anything has run.
    A lock rather than a limit: it replaces one that was left over, so that all unlocked points are alike.
    """
    if job.set_outside:
        settings = [
            Setting(sm_clock_mhz=next(iter(job.clocks_mhz), None), limit_mw=next(iter(job.limits_mw), None))
        ]
    else:
        settings = [
            Setting(),
            *(Setting(sm_clock_mhz=clock) for clock in dict.fromkeys(job.clocks_mhz)),
            *(Setting(limit_mw=limit) for limit in dict.fromkeys(job.limits_mw)),
        ]
    points = list(itertools.product(range(job.repeats), range(series), settings))
    random.Random(job.seed).shuffle(points)
    first = min(
        range(len(points)),
        key=lambda index: (points[index][2].sm_clock_mhz is None, points[index][2].limit_mw is None),
    )
    return [points[first], *points[:first], *points[first + 1 :]]


def checked_job(job: SweepJob, control: ClockControl) -> SweepJob:
    """The job with clocks that the device supports. Reads only.

    Raises:
        ClockError: a clock or a limit is out of its range, or not the one in force although it was set
            outside: better now than in the middle.
    """
    limits = control.limit_range_mw
    for limit_mw in job.limits_mw:
        if limits is not None and not limits[0] <= limit_mw <= limits[1]:
            raise ClockError(
                f"{limit_mw / 1e3:g} W is no power limit of {control.name}",
                expected=f"{limits[0] / 1e3:g} to {limits[1] / 1e3:g} W",
            )
        held_mw = control.power_limit_mw
        if job.set_outside and held_mw is not None and abs(held_mw - limit_mw) > _SAME_LIMIT * limit_mw:
            raise ClockError(
                f"a limit of {limit_mw / 1e3:g} W was set outside, it is said, and {held_mw / 1e3:g} W are "
                f"in force on {control.name}",
                remedy="have it set first, or state the one in force",
            )
    return replace(job, clocks_mhz=tuple(dict.fromkeys(control.snap(clock) for clock in job.clocks_mhz)))


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldDevice:
    """A device for the time of a sweep.

    Attributes:
        job: the sweep, with clocks that the device supports.
        control: what the driver says of it.
        ask: brings a setting about, from whatever was set before.
        note: what a reader of the result must know; None for nothing.
    """

    job: SweepJob
    control: ClockControl
    ask: Callable[[Setting], None]
    note: str | None = None


@contextlib.contextmanager
def hold_device(job: SweepJob, series: int) -> Iterator[HeldDevice]:
    """The device under a lease of our own; where everything was set outside, without.

    Args:
        job: the sweep.
        series: how many series it has.

    Raises:
        LockRefusedError: it is partitioned, shared or leased by another process.
        ClockError: see :func:`checked_job`.
        DeviceError: there is no such GPU.
    """
    if not job.set_outside:
        with ClockLease.acquire(job.device_uuid, duration_s=job.longest_s(series)) as lease:

            def ask(setting: Setting) -> None:
                lease.restore_limit()
                if setting.sm_clock_mhz is None:
                    lease.unlock()
                else:
                    lease.lock(setting.sm_clock_mhz)
                if setting.limit_mw is not None:
                    lease.limit(setting.limit_mw)

            yield HeldDevice(job=checked_job(job, lease.control), control=lease.control, ask=ask)
        return
    refuse_leased(job.device_uuid)
    with ClockControl(job.device_uuid) as control:
        shared = control.refusal()
        yield HeldDevice(
            job=checked_job(job, control),
            control=control,
            ask=lambda _: None,
            note=None
            if shared is None
            else f"energy and clock may be those of others too: {refusal_words(shared)}",
        )
