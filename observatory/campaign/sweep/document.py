"""The result of a clock sweep, from its windows and the telemetry of the same time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from observatory.analysis.energy.repeated_iterations import energy_of_repeats
from observatory.analysis.energy.traces import trace_of_frame
from observatory.analysis.energy.windows import energy_of_window
from observatory.analysis.energy.words import reason_words
from observatory.campaign.sweep.journal import JournalHead, JournalPoint, read_journal
from observatory.devices.event_reasons import POWER_CAP_BIT, slowed_label
from observatory.devices.sensors import sensor_of
from observatory.errors import ClockError
from observatory.host.provenance import collect_provenance
from observatory.run import open_run
from observatory.run.documents.clock_sweep import ClockPoint, ClockSeries, ClockSweep, PointLabel
from observatory.run.documents.writing import write_text
from observatory.run.manifest import RankPower

#: One step of the SM clock.
_STEP_MHZ = 15
#: A bit or a cap counts from this share of the window on.
_OFTEN = 0.1
_SLOWED_WORDS = {"thermal": "heat", "braked": "a hardware slowdown or the power brake"}


def sweep_document(
    head: JournalHead,
    measured: Sequence[JournalPoint],
    power: RankPower,
    telemetry: Path,
    *,
    ended: str | None = None,
) -> ClockSweep:
    """The document.

    Args:
        head: what was swept.
        measured: the windows.
        power: what the sampler said; empty where it was killed.
        telemetry: run directory with the samples.
        ended: why the sweep ended early; None when it did not.
    """
    run = open_run(telemetry)
    samples = run.power()
    samples = samples[samples["device_uuid"] == head.device.uuid]
    origin = collect_provenance()
    notes = [
        *filter(None, [head.note]),
        *power.notes,
        *_point_notes(measured),
    ]
    if ended is not None:
        notes.append(f"ended early, after {len(measured)} points: {ended}"[:4000])
    series = []
    for index, what in enumerate(head.series):
        points = tuple(_point(item, samples, head) for item in measured if item.series == index)
        if points:
            series.append(ClockSeries(**what.model_dump(), points=points))
    return ClockSweep(
        created_unix_s=time.time(),
        argv=head.argv,
        device=next((spec for spec in power.sampled if spec.uuid == head.device.uuid), head.device),
        max_sm_clock_mhz=head.supported_sm_clocks_mhz[-1],
        supported_sm_clocks_mhz=head.supported_sm_clocks_mhz,
        default_limit_mw=head.default_limit_mw,
        idle_power_mw=head.idle_power_mw,
        set_outside=head.set_outside,
        series=tuple(series),
        seed=head.seed,
        git_sha=origin["git_sha"],
        hosts=origin["hosts"],
        software=origin["software"],
        notes=tuple(notes),
    )


def write_sweep(sweep: ClockSweep, out: Path) -> None:
    """Write the document, whole or not at all."""
    write_text(out, sweep.model_dump_json(indent=1))


def recover_sweep(journal: Path, out: Path) -> ClockSweep:
    """The result of a sweep that was killed, from what it left: its journal and the run next to it.

    Both stay where they are.

    Raises:
        ClockError: the journal is none, or the telemetry of its time is missing.
        RunError: the telemetry cannot be read.
    """
    head, points = read_journal(journal)
    telemetry = journal.with_name(journal.name.removesuffix(".points.jsonl") + ".run")
    if not telemetry.is_dir():
        raise ClockError(
            f"{telemetry} is not there", expected="the telemetry of the sweep next to its journal"
        )
    sweep = sweep_document(head, points, RankPower(), telemetry, ended="the sweep was killed; recovered")
    write_sweep(sweep, out)
    return sweep


def _point_notes(measured: Sequence[JournalPoint]) -> list[str]:
    """Notes on single points, put together."""
    noted = [point.note for point in measured if point.note]
    return [f"{len(noted)} of {len(measured)} points, the first of them: {noted[0]}"] if noted else []


def _point(measured: JournalPoint, samples: pd.DataFrame, head: JournalHead) -> ClockPoint:
    """What the telemetry says of one window."""
    inside = samples[(samples["time_ns"] >= measured.start_ns) & (samples["time_ns"] <= measured.end_ns)]
    clock = inside["sm_clock_mhz"].dropna()
    reasons = inside["event_reasons"].dropna().astype("int64")
    often = 0
    for bit in (1 << position for position in range(16)):
        if len(reasons) and ((reasons & bit) > 0).mean() >= _OFTEN:
            often |= bit
    # A device that was lost before has no samples, and its window no energy.
    energy, counted = None, None
    if len(samples):
        trace, sensor = trace_of_frame(samples), sensor_of(head.device.name)
        energy = energy_of_window(trace, measured.start_ns, measured.end_ns, sensor=sensor)
        counted = energy_of_repeats(energy, trace, sensor, iterations=measured.iterations)
    label, reason = _label(
        measured.sm_clock_mhz, clock, often if len(reasons) else None, set_outside=head.set_outside
    )
    said = None if counted is None or counted.reason is None else reason_words(counted.reason)
    temperature = inside["temperature_c"].dropna()
    return ClockPoint(
        order=measured.order,
        repeat=measured.repeat,
        requested_sm_clock_mhz=measured.sm_clock_mhz,
        requested_limit_mw=measured.limit_mw,
        enforced_limit_mw=_last(inside["enforced_limit_mw"]),
        iterations=measured.iterations,
        duration_s=(measured.end_ns - measured.start_ns) / 1e9,
        energy_mj=None if counted is None else counted.energy_mj,
        energy_error=None if counted is None else counted.error,
        energy_source=None
        if energy is None or counted is None or counted.energy_mj is None
        else energy.source,
        energy_flag=None if counted is None else counted.flag,
        integral_energy_mj=None if energy is None else energy.integral_mj,
        sm_clock_mhz=None if clock.empty else round(clock.median()),
        sm_clock_low_mhz=None if clock.empty else round(clock.quantile(0.05)),
        sm_clock_high_mhz=None if clock.empty else round(clock.quantile(0.95)),
        event_reasons=often if len(reasons) else None,
        power_cap_share=_cap_share(inside),
        start_temperature_c=None if temperature.empty else int(temperature.iloc[0]),
        end_temperature_c=None if temperature.empty else int(temperature.iloc[-1]),
        label=label,
        reason="; ".join(filter(None, (reason, said))),
    )


def _label(
    wanted: int | None, clock: pd.Series[float], reasons: int | None, *, set_outside: bool
) -> tuple[PointLabel, str]:
    """What became of the request, and the evidence."""
    slowed = slowed_label(reasons)
    cause = _SLOWED_WORDS.get(slowed or "", "")
    if clock.empty:
        unseen = "the clock was not sampled in the window"
        return (slowed, f"{unseen}; the driver names {cause}") if slowed else ("unverified", unseen)
    driver = "event reasons were not sampled" if reasons is None else "the driver names no reason"
    sampled_mhz = round(float(clock.median()))
    met = wanted is None or abs(sampled_mhz - wanted) <= _STEP_MHZ
    said = "said to be set outside" if set_outside else "asked for"
    what = f"{sampled_mhz} MHz sampled" + ("" if wanted is None else f", {wanted} {said}")
    if slowed:
        return slowed, f"{what}; the driver names {cause}"
    if reasons is not None and reasons & POWER_CAP_BIT:
        return "power-capped", f"{what}; the driver names the power limit"
    if met:
        return "ok", what if reasons is not None else f"{what}; {driver}"
    why = ": it was not set, or not on this GPU" if set_outside else ""
    return "clamped", f"{what}; {driver}{why}"


def _cap_share(inside: pd.DataFrame) -> float | None:
    """Share of the window in which the limit held the clock: by the driver's counter, else by samples."""
    counter = inside["power_cap_ns"].dropna()
    lasted_ns = float(inside["time_ns"].max() - inside["time_ns"].min()) if len(inside) > 1 else 0.0
    if len(counter) > 1 and lasted_ns > 0:
        return min(1.0, max(0.0, float(counter.iloc[-1] - counter.iloc[0]) / lasted_ns))
    reasons = inside["event_reasons"].dropna().astype("int64")
    return float(((reasons & POWER_CAP_BIT) > 0).mean()) if len(reasons) else None


def _last(values: pd.Series[float]) -> int | None:
    present = values.dropna()
    return None if present.empty else int(present.iloc[-1])
