"""Devices that do not exist, with known time and energy at every clock, and the sweeps they would give.

The formulas are written out here a second time, in scalars, as they stand at the top of ``fake_nvml.c``, so
that a fault in the package's own model cannot cancel out. Nothing here was measured on any hardware.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from observatory.run.documents.clock_sweep import ClockPoint, ClockSeries, ClockSweep, PointLabel
from observatory.run.manifest import DeviceSpec, Phase

STEP_MHZ = 15
#: Locks of a usual sweep; the last two are above what the devices allow.
LOCKS_MHZ = (480, 600, 690, 780, 870, 990, 1110, 1230, 1350, 1470, 1590, 1710, 1830, 1905, 1980)


@dataclass(frozen=True)
class SyntheticDevice:
    """One device running one phase.

    t(f) = host + softmax(memory + memory_slope * f0/f, compute * f0/f), a plain maximum for sharpness 0;
    V(f) = 1 - voltage_slope * (1 - max(f/f0, ridge)), or the steps of a table of (up to MHz, V),
    P(f) = static + clock * f/f0 * V^2 + (memory_j + op_j V^2)/t. Where a limit holds the clock, energy is
    more by the part ``hunting`` and, unless that is 0, the clock moves by 60 MHz to either side. ``kernels``
    are further (memory, compute) pairs, one after the other. Locks below ``floor_mhz`` run at it. Above
    ``hot_w`` heat slows the chip in ``hot_share`` of the repeats, to the clock that draws ``hot_w``.
    """

    name: str
    host_s: float = 0.0005
    memory_s: float = 0.010
    memory_slope_s: float = 0.0
    compute_s: float = 0.004
    sharpness: float = 0.0
    static_w: float = 90.0
    clock_w: float = 110.0
    memory_j: float = 1.5
    op_j: float = 0.2
    ridge: float = 0.6
    voltage_slope: float = 1.0
    f0_mhz: int = 1830
    max_mhz: int = 1980
    min_mhz: int = 210
    limit_w: float = 700.0
    min_limit_w: float = 200.0
    idle_w: float = 75.0
    idles: bool = False
    hunting: float = 0.0
    phase: Phase = "decode"
    kernels: tuple[tuple[float, float], ...] = ()
    voltages: tuple[tuple[int, float], ...] = ()
    floor_mhz: int = 0
    hot_w: float = math.inf
    hot_share: float = 0.0

    def iteration_s(self, mhz: float) -> float:
        """True seconds of an iteration."""
        x = self.f0_mhz / mhz
        memory, compute = self.memory_s + self.memory_slope_s * x, self.compute_s * x
        rest_s = self.host_s + sum(max(memory_s, compute_s * x) for memory_s, compute_s in self.kernels)
        if self.sharpness:
            return rest_s + (memory**self.sharpness + compute**self.sharpness) ** (1 / self.sharpness)
        return rest_s + max(memory, compute)

    def volts(self, mhz: float) -> float:
        """Voltage relative to that at the highest clock."""
        if self.voltages:
            return next((volts for most_mhz, volts in self.voltages if mhz <= most_mhz), 1.0)
        return 1 - self.voltage_slope * (1 - max(mhz / self.f0_mhz, self.ridge))

    def power_w(self, mhz: float) -> float:
        """True mean power."""
        phi = mhz / self.f0_mhz
        volts = self.volts(mhz)
        work = (self.memory_j + self.op_j * volts**2) / self.iteration_s(mhz)
        return self.static_w + self.clock_w * phi * volts**2 + work

    def energy_j(self, mhz: float) -> float:
        """True energy of an iteration."""
        return self.power_w(mhz) * self.iteration_s(mhz)

    def clock(self, *, lock_mhz: int | None = None, limit_w: float | None = None) -> tuple[int, bool]:
        """The clock it runs at, and whether a power limit holds it there."""
        mhz = max(min(lock_mhz or self.max_mhz, self.f0_mhz), self.floor_mhz)
        capped = False
        while mhz > self.min_mhz and self.power_w(mhz) > (limit_w or self.limit_w):
            mhz, capped = mhz - STEP_MHZ, True
        return mhz, capped

    @cached_property
    def supported_mhz(self) -> tuple[int, ...]:
        """Clocks it can be locked to."""
        return tuple(range(self.max_mhz, self.min_mhz - 1, -STEP_MHZ))

    def slowdown(self, mhz: float) -> float:
        """True slowdown against running unlocked."""
        return self.iteration_s(mhz) / self.iteration_s(self.clock()[0]) - 1

    def saving(self, mhz: float) -> float:
        """True share of energy saved against running unlocked."""
        return 1 - self.energy_j(mhz) / self.energy_j(self.clock()[0])

    def best_mhz(self, max_slowdown: float, lowest_mhz: float = 0.0) -> int:
        """The supported clock of least energy inside the budget."""
        unlocked = self.clock()[0]
        inside = [
            mhz
            for mhz in self.supported_mhz
            if lowest_mhz <= mhz <= unlocked and self.slowdown(mhz) <= max_slowdown
        ]
        return min(inside, key=lambda mhz: (self.energy_j(mhz), -mhz))

    def lock_over_cap(self, max_slowdown: float, caps_w: Sequence[float], lowest_mhz: float) -> float:
        """By how much of the unlocked energy the best lock beats the best cap, caps in steps of 1 W.

        Caps from the lowest given to the device's own, locks from the lowest given clock on.
        """
        reached = {self.clock(limit_w=watts) for watts in np.arange(min(caps_w), self.limit_w + 0.5, 1.0)}
        reached.add(self.clock())
        unlocked_j = self.energy_j(self.clock()[0])
        caps = max(
            1 - self.energy_j(mhz) * (1 + self.hunting * (capped and mhz < self.clock()[0])) / unlocked_j
            for mhz, capped in reached
            if self.slowdown(mhz) <= max_slowdown
        )
        return self.saving(self.best_mhz(max_slowdown, lowest_mhz)) - caps


def made_sweep(
    devices: Sequence[SyntheticDevice],
    *,
    locks_mhz: Sequence[int] = LOCKS_MHZ,
    caps_w: Sequence[float] = (),
    repeats: int = 3,
    time_noise: float = 0.0,
    energy_noise: float = 0.0,
    setting_noise: float = 0.0,
    window_s: float = 5.0,
    supported: bool = True,
    seed: int = 0,
) -> ClockSweep:
    """A sweep of the first device's hardware, one series for each device, in random order.

    Args:
        devices: phases of one piece of hardware.
        locks_mhz: locks to ask for.
        caps_w: power limits to ask for.
        repeats: of every setting, the unlocked one included.
        time_noise, energy_noise: relative standard deviation of one repeat.
        setting_noise: relative deviation that all repeats of a setting share, in time and energy alike.
        window_s: length of one measurement.
        supported: whether the sweep names the supported clocks.
        seed: of noise and order.
    """
    generator = np.random.default_rng(seed)
    settings: list[tuple[int | None, float | None]] = [(None, None)]
    settings += [(lock, None) for lock in locks_mhz] + [(None, cap) for cap in caps_w]
    wanted = [
        (which, setting, repeat)
        for which in range(len(devices))
        for setting in settings
        for repeat in range(repeats)
    ]
    shared = {(which, setting): generator.normal() for which in range(len(devices)) for setting in settings}
    points: list[list[ClockPoint]] = [[] for _ in devices]
    for order, position in enumerate(generator.permutation(len(wanted))):
        which, (lock, cap), repeat = wanted[position]
        device = devices[which]
        together = math.exp(setting_noise * shared[which, (lock, cap)])
        is_hot = device.power_w(device.clock(lock_mhz=lock, limit_w=cap)[0]) > device.hot_w
        # Drawn only for devices that heat up: all others keep their noise.
        is_hot = is_hot and bool(generator.random() < device.hot_share)
        point = _point(device, lock, cap, order, repeat, window_s, is_hot=is_hot)
        iterations = point.iterations
        duration_s = point.duration_s * together * math.exp(time_noise * generator.normal())
        energy_mj = (point.energy_mj or 0.0) * together * math.exp(energy_noise * generator.normal())
        points[which].append(
            point.model_copy(
                update={"duration_s": duration_s, "energy_mj": energy_mj, "iterations": iterations}
            )
        )
    first = devices[0]
    return ClockSweep(
        created_unix_s=0.0,
        device=DeviceSpec(kind="gpu", name="Synthetic GPU", uuid="GPU-5ea1ed00-0000-4000-8000-000000000000"),
        max_sm_clock_mhz=first.max_mhz,
        supported_sm_clocks_mhz=first.supported_mhz if supported else None,
        default_limit_mw=round(first.limit_w * 1e3),
        idle_power_mw=round(first.idle_w * 1e3),
        series=tuple(
            ClockSeries(name=device.name, phase=device.phase, tokens_per_iteration=8, points=tuple(found))
            for device, found in zip(devices, points, strict=True)
        ),
        seed=seed,
    )


def _point(
    device: SyntheticDevice,
    lock: int | None,
    cap: float | None,
    order: int,
    repeat: int,
    window_s: float,
    *,
    is_hot: bool = False,
) -> ClockPoint:
    """What a perfect instrument would see."""
    mhz, capped = device.clock(lock_mhz=lock, limit_w=cap)
    if is_hot:
        mhz, capped = device.clock(lock_mhz=lock, limit_w=device.hot_w)[0], False
    seconds = device.iteration_s(mhz)
    iterations = max(1, round(window_s / seconds))
    excess = 1 + device.hunting if capped else 1.0
    swing = 60 if capped and device.hunting else 0
    label: PointLabel = "ok"
    if is_hot:
        label = "thermal"
    elif capped:
        label = "power-capped"
    elif lock is not None and abs(mhz - lock) > STEP_MHZ:
        label = "clamped"
    return ClockPoint(
        order=order,
        repeat=repeat,
        requested_sm_clock_mhz=lock,
        requested_limit_mw=None if cap is None else round(cap * 1e3),
        enforced_limit_mw=round((cap or device.limit_w) * 1e3),
        iterations=iterations,
        duration_s=iterations * seconds,
        energy_mj=1e3 * iterations * device.energy_j(mhz) * excess,
        energy_error=0.01,
        energy_source="counter",
        sm_clock_mhz=mhz,
        sm_clock_low_mhz=mhz - swing,
        sm_clock_high_mhz=mhz + max(swing, STEP_MHZ) if capped else mhz,
        event_reasons=(0x20 if is_hot else 0x4 if capped else 0) | (0x1 if device.idles else 0),
        power_cap_share=1.0 if capped else 0.0,
        label=label,
    )


#: Kinds of devices and phases, by what they show.
DEVICES: dict[str, SyntheticDevice] = {
    device.name: device
    for device in (
        SyntheticDevice("memory-bound", memory_s=0.0105, compute_s=0.0038, op_j=0.1, memory_j=0.4),
        SyntheticDevice("knee", memory_s=0.0105, compute_s=0.0075, clock_w=200.0, memory_j=1.0, op_j=0.5),
        SyntheticDevice(
            "compute-bound", host_s=0.001, memory_s=0.004, compute_s=0.020, clock_w=260.0, op_j=3.0,
            memory_j=0.5, phase="prefill",
        ),
        SyntheticDevice(
            "host-bound", host_s=0.012, memory_s=0.002, compute_s=0.0012, clock_w=90.0, op_j=0.05,
            memory_j=0.2, idles=True,
        ),
        SyntheticDevice(
            "capped", host_s=0.001, memory_s=0.004, compute_s=0.020, clock_w=330.0, op_j=4.0, memory_j=0.5,
            limit_w=450.0, phase="prefill",
        ),
        SyntheticDevice(
            "hunting", host_s=0.001, memory_s=0.004, compute_s=0.020, clock_w=260.0, op_j=3.0, memory_j=0.5,
            hunting=0.08, phase="prefill",
        ),
        SyntheticDevice(
            "soft", memory_s=0.0095, memory_slope_s=0.0003, compute_s=0.0045, sharpness=8.0, clock_w=150.0,
            voltage_slope=0.7, ridge=0.65, memory_j=0.6, op_j=0.1,
        ),
    )
}  # fmt: skip


def h200_like_decode(batch_size: int) -> SyntheticDevice:
    """Decode on a device shaped like what arXiv 2605.11999 reports of an H200.

    SYNTHETIC: the parameters are ours, chosen so that decode draws 137 to 300 W of 700 W, no cap binds, and a
    lock near 780 MHz saves 24 to 32 % of the energy for less than 1 % of the time. No H200 was measured.
    """
    load = math.log2(batch_size) / 5  # 0 at batch 1, 1 at batch 32
    return replace(
        SyntheticDevice(
            f"synthetic H200-like decode, batch {batch_size}",
            host_s=0.0004,
            memory_s=0.0085,
            memory_slope_s=0.00003,
            sharpness=32.0,
            ridge=0.7,
            voltage_slope=0.7,
        ),
        compute_s=0.0033,
        static_w=65.5 + 20.0 * load,
        clock_w=59.0 + 61.0 * load,
        memory_j=0.10 + 0.60 * load,
        op_j=0.02 + 0.12 * load,
    )
