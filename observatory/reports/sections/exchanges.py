"""The sections about exchanges; a report of runs and files without any has none of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pandas as pd

from observatory.reports.frames.report import ReportFrames, each_row, phases_of
from observatory.reports.page import Section
from observatory.reports.sections.bandwidth import bandwidth_section
from observatory.reports.sections.layer_time import anatomy_section
from observatory.reports.sections.prediction import prediction_section
from observatory.reports.sections.realism import realism_section
from observatory.reports.sections.traffic import traffic_section
from observatory.reports.sections.waiting import waiting_section

_NO_FILES = (
    "Mock traffic and predicted times",
    "No benchmark files were given: make them with observatory bench, replay and fit, then pass them with "
    "--bench, --replay and --network.",
)


def exchange_sections(frames: ReportFrames) -> list[Section]:
    """What runs hold of exchanges, then what benchmark files say about them."""
    return [*_of_runs(frames), *_of_files(frames)]


def _of_files(frames: ReportFrames) -> list[Section]:
    """Realism, prediction, bandwidth; those that the files say something about."""
    found = frames.benchmarks
    if found is None:
        return []
    sections = [
        realism_section(frames, found),
        prediction_section(frames, found),
        bandwidth_section(found),
    ]
    return [section for section in sections if section.blocks]


def _of_runs(frames: ReportFrames) -> list[Section]:
    """Anatomy, traffic and waiting of the runs that hold exchanges."""
    found = frames.exchanges
    if found is None:
        return []
    sections = [
        anatomy_section(_cells(frames, found.phases)),
        traffic_section(_cells(frames, found.traffic)),
        waiting_section(_cells(frames, found.ranks), layers=found.layers, unknown=found.unknown),
    ]
    gaps = [f"The exchanges of run {run + 1} are left out: {text}." for run, text in found.gaps]
    shown = [section for section in sections if section.blocks]
    if shown and frames.benchmarks is None:
        shown[-1] = replace(shown[-1], absent=(*shown[-1].absent, _NO_FILES))
    if gaps:
        shown.append(
            Section(id="exchange-gaps", title="Exchanges that could not be read", reason=" ".join(gaps))
        )
    return shown


def _cells(frames: ReportFrames, found: pd.DataFrame) -> list[tuple[int, str, str, str, pd.DataFrame]]:
    """(run, label, condition, phase, rows) of every run and phase that has rows."""
    return list(_each_cell(frames, found))


def _each_cell(
    frames: ReportFrames, found: pd.DataFrame
) -> Iterator[tuple[int, str, str, str, pd.DataFrame]]:
    for row in each_row(frames.runs):
        own = found[found["run"] == row.run]
        for phase in phases_of(own):
            yield row.run, row.label, row.condition, phase, own[own["phase"] == phase]
