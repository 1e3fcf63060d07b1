"""Power and clocks over time, with what ran and what held the clock."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pandas as pd

from observatory.analysis.columns import Column
from observatory.devices.event_reasons import HOLDING_BITS, reason_name
from observatory.reports.figures.power import power_timeline
from observatory.reports.frames.power import BINS, PowerFrames
from observatory.reports.frames.report import ReportFrames, each_group, each_row
from observatory.reports.page import FigureBlock, Section, Table, Variant, frame_table
from observatory.reports.sections.common import run_keys, run_text
from observatory.reports.text import count, number, plain, shorten
from observatory.run.documents.writing import frame_records
from observatory.text import listing

_TITLE = "Power and clocks over time"
_MOST_REASONS = 4
_TELEMETRY = (
    Column(name="phase", title="part", text=True, otherwise="whole run"),
    Column(name="samples", title="samples"),
    Column(name="power_median_mw", title="power", unit="W", scale=1e-3, digits=1),
    Column(name="power_p95_mw", title="95 % below", unit="W", scale=1e-3, digits=1),
    Column(name="limit_mw", title="limit", unit="W", scale=1e-3, digits=1),
    Column(name="power_cap_share", title="held by limit", unit="%", digits=1),
    Column(name="power_cap_busy_share", title="of busy time", unit="%", digits=1),
    Column(name="thermal_share", title="thermal", unit="%", digits=1),
    Column(name="brake_share", title="brake", unit="%", digits=1),
    Column(name="idle_share", title="idle", unit="%", digits=1),
    Column(
        name="sm_clock_mhz",
        title="SM clock",
        unit="MHz",
        digits=0,
        interval=("sm_clock_low_mhz", "sm_clock_high_mhz"),
        legend="and what 5 % and 95 % of the samples lie below",
    ),
    Column(name="busy_clock_mhz", title="clock while busy", unit="MHz", digits=0),
    Column(name="capped_clock_mhz", title="while held by limit", unit="MHz", digits=0),
)
_LATE_S = 0.5
_SOURCES = {
    "instant": "Power is the device's own reading of the moment",
    "average": "The device reports only the mean power of the last second: peaks are flattened",
    "counter": "The device reports energy only: power is the mean between readings of its counter",
}


def power_section(frames: ReportFrames) -> Section:
    """One figure per run and device; the reasons where there are no samples."""
    power = frames.power
    assert power is not None
    if not power.runs:
        return Section(id="power", title=_TITLE, short="Power", reason=no_power(frames, power))
    variants: list[Variant] = []
    without_samples: list[str] = []
    for (run, sampler, uuid), traces in each_group(power.traces, ["run", "sampled_by", "device_uuid"]):
        variant = _variant(frames, power, int(run), int(sampler), str(uuid), traces)
        if variant is None:
            name = device_name(str(uuid), _text(traces["device"].iloc[0]))
            missing = _missing(_unread(traces))
            without_samples.append(f"{run_text(frames, int(run))}, {name} does not report {missing}.")
        else:
            variants.append(variant)
    lead = [
        "One process per node reads every device once a period while the program runs. Shaded and in the "
        "lanes: what ran when, on the samples' clock. A lane in the warning colour is a throttle reason, "
        "reported by the driver; no reason ever says that a clock is locked.",
        *without_samples,
    ]
    if power.absent:
        lead.append(no_power(frames, power))
    blocks = (
        FigureBlock(
            id="power-timeline",
            title="Power, clocks, phases and event reasons",
            caption="Seconds since the first sample. A line is interrupted where readings are missing. "
            f"Every point is a sample of the run: with more than {2 * BINS} of them, the least and the "
            f"greatest of each of {BINS} equal stretches of time.",
            choice="Device",
            variants=tuple(variants),
        ),
    )
    reason = (
        "" if variants else f"No device reported its power, clock or temperature. {' '.join(without_samples)}"
    )
    if not variants:
        lead = lead[1 + len(without_samples) :]
    return Section(
        id="power",
        title=_TITLE,
        short="Power and clocks",
        lead=tuple(lead),
        blocks=blocks if variants else (),
        reason=reason,
    )


def no_power(frames: ReportFrames, power: PowerFrames) -> str:
    """Why runs hold no samples, runs of the same reason together."""
    reasons = Counter(text for _, text in power.absent)
    if len(reasons) == 1 and not power.runs:
        text = next(iter(reasons))
        return f"No run here shows power: {plain(text)}."
    parts = []
    for text, runs in list(reasons.items())[:_MOST_REASONS]:
        first = next(run for run, reason in power.absent if reason == text)
        whose = shorten(frames.runs.loc[first, "label"]) if runs == 1 else f"{runs} runs"
        parts.append(f"{whose}: {plain(text)}.")
    more = len(reasons) - len(parts)
    return "Without power: " + " ".join(parts) + (f" And {more} other reasons." if more > 0 else "")


def device_name(uuid: str, name: str | None) -> str:
    """How a device is called: its name and a part of its UUID that identifies it."""
    return shorten(uuid, 28) if not name else f"{shorten(name, 32)} {shorten(uuid, 20)}"


def _variant(
    frames: ReportFrames, measured: PowerFrames, run: int, sampler: int, uuid: str, traces: pd.DataFrame
) -> Variant | None:
    """Figure of one device; None when it has no samples of any quantity."""
    label = frames.runs.loc[run, "label"]
    name = device_name(uuid, _text(traces["device"].iloc[0]))
    where = f"{run_text(frames, run)}, {name}"
    samples, bands, reasons = (
        _of_device(frame, run, sampler, uuid)
        for frame in (measured.samples, measured.bands, measured.reasons)
    )
    if samples.empty:
        return None
    missing = _unread(traces)
    power = traces[traces["quantity"] == "power"].iloc[0]
    source = _text(power["source"])
    device = _of_device(measured.devices, run, sampler, uuid)
    idle_mw = float(device["idle_power_mw"].iloc[0]) if len(device) else float("nan")
    telemetry = measured.seen[(measured.seen["run"] == run) & (measured.seen["device_uuid"] == uuid[:128])]
    remarks = [text for of_run, about, text in measured.notes if (of_run, about) == (run, uuid[:128])]
    drawn = int(power["drawn"])
    ended_s = _ended_s(samples, bands)
    idle = ""
    if pd.notna(idle_mw):
        source_words = plain(_text(device["idle_source"].iloc[0]) or "source not stated")
        idle = f"Idle power {_watts(idle_mw)}: {source_words}."
    notes = [
        f"{where}, sampled by rank {sampler}: {count(float(power['samples']))} samples in "
        f"{number(float(power['seconds']), 1)} s"
        + (f", {count(drawn)} of power drawn" if source in ("instant", "average") and drawn < power["samples"]
           else "")
        + ".",
        f"{_SOURCES[source]}." if source else "",
        idle,
        "" if ended_s is None else f"The samples end at {number(ended_s, 1)} s, before the phases do.",
        *(f"{_sentence(text)}." for text in remarks),
        f"Not reported: {_missing(missing)}." if len(missing) else "",
        "Event reasons are not reported." if telemetry["idle_share"].isna().all() else "",
    ]  # fmt: skip
    return Variant(
        group=shorten(label),
        keys=run_keys(str(label)),
        label=f"{shorten(label, 30)} · {name}",
        figure=power_timeline(
            samples,
            bands,
            reasons,
            idle_w=None if pd.isna(idle_mw) else idle_mw * 1e-3,
            source=source or "instant",
            ended_s=ended_s,
        ),
        alt=f"Course of {listing(_drawn(samples))} for {where}, over {number(float(power['seconds']), 1)} "
        "s, with "
        f"{len(set(bands['phase']))} phases and {_held(reasons)}.",
        note=" ".join(filter(None, notes)),
        numbers=_numbers(telemetry, where),
    )


def _ended_s(samples: pd.DataFrame, bands: pd.DataFrame) -> float | None:
    """When the samples ended, where the phases went on for longer than a sampler takes to stop."""
    if bands.empty:
        return None
    last = float(samples["time_s"].max())
    return last if float(bands["end_s"].max()) > last + _LATE_S else None


def _drawn(samples: pd.DataFrame) -> list[str]:
    return [_quantity(name) for name in dict.fromkeys(samples["quantity"])]


def _quantity(name: object) -> str:
    return str(name).replace("_", " ").replace("sm ", "SM ")


def _held(reasons: pd.DataFrame) -> str:
    held = [reason_name(int(bit)) for bit in sorted(set(reasons["bit"])) if int(bit) & HOLDING_BITS]
    return f"the clock held down by {listing(held)}" if held else "no reason that held the clock down"


def _text(value: Any) -> str | None:
    return None if value is None or pd.isna(value) else str(value)


def _sentence(text: str) -> str:
    return plain(text[:1].upper() + text[1:])


def _unread(traces: pd.DataFrame) -> pd.DataFrame:
    """Traces without samples; a device without a power limit lacks nothing."""
    return traces[traces["reason"].notna() & (traces["quantity"] != "limit")]


def _missing(rows: pd.DataFrame) -> str:
    """Quantities that are not reported, with the reasons; those of one reason together."""
    by_reason: dict[str, list[str]] = {}
    for row in each_row(rows):
        by_reason.setdefault(plain(row.reason), []).append(_quantity(row.quantity))
    return "; ".join(f"{listing(names)}: {shorten(reason, 240)}" for reason, names in by_reason.items())


def _of_device(frame: pd.DataFrame, run: int, sampler: int, uuid: str) -> pd.DataFrame:
    if frame.empty:
        return frame
    selected = (frame["run"] == run) & (frame["device_uuid"] == uuid) & (frame["sampled_by"] == sampler)
    return frame[selected]


def _numbers(telemetry: pd.DataFrame, where: str) -> Table:
    """Power and clocks of the whole run and of each phase; related numbers share a column."""
    return frame_table(
        f"{where}: what its samples show",
        _TELEMETRY,
        frame_records(telemetry),
        note="Medians, and shares of the samples or, where the driver counts it, of the time. The smaller "
        "line of a cell is what the smaller line of its head names. Power and SM clock are of all samples, "
        "busy or idle; the last column is of samples without the idle bit, and of those among them that the "
        "power limit holds.",
        below={
            "phase": "samples",
            "power_median_mw": "power_p95_mw",
            "power_cap_share": "power_cap_busy_share",
            "busy_clock_mhz": "capped_clock_mhz",
        },
    )


def _watts(milliwatts: float) -> str:
    return f"{number(milliwatts * 1e-3, 1)} W"
