"""What runs and sweeps say about energy and clocks, one computed sentence each."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from observatory.reports.frames.report import ReportFrames, each_row, phases_of
from observatory.reports.sections.common import Finding, run_keys
from observatory.reports.sections.frequency import advice_sentence
from observatory.reports.text import millijoules, millijoules_interval, percent, plain, shorten

#: Sentences of one kind; the tables hold the rest.
_MOST = 4


def power_findings(frames: ReportFrames) -> list[Finding]:
    """Energy per token of each phase, whether a limit binds, and the clock to choose."""
    stated = list(_tokens(frames))[:_MOST] + list(_caps(frames))[:_MOST]
    if frames.clocks is not None:
        files = frames.clocks.files
        series = [(file, advice) for file in files for advice in file.advice.series]
        stated += [
            Finding(
                section="clocks",
                text=advice_sentence(file, advice),
                stake=None if advice.choice is None else advice.choice.saving.value,
            )
            for file, advice in series[:_MOST]
        ]
    return stated


def _tokens(frames: ReportFrames) -> Iterator[Finding]:
    """Per run and phase: the rank that takes most, with what of it is idle power."""
    power = frames.power
    if power is None or power.tokens.empty:
        return
    known = power.tokens[power.tokens["mj_per_token"].notna()]
    for run in power.runs:
        of_run = known[known["run"] == run]
        for phase in phases_of(of_run):
            rows = of_run[of_run["phase"] == phase].sort_values("mj_per_token", ascending=False)
            row = next(each_row(rows))
            which = f" (rank {row.source_rank}, the most of {len(rows)}{_overall(power.totals, run, phase)})"
            which = which if len(rows) > 1 else ""
            idle = row.idle_mj_per_token
            idle_share = idle / row.mj_per_token if pd.notna(idle) and row.mj_per_token > 0 else None
            share = f", {percent(idle_share)} of it what the idle device draws" if idle_share else ""
            flag = " It is flagged: see the section on energy." if pd.notna(row.flag) else ""
            text = (
                f"In {phase}, {shorten(frames.runs.loc[run, 'label'], 48)} takes "
                f"{millijoules(row.mj_per_token)} "
                f"({millijoules_interval(row.mj_per_token_low, row.mj_per_token_high)}) per {row.kind} "
                f"token{which}{share}.{flag}"
            )
            rank = int(row.source_rank) if len(rows) > 1 else None
            yield Finding(
                section="energy",
                text=text,
                stake=None if frames.facts[run].is_simulated else idle_share,
                keys=_keys(frames, run, phase, rank),
            )


def _keys(frames: ReportFrames, run: int, phase: str = "", rank: int | None = None) -> dict[str, str]:
    return run_keys(str(frames.runs.loc[run, "label"]), frames.facts[run].condition, phase, rank)


def _overall(totals: pd.DataFrame, run: int, phase: str) -> str:
    """What all ranks together take per token, where that is known."""
    known = totals[(totals["run"] == run) & (totals["phase"] == phase) & totals["mj_per_token"].notna()]
    if known.empty:
        return ""
    return f"; over all ranks: {millijoules(known['mj_per_token'].iloc[0])}"


def _caps(frames: ReportFrames) -> Iterator[Finding]:
    """What telemetry says of limits and heat."""
    power = frames.power
    if power is None:
        return
    for run, uuid, text in power.held:
        where = f"On {shorten(uuid, 28)} of {shorten(frames.runs.loc[run, 'label'], 48)}"
        yield Finding(section="power", text=f"{where}, {plain(text)}.", keys=_keys(frames, run))
