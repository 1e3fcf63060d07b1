"""Rows of the frames of a run's energy: one record per kind of row, and the frame made of them.

A record keeps reasons and flags with their codes; a frame has them in words and as codes (``reason`` and
``reason_code``, ``flag`` and ``flag_code``). Values that are not known are None in a record, missing in a
frame.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, get_type_hints

import numpy as np
import pandas as pd

from observatory.analysis.energy.attribution import Attribution, IdlePower, PhasePower
from observatory.analysis.energy.codes import EnergyCode
from observatory.analysis.energy.design import IDLE
from observatory.analysis.energy.estimators import NORMAL_90
from observatory.analysis.energy.least_squares import WIDEST_INTERVAL
from observatory.analysis.energy.phases import RankPhases
from observatory.analysis.energy.repeated_iterations import update_period_ms
from observatory.analysis.energy.timeline import Timeline
from observatory.analysis.energy.traces import PowerTrace
from observatory.analysis.energy.windows import WindowEnergy
from observatory.analysis.energy.words import reasons_words
from observatory.devices.aliasing import TOLERATED, missed_error, rhythm_of
from observatory.devices.sensors import SensorModel
from observatory.reasons import Reason
from observatory.run.manifest import EnergyFlag

IN_TIME: EnergyFlag = "in time with the sensor"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Device:
    """One sampled device.

    Attributes:
        sampler: rank that took the samples.
        uuid, name, kind: the device; None where the run does not state it.
        samples: how many it has, each moment once.
        sensor: properties of its sensors.
        calibrated_idle_mw: idle power that the sampler measured when it started; None without.
        rank: rank that it works for alone; None where ``rank_reason`` says why there is none.
        disorder: why its samples cannot be used; None where they can.
    """

    sampler: int
    uuid: str
    samples: int
    sensor: SensorModel
    name: str | None
    kind: str | None
    calibrated_idle_mw: float | None
    rank: int | None
    rank_reason: Reason | None
    disorder: Reason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRow:
    """Energy of one device over the run."""

    device_uuid: str
    device: str | None
    kind: str | None
    sampled_by: int
    source_rank: int | None
    samples: int
    duration_s: float = 0.0
    energy_mj: float | None = None
    error: float | None = None
    source: str | None = None
    power_mw: float | None = None
    counter_mj: float | None = None
    integral_mj: float | None = None
    disagreement: float | None = None
    flags: tuple[Reason, ...] = ()
    energy_flag: str | None = None
    attributed_share: float | None = None
    idle_power_mw: float | None = None
    idle_source: tuple[Reason, ...] = ()
    sensor_update_ms: float | None = None
    sensor_window_ms: float | None = None
    counter_ms: float | None = None
    sensor_source: str
    reasons: tuple[Reason, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseRow:
    """Power and energy of one phase, or of a span inside it, on one device."""

    source_rank: int | None
    device_uuid: str
    phase: str
    span: str | None
    seconds: float | None = None
    power_mw: float | None = None
    power_low_mw: float | None = None
    power_high_mw: float | None = None
    energy_mj: float | None = None
    energy_low_mj: float | None = None
    energy_high_mj: float | None = None
    idle_mj: float | None = None
    above_idle_mj: float | None = None
    above_idle_low_mj: float | None = None
    above_idle_high_mj: float | None = None
    method: str | None = None
    source: str | None = None
    observations: int = 0
    measured_s: float | None = None
    condition: float | None = None
    flags: tuple[Reason, ...] = ()
    energy_flag: str | None = None
    reasons: tuple[Reason, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AliasingRow:
    """What the sensor of a device misses of the regular steps of a phase."""

    source_rank: int | None
    device_uuid: str
    phase: str
    step_period_ms: float
    step_jitter_ms: float
    update_ms: float
    window_ms: float
    error: float


Row = TypeVar("Row")


def frame_of(rows: Sequence[Row], kind: type[Row]) -> pd.DataFrame:
    """A frame of records of one kind, whose columns have one type each, whatever is missing."""
    hints = get_type_hints(kind)
    columns: dict[str, pd.Series[Any]] = {}
    for name in (item.name for item in fields(kind)):  # type: ignore[arg-type]  # a dataclass
        values = [getattr(row, name) for row in rows]
        if hints[name] == tuple[Reason, ...]:
            singular = name.removesuffix("s")
            columns[singular] = pd.Series([reasons_words(value) for value in values], dtype=object)
            columns[f"{singular}_code"] = pd.Series([_codes(value) for value in values], dtype=object)
        elif hints[name] in (int, int | None):
            columns[name] = pd.Series(values, dtype="Int64")
        else:
            number = hints[name] in (float, float | None)
            columns[name] = pd.Series(values, dtype="float64" if number else object)
    return pd.DataFrame(columns)


def _codes(reasons: tuple[Reason, ...]) -> str | None:
    return "; ".join(dict.fromkeys(reason.code.value for reason in reasons)) or None


def device_row(
    device: Device,
    energy: WindowEnergy | None,
    idle: IdlePower | None,
    attributed_mj: float | None,
    reason: Reason | None,
    aliasing: Sequence[AliasingRow],
) -> DeviceRow:
    """Row of one device.

    Args:
        device: the device.
        energy: of the whole run; None where its samples give no window.
        idle: its idle power; None where no phases were attributed.
        attributed_mj: energy of all phases and idle together; None where it is not known.
        reason: why there are no phases of it; None where there are.
        aliasing: what its sensor misses of regular steps.
    """
    sensor = device.sensor
    idle_source: tuple[Reason, ...] = ()
    if idle is not None:
        idle_source = (idle.source,)
    elif device.calibrated_idle_mw:
        idle_source = (Reason(EnergyCode.IDLE_BY_CALIBRATION),)
    row = DeviceRow(
        device_uuid=device.uuid,
        device=device.name,
        kind=device.kind,
        sampled_by=device.sampler,
        source_rank=device.rank,
        samples=device.samples,
        idle_power_mw=device.calibrated_idle_mw if idle is None else idle.power_mw,
        idle_source=idle_source,
        sensor_update_ms=sensor.update_ms,
        sensor_window_ms=sensor.window_ms,
        counter_ms=sensor.counter_ms,
        sensor_source=sensor.source,
    )
    if energy is None:
        return replace(row, reasons=(device.disorder or Reason(EnergyCode.ONE_SAMPLE),))
    row = replace(
        row,
        duration_s=energy.duration_s,
        energy_mj=energy.energy_mj,
        error=energy.relative_error,
        source=energy.source,
        power_mw=energy.power_mw,
        counter_mj=energy.counter_mj,
        integral_mj=energy.integral_mj,
        disagreement=energy.disagreement,
        flags=_reasons(energy.flag),
        attributed_share=attributed_mj / energy.energy_mj if attributed_mj and energy.energy_mj else None,
        reasons=_reasons(reason, energy.reason),
    )
    return _allow_for_steps(row, max((item.error for item in aliasing), default=0.0))


def _reasons(*reasons: Reason | None) -> tuple[Reason, ...]:
    return tuple(reason for reason in reasons if reason is not None)


def _allow_for_steps(row: DeviceRow, missed: float) -> DeviceRow:
    """A row of integrated power, its error extended by what the sensor misses of steps in time with it."""
    if row.source != "integral" or missed <= TOLERATED:
        return row
    row = replace(row, energy_flag=IN_TIME)
    if NORMAL_90 * missed > WIDEST_INTERVAL:
        refused = Reason(EnergyCode.STEPS_IN_TIME, {"error": missed, "allowed_for": False})
        return replace(
            row, energy_mj=None, error=None, source=None, power_mw=None, attributed_share=None,
            reasons=(*row.reasons, refused),
        )  # fmt: skip
    flag = Reason(EnergyCode.STEPS_IN_TIME, {"error": missed, "allowed_for": True})
    return replace(row, error=math.hypot(row.error or 0.0, NORMAL_90 * missed), flags=(*row.flags, flag))


def phase_rows(
    device: Device,
    attribution: Attribution,
    phase: str | None,
    idle: IdlePower,
    aliasing: Sequence[AliasingRow],
) -> list[PhaseRow]:
    """Rows of the phases (``phase`` None) or of the spans inside one."""
    missed = {item.phase: item.error for item in aliasing}
    rows = []
    for item in attribution.phases:
        row = PhaseRow(
            source_rank=device.rank,
            device_uuid=device.uuid,
            phase=item.name if phase is None else phase,
            span=None if phase is None else item.name,
            seconds=item.seconds,
            method=item.method,
            source=item.source,
            observations=item.observations,
            measured_s=item.measured_s,
            condition=item.condition,
            flags=item.flags,
            reasons=_reasons(item.reason),
        )
        row = _with_energy(row, item, idle, is_idle=phase is None and item.name == IDLE)
        rows.append(_allow_for_phase(row, missed.get(row.phase, 0.0)))
    return rows


def refused_rows(device: Device, ran: RankPhases) -> list[PhaseRow]:
    """Rows of the phases of a rank whose spans overlap, without energy."""
    return [
        PhaseRow(
            source_rank=device.rank, device_uuid=device.uuid, phase=phase, span=None,
            reasons=_reasons(ran.overlap),
        )
        for phase in ran.steps
    ]  # fmt: skip


def _with_energy(row: PhaseRow, item: PhasePower, idle: IdlePower, *, is_idle: bool) -> PhaseRow:
    """Row of a phase with its energy, and what of it is above idle."""
    seconds, idle_mw = item.seconds, idle.power_mw
    if item.power_mw is None or item.low_mw is None or item.high_mw is None:
        return row if idle_mw is None else replace(row, idle_mj=idle_mw * seconds)
    row = replace(
        row,
        power_mw=item.power_mw,
        power_low_mw=item.low_mw,
        power_high_mw=item.high_mw,
        energy_mj=item.power_mw * seconds,
        energy_low_mj=item.low_mw * seconds,
        energy_high_mj=item.high_mw * seconds,
    )
    if idle_mw is None:
        return row
    if is_idle:
        return replace(row, idle_mj=item.power_mw * seconds, above_idle_mj=0.0)
    low = idle_mw if idle.low_mw is None else idle.low_mw
    high = idle_mw if idle.high_mw is None else idle.high_mw
    return replace(
        row,
        idle_mj=idle_mw * seconds,
        above_idle_mj=(item.power_mw - idle_mw) * seconds,
        above_idle_low_mj=(item.low_mw - high) * seconds,
        above_idle_high_mj=(item.high_mw - low) * seconds,
    )


def _allow_for_phase(row: PhaseRow, missed: float) -> PhaseRow:
    """A row whose power was integrated over steps in time with the sensor, its intervals extended by that.

    Where they then exceed +-25 % there is no power. Powers by least squares are flagged only: the lags that
    they allow for cover it.
    """
    if not row.method or row.source == "counter" or missed <= TOLERATED:
        return row
    row = replace(row, energy_flag=IN_TIME)
    if row.method != "repetition":
        flag = Reason(EnergyCode.PHASE_IN_TIME, {"error": None, "allowed_for": True})
        return replace(row, flags=(*row.flags, flag))
    half = NORMAL_90 * missed
    if half > WIDEST_INTERVAL:
        refused = Reason(EnergyCode.PHASE_IN_TIME, {"error": missed, "allowed_for": False})
        return PhaseRow(
            source_rank=row.source_rank, device_uuid=row.device_uuid, phase=row.phase, span=row.span,
            seconds=row.seconds, idle_mj=row.idle_mj, energy_flag=IN_TIME, reasons=(refused,),
        )  # fmt: skip
    flag = Reason(EnergyCode.PHASE_IN_TIME, {"error": missed, "allowed_for": True})
    energy_low_mj, energy_high_mj = _times(row.energy_low_mj, 1 - half), _times(row.energy_high_mj, 1 + half)
    return replace(
        row,
        power_low_mw=_times(row.power_low_mw, 1 - half),
        power_high_mw=_times(row.power_high_mw, 1 + half),
        energy_low_mj=energy_low_mj,
        energy_high_mj=energy_high_mj,
        above_idle_low_mj=_moved(row.above_idle_low_mj, row.energy_low_mj, energy_low_mj),
        above_idle_high_mj=_moved(row.above_idle_high_mj, row.energy_high_mj, energy_high_mj),
        flags=(*row.flags, flag),
    )


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _moved(value: float | None, before: float | None, after: float | None) -> float | None:
    """A value moved as far as another one was."""
    return None if value is None or before is None or after is None else value + after - before


def aliasing_rows(device: Device, trace: PowerTrace, ran: RankPhases, phases: Timeline) -> list[AliasingRow]:
    """What the sensor misses of steps that are regular; rows for those only."""
    sensor = device.sensor
    if sensor.window_ms is None or np.isnan(trace.power_mw_N).all():
        return []
    update_ms = update_period_ms(trace, sensor)
    if update_ms is None:
        return []
    rows = []
    seconds: Mapping[str, float] = phases.seconds()
    for phase, starts in ran.step_starts_ns.items():
        rhythm = rhythm_of(starts)
        if rhythm is None or not seconds.get(phase):
            continue
        error = missed_error(starts, rhythm.period_ms, update_ms=update_ms, window_ms=sensor.window_ms)
        rows.append(
            AliasingRow(
                source_rank=device.rank,
                device_uuid=device.uuid,
                phase=phase,
                step_period_ms=rhythm.period_ms,
                step_jitter_ms=rhythm.jitter_ms,
                update_ms=update_ms,
                window_ms=sensor.window_ms,
                error=error,
            )
        )
    return rows
