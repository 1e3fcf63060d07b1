"""What a run's power samples alone say about caps and clocks, without a sweep.

They say whether the power limit binds, at which clock it holds the device, which clock a busy device has and
how near it is to idle. They do not say which clock is best: that takes the time of an iteration at several.

What is said of a state is computed from the samples in that state, which their event reasons name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from observatory.analysis.energy.phase_intervals import DeviceBands, device_bands
from observatory.analysis.frequency.confounds import BINDING_SHARE
from observatory.analysis.frequency.telemetry_records import (
    DeviceTelemetry,
    FindingCode,
    Missing,
    Readings,
    ShareSource,
    StateName,
    TelemetryAdvice,
)
from observatory.analysis.frequency.telemetry_words import finding_words
from observatory.devices.event_reasons import BRAKE_BITS, HOLDING_BITS, IDLE_BIT, POWER_CAP_BIT, THERMAL_BITS
from observatory.devices.sensors import SensorModel, sensor_of
from observatory.errors import ClockError
from observatory.run import Run
from observatory.run.device_samples import device_samples, sampled_devices
from observatory.run.manifest import DeviceSpec

#: Columns of the power table that are read.
COLUMNS = (
    "time_ns", "power_mw", "enforced_limit_mw", "sm_clock_mhz", "event_reasons", "power_cap_ns", "thermal_ns"
)  # fmt: skip
#: A device that idles in a tenth of the samples waits for something.
_IDLE_SHARE = 0.1
#: Below this part of the way from idle power to the limit, a device hardly works.
_LOW_DRAW = 0.15
_LEAST_SAMPLES = 10
#: Devices of a run that something is said of.
MOST_DEVICES = 256
#: A limit may act on a device that was seen to draw this part of it.
_NEAR_LIMIT = 0.9
#: A counter that was read over this part of the time speaks of all of it.
_MOSTLY = 0.9
#: Update period of power where the device's own is not known: that of all NVIDIA GPUs since Ampere.
_UPDATE_MS = 100.0


def telemetry_advice(run: Run) -> TelemetryAdvice:
    """Read a run's power table.

    Raises:
        ClockError: the run has no power samples.
    """
    sampled = sampled_devices(run)[:MOST_DEVICES]
    if not sampled:
        raise ClockError(
            f"run {run.path} holds no power samples; capture some with `observatory power --out RUN -- "
            "COMMAND`"
        )
    devices: list[DeviceTelemetry] = []
    # The same name may stand for a device of each of several nodes, on each node's own clock.
    bands = device_bands(run, [(device.rank, device.uuid) for device in sampled])
    for device, samples in device_samples(run, sampled, COLUMNS):
        devices += device_telemetry(run, device.uuid, samples, bands[device.rank, device.uuid])
    return TelemetryAdvice(
        run=str(run.path),
        devices=tuple(devices),
        cannot="which clock saves energy cannot be determined at one clock: it takes the time and energy of "
        "an iteration at several",
        next_steps=(
            "observatory clocks sweep --help",
            "observatory clocks fit SWEEP.json --out fit.json",
            "observatory clocks recommend fit.json --max-slowdown 0.02",
        ),
    )


def device_telemetry(
    run: Run, uuid: str, samples: pd.DataFrame, bands: DeviceBands
) -> Iterator[DeviceTelemetry]:
    """What the samples of one device say, first of the whole run, then of each phase.

    Args:
        run: the run.
        uuid: of the device.
        samples: its samples in time order, with :data:`COLUMNS`.
        bands: phases on the clock of its samples.
    """
    rows = _with_limit_in_force(samples)
    spec = run.manifest.device_specs.get(uuid)
    idle_mw = _idle_power_mw(run, uuid)
    yield _device(uuid, None, rows, spec, idle_mw)
    sensor = sensor_of(None if spec is None else spec.name)
    for phase, part in _by_phase(rows, bands, sensor):
        if len(part) >= _LEAST_SAMPLES:
            yield _device(uuid, phase, part, spec, idle_mw)


def _idle_power_mw(run: Run, uuid: str) -> float | None:
    """Idle power as the sampler found it at the start; None where the run does not say."""
    for status in run.manifest.ranks:
        calibration = None if status.power is None else status.power.calibration.get(uuid)
        if calibration is not None and calibration.idle_power_mw:
            return float(calibration.idle_power_mw)
    return None


def _with_limit_in_force(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with the last limit read before each; one that is not positive is no reading."""
    limit_mw = pd.Series(_valid(rows, "enforced_limit_mw"), index=rows.index)
    return rows.assign(limit_in_force_mw=limit_mw.where(limit_mw > 0.0).ffill())


