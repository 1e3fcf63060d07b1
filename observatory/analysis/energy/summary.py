"""What a run says of energy: per device, per phase and span, per token, and what its sensors could not see.

Every frame has one row per thing and device; a value that cannot be given is NaN and the row's ``reason``
says why.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from pydantic import JsonValue

from observatory.analysis.energy.attribution import IdlePower, attribute, idle_power
from observatory.analysis.energy.device_ownership import (
    Clocks,
    device_ranks,
    device_specs,
    devices_of_rank,
    power_config,
    ranks_of_node,
)
from observatory.analysis.energy.phases import REST, RankPhases, rank_phases
from observatory.analysis.energy.rows import (
    ALIASING_COLUMNS,
    DEVICE_COLUMNS,
    PHASE_COLUMNS,
    Device,
    aliasing_rows,
    device_row,
    flag_aliased,
    flag_device,
    phase_rows,
    refused_rows,
    tidy_frame,
    token_frame,
    total_frame,
)
from observatory.analysis.energy.traces import PowerTrace, traces_of
from observatory.analysis.energy.windows import energy_of_window
from observatory.devices.sensors import sensor_of
from observatory.errors import EnergyError
from observatory.run import Run

#: A counter may be reset so often in a run.
_MOST_RESETS = 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EnergySummary:
    """Energy of a run.

    Attributes:
        devices: one row per sampled device; ``DEVICE_COLUMNS``. Energy of the whole run (from its first phase
            to its last; from the first sample to the last where no phases are known), by the counter or else
            by integrated power; ``error`` is the half-width of its 90 % interval, relative.
            ``attributed_share`` is what all phases and idle add up to, over this energy.
        phases: per device and phase (``span`` None) or span inside a phase, and ``idle``; ``PHASE_COLUMNS``.
            ``idle_mj`` is the device's idle power over the same time, ``above_idle_mj`` the rest.
        tokens: per rank and phase, over all devices of the rank; ``TOKEN_COLUMNS``.
        totals: per phase that several ranks ran, over all of them; ``TOTAL_COLUMNS``.
        aliasing: per device and phase with regular steps, what the sensor of instant power makes of them;
            ``ALIASING_COLUMNS``.
        problems: what could not be used, or must be known.

    ``energy_flag`` of devices, phases, tokens and totals is a code beside ``flag`` and ``reason``: ``in time
    with the sensor`` where integrated power was widened, or refused, for what the sensor may have missed.
    """

    devices: pd.DataFrame
    phases: pd.DataFrame
    tokens: pd.DataFrame
    totals: pd.DataFrame
    aliasing: pd.DataFrame
    problems: tuple[str, ...]


def energy_summary(run: Run, *, seed: int = 0) -> EnergySummary:
    """Energy of a run, attributed as far as its samples allow.

    Args:
        run: with power samples.
        seed: of the bootstraps.

    Raises:
        EnergyError: the run holds no power samples, or none that can be read.
    """
    power = run.power()
    if power.empty:
        damaged = damaged_samples(run)
        if damaged:
            raise EnergyError(f"run {run.path} has no power samples that can be read: {damaged}")
        powers = [status.power for status in run.manifest.ranks if status.power is not None]
        notes = list(dict.fromkeys(note for told in powers for note in told.notes))
        why = f": {'; '.join(notes)[:600]}" if notes else ""
        raise EnergyError(
            f"run {run.path} holds no power samples{why}; capture it where a device can be read "
            "(`observatory doctor` lists them)"
        )
    problems: list[str] = []
    devices = _devices(run, power, problems)
    spans = run.spans()
    placed = {device.rank for device in devices if device.rank is not None}
    phases_of: dict[int, RankPhases] = {}
    for rank in sorted(placed.union(spans["source_rank"].unique().tolist())):
        found = rank_phases(spans[spans["source_rank"] == rank])
        if not isinstance(found, str):
            phases_of[rank] = found
        if rank in placed:
            told = (found,) if isinstance(found, str) else found.problems
            problems += [f"rank {rank}: {problem}" for problem in told]
    rows = _Rows()
    for device in devices:
        _add_device(rows, device, phases_of, run, problems, seed)
    missing = _missing(run, devices, rows, list(phases_of))
    flagged = {str(row["device_uuid"]): str(row["flag"]) for row in rows.devices if row.get("flag")}
    tokens = token_frame(run, rows.phases, phases_of, missing, flagged)
    return EnergySummary(
        devices=tidy_frame(rows.devices, DEVICE_COLUMNS),
        phases=tidy_frame(rows.phases, PHASE_COLUMNS),
        tokens=tokens,
        totals=total_frame(tokens),
        aliasing=tidy_frame(rows.aliasing, ALIASING_COLUMNS),
        problems=tuple(dict.fromkeys(problems)),
    )


def damaged_samples(run: Run) -> str:
    """What is wrong with the files of a run's power table, the first few; empty when nothing is."""
    return "; ".join([problem for problem in run.problems if problem.startswith("power/")][:3])


