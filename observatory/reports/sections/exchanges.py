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
    benchmarks = frames.benchmarks
    if benchmarks is None:
        return []
    sections = [
        realism_section(frames, benchmarks),
        prediction_section(frames, benchmarks),
        bandwidth_section(benchmarks),
    ]
    return [section for section in sections if section.blocks]


def _of_runs(frames: ReportFrames) -> list[Section]:
    """Anatomy, traffic and waiting of the runs that hold exchanges."""
    exchanges = frames.exchanges
    if exchanges is None:
        return []
    sections = [
        anatomy_section(_cells(frames, exchanges.phases)),
        traffic_section(_cells(frames, exchanges.traffic)),
        waiting_section(_cells(frames, exchanges.ranks), layers=exchanges.layers, unknown=exchanges.unknown),
    ]
    gaps = [f"The exchanges of run {run + 1} are left out: {text}." for run, text in exchanges.gaps]
    shown = [section for section in sections if section.blocks]
    if shown and frames.benchmarks is None:
        shown[-1] = replace(shown[-1], absent=(*shown[-1].absent, _NO_FILES))
    if gaps:
        shown.append(
            Section(id="exchange-gaps", title="Exchanges that could not be read", reason=" ".join(gaps))
        )
    return shown


def _cells(frames: ReportFrames, frame: pd.DataFrame) -> list[tuple[int, str, str, str, pd.DataFrame]]:
    """(run, label, condition, phase, rows) of every run and phase that has rows."""
    return list(_each_cell(frames, frame))


def _each_cell(
    frames: ReportFrames, frame: pd.DataFrame
) -> Iterator[tuple[int, str, str, str, pd.DataFrame]]:
    for row in each_row(frames.runs):
        of_run = frame[frame["run"] == row.run]
        for phase in phases_of(of_run):
            yield row.run, row.label, row.condition, phase, of_run[of_run["phase"] == phase]