def _by_phase(rows: pd.DataFrame, bands: DeviceBands, sensor: SensorModel) -> list[tuple[str, pd.DataFrame]]:
    """Samples of each phase of the rank that the device works for, else of the one that sampled it.

    Power is left out of samples that may still describe what ran before the phase: a reading is as old as the
    last update and, before that, its averaging window.
    """
    if not bands.phase:
        return []
    time_ns = rows["time_ns"].to_numpy()
    index = np.searchsorted(bands.start_ns, time_ns, side="right") - 1
    inside = (index >= 0) & (time_ns < bands.end_ns[np.maximum(index, 0)])
    names = np.array(bands.phase, dtype=object)
    phase = names[np.maximum(index, 0)]
    oldest_ns = 1e6 * ((sensor.update_ms or _UPDATE_MS) + (sensor.window_ms or 0.0))
    starts = np.ones(len(names), dtype=bool)
    starts[1:] = (names[1:] != names[:-1]) | (bands.start_ns[1:] - bands.end_ns[:-1] > oldest_ns)
    since_ns = bands.start_ns[starts][np.cumsum(starts) - 1][np.maximum(index, 0)]
    fresh = time_ns - since_ns >= oldest_ns
    rows = rows.assign(power_mw=rows["power_mw"].where(fresh), stale=rows["power_mw"].notna() & ~fresh)
    return [(str(name), rows[inside & (phase == name)]) for name in sorted(set(phase[inside].tolist()))]


def _device(
    uuid: str, phase: str | None, rows: pd.DataFrame, spec: DeviceSpec | None, idle_mw: float | None
) -> DeviceTelemetry:
    whole = _readings(rows)
    reasons = pd.to_numeric(rows["event_reasons"], errors="coerce").fillna(-1).to_numpy(dtype=np.int64)
    has_reasons = reasons >= 0
    states = _states(rows, reasons) if has_reasons.any() else None
    # Counters count over gaps too, so that they are read over the whole run only.
    counted = phase is None
    capped, capped_busy, capped_by = _held(rows if counted else None, "power_cap_ns", reasons, POWER_CAP_BIT)
    hot, hot_busy, hot_by = _held(rows if counted else None, "thermal_ns", reasons, THERMAL_BITS)
    braked, braked_busy, _ = _held(None, "", reasons, BRAKE_BITS)
    device = DeviceTelemetry(
        **whole.model_dump(),
        device_uuid=uuid[:128],
        phase=phase,
        duration_s=float(rows["time_ns"].iloc[-1] - rows["time_ns"].iloc[0]) / 1e9,
        reason_samples=int(has_reasons.sum()),
        states=states,
        power_cap_share=capped,
        power_cap_busy_share=capped_busy,
        power_cap_source=capped_by,
        thermal_share=hot,
        thermal_busy_share=hot_busy,
        thermal_source=hot_by,
        brake_share=braked,
        brake_busy_share=braked_busy,
        idle_share=states["idle"].samples / float(has_reasons.sum()) if states else None,
        max_sm_clock_mhz=float(spec.max_sm_clock_mhz) if spec and spec.max_sm_clock_mhz else None,
        idle_power_mw=idle_mw,
        cap=_cap(capped, capped_busy, capped_by, states, whole),
        missing=_missing(whole, rows, spec, has_reasons=bool(has_reasons.any())),
    )
    codes = tuple(_finding_codes(device))
    sentences = tuple(finding_words(code, device) for code in codes)
    return device.model_copy(update={"findings": sentences, "finding_codes": codes})