class _Rows:
    def __init__(self) -> None:
        self.devices: list[dict[str, object]] = []
        self.phases: list[dict[str, object]] = []
        self.aliasing: list[dict[str, object]] = []


def _missing(run: Run, devices: list[Device], rows: _Rows, ranks: list[int]) -> dict[int, str]:
    """Of the ranks whose energy is not known, or not that of all their devices, why."""
    owned = devices_of_rank(run.manifest)
    attributed = {row["device_uuid"] for row in rows.phases}
    reasons = {row["device_uuid"]: row["reason"] for row in rows.devices}
    result: dict[int, str] = {}
    for rank in ranks:
        node = ranks_of_node(run.manifest, rank)
        near = [device for device in devices if node is None or device.sampler in node]
        sampled = {device.uuid for device in near}
        absent = [uuid for uuid in owned.get(rank, []) if uuid not in sampled]
        own = [device for device in near if device.rank == rank]
        unusable = [device.uuid for device in own if device.uuid not in attributed]
        if absent:
            result[rank] = f"{absent[0]}, on which it computes, was not sampled"
        elif unusable:
            result[rank] = f"{unusable[0]}: {reasons[unusable[0]]}"
        elif not own:
            # The device that it names, if there is one, says best why.
            near.sort(key=lambda device: device.uuid not in owned.get(rank, []))
            result[rank] = (
                f"{near[0].uuid}: {near[0].rank_reason}" if near else "no device of its node was sampled"
            )
    return result


def _each_once(
    traces: dict[tuple[int, str], PowerTrace], problems: list[str]
) -> dict[tuple[int, str], PowerTrace]:
    """One trace of each device, the longest: ranks that share a GPU may each have sampled it."""
    longest: dict[str, int] = {}
    for (sampler, uuid), trace in traces.items():
        best = longest.get(uuid)
        if best is None or np.ptp(trace.time_ns_N) > np.ptp(traces[best, uuid].time_ns_N):
            longest[uuid] = sampler
    for uuid, sampler in longest.items():
        others = sum(name == uuid for _, name in traces) - 1
        if others:
            problems.append(
                f"device {uuid}: {others + 1} ranks sampled it; its energy counts once, by rank {sampler}"
            )
    return {key: trace for key, trace in traces.items() if longest[key[1]] == key[0]}


def _devices(run: Run, power: pd.DataFrame, problems: list[str]) -> list[Device]:
    traces = _each_once(traces_of(power), problems)
    specs = device_specs(run.manifest)
    calibration = power_config(run.manifest).get("calibration")
    places = device_ranks(run.manifest, list(traces))
    found = []
    for (sampler, uuid), trace in traces.items():
        spec = specs.get(uuid)
        told: JsonValue = calibration.get(uuid) if isinstance(calibration, dict) else None
        entry = told if isinstance(told, dict) else {}
        idle = entry.get("idle_power_mw")
        place = places[sampler, uuid]
        if trace.repeated:
            problems.append(f"device {uuid}: {trace.repeated} samples have the time of another; left out")
        if trace.impossible:
            problems.append(f"device {uuid}: {trace.impossible} readings are impossible; left out")
        if spec is not None and spec.kind == "replay":
            problems.append(
                f"device {uuid}: its power was played from a recording, not measured while this run ran: its "
                "energy, per phase and token too, says nothing of this model"
            )
        disorder = _disorder(trace)
        if disorder is not None:
            problems.append(f"device {uuid}: {disorder}; no energy of it is given")
            place = disorder
        elif isinstance(place, str):
            problems.append(f"device {uuid}: {place}; its energy is given for the whole run only")
        found.append(
            Device(
                sampler=sampler, uuid=uuid, trace=trace,
                sensor=sensor_of(
                    None if spec is None else spec.name, entry, kind=None if spec is None else spec.kind
                ),
                name=None if spec is None else spec.name, kind=None if spec is None else spec.kind,
                calibrated_idle_mw=float(idle) if isinstance(idle, int | float) and 0 < idle < 1e9 else None,
                rank=None if isinstance(place, str) else place,
                rank_reason=place if isinstance(place, str) else None,
                disorder=disorder,
            )
        )  # fmt: skip
    return found


