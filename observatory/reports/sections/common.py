"""Wording and selections that several sections share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd

from observatory.reports.frames.benchmarks import BenchmarkFrames
from observatory.reports.frames.report import NOT_STATED, ReportFrames, phases_of
from observatory.reports.text import count, number, shorten

NO_LOADS = "No run given here holds routing rows with assignments, so there is nothing to show."


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One computed sentence.

    Attributes:
        section: anchor of the section that its numbers are in.
        text: the sentence.
        stake: share of a time or an energy that is at stake; None where it is about neither.
        keys: model, condition, phase, rank that it is about, by which a page is filtered; none of what it is
            over all of.
    """

    section: str
    text: str
    stake: float | None = None
    keys: Mapping[str, str] = field(default_factory=dict)


def spread(values: pd.Series, form: object = count) -> str:
    """``20`` where all are equal, ``20 to 40`` otherwise."""
    values = values.dropna()
    if values.empty:
        return "n/a"
    low, high = form(values.min()), form(values.max())  # type: ignore[operator]
    return low if low == high else f"{low} to {high}"


def choice_label(condition: str, phase: str) -> str:
    """How a cell is called in a control."""
    return phase if condition == NOT_STATED else f"{shorten(condition, 24)}, {phase}"


def run_choice(label: str, condition: str, phase: str) -> str:
    """How a run's phase is called in a control."""
    return f"{shorten(label, 44)} · {choice_label(condition, phase)}"


def run_keys(label: str, condition: str = "", phase: str = "", rank: int | None = None) -> dict[str, str]:
    """What a page is filtered by, of what is about one run and phase; empty for what it shows all of."""
    named = {"model": shorten(label) if label else "", "condition": shorten(condition, 24), "phase": phase}
    named |= {} if rank is None else {"rank": str(rank)}
    return {name: value for name, value in named.items() if value and value != NOT_STATED}


def window_text(cells: pd.DataFrame) -> str:
    """Window, tokens and floor of the cells shown."""
    return (
        f"Window: the whole run of {spread(cells['steps'])} steps, {spread(cells['tokens'])} tokens per "
        f"layer; sampling floor {spread(cells['gini_floor'], number)}."
    )


def layer_window_text(layers: pd.DataFrame) -> str:
    """Window, tokens, experts and floor of the layers shown."""
    return (
        f"{spread(layers['experts'])} experts per layer; whole window of {spread(layers['steps'])} steps, "
        f"{spread(layers['tokens'])} tokens per layer, {spread(layers['assignments'])} assignments; "
        f"sampling floor of Gini {spread(layers['gini_floor'], number)}."
    )


def phases_in(rows: pd.DataFrame) -> list[str]:
    """Phases present: those of runs in their order, then whatever else a file says."""
    phases = phases_of(rows)
    return [*phases, *(phase for phase in rows["phase"].dropna().unique() if phase not in phases)]


def replay_name(frames: ReportFrames, benchmarks: BenchmarkFrames, replay: int) -> str:
    """Whose traffic a replay sent, over how many ranks of which fabric."""
    given = benchmarks.files.replays[replay]
    ids = [fact.manifest.run_id for fact in frames.facts]
    run = ids.index(given.document.run_id or "") if given.document.run_id in ids else 0
    label, condition = frames.runs.loc[run, ["label", "condition"]]
    return (
        f"{model_on(label, condition)} over {given.document.ranks} ranks, "
        f"{shorten(given.document.backend, 16)} ({shorten(given.name, 32)})"
    )


def model_on(label: object, condition: object) -> str:
    """A model and what it was fed, where that is stated: servers and telemetry alone state nothing."""
    return shorten(label) if condition == NOT_STATED else f"{shorten(label)} on {shorten(condition, 24)}"


def run_text(frames: ReportFrames, run: int) -> str:
    """A run by its model and what it was fed."""
    label, condition = frames.runs.loc[run, ["label", "condition"]]
    return model_on(label, condition)
