"""Frames about power: the only part of reports that reads power from runs.

``traces``     run, device_uuid, sampled_by, device, quantity, source, samples, drawn, seconds, reason: what
               is drawn of each quantity of each device, or why it is not
``samples``    run, device_uuid, sampled_by, quantity, segment, time_s, value: the points drawn; each is a row
               of the run (``power`` by ``counter``: the mean between two of them)
``bands``      run, device_uuid, sampled_by, phase, start_s, end_s, spans
``reasons``    run, device_uuid, sampled_by, bit, start_s, end_s, stretches
``seen``       run, the numbers of ``DeviceTelemetry`` (``observatory.analysis.frequency.telemetry_records``),
               and
               busy_clock_mhz, capped_clock_mhz: medians while busy, and while the limit holds the clock
``devices``    run, and the columns of ``observatory.analysis.energy``'s summary of devices; likewise
               ``phases``,
               ``tokens`` (with ``flag``), ``totals`` and ``aliasing``

Quantities: ``power`` (W), ``limit`` (W), ``sm_clock`` and ``memory_clock`` (MHz), ``temperature`` (degrees).
Times are seconds after the first sample of the rank that sampled. Bands and reasons that lie closer together
than a three-hundredth of the whole are drawn as one; ``spans`` and ``stretches`` count what they join.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from observatory.analysis.energy import energy_summary, reason_words
from observatory.analysis.energy.phase_intervals import DeviceBands, device_bands
from observatory.analysis.energy.run_energy import damaged_samples
from observatory.analysis.frequency.telemetry import COLUMNS as TELEMETRY_COLUMNS
from observatory.analysis.frequency.telemetry import MOST_DEVICES as MOST_SEEN
from observatory.analysis.frequency.telemetry import device_telemetry
from observatory.analysis.frequency.telemetry_records import DeviceTelemetry, FindingCode, StateName
from observatory.devices.event_reasons import reason_stretches
from observatory.errors import ObservatoryError
from observatory.reports.thinning import joined_stretches, kept_samples
from observatory.run import Run
from observatory.run.device_samples import device_samples, sampled_devices
from observatory.run.manifest import RankPower

#: Bins of time of one drawn quantity; each shows its least and its greatest sample.
BINS = 400
#: Devices of one run whose course is drawn.
MOST_DEVICES = 16
#: Parts of the whole that are distinguished among bands and reasons.
_PARTS = 300
#: A hole of more than so many usual periods interrupts a line.
_GAP_PERIODS = 3.0

#: quantity -> column, what one unit of it is in the figure's unit.
_QUANTITIES: dict[str, tuple[str, float]] = {
    "power": ("power_mw", 1e-3),
    "limit": ("enforced_limit_mw", 1e-3),
    "sm_clock": ("sm_clock_mhz", 1.0),
    "memory_clock": ("memory_clock_mhz", 1.0),
    "temperature": ("temperature_c", 1.0),
}
#: Columns of the power table that are read.
_READ = {
    *TELEMETRY_COLUMNS, *(column for column, _ in _QUANTITIES.values()), "average_power_mw", "energy_mj",
}  # fmt: skip
#: Column of ``seen`` -> the state whose median clock it is.
_STATE_CLOCKS: dict[str, StateName] = {"busy_clock_mhz": "busy", "capped_clock_mhz": "power cap"}
_HELD: tuple[FindingCode, ...] = ("limit binds", "slowed by heat", "slowed by the brake")
_KEYS = ("run", "device_uuid", "sampled_by")
_COLUMNS: dict[str, tuple[str, ...]] = {
    "traces": (*_KEYS, "device", "quantity", "source", "samples", "drawn", "seconds", "reason"),
    "samples": (*_KEYS, "quantity", "segment", "time_s", "value"),
    "bands": (*_KEYS, "phase", "start_s", "end_s", "spans"),
    "reasons": (*_KEYS, "bit", "start_s", "end_s", "stretches"),
    "seen": ("run", "device_uuid", "phase"),
    "devices": ("run", "device_uuid"),
    "phases": ("run", "device_uuid", "source_rank", "phase", "span"),
    "tokens": ("run", "source_rank", "phase", "mj_per_token", "flag"),
    "totals": ("run", "phase", "ranks", "mj_per_token"),
    "aliasing": ("run", "device_uuid", "phase"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerFrames:
    """Frames of all runs (columns in the module's docstring), and what could not be shown.

    Attributes:
        absent: run and why it holds no power samples.
        gaps: run and one line for what is missing from its power, or must be known of it.
        notes: run, device, sentence on what telemetry alone shows.
        held: those of the notes that name what holds a clock down.
    """

    traces: pd.DataFrame
    samples: pd.DataFrame
    bands: pd.DataFrame
    reasons: pd.DataFrame
    seen: pd.DataFrame
    devices: pd.DataFrame
    phases: pd.DataFrame
    tokens: pd.DataFrame
    totals: pd.DataFrame
    aliasing: pd.DataFrame
    absent: tuple[tuple[int, str], ...] = ()
    gaps: tuple[tuple[int, str], ...] = ()
    notes: tuple[tuple[int, str, str], ...] = ()
    held: tuple[tuple[int, str, str], ...] = ()

    @property
    def runs(self) -> list[int]:
        """Runs with power samples."""
        return sorted(set(self.traces["run"].tolist()))


@dataclass(slots=True)
class _Found:
    frames: dict[str, list[pd.DataFrame]] = field(default_factory=lambda: {name: [] for name in _COLUMNS})
    absent: list[tuple[int, str]] = field(default_factory=list)
    gaps: list[tuple[int, str]] = field(default_factory=list)
    notes: list[tuple[int, str, str]] = field(default_factory=list)
    held: list[tuple[int, str, str]] = field(default_factory=list)


def collect_power(runs: Sequence[Run]) -> PowerFrames:
    """Read the power of every run, one run at a time."""
    collected = _Found()
    for index, run in enumerate(runs):
        if not run.row_count("power"):
            collected.absent.append((index, _why_absent(run)))
            continue
        try:
            _add_run(collected, index, run)
        except ObservatoryError as error:
            collected.absent.append((index, f"its power cannot be read: {error}"))
    joined = {
        name: pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(_COLUMNS[name]))
        for name, frames in collected.frames.items()
    }
    return PowerFrames(
        **joined,
        absent=tuple(collected.absent),
        gaps=tuple(dict.fromkeys(collected.gaps)),
        notes=tuple(collected.notes),
        held=tuple(collected.held),
    )


def _powers(run: Run) -> list[RankPower]:
    return [status.power for status in run.manifest.ranks if status.power is not None]


def _why_absent(run: Run) -> str:
    """Why a run has no samples, in its own words where it has some."""
    powers = _powers(run)
    notes = list(dict.fromkeys(note for power in powers for note in power.notes))
    damaged = damaged_samples(run)
    if damaged:
        return f"its power samples cannot be read: {damaged}"
    if notes:
        return f"it holds no power samples: {'; '.join(notes)[:600]}"
    if any(power.sampled for power in powers):
        return "its devices were opened, but no sample of them was kept"
    return (
        "it holds no power samples: none were asked for, or the model was on no GPU. Ask with profile "
        "--power on, watch(power=True) or a device by name; observatory doctor lists what can be read here"
    )


def _add_run(collected: _Found, index: int, run: Run) -> None:
    summary = energy_summary(run)
    collected.gaps += [(index, reason_words(problem)) for problem in summary.problems]
    # What the run itself says stands among its own gaps already.
    notes = [note for power in _powers(run) for note in power.notes if note not in run.manifest.notes]
    collected.gaps += [(index, note) for note in notes]
    flagged = summary.devices[summary.devices["flag"].notna()]
    collected.gaps += [
        (index, f"device {uuid}: {flag}")
        for uuid, flag in zip(flagged["device_uuid"], flagged["flag"], strict=True)
    ]
    for name in ("devices", "phases", "tokens", "totals", "aliasing"):
        collected.frames[name].append(getattr(summary, name).assign(run=index))
    sampled = sampled_devices(run)
    left_out = len(sampled[MOST_DEVICES:])
    if left_out:
        collected.gaps.append(
            (index, f"the course of {left_out} of {len(sampled)} devices is not drawn, only their energy")
        )
    bands_of = device_bands(run, [(device.rank, device.uuid) for device in sampled[:MOST_SEEN]])
    telemetry: list[DeviceTelemetry] = []
    drawn = _Found(frames=collected.frames, gaps=collected.gaps)
    for device, samples in device_samples(run, sampled[:MOST_SEEN], _READ):
        bands = bands_of[device.rank, device.uuid]
        telemetry += device_telemetry(run, device.uuid, samples, bands)
        if device in sampled[:MOST_DEVICES]:
            start_ns = min(other.first_ns for other in sampled if other.rank == device.rank)
            key_columns = {"run": index, "device_uuid": device.uuid, "sampled_by": device.rank}
            _add_device(drawn, run, samples, bands, start_ns, key_columns)
    collected.frames["seen"].append(pd.DataFrame([_numbers(item) for item in telemetry]).assign(run=index))
    for item in telemetry:
        if item.phase is None:
            coded = list(zip(item.finding_codes, item.findings, strict=True))
            collected.notes += [(index, item.device_uuid, text) for _, text in coded]
            collected.held += [(index, item.device_uuid, text) for code, text in coded if code in _HELD]
    collected.notes += drawn.notes


def _numbers(item: DeviceTelemetry) -> dict[str, Any]:
    numbers = item.model_dump(exclude={"states", "missing", "findings", "finding_codes"})
    for column, name in _STATE_CLOCKS.items():
        readings = item.in_state(name)
        numbers[column] = None if readings is None else readings.sm_clock_mhz
    return numbers


def _add_device(
    collected: _Found,
    run: Run,
    rows: pd.DataFrame,
    bands: DeviceBands,
    start_ns: int,
    key_columns: dict[str, Any],
) -> None:
    """Traces, points, bands and reasons of one device."""
    time_ns = rows["time_ns"].to_numpy(np.int64)
    period_ns = int(np.median(np.diff(time_ns))) if len(time_ns) > 1 else 50_000_000
    span_ns = max(int(time_ns[-1] - time_ns[0]), 1)
    spec = run.manifest.device_specs.get(key_columns["device_uuid"])
    traces = []
    for quantity, (column, factor) in _QUANTITIES.items():
        points, source = _points(rows, quantity, column, period_ns)
        trace = {
            **key_columns,
            "device": None if spec is None else spec.name, "quantity": quantity, "source": source,
            "samples": len(rows), "drawn": len(points), "seconds": span_ns * 1e-9,
            "reason": None if len(points) else _why_unread(run, str(key_columns["device_uuid"]), column),
        }  # fmt: skip
        traces.append(trace)
        if len(points):
            collected.frames["samples"].append(
                points.assign(
                    **key_columns,
                    quantity=quantity,
                    time_s=(points["time_ns"] - start_ns) * 1e-9,
                    value=points["value"] * factor,
                ).drop(columns="time_ns")
            )
    collected.frames["traces"].append(pd.DataFrame(traces))
    if bands.reason is not None:
        collected.gaps.append(
            (
                int(key_columns["run"]),
                f"device {key_columns['device_uuid']}: no phases are drawn: {reason_words(bands.reason)}",
            )
        )
    elif not bands.of_device:
        text = f"the phases are those of rank {bands.rank}, which sampled it; it may work for others too"
        collected.notes.append((int(key_columns["run"]), str(key_columns["device_uuid"])[:128], text))
    closer_ns = max(span_ns // _PARTS, 1)
    for phase in dict.fromkeys(bands.phase):
        chosen = np.array([name == phase for name in bands.phase])
        begin, end = bands.start_ns[chosen], bands.end_ns[chosen]
        collected.frames["bands"].append(
            _stretches(begin, end, closer_ns, start_ns, "spans", key_columns | {"phase": phase})
        )
    known = rows[rows["event_reasons"].notna()]
    stretches = list(
        reason_stretches(
            known["time_ns"].to_numpy(np.int64), known["event_reasons"].to_numpy(np.int64),
            period_ns=period_ns, longest_gap_ns=int(_GAP_PERIODS * period_ns),
        )
    )  # fmt: skip
    for bit in dict.fromkeys(stretch[0] for stretch in stretches):
        edges = np.array([stretch[1:] for stretch in stretches if stretch[0] == bit], dtype=np.int64)
        collected.frames["reasons"].append(
            _stretches(edges[:, 0], edges[:, 1], closer_ns, start_ns, "stretches", key_columns | {"bit": bit})
        )


def _stretches(
    begin_ns: npt.NDArray[np.int64],
    end_ns: npt.NDArray[np.int64],
    closer_ns: int,
    start_ns: int,
    count: str,
    key_columns: dict[str, Any],
) -> pd.DataFrame:
    """Rows of stretches, neighbours joined; ``count`` names the column of how many each joins."""
    start, end = joined_stretches(begin_ns, end_ns, closer_ns=closer_ns)
    joined = np.searchsorted(np.sort(begin_ns), end, side="left") - np.searchsorted(np.sort(begin_ns), start)
    return pd.DataFrame(
        {"start_s": (start - start_ns) * 1e-9, "end_s": (end - start_ns) * 1e-9, count: joined}
    ).assign(**key_columns)


def _points(
    rows: pd.DataFrame, quantity: str, column: str, period_ns: int
) -> tuple[pd.DataFrame, str | None]:
    """Points of one quantity (time_ns, segment, value in the column's unit) and where they come from."""
    candidates = [(column, "instant" if quantity == "power" else "readings")]
    candidates += [("average_power_mw", "average")] if quantity == "power" else []
    for name, source in candidates:
        known = rows[name].notna().to_numpy() & (rows[name].fillna(-1).to_numpy() >= 0)
        if known.any():
            return _thinned(rows["time_ns"].to_numpy(np.int64), rows[name], known, period_ns), source
    if quantity == "power":
        points = _by_counter(rows)
        if len(points):
            return points, "counter"
    return pd.DataFrame({"time_ns": [], "segment": [], "value": []}), None


def _thinned(
    time_ns: npt.NDArray[np.int64], values: pd.Series[Any], known: npt.NDArray[np.bool_], period_ns: int
) -> pd.DataFrame:
    place = np.flatnonzero(known)
    own_ns, value = time_ns[place], values.to_numpy(dtype=np.float64, na_value=np.nan)[place]
    # A row without a reading, or no row for long, ends a segment.
    broken = (np.diff(place) > 1) | (np.diff(own_ns) > _GAP_PERIODS * period_ns)
    segment = np.concatenate([[0], np.cumsum(broken)]).astype(np.int64)
    kept = kept_samples(own_ns, value, segment, bins=BINS)
    return pd.DataFrame({"time_ns": own_ns[kept], "segment": segment[kept], "value": value[kept]})


def _by_counter(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean power between readings of the counter, in mW, for devices that report nothing else.

    Readings are taken half a second apart or a four-hundredth of the whole, whichever is longer: a counter
    with an update period of 100 ms is then off by a fifth at most.
    """
    readings = rows[rows["energy_mj"].notna()]
    time_ns, energy_mj = readings["time_ns"].to_numpy(np.int64), readings["energy_mj"].to_numpy(np.float64)
    if len(time_ns) < 2:
        return pd.DataFrame({"time_ns": [], "segment": [], "value": []})
    step_ns = max(500_000_000, int(time_ns[-1] - time_ns[0]) // BINS)
    wanted = np.arange(time_ns[0], time_ns[-1] + 1, step_ns)
    place = np.unique(np.append(np.searchsorted(time_ns, wanted), len(time_ns) - 1))
    lasted_s, gained_mj = np.diff(time_ns[place]) * 1e-9, np.diff(energy_mj[place])
    kept = (lasted_s > 0.25) & (gained_mj >= 0)
    start, end, value = time_ns[place][:-1][kept], time_ns[place][1:][kept], (gained_mj / lasted_s)[kept]
    return pd.DataFrame(
        {
            "time_ns": np.column_stack([start, end]).reshape(-1),
            "segment": 0,
            "value": np.repeat(value, 2),
        }
    )


def _why_unread(run: Run, uuid: str, column: str) -> str:
    """Why a device does not report a quantity, as the sampler noted it."""
    for power in _powers(run):
        reason = power.unavailable.get(uuid, {}).get(column)
        if reason:
            return reason
    return "the samples hold no reading of it and the run does not state why"
