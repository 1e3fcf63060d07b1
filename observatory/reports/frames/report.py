"""The tidy frames that all sections and figures are made from.

``runs``      run, label, condition, kind, mixer, ranks
``layers``    run, phase, and the columns of ``observatory.analysis.routing.layer_metrics``
``summary``   run, phase, and the columns of ``observatory.analysis.routing.phase_summary``
``loads``     run, phase, layer, expert, load (whole window, summed over source ranks), and its parts load_odd
              and load_even from every other step (of long runs: every other group of neighbouring steps)
``scan``      run, and the columns of ``observatory.analysis.parallel.scan_run``
``bands``     label, phase, band, reason
``locality``  run, and the columns of ``observatory.analysis.routing.local_consistency``; empty without token
              samples
``steps``     run, and the columns of ``observatory.reports.frames.steps.step_summary``

``run`` is the position of the run in the report; ``label`` names a model, uniquely among runs of the same
condition; ``kind`` is real, altered, mock or unstated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from observatory.devices.simulated import SIMULATED_UUID
from observatory.reports.frames.benchmarks import BenchmarkFrames
from observatory.reports.frames.exchanges import ExchangeFrames
from observatory.reports.frames.frequency import ClockFrames
from observatory.reports.frames.plan import PlannedFile
from observatory.reports.frames.power import PowerFrames
from observatory.reports.frames.route_fetch import RouteFetchFile
from observatory.run.manifest import PHASES, Manifest

#: Condition of a run that does not say what it was fed.
NOT_STATED = "not stated"
_KNOWN_CONDITIONS = ("prose", "code", "foreign", "structured", "shuffled", "mock")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What one run says about itself.

    Attributes:
        run: position in the report.
        path: where it was read from.
        manifest: its manifest, ranks merged.
        problems: gaps the reader found.
        gaps: what the report leaves out for this run, and why.
        scan_gaps: those of them that are degrees which the scan leaves out.
    """

    run: int
    path: Path
    manifest: Manifest
    problems: tuple[str, ...]
    gaps: tuple[str, ...] = ()
    scan_gaps: tuple[str, ...] = ()

    @property
    def condition(self) -> str:
        """Name of the data condition."""
        return self.manifest.data.condition if self.manifest.data else NOT_STATED

    @property
    def is_simulated(self) -> bool:
        """Whether its power is that of a simulated device."""
        return SIMULATED_UUID in self.manifest.device_specs

    @property
    def kind(self) -> str:
        """``mock``, ``real``, ``altered`` (real tokens in another order) or ``unstated``."""
        if self.condition == "mock":
            return "mock"
        real = self.manifest.data.real if self.manifest.data else None
        return "unstated" if real is None else "real" if real else "altered"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFrames:
    """All frames of a report (columns in the module's docstring) and the runs' facts.

    ``exchanges`` is None when no run holds any, ``benchmarks`` and ``clocks`` when no files were given,
    ``power`` when it was not read; ``route_fetch`` has the measurements of ``bench route-fetch``, ``plans``
    capacity plans. ``advice`` has, by run, what ``observatory advise`` states about it (docs/json.md);
    ``no_advice`` why a run that was spread over ranks has none. ``times`` has, by run, the content of
    a document of kind ``times`` (docs/json.md). ``missing`` has what should be among the runs,
    and why it is not.
    """

    facts: tuple[RunFacts, ...]
    runs: pd.DataFrame
    layers: pd.DataFrame
    summary: pd.DataFrame
    loads: pd.DataFrame
    scan: pd.DataFrame
    bands: pd.DataFrame
    locality: pd.DataFrame
    steps: pd.DataFrame
    exchanges: ExchangeFrames | None = None
    benchmarks: BenchmarkFrames | None = None
    power: PowerFrames | None = None
    clocks: ClockFrames | None = None
    route_fetch: tuple[RouteFetchFile, ...] = ()
    plans: tuple[PlannedFile, ...] = ()
    advice: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    no_advice: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    times: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    missing: tuple[tuple[str, str], ...] = ()

    @property
    def cells(self) -> pd.DataFrame:
        """``summary`` with label, condition and kind, in reading order."""
        return self.summary.merge(self.runs, on="run", suffixes=("", "_of_run")).pipe(in_reading_order)

    def compared(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Rows by which models are compared: of each, the runs on the number of ranks with most conditions.

        A model that was spread over ranks as well would stand there twice.
        """
        runs = self.runs.assign(
            model=[fact.manifest.model.name for fact in self.facts],
            simulated=[fact.is_simulated for fact in self.facts],
        )
        conditions = runs.groupby(["model", "ranks", "simulated"])["condition"].transform("nunique")
        most = conditions.groupby(runs["model"]).transform("max")
        return rows[rows["run"].isin(runs.loc[conditions == most, "run"])]

    def cells_in_order(self) -> Iterator[tuple[int, str, str, str]]:
        """(run, label, condition, phase) of every cell that has data, phases apart."""
        for row in each_row(self.cells):
            yield row.run, row.label, row.condition, row.phase


def each_row(frame: pd.DataFrame) -> Iterator[Any]:
    """Rows as named tuples; what a column holds is said by the frame, not by the type checker."""
    yield from frame.itertuples()


def each_group(frame: pd.DataFrame, keys: list[str]) -> Iterator[tuple[Any, pd.DataFrame]]:
    """Rows by several keys in order of appearance; a missing key is a key like any other."""
    yield from frame.groupby(keys, sort=False, dropna=False)


def in_reading_order(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows by phase, then model in the order given, then condition."""
    conditions = condition_order(frame)
    phases = list(PHASES)
    models = list(dict.fromkeys(frame["label"]))
    return frame.sort_values(
        ["phase", "label", "condition"],
        key=lambda column: column.map(
            {"phase": phases, "label": models, "condition": conditions}[str(column.name)].index
        ),
        kind="stable",
    ).reset_index(drop=True)


def condition_order(runs: pd.DataFrame) -> list[str]:
    """Conditions: real text, then what the user named, then altered text, mock last."""
    rank = {"real": 0, "unstated": 1, "altered": 2, "mock": 3}
    place = {name: index for index, name in enumerate(_KNOWN_CONDITIONS)}
    pairs = dict.fromkeys(zip(runs["kind"], runs["condition"], strict=True))
    ordered = sorted(pairs, key=lambda pair: (rank[pair[0]], place.get(pair[1], len(place))))
    return list(dict.fromkeys(condition for _, condition in ordered))


def phases_of(frame: pd.DataFrame) -> list[str]:
    """Phases present, in the order of ``PHASES``."""
    present = set(frame["phase"])
    return [phase for phase in PHASES if phase in present]


def label_runs(facts: tuple[RunFacts, ...]) -> list[str]:
    """Model names, made unique where the same model meets the same condition more than once.

    A number of ranks over one is added where it differs, and the position in the report where nothing
    else does.
    """
    labels = [
        f"{fact.manifest.model.name}{f' ({SIMULATED_UUID})' if fact.is_simulated else ''}" for fact in facts
    ]
    suffixes: tuple[Callable[[RunFacts], str], ...] = (
        lambda fact: f" ({fact.manifest.topology.ranks} ranks)" if fact.manifest.topology.ranks > 1 else "",
        lambda fact: f" (run {fact.run + 1})",
    )
    for suffix in suffixes:
        runs_of: dict[tuple[str, str], list[int]] = {}
        for index, fact in enumerate(facts):
            runs_of.setdefault((labels[index], fact.condition), []).append(index)
        for members in runs_of.values():
            endings = {index: suffix(facts[index]) for index in members}
            if len(members) > 1 and len(set(endings.values())) > 1:
                for index, ending in endings.items():
                    labels[index] += ending
    return labels