def _finding_codes(device: DeviceTelemetry) -> Iterator[FindingCode]:
    """What the numbers of one device, or of one phase on it, show."""
    if device.cap is None:
        yield "limit not known"
    else:
        yield "limit binds" if device.cap == "binds" else "limit does not bind"
    yield from _clock_codes(device)
    if _acted(device.thermal_share, device.thermal_busy_share):
        yield "slowed by heat"
    if _acted(device.brake_share, device.brake_busy_share):
        yield "slowed by the brake"
    # Power that is read soon after idling may still be that of the idle device: nothing is said about it.
    if (device.idle_share or 0.0) >= _IDLE_SHARE:
        yield "idle"
    elif _draws_little(device):
        yield "little power"
    if device.states is None:
        yield "states not known"
    elif device.reason_samples < device.samples:
        yield "states in part"
    if _lacks_power_over_limit(device):
        yield "power over limit not known"


def _clock_codes(device: DeviceTelemetry) -> Iterator[FindingCode]:
    if device.sm_clock_mhz is None:
        yield "SM clock not known"
        return
    if device.states is None:
        yield "SM clock"
        return
    busy, free = device.states["busy"], device.states["free"]
    below = device.is_below_highest(free)
    if busy.sm_clock_mhz is None:
        yield "SM clock not known"
        return
    # One sentence says both where nothing holds any busy sample down.
    if not (below and free.samples == busy.samples):
        yield "SM clock"
    if below:
        yield "SM clock below the highest"


def _acted(share: float | None, busy_share: float | None) -> bool:
    return max(share or 0.0, busy_share or 0.0) >= BINDING_SHARE


def _draws_little(device: DeviceTelemetry) -> bool:
    power_mw, limit_mw, idle_mw = device.busy.power_median_mw, device.busy.limit_mw, device.idle_power_mw
    if power_mw is None or limit_mw is None or idle_mw is None:
        return False
    return (power_mw - idle_mw) / max(limit_mw - idle_mw, 1.0) < _LOW_DRAW


def _lacks_power_over_limit(device: DeviceTelemetry) -> bool:
    """Whether it is not known how near the limit the device runs, and no other sentence says so."""
    if device.limit_needs_readings:
        return False
    if any(name != "event reasons" for name in device.missing_for_limit):
        return True
    return device.states is not None and device.busy.samples > 0 and device.busy.power_over_limit is None


def _states(rows: pd.DataFrame, reasons: NDArray[np.int64]) -> dict[StateName, Readings]:
    """Readings of the samples in each state.

    Args:
        rows: samples.
        reasons: their bits; negative where not known.
    """
    idle = (reasons >= 0) & (reasons & IDLE_BIT > 0)
    busy = (reasons >= 0) & ~idle
    chosen: dict[StateName, NDArray[np.bool_]] = {
        "busy": busy,
        "free": busy & (reasons & HOLDING_BITS == 0),
        "power cap": busy & (reasons & POWER_CAP_BIT > 0),
        "thermal": busy & (reasons & THERMAL_BITS > 0),
        "brake": busy & (reasons & BRAKE_BITS > 0),
        "idle": idle,
    }
    return {name: _readings(rows[selected]) for name, selected in chosen.items()}


def _readings(rows: pd.DataFrame) -> Readings:
    power_mw, limit_mw, clock_mhz = (
        _valid(rows, name) for name in ("power_mw", "limit_in_force_mw", "sm_clock_mhz")
    )
    over_limit = power_mw / limit_mw
    median_mw, p95_mw, highest_mw = _quantiles(power_mw, 0.5, 0.95, 1.0)
    over, highest_over = _quantiles(over_limit, 0.95, 1.0)
    lowest_limit_mw, highest_limit_mw = _quantiles(limit_mw, 0.0, 1.0)
    low_mhz, middle_mhz, high_mhz, highest_mhz = _quantiles(clock_mhz, 0.05, 0.5, 0.95, 1.0)
    return Readings(
        samples=len(rows),
        power_samples=int(np.isfinite(power_mw).sum()),
        clock_samples=int(np.isfinite(clock_mhz).sum()),
        power_median_mw=median_mw,
        power_p95_mw=p95_mw,
        power_highest_mw=highest_mw,
        power_over_limit=over,
        highest_power_over_limit=highest_over,
        limit_mw=lowest_limit_mw,
        highest_limit_mw=highest_limit_mw,
        sm_clock_low_mhz=low_mhz,
        sm_clock_mhz=middle_mhz,
        sm_clock_high_mhz=high_mhz,
        sm_clock_highest_mhz=highest_mhz,
    )


