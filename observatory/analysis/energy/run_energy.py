"""Energy of a run: per device, per phase and span, per token, and what its sensors miss.

Every frame has one row per thing and device; a value that cannot be given is NaN and the row's ``reason``
says why, in words and as ``reason_code``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from pydantic import JsonValue

from observatory.analysis.energy.attribution import IdlePower, attribute, idle_power
from observatory.analysis.energy.codes import EnergyCode
from observatory.analysis.energy.device_ownership import (
    device_ranks,
    devices_of_rank,
    ranks_of_node,
)
from observatory.analysis.energy.phase_intervals import ClockShift
from observatory.analysis.energy.phases import REST, RankPhases, rank_phases
from observatory.analysis.energy.rows import (
    AliasingRow,
    Device,
    DeviceRow,
    PhaseRow,
    aliasing_rows,
    device_row,
    frame_of,
    phase_rows,
    refused_rows,
)
from observatory.analysis.energy.tokens import TokenRow, TotalRow, token_rows, total_rows
from observatory.analysis.energy.traces import PowerTrace, trace_of_frame
from observatory.analysis.energy.windows import energy_of_window
from observatory.devices.sensors import sensor_of
from observatory.errors import EnergyError
from observatory.reasons import Reason
from observatory.run import Run
from observatory.run.device_samples import SampledDevice, device_samples, sampled_devices

#: Columns of the power table that energy rests on.
_COLUMNS = ("time_ns", "read_ns", "power_mw", "energy_mj")
#: A counter is reset at most so often in a run: by a driver reload, or when it overflows.
_MOST_RESETS = 3
#: And goes back in at most this share of its readings, for runs so long that more resets are plausible.
_MOST_RESET_SHARE = 0.005


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EnergySummary:
    """Energy of a run.

    Attributes:
        devices: one row per sampled device; ``DeviceRow``. Energy of the whole run (from its first phase to
            its last; from the first sample to the last where no phases are known), by the counter or else by
            integrated power; ``error`` is the half-width of its 90 % interval, relative. ``attributed_share``
            is what all phases and idle add up to, over this energy.
        phases: per device and phase (``span`` None) or span inside a phase, and ``idle``; ``PhaseRow``.
            ``idle_mj`` is the device's idle power over the same time, ``above_idle_mj`` the rest.
        tokens: per rank and phase, over all devices of the rank; ``TokenRow``.
        totals: per phase that several ranks ran, over all of them; ``TotalRow``.
        aliasing: per device and phase with regular steps, what the sensor of instant power misses of them;
            ``AliasingRow``.
        problems: what could not be used, or must be known.

    ``energy_flag`` of devices, phases, tokens and totals is a code besides ``flag`` and ``reason``: ``in time
    with the sensor`` where integrated power was widened, or refused, for what the sensor may have missed.
    """

    devices: pd.DataFrame
    phases: pd.DataFrame
    tokens: pd.DataFrame
    totals: pd.DataFrame
    aliasing: pd.DataFrame
    problems: tuple[Reason, ...]


def energy_summary(run: Run, *, seed: int = 0) -> EnergySummary:
    """Energy of a run, attributed as far as its samples allow.

    Args:
        run: with power samples.
        seed: of the bootstraps.

    Raises:
        EnergyError: the run holds no power samples, or none that can be read.
    """
    sampled = sampled_devices(run)
    if not sampled:
        raise _no_samples(run)
    repeated: list[Reason] = []
    sampled = _each_once(sampled, repeated)
    ranks = device_ranks(run.manifest, [(one.rank, one.uuid) for one in sampled])
    ran_of = _phases_of(run, {rank for rank in ranks.values() if not isinstance(rank, Reason)})
    phases_of = {rank: ran for rank, ran in ran_of.items() if not isinstance(ran, Reason)}
    rows = _Rows()
    devices: list[Device] = []
    of_samples: list[Reason] = []
    of_phases: list[Reason] = []
    for one, samples in device_samples(run, sampled, _COLUMNS):
        trace = trace_of_frame(samples, device_uuid=one.uuid)
        del samples  # as large as the trace
        device = _device(run, one, trace, ranks[one.rank, one.uuid], of_samples)
        _add_device(rows, device, trace, phases_of, run, of_phases, seed)
        devices.append(device)
    missing = _missing(run, devices, rows, list(phases_of))
    problems = [*repeated, *of_samples, *_rank_problems(devices, ran_of), *of_phases]
    flags_of = {row.device_uuid: row.flags for row in rows.devices}
    tokens = token_rows(run, rows.phases, phases_of, missing, flags_of)
    return EnergySummary(
        devices=frame_of(rows.devices, DeviceRow),
        phases=frame_of(rows.phases, PhaseRow),
        tokens=frame_of(tokens, TokenRow),
        totals=frame_of(total_rows(tokens), TotalRow),
        aliasing=frame_of(rows.aliasing, AliasingRow),
        problems=_distinct(problems),
    )


def _no_samples(run: Run) -> EnergyError:
    damaged = damaged_samples(run)
    if damaged:
        return EnergyError(f"run {run.path} has no power samples that can be read: {damaged}")
    powers = [status.power for status in run.manifest.ranks if status.power is not None]
    notes = list(dict.fromkeys(note for power in powers for note in power.notes))
    why = f": {'; '.join(notes)[:600]}" if notes else ""
    return EnergyError(
        f"run {run.path} holds no power samples{why}; capture it where a device can be read "
        "(`observatory doctor` lists them)"
    )


def damaged_samples(run: Run) -> str:
    """What is wrong with the files of a run's power table, the first few; empty when nothing is."""
    return "; ".join(run.problems_of("power")[:3])


