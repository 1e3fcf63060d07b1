"""A power sensor that is played: a load whose power is known at every moment, seen as a device shows it.

    load = steps([("dispatch", 2.0, 300.0), ("experts", 5.0, 600.0)], seconds=20)   # ms, W
    frame = SimulatedSensor(noise=0.01).sample(load)                                # columns of POWER_SCHEMA
    load.energy_mj(start_ns, end_ns)                                                # the truth

Every ``update_ms`` the instant sensor shows the mean power of the ``window_ms`` before (100 and 25 on A100
and H100, arXiv 2312.02741), and every ``counter_ms`` the counter shows the energy so far. Both then stand
still until the next update, and a reader polls them when it likes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pandas as pd

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

#: Loads begin here rather than at 0, as monotonic clocks do.
EPOCH_NS = 5_000_000_000_000

Stage = tuple[str, float, float]


@dataclass(frozen=True, kw_only=True)
class Load:
    """Power of a device over time, constant between edges.

    Attributes:
        edge_ns: M + 1 ascending times.
        power_w: M powers.
        name: M names of what ran; "" where nothing did.
        step: M numbers of the step.
        idle_w: power before the first and after the last edge.
    """

    edge_ns: Int64
    power_w: Float64
    name: tuple[str, ...]
    step: Int64
    idle_w: float = 80.0

    @property
    def start_ns(self) -> int:
        return int(self.edge_ns[0])

    @property
    def end_ns(self) -> int:
        return int(self.edge_ns[-1])

    def energy_until_mj(self, time_ns: npt.ArrayLike) -> Float64:
        """Energy since the load began; negative before."""
        time = np.asarray(time_ns, dtype=np.float64)
        length_ms = np.diff(self.edge_ns) * 1e-6
        until_mj = np.concatenate([[0.0], np.cumsum(self.power_w * length_ms)])
        inside = np.interp(time, self.edge_ns.astype(np.float64), until_mj)
        before_ms = np.minimum(time - self.edge_ns[0], 0) * 1e-6
        after_ms = np.maximum(time - self.edge_ns[-1], 0) * 1e-6
        return np.asarray(inside + self.idle_w * (before_ms + after_ms))

    def energy_mj(self, start_ns: int, end_ns: int) -> float:
        """Energy of a window."""
        first, last = self.energy_until_mj([start_ns, end_ns])
        return float(last - first)

    def truth(self) -> dict[str, tuple[float, float]]:
        """Mean power (W) and seconds of each name."""
        seconds = np.diff(self.edge_ns) * 1e-9
        names = np.array(self.name, dtype=object)
        return {
            str(name): (
                float((self.power_w * seconds)[names == name].sum() / seconds[names == name].sum()),
                float(seconds[names == name].sum()),
            )
            for name in dict.fromkeys(self.name)
        }


def steps(
    stages: Sequence[Stage],
    *,
    seconds: float,
    jitter: float = 0.0,
    step_jitter: float = 0.0,
    power_jitter: float = 0.0,
    idle_w: float = 80.0,
    start_ns: int = EPOCH_NS,
    seed: int = 0,
) -> Load:
    """Steps made of the same stages, one after another, for about so long.

    Args:
        stages: name, length in ms, power in W.
        seconds: of all steps together.
        jitter: relative standard deviation of single stages' lengths.
        step_jitter: likewise of whole steps, by which all stages of a step change alike.
        power_jitter: likewise of single stages' powers.
        idle_w: power before and after; "" in stages is an idle gap and should have it.
        start_ns: when they begin.
        seed: of the jitters.
    """
    generator = np.random.default_rng(seed)
    count = max(1, round(seconds * 1e3 / sum(stage[1] for stage in stages)))

    def spread(relative: float, shape: tuple[int, ...]) -> Float64:
        return np.exp(relative * generator.standard_normal(shape))

    length_ms = np.tile([stage[1] for stage in stages], (count, 1))
    length_ms = length_ms * spread(jitter, length_ms.shape) * spread(step_jitter, (count, 1))
    power_w = np.tile([stage[2] for stage in stages], (count, 1)) * spread(power_jitter, length_ms.shape)
    edge_ns = start_ns + np.concatenate([[0.0], np.cumsum(length_ms.ravel())]) * 1e6
    return Load(
        edge_ns=np.rint(edge_ns).astype(np.int64),
        power_w=power_w.ravel(),
        name=tuple(stage[0] for stage in stages) * count,
        step=np.repeat(np.arange(count), len(stages)),
        idle_w=idle_w,
    )


def bursts(
    stages: Sequence[Stage], *, seconds: float, seed: int = 0, idle_w: float = 80.0, spread: float = 0.5
) -> Load:
    """Stages in random order with lengths that differ widely (log-normal), as prompts of a server do."""
    generator = np.random.default_rng(seed)
    lengths, powers, names = [], [], []
    while sum(lengths) < seconds * 1e3:
        name, length_ms, power_w = stages[int(generator.integers(len(stages)))]
        lengths.append(length_ms * float(np.exp(spread * generator.standard_normal())))
        powers.append(power_w)
        names.append(name)
    edge_ns = EPOCH_NS + np.concatenate([[0.0], np.cumsum(lengths)]) * 1e6
    return Load(
        edge_ns=np.rint(edge_ns).astype(np.int64),
        power_w=np.array(powers),
        name=tuple(names),
        step=np.arange(len(names)),
        idle_w=idle_w,
    )


def join(*loads: Load, gap_ms: float = 0.0) -> Load:
    """Loads one after another, with idle gaps between them."""
    edges, powers = [loads[0].start_ns], []
    names: list[str] = []
    numbers: list[int] = []
    for position, load in enumerate(loads):
        if position and gap_ms:
            edges.append(edges[-1] + round(gap_ms * 1e6))
            powers.append(load.idle_w)
            names.append("")
            numbers.append(numbers[-1])
        edges += (np.cumsum(np.diff(load.edge_ns)) + edges[-1]).tolist()
        powers += load.power_w.tolist()
        names += load.name
        numbers += (load.step + (max(numbers) + 1 if numbers else 0)).tolist()
    return Load(
        edge_ns=np.array(edges, dtype=np.int64),
        power_w=np.array(powers),
        name=tuple(names),
        step=np.array(numbers),
        idle_w=loads[0].idle_w,
    )


@dataclass(frozen=True, kw_only=True)
class SimulatedSensor:
    """How a device shows its power.

    Attributes:
        update_ms, window_ms: of the instant sensor; every ``update_ms`` the mean of the last ``window_ms``.
        latency_ms: how much later than its window's end a value can be read; of the counter likewise.
        noise: relative standard deviation of single values of the instant sensor.
        gain, counter_gain: calibration of the sensor and of the counter; 1.0 is right, +-5 % is usual.
        counter_ms: period of the counter; None for a device without.
        tick_jitter_ms: standard deviation of the moments of updates.
        smoothing_ms: time constant of the board's capacitors, which the sensor sees through.
        period_error: relative error of the device's own clock: its 100 ms are not the host's.
        tick_ms: when updates come, after the start of the load and modulo their period; None: at random.
    """

    update_ms: float = 100.0
    window_ms: float = 25.0
    latency_ms: float = 0.0
    noise: float = 0.01
    gain: float = 1.0
    counter_gain: float = 1.0
    counter_ms: float | None = 100.0
    tick_jitter_ms: float = 0.0
    smoothing_ms: float = 0.0
    period_error: float = 4e-4
    tick_ms: float | None = None
    device_uuid: str = "GPU-00000000-0000-4000-8000-000000000000"
    counter_start_mj: int = 7_000_000
    _margin_ns: int = field(default=1_500_000_000, repr=False)

    def sample(
        self,
        load: Load,
        *,
        poll_ms: float = 50.0,
        jitter_ms: float = 0.3,
        seed: int = 0,
        read_us: float = 300.0,
        offset_ms: float = 0.0,
    ) -> pd.DataFrame:
        """What a reader that polls sees, from 1.5 s before the load to 1.5 s after it.

        Args:
            load: what the device does.
            poll_ms: time between polls.
            jitter_ms: standard deviation of how late a poll is.
            seed: of everything random.
            read_us: how long a poll takes.
            offset_ms: time from a poll to the start of the load, where ``poll_ms`` divides 1.5 s.
        """
        generator = np.random.default_rng(seed)
        begin, end = load.start_ns - self._margin_ns, load.end_ns + self._margin_ns
        begin -= round(offset_ms * 1e6)
        count = int((end - begin) / (poll_ms * 1e6))
        late_ms = np.abs(jitter_ms * generator.standard_normal(count))
        poll_ns = begin + np.rint((np.arange(count) * poll_ms + late_ms) * 1e6).astype(np.int64)
        # Value n is measured at tick n and can be read from then on, plus the latency.
        energy = self._smoothed(load, begin, end)
        power_tick_ns = self._ticks(load, begin, end, self.update_ms, generator)
        window_ns = self.window_ms * 1e6
        mean_w = (energy(power_tick_ns) - energy(power_tick_ns - window_ns)) / self.window_ms
        mean_w = mean_w * self.gain * (1 + self.noise * generator.standard_normal(len(mean_w)))
        columns = {"power_mw": np.rint(mean_w * 1e3)[self._seen(power_tick_ns, poll_ns)]}
        if self.counter_ms is not None:
            tick_ns = self._ticks(load, begin, end, self.counter_ms, generator)
            total_mj = self.counter_start_mj + self.counter_gain * (energy(tick_ns) - energy(tick_ns[:1]))
            columns["energy_mj"] = np.floor(total_mj)[self._seen(tick_ns, poll_ns)]
        return power_frame(poll_ns, self.device_uuid, read_ns=np.full(count, round(read_us * 1e3)), **columns)

    def _ticks(
        self, load: Load, begin: int, end: int, period_ms: float, generator: np.random.Generator
    ) -> Float64:
        period_ns = period_ms * 1e6 * (1 + self.period_error)
        early = generator.random()
        if self.tick_ms is not None:
            early = (begin - load.start_ns - self.tick_ms * 1e6) / period_ns % 1.0
        first = begin - period_ns * (2 + early)
        ticks = np.arange(first, end, period_ns)
        return ticks + self.tick_jitter_ms * 1e6 * generator.standard_normal(len(ticks))

    def _seen(self, tick_ns: Float64, poll_ns: Int64) -> Int64:
        readable_ns = np.maximum.accumulate(tick_ns + self.latency_ms * 1e6)
        return np.searchsorted(readable_ns, poll_ns, side="right") - 1

    def _smoothed(self, load: Load, begin: int, end: int):  # type: ignore[no-untyped-def]
        if not self.smoothing_ms:
            return load.energy_until_mj
        grid_ns = np.arange(begin - 5e8, end + 5e8, 2e5)
        energy = load.energy_until_mj(grid_ns)
        keep = np.exp(-0.2 / self.smoothing_ms)
        from scipy.signal import lfilter

        smooth = lfilter([1 - keep], [1, -keep], energy - energy[0]) + energy[0]
        return lambda time_ns: np.interp(np.asarray(time_ns, float), grid_ns, smooth)


def power_frame(
    time_ns: npt.ArrayLike,
    device_uuid: str = "GPU-0",
    *,
    power_mw: npt.ArrayLike | None = None,
    energy_mj: npt.ArrayLike | None = None,
    read_ns: npt.ArrayLike | None = None,
    source_rank: int = 0,
) -> pd.DataFrame:
    """Rows as ``run.power()`` gives them; NaN stands for a reading that is missing."""
    time = np.asarray(time_ns, dtype=np.int64)
    missing = np.full(len(time), np.nan)
    return pd.DataFrame(
        {
            "time_ns": time,
            "device_uuid": device_uuid,
            "power_mw": missing if power_mw is None else np.asarray(power_mw, float),
            "energy_mj": missing if energy_mj is None else np.asarray(energy_mj, float),
            "read_ns": 0 if read_ns is None else np.asarray(read_ns, np.int64),
            "source_rank": source_rank,
        }
    )


def spans_of(
    load: Load, *, phase: str | None = None, layer: int | None = None, source_rank: int = 0
) -> pd.DataFrame:
    """Spans that a capture of the load would leave.

    Args:
        load: the load; idle gaps leave no span.
        phase: None: the load's names are phases. Otherwise they are names of spans in this phase, and every
            step is a span ``phase`` of its own too.
        layer: of the spans inside a phase.
        source_rank: the rank.
    """
    start_ns, end_ns = load.edge_ns[:-1], load.edge_ns[1:]
    names = np.array(load.name, dtype=object)
    ran = names != ""
    frame = pd.DataFrame(
        {
            "step": load.step,
            "phase": names if phase is None else phase,
            "layer": pd.array([None if phase is None else layer] * len(names), "Int32"),
            "source_rank": source_rank,
            "name": "phase" if phase is None else names,
            "start_ns": start_ns,
            "end_ns": end_ns,
        }
    )[ran]
    if phase is None:
        return frame.reset_index(drop=True)
    whole = frame.groupby("step").agg(start_ns=("start_ns", "min"), end_ns=("end_ns", "max")).reset_index()
    whole = whole.assign(phase=phase, layer=pd.NA, source_rank=source_rank, name="phase")
    return pd.concat([whole.astype({"layer": "Int32"}), frame], ignore_index=True)