def _valid(rows: pd.DataFrame, column: str) -> NDArray[np.float64]:
    """A column with NaN for what is not known or not possible."""
    values = pd.to_numeric(rows[column], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    valid: NDArray[np.float64] = np.where(np.isfinite(values) & (values >= 0.0), values, np.nan)
    return valid


def _quantiles(values: NDArray[np.float64], *shares: float) -> list[float] | list[None]:
    """Quantiles of the finite values; None for each without one."""
    finite = values[np.isfinite(values)]
    return np.quantile(finite, shares).tolist() if finite.size else [None] * len(shares)


def _missing(
    whole: Readings, rows: pd.DataFrame, spec: DeviceSpec | None, *, has_reasons: bool
) -> tuple[Missing, ...]:
    """What no sample holds and the device does not report; ``known``: some samples hold event reasons."""
    missing: list[Missing] = [] if has_reasons else ["event reasons"]
    if whole.power_median_mw is None:
        stale = "stale" in rows and bool(rows["stale"].any())
        missing.append("power of the phase" if stale else "power")
    if whole.limit_mw is None:
        missing.append("power limit")
    elif whole.power_median_mw is not None and whole.power_over_limit is None:
        missing.append("power beside a limit")
    if whole.sm_clock_mhz is None:
        missing.append("SM clock")
    if spec is None or not spec.max_sm_clock_mhz:
        missing.append("highest SM clock")
    return tuple(missing)


def _held(
    counted: pd.DataFrame | None, column: str, reasons: NDArray[np.int64], bits: int
) -> tuple[float | None, float | None, ShareSource | None]:
    """Share of all time and of the busy time in which something held the clock down, and its source.

    Args:
        counted: samples whose counter may be read; None for the bits alone.
        column: the counter.
        reasons: bits of the samples; negative where not known.
        bits: those of what held it.
    """
    bits_known = reasons[reasons >= 0]
    busy = bits_known[bits_known & IDLE_BIT == 0]
    share = None if counted is None else _counter_share(counted, column)
    if share is not None:
        # An idle chip has no clock to hold down, so that what was counted is taken to be busy time.
        return share, min(1.0, share * len(bits_known) / len(busy)) if len(busy) else None, "counter"
    if not len(bits_known):
        return None, None, None
    of_busy = float(np.mean(busy & bits > 0)) if len(busy) else None
    return float(np.mean(bits_known & bits > 0)), of_busy, "event reasons"


def _counter_share(rows: pd.DataFrame, column: str) -> float | None:
    """Part of the time that a counter of nanoseconds advanced.

    None when it ran backwards, or is known for part of the time only: what it counts there is not the share
    of the whole.
    """
    readings = rows[["time_ns", column]].dropna()
    if len(readings) < 2 or np.ptp(readings["time_ns"]) < _MOSTLY * np.ptp(rows["time_ns"]):
        return None
    counted = readings[column].to_numpy(dtype=np.float64)
    elapsed = float(readings["time_ns"].iloc[-1] - readings["time_ns"].iloc[0])
    if elapsed <= 0.0 or (np.diff(counted) < 0.0).any():
        return None
    return float(min(1.0, (counted[-1] - counted[0]) / elapsed))


def _cap(
    share: float | None,
    busy_share: float | None,
    source: ShareSource | None,
    states: dict[StateName, Readings] | None,
    whole: Readings,
) -> Literal["binds", "does not bind"] | None:
    """Whether the limit binds while the device is busy.

    Without event reasons the busy part of the time is not known. It is at most all of it, so that a counter
    above the threshold decides, and one that never advanced; so does power that never came near the limit.
    """
    if busy_share is not None:
        return "binds" if busy_share >= BINDING_SHARE else "does not bind"
    if source == "counter" and share is not None and share >= BINDING_SHARE:
        return "binds"
    if states is not None:
        return None  # no busy sample
    if source == "counter":
        return "does not bind" if share == 0.0 else None
    highest = whole.highest_power_over_limit
    return "does not bind" if highest is not None and highest < _NEAR_LIMIT else None
