"""What a run's power samples alone say about caps and clocks, where nobody swept anything.

They tell whether the power limit binds, which clock was seen and how near the device is to idle. They do not
tell which clock is best: that takes the time of an iteration at several clocks.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field

from observatory.cost.clocks.confounds import BINDING_SHARE
from observatory.energy.bands import DeviceBands, device_bands
from observatory.energy.places import device_specs
from observatory.energy.sensors import SensorModel, sensor_of
from observatory.errors import ClockError
from observatory.records import DeviceSpec, Record, Text
from observatory.store import Run

__all__ = ["DeviceTelemetry", "TelemetryAdvice", "telemetry_advice"]

_IDLE, _POWER_CAP, _THERMAL = 0x1, 0x4, 0x20 | 0x40
_BRAKE = 0x8 | 0x80
_LEAST_SAMPLES = 10
_STEADY_MHZ = 30.0
_IDLE_SHARE = 0.1
_LOW_DRAW = 0.15
_MOST_DEVICES = 256
#: Renewal of power where the device's own is not known: that of all NVIDIA GPUs since Ampere.
_UPDATE_MS = 100.0

_Share = Annotated[float, Field(ge=0.0, le=1.0)]


class DeviceTelemetry(Record):
    """One device, or one phase on it.

    Attributes:
        device_uuid: the device.
        phase: the phase; None for the whole run.
        samples: samples in it.
        duration_s: from the first to the last.
        power_median_mw, power_p95_mw: of the instant power; None when not told, like all below.
        limit_mw: power limit in force, the lowest seen.
        highest_limit_mw: the highest seen.
        power_over_limit: p95 of power over the limit in force at the time.
        power_cap_share: share of time in which the limit held the clock down.
        thermal_share: likewise heat.
        brake_share: likewise hardware slowdown and power brake.
        idle_share: share of samples that the driver calls idle.
        sm_clock_low_mhz, sm_clock_mhz, sm_clock_high_mhz: 5 %, median and 95 % of the clock.
        max_sm_clock_mhz: highest clock of the device.
        cap: whether the limit binds; None when nothing tells.
        findings: sentences.
    """

    device_uuid: Text
    phase: Text | None = None
    samples: int
    duration_s: float
    power_median_mw: float | None = None
    power_p95_mw: float | None = None
    limit_mw: float | None = None
    highest_limit_mw: float | None = None
    power_over_limit: float | None = None
    power_cap_share: _Share | None = None
    thermal_share: _Share | None = None
    brake_share: _Share | None = None
    idle_share: _Share | None = None
    sm_clock_low_mhz: float | None = None
    sm_clock_mhz: float | None = None
    sm_clock_high_mhz: float | None = None
    max_sm_clock_mhz: float | None = None
    cap: Literal["binds", "does not bind"] | None = None
    findings: tuple[Text, ...] = ()


class TelemetryAdvice(Record):
    """What ``observatory clocks recommend --telemetry RUN`` prints.

    Attributes:
        run: its directory.
        devices: every device, then its phases.
        cannot: what a sweep alone could tell.
        next_steps: commands.
    """

    run: Text
    devices: tuple[DeviceTelemetry, ...]
    cannot: Text
    next_steps: tuple[Text, ...]


def telemetry_advice(run: Run) -> TelemetryAdvice:
    """Read a run's power table.

    Raises:
        ClockError: the run has no power samples.
    """
    frame = run.power()
    if frame.empty:
        raise ClockError(
            f"run {run.path} holds no power samples; capture some with `observatory power --out RUN -- "
            "COMMAND`"
        )
    specs = device_specs(run.manifest)
    found: list[DeviceTelemetry] = []
    # The same name may stand for a device of each of several nodes, on each node's own clock.
    ordered = frame.sort_values("time_ns", kind="stable")
    groups = [
        ((int(own["source_rank"].iloc[0]), str(own["device_uuid"].iloc[0])), own)
        for _, own in ordered.groupby(["source_rank", "device_uuid"], sort=True)
    ][:_MOST_DEVICES]
    bands = device_bands(run, [key for key, _ in groups])
    for key, rows in groups:
        uuid = key[1]
        spec = specs.get(uuid)
        idle_mw = _idle_power_mw(run, uuid)
        found.append(_device(uuid, None, rows, spec, idle_mw))
        sensor = sensor_of(None if spec is None else spec.name)
        for phase, part in _by_phase(rows, bands[key], sensor):
            if len(part) >= _LEAST_SAMPLES:
                found.append(_device(uuid, phase, part, spec, idle_mw))
    return TelemetryAdvice(
        run=str(run.path),
        devices=tuple(found),
        cannot="which clock saves energy cannot be told from one clock: it takes the time and energy of "
        "an iteration at several",
        next_steps=(
            "observatory clocks sweep --help",
            "observatory clocks fit SWEEP.json --out fit.json",
            "observatory clocks recommend fit.json --max-slowdown 0.02",
        ),
    )


def _idle_power_mw(run: Run, uuid: str) -> float | None:
    """Idle power as the sampler found it at the start; None where the run does not say."""
    for status in run.manifest.ranks:
        found = None if status.power is None else status.power.calibration.get(uuid)
        if found is not None and found.idle_power_mw:
            return float(found.idle_power_mw)
    return None


def _by_phase(rows: pd.DataFrame, bands: DeviceBands, sensor: SensorModel) -> list[tuple[str, pd.DataFrame]]:
    """Samples of each phase of the rank that the device works for, else of the one that sampled it.

    Power is left out of samples that may still tell of what ran before the phase: a reading is as old as the
    last renewal and, before that, what the sensor averages.
    """
    if not bands.phase:
        return []
    time_ns = rows["time_ns"].to_numpy()
    index = np.searchsorted(bands.start_ns, time_ns, side="right") - 1
    inside = (index >= 0) & (time_ns < bands.end_ns[np.maximum(index, 0)])
    names = np.array(bands.phase, dtype=object)
    phase = names[np.maximum(index, 0)]
    oldest_ns = 1e6 * ((sensor.update_ms or _UPDATE_MS) + (sensor.window_ms or 0.0))
    begun = np.ones(len(names), dtype=bool)
    begun[1:] = (names[1:] != names[:-1]) | (bands.start_ns[1:] - bands.end_ns[:-1] > oldest_ns)
    since_ns = bands.start_ns[begun][np.cumsum(begun) - 1][np.maximum(index, 0)]
    rows = rows.assign(power_mw=rows["power_mw"].where(time_ns - since_ns >= oldest_ns))
    return [(str(name), rows[inside & (phase == name)]) for name in sorted(set(phase[inside].tolist()))]


def _device(
    uuid: str, phase: str | None, rows: pd.DataFrame, spec: DeviceSpec | None, idle_mw: float | None
) -> DeviceTelemetry:
    power = _known(rows, "power_mw")
    clock = _known(rows, "sm_clock_mhz")
    limit = _known(rows, "enforced_limit_mw")
    limit_mw = float(limit.min()) if limit.size and limit.min() > 0 else None
    p95 = float(np.quantile(power, 0.95)) if power.size else None
    # Counters count over gaps too, so that they are read over the whole run only.
    counted = _counter_share(rows, "power_cap_ns") if phase is None else None
    capped = counted if counted is not None else _bit_share(rows, _POWER_CAP)
    hot = _counter_share(rows, "thermal_ns") if phase is None else None
    ratio = _over_limit(rows) if limit_mw else None
    device = DeviceTelemetry(
        device_uuid=uuid[:128],
        phase=phase,
        samples=len(rows),
        duration_s=float(rows["time_ns"].iloc[-1] - rows["time_ns"].iloc[0]) / 1e9,
        power_median_mw=float(np.median(power)) if power.size else None,
        power_p95_mw=p95,
        limit_mw=limit_mw,
        highest_limit_mw=float(limit.max()) if limit_mw else None,
        power_over_limit=ratio,
        power_cap_share=capped,
        thermal_share=hot if hot is not None else _bit_share(rows, _THERMAL),
        brake_share=_bit_share(rows, _BRAKE),
        idle_share=_bit_share(rows, _IDLE),
        sm_clock_low_mhz=float(np.quantile(clock, 0.05)) if clock.size else None,
        sm_clock_mhz=float(np.median(clock)) if clock.size else None,
        sm_clock_high_mhz=float(np.quantile(clock, 0.95)) if clock.size else None,
        max_sm_clock_mhz=float(spec.max_sm_clock_mhz) if spec and spec.max_sm_clock_mhz else None,
        cap=_cap(capped, ratio),
    )
    return device.model_copy(update={"findings": tuple(_findings(device, idle_mw))})


def _known(rows: pd.DataFrame, column: str) -> NDArray[np.float64]:
    values = pd.to_numeric(rows[column], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    known: NDArray[np.float64] = values[np.isfinite(values) & (values >= 0.0)]
    return known


def _over_limit(rows: pd.DataFrame) -> float | None:
    """95th percentile of power over the limit in force; None where no sample tells both."""
    power, limit = (
        pd.to_numeric(rows[name], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
        for name in ("power_mw", "enforced_limit_mw")
    )
    limit = pd.Series(limit).ffill().to_numpy()
    told = np.isfinite(power) & (power >= 0.0) & (limit > 0.0)
    return float(np.quantile(power[told] / limit[told], 0.95)) if told.any() else None


def _bit_share(rows: pd.DataFrame, bits: int) -> float | None:
    reasons = rows["event_reasons"].dropna().to_numpy(dtype=np.int64)
    return float(np.mean((reasons & bits) != 0)) if reasons.size else None


def _counter_share(rows: pd.DataFrame, column: str) -> float | None:
    """Part of the time that a counter of nanoseconds advanced; None when it is not told or ran backwards."""
    known = rows[["time_ns", column]].dropna()
    if len(known) < 2:
        return None
    counted = known[column].to_numpy(dtype=np.float64)
    elapsed = float(known["time_ns"].iloc[-1] - known["time_ns"].iloc[0])
    if elapsed <= 0.0 or (np.diff(counted) < 0.0).any():
        return None
    return float(min(1.0, (counted[-1] - counted[0]) / elapsed))


def _cap(share: float | None, ratio: float | None) -> Literal["binds", "does not bind"] | None:
    if share is not None:
        return "binds" if share >= BINDING_SHARE else "does not bind"
    return "does not bind" if ratio is not None and ratio < 0.9 else None


def _percent(share: float | None) -> str:
    return f"{100 * (share or 0.0):.0f} %"


def _findings(device: DeviceTelemetry, idle_mw: float | None) -> list[str]:
    found = []
    low, high = device.limit_mw, device.highest_limit_mw
    limit = "its power limit" if low is None else f"the power limit of {low / 1e3:.0f} W"
    whole = "it"
    if low is not None and high is not None and high > 1.01 * low:
        whole = "the limit in force"
        limit = f"the power limit, which was changed between {low / 1e3:.0f} and {high / 1e3:.0f} W,"
    drawn = ""
    if device.power_p95_mw is not None and device.power_over_limit is not None:
        drawn = f" (95 % of the samples stay below {device.power_p95_mw / 1e3:.0f} W, "
        drawn += f"{_percent(device.power_over_limit)} of {whole})"
    if device.cap == "binds":
        found.append(
            f"{limit} binds: it holds the clock down for {_percent(device.power_cap_share)} of the "
            f"time{drawn}; a lock above the clock seen would do nothing"
        )
    elif device.cap == "does not bind":
        found.append(
            f"{limit} does not bind{drawn}: a cap above that power changes nothing, locking the clock would"
        )
    else:
        found.append(f"whether {limit} binds cannot be told: neither event reasons nor power were sampled")
    found += _clock_findings(device)
    if (device.thermal_share or 0.0) >= BINDING_SHARE:
        found.append(
            f"heat slowed the chip for {_percent(device.thermal_share)} of the time: mend that first"
        )
    if (device.brake_share or 0.0) >= BINDING_SHARE:
        found.append(
            f"hardware slowdown or the power brake acted in {_percent(device.brake_share)} of the samples: "
            "mend that first"
        )
    idle = device.idle_share or 0.0
    if idle >= _IDLE_SHARE:
        found.append(
            f"the device idled in {_percent(idle)} of the samples: it waits for the host or for other ranks, "
            "which a clock does not change"
        )
    elif idle_mw is not None and device.limit_mw and device.power_median_mw is not None:
        way = (device.power_median_mw - idle_mw) / max(device.limit_mw - idle_mw, 1.0)
        if way < _LOW_DRAW:
            found.append(
                f"at {device.power_median_mw / 1e3:.0f} W it draws little more than the "
                f"{idle_mw / 1e3:.0f} W of an idle device: it may be waiting for the host"
            )
    return found


def _clock_findings(device: DeviceTelemetry) -> list[str]:
    low, middle, high = device.sm_clock_low_mhz, device.sm_clock_mhz, device.sm_clock_high_mhz
    if low is None or middle is None or high is None:
        return ["the SM clock was not sampled: no lock can be verified on such telemetry"]
    if high - low > _STEADY_MHZ:
        return [f"the SM clock moved between {low:.0f} and {high:.0f} MHz (median {middle:.0f})"]
    text = f"the SM clock stood at {middle:.0f} MHz"
    most = device.max_sm_clock_mhz
    if most is not None and middle < most - _STEADY_MHZ and device.cap != "binds":
        text += (
            f", below the highest of {most:.0f}: it is locked, clamped or held by heat; no event reason says "
            '"locked"'
        )
    return [text]
