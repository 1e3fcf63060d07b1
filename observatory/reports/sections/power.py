"""Power and clocks over time, with what ran and what held the clock."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pandas as pd

from observatory.devices.event_reasons import HOLDING_BITS, reason_name
from observatory.reports.figures.power import power_timeline
from observatory.reports.frames.power import BINS, PowerFrames
from observatory.reports.frames.report import ReportFrames, each_group, each_row
from observatory.reports.page import FigureBlock, Section, Table, Variant, table
from observatory.reports.sections.common import run_text
from observatory.reports.text import count, number, percent, plain, shorten
from observatory.text import listing

_TITLE = "Power and clocks over time"
_MOST_REASONS = 4
_LATE_S = 0.5
_SOURCES = {
    "instant": "Power is the device's own reading of the moment",
    "average": "Power is the device's mean over the last second: it tells no other, and peaks are flattened",
    "counter": "The device tells energy only: power is the mean between readings of its counter",
}


def power_section(frames: ReportFrames) -> Section:
    """One figure per run and device; the reasons where there are no samples."""
    found = frames.power
    assert found is not None
    if not found.runs:
        return Section(id="power", title=_TITLE, short="Power", reason=no_power(frames, found))
    variants: list[Variant] = []
    unseen: list[str] = []
    for (run, sampler, uuid), traces in each_group(found.traces, ["run", "sampled_by", "device_uuid"]):
        variant = _variant(frames, found, int(run), int(sampler), str(uuid), traces)
        if isinstance(variant, str):
            unseen.append(variant)
        else:
            variants.append(variant)
    lead = [
        "One process a node reads every device once a period, beside the program. Shaded and in the lanes: "
        "what ran when, on the samples' clock. A lane in the warning colour is a reason, told by the "
        "driver, for which the clock was held down; no reason ever says that a clock is locked.",
        *unseen,
    ]
    if found.absent:
        lead.append(no_power(frames, found))
    blocks = (
        FigureBlock(
            id="power-timeline",
            title="Power, clocks, phases and event reasons",
            caption="Seconds since the first sample. A line is interrupted where the device did not tell. "
            f"Every point is a sample of the run: with more than {2 * BINS} of them, the least and the "
            f"greatest of each of {BINS} equal stretches of time.",
            choice="Device",
            variants=tuple(variants),
        ),
    )
    reason = "" if variants else f"No device told its power, clock or temperature. {' '.join(unseen)}"
    if not variants:
        lead = lead[1 + len(unseen) :]
    return Section(
        id="power",
        title=_TITLE,
        short="Power and clocks",
        lead=tuple(lead),
        blocks=blocks if variants else (),
        reason=reason,
    )


def no_power(frames: ReportFrames, found: PowerFrames) -> str:
    """Why runs hold no samples, runs of the same reason together."""
    reasons = Counter(text for _, text in found.absent)
    if len(reasons) == 1 and not found.runs:
        text = next(iter(reasons))
        return f"No run here shows power: {plain(text)}."
    parts = []
    for text, runs in list(reasons.items())[:_MOST_REASONS]:
        first = next(run for run, reason in found.absent if reason == text)
        whose = shorten(frames.runs.loc[first, "label"]) if runs == 1 else f"{runs} runs"
        parts.append(f"{whose}: {plain(text)}.")
    more = len(reasons) - len(parts)
    return "Without power: " + " ".join(parts) + (f" And {more} other reasons." if more > 0 else "")


def device_name(uuid: str, name: str | None) -> str:
    """How a device is called: its name and enough of its UUID to tell it apart."""
    return shorten(uuid, 28) if not name else f"{shorten(name, 32)} {shorten(uuid, 20)}"


def _variant(
    frames: ReportFrames, found: PowerFrames, run: int, sampler: int, uuid: str, traces: pd.DataFrame
) -> Variant | str:
    """Figure of one device, or a sentence when it told nothing."""
    label = frames.runs.loc[run, "label"]
    name = device_name(uuid, _text(traces["device"].iloc[0]))
    where = f"{run_text(frames, run)}, {name}"
    samples, bands, reasons = (
        _of_device(frame, run, sampler, uuid) for frame in (found.samples, found.bands, found.reasons)
    )
    missing = traces[traces["reason"].notna() & (traces["quantity"] != "limit")]
    if samples.empty:
        return f"{where} does not tell {_missing(missing)}."
    power = traces[traces["quantity"] == "power"].iloc[0]
    source = _text(power["source"])
    device = _of_device(found.devices, run, sampler, uuid)
    idle_mw = float(device["idle_power_mw"].iloc[0]) if len(device) else float("nan")
    seen = found.seen[(found.seen["run"] == run) & (found.seen["device_uuid"] == uuid[:128])]
    said = [text for told, device_uuid, text in found.notes if told == run and device_uuid == uuid[:128]]
    drawn = int(power["drawn"])
    ended_s = _ended_s(samples, bands)
    idle = ""
    if pd.notna(idle_mw):
        told = plain(_text(device["idle_source"].iloc[0]) or "not said how")
        idle = f"Idle power {_watts(idle_mw)}: {told}."
    notes = [
        f"{where}, sampled by rank {sampler}: {count(float(power['samples']))} samples in "
        f"{number(float(power['seconds']), 1)} s"
        + (f", {count(drawn)} of power drawn" if source in ("instant", "average") and drawn < power["samples"]
           else "")
        + ".",
        f"{_SOURCES[source]}." if source else "",
        idle,
        "" if ended_s is None else f"The samples end at {number(ended_s, 1)} s, before the phases do.",
        *(f"{_sentence(text)}." for text in said),
        f"Not told: {_missing(missing)}." if len(missing) else "",
        "Event reasons are not told." if seen["idle_share"].isna().all() else "",
    ]  # fmt: skip
    return Variant(
        group=shorten(label),
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
        numbers=_numbers(seen, where),
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


def _missing(rows: pd.DataFrame) -> str:
    """Quantities that are not told, with the reasons; those of one reason together."""
    by_reason: dict[str, list[str]] = {}
    for row in each_row(rows):
        by_reason.setdefault(plain(row.reason), []).append(_quantity(row.quantity))
    return "; ".join(f"{listing(names)}: {shorten(reason, 240)}" for reason, names in by_reason.items())


def _of_device(frame: pd.DataFrame, run: int, sampler: int, uuid: str) -> pd.DataFrame:
    if frame.empty:
        return frame
    own = (frame["run"] == run) & (frame["device_uuid"] == uuid) & (frame["sampled_by"] == sampler)
    return frame[own]


def _numbers(seen: pd.DataFrame, where: str) -> Table:
    return table(
        f"{where}: what its samples show",
        [
            "Part", "Samples", "Power, median", "95 % below", "Limit", "Held by limit", "Of busy time",
            "By heat", "By brake", "Idle", "SM clock, median", "5 % to 95 %", "SM clock, busy",
            "SM clock, held by limit",
        ],
        [
            [
                "whole run" if _text(row.phase) is None else plain(row.phase),
                count(row.samples),
                _watts(row.power_median_mw),
                _watts(row.power_p95_mw),
                _watts(row.limit_mw),
                percent(row.power_cap_share),
                percent(row.power_cap_busy_share),
                percent(row.thermal_share),
                percent(row.brake_share),
                percent(row.idle_share),
                _mhz(row.sm_clock_mhz),
                f"{number(row.sm_clock_low_mhz, 0)} – {number(row.sm_clock_high_mhz, 0)}",
                _mhz(row.busy_clock_mhz),
                _mhz(row.capped_clock_mhz),
            ]
            for row in each_row(seen)
        ],
        note="Shares of the samples, or, where the driver counts it, of the time; phases by the samples "
        "inside. Power and SM clock are of all samples, busy or idle; the last two columns are the "
        "median SM clock of the samples without the idle bit, and of those among them that the limit holds.",
    )  # fmt: skip


def _watts(milliwatts: float | None) -> str:
    text = number(None if milliwatts is None else milliwatts * 1e-3, 1)
    return text if text == "n/a" else f"{text} W"


def _mhz(value: float | None) -> str:
    text = number(value, 0)
    return text if text == "n/a" else f"{text} MHz"
