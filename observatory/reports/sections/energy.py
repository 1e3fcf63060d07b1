"""Energy per token and phase, idle apart, and how far the numbers can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from observatory.analysis.columns import Column
from observatory.analysis.energy.document import DEVICE_COLUMNS, PHASE_COLUMNS, TOKEN_COLUMNS, place_text
from observatory.devices.aliasing import TOLERATED
from observatory.reports.figures.energy import device_energy, token_energy
from observatory.reports.frames.power import PowerFrames
from observatory.reports.frames.report import ReportFrames, each_row, phases_of
from observatory.reports.page import Block, Cell, FigureBlock, Section, Table, Variant, frame_table
from observatory.reports.sections.common import run_keys, run_text
from observatory.reports.text import count, interval, millijoules, number, percent, plain, shorten
from observatory.run.documents.writing import frame_records
from observatory.run.manifest import PHASES
from observatory.text import listing

_TITLE = "Energy per phase and token"
_MOST_BARS = 24
#: Warnings that are sentences of their own; more are a table.
_MOST_WARNINGS = 2
_MOST_ROWS = 40
#: Parts of a device's energy below this are rounding, not worth a bar.
_NOT_ATTRIBUTED = 0.005
_REMARK = Column(name="remark", title="remarks", text=True, otherwise="–")
_ALIASING = (
    Column(name="place", title="phase", text=True),
    Column(name="step_period_ms", title="step", unit="ms", digits=1),
    Column(name="update_ms", title="update period", unit="ms", digits=0),
    Column(name="error", title="integrated power off by up to", unit="%", digits=1),
)


def energy_section(frames: ReportFrames) -> Section:
    """Per token, per device, and the tables behind both; empty without power samples."""
    power = frames.power
    assert power is not None
    if not power.runs:
        return Section(id="energy", title=_TITLE)
    tokens = [variant for run in power.runs if (variant := _token_variant(frames, power, run))]
    devices = [variant for run in power.runs if (variant := _device_variant(frames, power, run))]
    blocks: list[Block] = []
    if tokens:
        blocks.append(
            FigureBlock(
                id="energy-tokens",
                title="Energy per token",
                caption="All devices of a rank over all its tokens of the phase: input tokens for prefill, "
                "output tokens for decode. Every phase has a scale of its own. Hatched: what the idle "
                "device draws in the same time. Bars with ends: 90 % interval, without the calibration of "
                "the sensor (5 %).",
                choice="Run",
                variants=tuple(tokens),
            )
        )
    if devices:
        blocks.append(
            FigureBlock(
                id="energy-devices",
                title="Where the energy of each device went",
                caption="Energy from the first phase to the last (of all samples where no phases are "
                "known): by "
                "the counter where there is one, else by integrated power. Time in no phase stands apart.",
                choice="Run",
                variants=tuple(devices),
            )
        )
    if len(power.phases):
        blocks.append(_phase_table(frames, power))
    aliased = _aliased(power)
    if len(aliased) > _MOST_WARNINGS:
        blocks.append(_aliasing_table(frames, aliased))
    lead = (
        "A phase is measured alone where it fills windows of five seconds or more (repetition), else by "
        "least squares over the shares of time, and not at all where neither can determine it: "
        "then the reason is given. Counter and integrated power are computed apart and compared.",
        *_why_no_tokens(frames, power, tokens),
        *_aliasing_sentences(frames, power),
    )
    return Section(id="energy", title=_TITLE, short="Energy per token", lead=lead, blocks=tuple(blocks))


def _text(value: Any) -> str:
    return "" if value is None or pd.isna(value) else plain(value)


def _token_variant(frames: ReportFrames, power: PowerFrames, run: int) -> Variant | None:
    of_run = power.tokens[power.tokens["run"] == run]
    known = of_run[of_run["mj_per_token"].notna()]
    if known.empty:
        return None
    ordered = pd.concat([known[known["phase"] == phase] for phase in phases_of(known)])
    most = known.groupby("source_rank")["mj_per_token"].max().sort_values(ascending=False)
    shown = ordered[ordered["source_rank"].isin(most.head(_MOST_BARS).index)]
    where = run_text(frames, run)
    sentences = [
        f"{row.phase}, rank {row.source_rank}: {number(row.mj_per_token, 2)} mJ per {row.kind} token "
        f"({interval(row.mj_per_token_low, row.mj_per_token_high, 2)}), {count(row.tokens)} tokens from "
        f"{_text(row.tokens_source)}"
        for row in each_row(shown.head(4))
    ]
    left_out = len(most) - shown["source_rank"].nunique()
    return Variant(
        group=shorten(frames.runs.loc[run, "label"]),
        label=where,
        keys=run_keys(*frames.runs.loc[run, ["label", "condition"]]),
        figure=token_energy(shown),
        alt=f"Bars of energy per token for {where}. {'; '.join(sentences)}.",
        note=f"{where}: {'; '.join(sentences)}."
        + (f" {left_out} ranks with less energy per token are not drawn." if left_out else "")
        + _flagged(shown),
        numbers=_token_table(of_run, power.totals[power.totals["run"] == run], where),
    )


def _flagged(shown: pd.DataFrame) -> str:
    """Sentences on the numbers that are flagged, each with whose it is."""
    return "".join(
        f" Flagged, {listing([f'{row.phase} on rank {row.source_rank}' for row in each_row(rows)])}: "
        f"{_text(flag)}."
        for flag, rows in shown[shown["flag"].notna()].groupby("flag", sort=False)
    )


def _token_table(tokens: pd.DataFrame, totals: pd.DataFrame, where: str) -> Table:
    whole = [{**row, "source_rank": f"all {row['ranks']}"} for row in frame_records(totals)]
    rows = [*whole, *frame_records(tokens.head(_MOST_ROWS))]
    return _energy_table(f"{where}: energy per token", TOKEN_COLUMNS, rows, len(tokens))


def _energy_table(
    caption: str, columns: Sequence[Column], rows: Sequence[dict[str, Any]], of_rows: int, note: str = ""
) -> Table:
    """Columns of `energy_document` and, last, what is to be known of a row."""
    remarked = [
        {**row, "remark": "; ".join(filter(None, (row["flag"], row["reason"]))) or None} for row in rows
    ]
    return frame_table(
        caption,
        (*columns, _REMARK),
        remarked,
        note=f"{note}{_more(of_rows)}".strip(),
        folded=[column.name for column in columns if column.wide],
    )


def _device_variant(frames: ReportFrames, power: PowerFrames, run: int) -> Variant | None:
    devices = power.devices[(power.devices["run"] == run)]
    known = devices[devices["energy_mj"].notna()].sort_values("energy_mj", ascending=False).head(_MOST_BARS)
    if known.empty:
        return None
    where = run_text(frames, run)
    parts = _parts(known, power.phases[(power.phases["run"] == run) & power.phases["span"].isna()])
    whole = float(known["energy_mj"].sum())
    shares = parts.groupby("part", sort=False)["mj"].sum() / whole
    return Variant(
        group=shorten(frames.runs.loc[run, "label"]),
        label=where,
        keys=run_keys(*frames.runs.loc[run, ["label", "condition"]]),
        figure=device_energy(known, parts),
        alt=f"Stacked bars of {len(known)} devices for {where}: {millijoules(whole)} in all.",
        note=f"{where}: {millijoules(whole)} on {len(known)} of {len(devices)} devices. Of it "
        + listing([f"{plain(name)}: {percent(share)}" for name, share in shares.items()], most=9)
        + ".",
        numbers=_device_table(devices, where),
    )


def _parts(devices: pd.DataFrame, phases: pd.DataFrame) -> pd.DataFrame:
    """What each device's energy consists of, in the order in which it is stacked.

    A phase whose power is not above idle, within its error, is all idle power.
    """
    rows: list[dict[str, object]] = []
    for device in each_row(devices):
        of_device = phases[(phases["device_uuid"] == device.device_uuid) & phases["energy_mj"].notna()]
        ran = of_device[of_device["phase"] != "idle"]
        pieces = [_piece(row) for phase in phases_of(ran) for row in each_row(ran[ran["phase"] == phase])]
        idle = sum(float(row.energy_mj) for row in each_row(ran)) - sum(mj for _, _, mj in pieces)
        pieces.append(("idle power during phases", "", idle))
        pieces.append(
            ("idle time", "", float(of_device.loc[of_device["phase"] == "idle", "energy_mj"].sum()))
        )
        rest = float(device.energy_mj) - sum(mj for _, _, mj in pieces)
        if rest > _NOT_ATTRIBUTED * device.energy_mj:
            pieces.append(("not attributed", "", rest))
        rows += [
            {"device_uuid": device.device_uuid, "part": part, "phase": phase, "mj": mj}
            for part, phase, mj in pieces
            if mj > 0
        ]
    return pd.DataFrame(rows, columns=["device_uuid", "part", "phase", "mj"])


def _piece(row: Any) -> tuple[str, str, float]:
    """Name, phase and energy of a phase above idle; of all of it where its idle part is not known."""
    if pd.isna(row.above_idle_mj):
        return f"{row.phase}, idle part not known", str(row.phase), float(row.energy_mj)
    return f"{row.phase}, above idle", str(row.phase), max(float(row.above_idle_mj), 0.0)


def _device_table(devices: pd.DataFrame, where: str) -> Table:
    rows = [
        {
            **row,
            "label": Cell(text=shorten(row["device_uuid"], 44), detail=_text(row["device"])),
        }
        for row in frame_records(devices.head(_MOST_ROWS))
    ]
    return _energy_table(f"{where}: energy of each device", DEVICE_COLUMNS, rows, len(devices))


def _phase_table(frames: ReportFrames, power: PowerFrames) -> Table:
    several = len(power.runs) > 1
    one_device = not several and power.phases["device_uuid"].nunique() == 1
    shown = _alike_as_one(_in_order(power.phases))
    rows = []
    for row in frame_records(shown.head(_MOST_ROWS)):
        whose = "" if one_device else shorten(row["device_uuid"], 20)
        detail = f"{run_text(frames, row['run'])}, {whose}" if several else whose
        rows.append({**row, "place": Cell(text=plain(place_text(row)), detail=detail)})
    return _energy_table(
        "Power and energy of each phase, and of the spans inside",
        PHASE_COLUMNS,
        rows,
        len(shown),
        "Idle, as a phase: time in no phase. Spans whose power is not known for the same reason share a row.",
    )


def _in_order(phases: pd.DataFrame) -> pd.DataFrame:
    """Rows by run, rank and device, phases in their usual order, idle last, spans below their phase."""
    order = {phase: place for place, phase in enumerate(PHASES)}
    return (
        phases.assign(place=phases["phase"].map(order).fillna(len(order)))
        .sort_values(["run", "source_rank", "device_uuid", "place"], kind="stable")
        .drop(columns="place")
    )


def _alike_as_one(phases: pd.DataFrame) -> pd.DataFrame:
    """Spans of one phase whose power is not known for the same reason, in one row that names them all."""
    keys = ["run", "source_rank", "device_uuid", "phase", "reason"]
    unknown = phases["span"].notna() & phases["power_mw"].isna() & phases["reason"].notna()
    alike = unknown & phases.where(unknown).duplicated(keys, keep=False)
    if not alike.any():
        return phases
    groups = phases[alike].groupby(keys, sort=False)
    names = groups["span"].transform(lambda own: listing(own.tolist(), most=12))
    return phases.assign(
        span=phases["span"].where(~alike, groups["span"].transform("size").astype(str) + " spans"),
        seconds=phases["seconds"].where(~alike, groups["seconds"].transform("sum")),
        reason=phases["reason"].where(~alike, names + ": " + phases["reason"]),
    )[~alike | ~phases.where(alike).duplicated(keys)]


def _more(rows: int) -> str:
    return f" {rows - _MOST_ROWS} more rows: observatory energy RUN." if rows > _MOST_ROWS else ""


def _why_no_tokens(frames: ReportFrames, power: PowerFrames, shown: list[Variant]) -> list[str]:
    """Runs without any energy per token, and why."""
    labels = {variant.label for variant in shown}
    sentences = []
    for run in power.runs:
        if run_text(frames, run) in labels:
            continue
        tokens = power.tokens[power.tokens["run"] == run]
        of_devices = power.devices.loc[power.devices["run"] == run, "reason"]
        reasons = [*map(_text, tokens["reason"].dropna()), *map(_text, of_devices.dropna())]
        why = "; ".join(dict.fromkeys(reasons)) or "no phases of it are known"
        sentences.append(f"{run_text(frames, run)} has no energy per token: {shorten(why, 600)}.")
    return sentences


def _aliased(power: PowerFrames) -> pd.DataFrame:
    """Phases whose steps move in time with the sensor, the worst first."""
    rows = power.aliasing
    if rows.empty:
        return rows
    return rows[rows["error"] > TOLERATED].sort_values("error", ascending=False, kind="stable")


def _aliasing_sentences(frames: ReportFrames, power: PowerFrames) -> list[str]:
    """Warnings of what the sensor could not see."""
    rows = _aliased(power)
    sentences = [
        f"Warning: in {run_text(frames, row.run)}, steps of {plain(row.phase)} take "
        f"{number(row.step_period_ms, 1)} ms and move in time with the power sensor (update period "
        f"{number(row.update_ms, 0)} ms): its integrated power may be off by up to "
        f"{percent(row.error, 0)}. Energy by the counter is not affected."
        for row in each_row(rows.head(_MOST_WARNINGS))
    ]
    more = len(rows) - len(sentences)
    return [*sentences, *([f"{more} more such phases are in the last table below."] if more > 0 else [])]


def _aliasing_table(frames: ReportFrames, rows: pd.DataFrame) -> Table:
    shown = [
        {
            **row._asdict(),
            "place": Cell(
                text=plain(row.phase),
                detail=f"{run_text(frames, row.run)}, rank {row.source_rank}",
            ),
        }
        for row in each_row(rows.head(_MOST_ROWS))
    ]
    return frame_table(
        "Steps that move in time with the power sensor",
        _ALIASING,
        shown,
        note="Predicted for a load that is on for part of each step, the worst part; the counter sees all "
        "of it." + _more(len(rows)),
    )