def _distinct(problems: Sequence[Reason]) -> tuple[Reason, ...]:
    return tuple(item for index, item in enumerate(problems) if item not in problems[:index])


def _phases_of(run: Run, with_device: set[int]) -> dict[int, RankPhases | Reason]:
    """Phases of each rank that has spans or devices, or why there are none, by rank."""
    spans = run.spans()
    ranks = sorted(with_device.union(spans["source_rank"].unique().tolist()))
    return {rank: rank_phases(spans[spans["source_rank"] == rank]) for rank in ranks}


def _rank_problems(devices: Sequence[Device], ran_of: Mapping[int, RankPhases | Reason]) -> list[Reason]:
    """What could not be used of the phases of ranks that have a device."""
    problems = []
    for rank in sorted({device.rank for device in devices if device.rank is not None}):
        ran = ran_of[rank]
        causes = (ran,) if isinstance(ran, Reason) else ran.problems
        problems += [Reason(EnergyCode.OF_RANK, {"rank": rank}, (cause,)) for cause in causes]
    return problems


@dataclass(slots=True)
class _Rows:
    devices: list[DeviceRow] = field(default_factory=list)
    phases: list[PhaseRow] = field(default_factory=list)
    aliasing: list[AliasingRow] = field(default_factory=list)


def _missing(run: Run, devices: Sequence[Device], rows: _Rows, ranks: Sequence[int]) -> dict[int, Reason]:
    """Of the ranks whose energy is not known, or not that of all their devices, why."""
    owned = devices_of_rank(run.manifest)
    attributed = {row.device_uuid for row in rows.phases}
    reasons = {row.device_uuid: row.reasons for row in rows.devices}
    result: dict[int, Reason] = {}
    for rank in ranks:
        node = ranks_of_node(run.manifest, rank)
        near = [device for device in devices if node is None or device.sampler in node]
        sampled = {device.uuid for device in near}
        absent = [uuid for uuid in owned.get(rank, []) if uuid not in sampled]
        of_rank = [device for device in near if device.rank == rank]
        unusable = [device.uuid for device in of_rank if device.uuid not in attributed]
        if absent:
            result[rank] = Reason(EnergyCode.NOT_SAMPLED, {"device": absent[0]})
        elif unusable:
            result[rank] = _of_device(unusable[0], *reasons[unusable[0]])
        elif not of_rank:
            # The device that it names, if there is one, gives the best reason.
            near.sort(key=lambda device: device.uuid not in owned.get(rank, []))
            causes = [device.rank_reason for device in near[:1] if device.rank_reason is not None]
            result[rank] = _of_device(near[0].uuid, *causes) if near else Reason(EnergyCode.NO_DEVICE_SAMPLED)
    return result


def _serves_others(device: Device) -> Reason:
    """Why a device of a rank's node is not the rank's own."""
    cause = device.rank_reason or Reason(EnergyCode.WORKS_FOR_RANK, {"rank": device.rank})
    return _of_device(device.uuid, cause)


def _of_device(uuid: str, *causes: Reason) -> Reason:
    return Reason(EnergyCode.OF_DEVICE, {"device": uuid}, causes)


def _each_once(devices: Sequence[SampledDevice], problems: list[Reason]) -> list[SampledDevice]:
    """Each device once, where its samples are longest: ranks that share a GPU may each have sampled it."""
    samplers: dict[str, list[SampledDevice]] = {}
    for device in devices:
        samplers.setdefault(device.uuid, []).append(device)
    longest = {
        uuid: max(of_uuid, key=lambda device: device.last_ns - device.first_ns)
        for uuid, of_uuid in samplers.items()
    }
    for uuid, device in longest.items():
        if len(samplers[uuid]) > 1:
            counts: dict[str, JsonValue] = {"ranks": len(samplers[uuid]), "rank": device.rank}
            problems.append(_of_device(uuid, Reason(EnergyCode.SAMPLED_TWICE, counts)))
    return [device for device in devices if longest[device.uuid] is device]