def _disorder(trace: PowerTrace) -> str | None:
    """Why the samples are in no order that can be believed; None when they are.

    A counter goes back when it is reset. One that goes back and forth was read at other times than its
    samples say, or is two counters.
    """
    known = trace.energy_mj_N[~np.isnan(trace.energy_mj_N)]
    back = int((np.diff(known) < 0).sum())
    if back <= max(_MOST_RESETS, 0.005 * len(known)):
        return None
    return f"its counter goes back {back} times: the samples' clock jumped, or two devices have one name"


def _add_device(
    rows: _Rows,
    device: Device,
    phases_of: dict[int, RankPhases],
    run: Run,
    problems: list[str],
    seed: int,
) -> None:
    """Rows of one device."""
    time = device.trace.time_ns_N
    start, end = int(time[0]), int(time[-1])
    ran = None if device.rank is None else phases_of.get(device.rank)
    reason = device.rank_reason or (None if ran else "no phases of its rank are known")
    idle: IdlePower | None = None
    attributed_mj: float | None = None
    aliased: list[dict[str, object]] = []
    if ran is not None and device.rank is not None:
        middle = (ran.phases.start_ns + ran.phases.end_ns) // 2
        clocks = Clocks.between(run.manifest, device.rank, device.sampler, middle)
        reason = clocks.reason
        if clocks.reason is not None:
            problems.append(f"device {device.uuid}: {clocks.reason}")
        else:
            phases = ran.phases.moved(clocks.shift_ns)
            start, end = phases.start_ns, phases.end_ns
            aliased = aliasing_rows(device, ran, phases)
            rows.aliasing += aliased
            if ran.overlap is None:
                idle, attributed_mj = _add_phases(rows, device, ran, clocks, aliased, seed)
            else:
                reason = ran.overlap
                rows.phases += refused_rows(device, ran)
    energy = None
    if end > start and device.disorder is None:
        energy = energy_of_window(device.trace, start, end, sensor=device.sensor)
    row = device_row(device, energy, idle, attributed_mj, reason)
    rows.devices.append(flag_device(row, aliased))


def _add_phases(
    rows: _Rows, device: Device, ran: RankPhases, clocks: Clocks, aliased: list[dict[str, object]], seed: int
) -> tuple[IdlePower, float | None]:
    """Rows of the phases of one device; its idle power, and the energy of all phases where it is known."""
    phases = ran.phases.moved(clocks.shift_ns)
    whole = attribute(device.trace, phases, device.sensor, clock_error_ns=clocks.error_ns, seed=seed)
    idle = idle_power(device.trace, phases, device.sensor, whole, device.calibrated_idle_mw)
    own = flag_aliased(phase_rows(device, whole, None, idle), aliased)
    rows.phases += own
    for phase, inside in ran.inside.items():
        inner = attribute(
            device.trace, inside.moved(clocks.shift_ns), device.sensor, fillers=(REST,),
            inside_only=True, clock_error_ns=clocks.error_ns, lag_ms=whole.lag_ms, seed=seed,
        )  # fmt: skip
        rows.phases += flag_aliased(phase_rows(device, inner, phase, idle), aliased)
    known = all(row.get("energy_mj") is not None for row in own)
    return idle, whole.energy_mj if known else None
