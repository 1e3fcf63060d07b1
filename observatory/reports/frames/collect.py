"""From run directories to the report's frames: the only module of reports that reads runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from observatory.advice.mitigations.models import advise_by_itself
from observatory.analysis.compare.collect import timing_rows, tokens_fed
from observatory.analysis.parallel.scan import scan_run
from observatory.analysis.routing import (
    ConditionGini,
    RunLoads,
    band_words,
    classify,
    collect_layer_loads,
    layer_metrics,
    local_consistency,
    phase_summary,
)
from observatory.analysis.step_times import step_times
from observatory.errors import ObservatoryError
from observatory.reports.frames.benchmark_files import BenchmarkFiles
from observatory.reports.frames.benchmarks import collect_benchmarks
from observatory.reports.frames.exchanges import collect_exchanges
from observatory.reports.frames.frequency import ClockFrames
from observatory.reports.frames.power import collect_power
from observatory.reports.frames.report import ReportFrames, RunFacts, each_row, in_reading_order, label_runs
from observatory.reports.frames.steps import STEP_COLUMNS, step_summary
from observatory.run import Run

_BOOTSTRAP = 200
_NOTHING = "no routing rows: the run is left out of every figure"
_LOADS = ("phase", "layer", "expert", "load", "load_odd", "load_even", "run")
_LOCALITY = ("phase", "layer", "segments", "hit_share", "hit_share_shuffled", "locality_gain", "run")


def collect(
    runs: Sequence[Run],
    *,
    ep_degrees: Sequence[int],
    gpus_per_node: int,
    files: BenchmarkFiles | None = None,
    clocks: ClockFrames | None = None,
) -> ReportFrames:
    """Read every run once for its loads and once for its scan; one run is held at a time.

    A run that cannot be analysed keeps its place, with the reason among its gaps.

    Args:
        runs: open runs.
        ep_degrees: expert-parallel degrees of the scan.
        gpus_per_node: ranks per node of the scan.
        files: benchmarks, replays and network models that were given with the runs.
        clocks: what was made of the sweeps and clock models given.
    """
    facts: list[RunFacts] = []
    advice: dict[int, dict[str, Any]] = {}
    no_advice: dict[int, tuple[str, ...]] = {}
    times: dict[int, dict[str, Any]] = {}
    steps: list[pd.DataFrame] = []
    networks = [given.document for given in files.networks] if files else []
    layers, summaries, loads, scans, localities = [], [], [], [], []
    for index, run in enumerate(runs):
        gaps: list[str] = []
        scan_gaps: list[str] = []
        try:
            layer_loads = collect_layer_loads(run)
            if layer_loads:
                metrics = layer_metrics(layer_loads, bootstrap=_BOOTSTRAP)
                scan, scan_gaps = _scan(run, layer_loads, ep_degrees, gpus_per_node)
                gaps += scan_gaps + _notes(metrics)
                layers.append(metrics.assign(run=index))
                summaries.append(phase_summary(layer_loads, bootstrap=_BOOTSTRAP).assign(run=index))
                loads.append(_loads_frame(layer_loads).assign(run=index))
                scans += [] if scan is None else [scan.assign(run=index)]
                samples = run.token_samples()
                localities += [] if samples.empty else [local_consistency(samples).assign(run=index)]
            else:
                power = run.row_count("power") > 0
                gaps.append(_NOTHING + (", but for its power" if power else ""))
        except ObservatoryError as error:
            gaps.append(f"the run is left out of figures: {error}")
        try:
            advised = advise_by_itself(run, networks)
        except ObservatoryError as error:
            no_advice[index] = (str(error),)
        else:
            advice |= {} if advised is None else {index: advised}
        try:
            of_steps = step_times(run)
            timed = timing_rows(run, of_steps)
            steps.append(step_summary(of_steps, timed).assign(run=index))
        except ObservatoryError as error:
            gaps.append(f"its times are left out: {error}")
        else:
            times |= {index: {"metrics": timed, "fed": tokens_fed(run)}} if timed else {}
        facts.append(
            RunFacts(
                run=index,
                path=run.path,
                manifest=run.manifest,
                problems=tuple(run.problems),
                gaps=tuple(gaps),
                scan_gaps=tuple(scan_gaps),
            )
        )
    frame = _runs_frame(tuple(facts))
    summary = _joined(summaries, (*phase_summary({}, bootstrap=0).columns, "run"))
    return ReportFrames(
        facts=tuple(replace(fact, gaps=tuple(dict.fromkeys(fact.gaps))) for fact in facts),
        runs=frame,
        layers=_joined(layers, (*layer_metrics({}, bootstrap=0).columns, "run")),
        summary=summary,
        loads=_joined(loads, _LOADS),
        scan=_joined(scans, ("ep", "placement", "layer", "phase", "run")),
        bands=model_bands(in_reading_order(summary.merge(frame, on="run"))),
        locality=_joined(localities, _LOCALITY),
        exchanges=collect_exchanges(runs),
        benchmarks=collect_benchmarks(runs, files or BenchmarkFiles()),
        power=collect_power(runs),
        clocks=clocks,
        advice=advice,
        no_advice=no_advice,
        times=times,
        steps=_joined(steps, STEP_COLUMNS),
    )


def model_bands(cells: pd.DataFrame) -> pd.DataFrame:
    """Band of each model and phase from its real-text cells: label, phase, band (None for none), reason."""
    rows = []
    for (label, phase), of_model in cells.groupby(["label", "phase"], sort=False):
        texts = {
            row.condition: ConditionGini(
                gini=float(row.gini), floor=float(row.gini_floor), uniform_limit=float(row.gini_uniform_limit)
            )
            for row in each_row(of_model[of_model["kind"] == "real"])
        }
        band = classify(texts)
        rows.append({"label": label, "phase": phase, "band": band.name, "reason": band_words(band.reason)})
    # object: among strings, pandas would turn the None of "no band" into NaN
    return pd.DataFrame(rows, columns=["label", "phase", "band", "reason"], dtype=object)


def _runs_frame(facts: tuple[RunFacts, ...]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "run": [fact.run for fact in facts],
            "label": label_runs(facts),
            "condition": [fact.condition for fact in facts],
            "kind": [fact.kind for fact in facts],
            "mixer": [fact.manifest.model.mixer for fact in facts],
            "ranks": [fact.manifest.topology.ranks for fact in facts],
        }
    )


def _loads_frame(loads: RunLoads) -> pd.DataFrame:
    return pd.concat(
        [
            pd.DataFrame(
                {
                    "phase": phase,
                    "layer": layer,
                    "expert": np.arange(layer_loads.experts),
                    "load": layer_loads.load_E,
                    "load_odd": layer_loads.load_GE[0::2].sum(axis=0),
                    "load_even": layer_loads.load_GE[1::2].sum(axis=0),
                }
            )
            for (phase, layer), layer_loads in loads.items()
        ],
        ignore_index=True,
    )


def _scan(
    run: Run, loads: RunLoads, ep_degrees: Sequence[int], gpus_per_node: int
) -> tuple[pd.DataFrame | None, list[str]]:
    """Scan over the degrees that divide every layer's experts; the others are stated."""
    experts = sorted({layer_loads.experts for layer_loads in loads.values()})
    fitting = [ep for ep in ep_degrees if ep >= 1 and all(count % ep == 0 for count in experts)]
    gaps = [
        f"EP {ep} is left out of the scan: it does not divide {' and '.join(map(str, experts))} experts"
        for ep in ep_degrees
        if ep not in fitting
    ]
    if not fitting:
        return None, gaps
    return scan_run(run, ep_degrees=fitting, gpus_per_node=gpus_per_node), gaps


def _notes(metrics: pd.DataFrame) -> list[str]:
    """The analysis' remarks, each once with the layers it is about."""
    noted = metrics[metrics["notes"] != ""]
    return [
        f"{phase}, {len(rows)} of {(metrics['phase'] == phase).sum()} layers: {note}"
        for (phase, note), rows in noted.groupby(["phase", "notes"], sort=False)
    ]


def _joined(frames: list[pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(columns))