def _device(
    run: Run, sampled: SampledDevice, trace: PowerTrace, rank: int | Reason, problems: list[Reason]
) -> Device:
    """What is known of a device; ``rank``: the one that it works for, or why there is none."""
    uuid = sampled.uuid
    spec = run.manifest.device_specs.get(uuid)
    name, kind = (None, None) if spec is None else (spec.name, spec.kind)
    calibration = None
    for status in run.manifest.ranks:
        calibration = calibration if status.power is None else status.power.calibration.get(uuid, calibration)
    idle_mw = None if calibration is None else calibration.idle_power_mw
    disorder = _disorder(trace)
    rank = rank if disorder is None else disorder
    causes = _trace_problems(trace, kind)
    if disorder is not None:
        causes.append(Reason(EnergyCode.NO_ENERGY_GIVEN, because=(disorder,)))
    elif isinstance(rank, Reason):
        causes.append(Reason(EnergyCode.WHOLE_RUN_ONLY, because=(rank,)))
    problems += [_of_device(uuid, cause) for cause in causes]
    return Device(
        sampler=sampled.rank,
        uuid=uuid,
        samples=len(trace.time_ns_N),
        sensor=sensor_of(name, calibration, kind=kind),
        name=name,
        kind=kind,
        calibrated_idle_mw=float(idle_mw) if idle_mw is not None and 0 < idle_mw < 1e9 else None,
        rank=None if isinstance(rank, Reason) else rank,
        rank_reason=rank if isinstance(rank, Reason) else None,
        disorder=disorder,
    )


def _trace_problems(trace: PowerTrace, kind: str | None) -> list[Reason]:
    """What to know of the samples of a device."""
    problems = []
    if trace.repeated:
        problems.append(Reason(EnergyCode.REPEATED_TIMES, {"samples": trace.repeated}))
    if trace.impossible:
        problems.append(Reason(EnergyCode.IMPOSSIBLE_READINGS, {"readings": trace.impossible}))
    if kind == "replay":
        problems.append(Reason(EnergyCode.REPLAYED))
    return problems


def _disorder(trace: PowerTrace) -> Reason | None:
    """Why the samples are in no order that can be believed; None when they are.

    A counter goes back when it is reset. One that goes back and forth was read at other times than its
    samples state, or is two counters.
    """
    energy_mj = trace.energy_mj_N[~np.isnan(trace.energy_mj_N)]
    times = int((np.diff(energy_mj) < 0).sum())
    if times <= max(_MOST_RESETS, _MOST_RESET_SHARE * len(energy_mj)):
        return None
    return Reason(EnergyCode.COUNTER_OUT_OF_ORDER, {"times": times})


def _add_device(
    rows: _Rows,
    device: Device,
    trace: PowerTrace,
    phases_of: dict[int, RankPhases],
    run: Run,
    problems: list[Reason],
    seed: int,
) -> None:
    """Rows of one device."""
    time = trace.time_ns_N
    start, end = int(time[0]), int(time[-1])
    ran = None if device.rank is None else phases_of.get(device.rank)
    reason = device.rank_reason or (None if ran else Reason(EnergyCode.NO_PHASES_OF_RANK))
    idle: IdlePower | None = None
    attributed_mj: float | None = None
    aliasing: list[AliasingRow] = []
    if ran is not None and device.rank is not None:
        middle = (ran.phases.start_ns + ran.phases.end_ns) // 2
        shift = ClockShift.between(run.manifest, device.rank, device.sampler, middle)
        reason = shift.reason
        if shift.reason is not None:
            problems.append(_of_device(device.uuid, shift.reason))
        else:
            phases = ran.phases.moved(shift.shift_ns)
            start, end = phases.start_ns, phases.end_ns
            aliasing = aliasing_rows(device, trace, ran, phases)
            rows.aliasing += aliasing
            if ran.overlap is None:
                idle, attributed_mj = _add_phases(rows, device, trace, ran, shift, aliasing, seed)
            else:
                reason = ran.overlap
                rows.phases += refused_rows(device, ran)
    energy = None
    if end > start and device.disorder is None:
        energy = energy_of_window(trace, start, end, sensor=device.sensor)
    rows.devices.append(device_row(device, energy, idle, attributed_mj, reason, aliasing))


def _add_phases(
    rows: _Rows,
    device: Device,
    trace: PowerTrace,
    ran: RankPhases,
    shift: ClockShift,
    aliasing: list[AliasingRow],
    seed: int,
) -> tuple[IdlePower, float | None]:
    """Rows of the phases of one device; its idle power, and the energy of all phases where it is known."""
    phases = ran.phases.moved(shift.shift_ns)
    whole = attribute(trace, phases, device.sensor, clock_error_ns=shift.error_ns, seed=seed)
    idle = idle_power(trace, phases, device.sensor, whole, device.calibrated_idle_mw)
    of_phases = phase_rows(device, whole, None, idle, aliasing)
    rows.phases += of_phases
    for phase, inside in ran.inside.items():
        inner = attribute(
            trace, inside.moved(shift.shift_ns), device.sensor, fillers=(REST,),
            inside_only=True, clock_error_ns=shift.error_ns, lag_ms=whole.lag_ms, seed=seed,
        )  # fmt: skip
        rows.phases += phase_rows(device, inner, phase, idle, aliasing)
    complete = all(row.energy_mj is not None for row in of_phases)
    return idle, whole.energy_mj if complete else None
