"""What the numbers say, one plain sentence each. Every sentence is computed; none is chosen by hand."""

from __future__ import annotations

from typing import Any

import pandas as pd

from observatory.reports.frames.committees import committee_overlaps
from observatory.reports.frames.report import ReportFrames, each_row, phases_of
from observatory.reports.sections.common import Finding, model_on, run_keys, spread
from observatory.reports.sections.exchange_findings import exchange_findings
from observatory.reports.sections.layers import worst_layers
from observatory.reports.sections.mock import mock_ratios
from observatory.reports.sections.power_findings import power_findings
from observatory.reports.sections.scan import mean_over_layers
from observatory.reports.text import interval, number, plain, shorten, times
from observatory.text import listing


def findings(frames: ReportFrames) -> list[Finding]:
    """Sentences, those with most time or energy at stake first; empty when there is nothing to say."""
    stated = exchange_findings(frames) + power_findings(frames)
    cells = frames.cells.dropna(subset=["gini"])
    if len(cells):
        stated += _of_routing(frames, cells)
    return sorted(stated, key=lambda finding: -(finding.stake or 0.0))


def _of_routing(frames: ReportFrames, cells: pd.DataFrame) -> list[Finding]:
    """What is about counts; nothing of it is a share of time or energy."""
    stated: list[Finding] = []
    one_model = len({fact.manifest.model.name for fact in frames.facts}) == 1
    compared = frames.compared(cells)
    for phase in phases_of(cells):
        of_phase = compared[compared["phase"] == phase]
        texts = _one_model(frames, of_phase, phase) if one_model else _concentration(of_phase, phase)
        stated += [Finding(section="grid", text=text, keys={"phase": phase}) for text in texts]
        stated += _mock(mock_ratios(of_phase), phase)
    return [
        *stated,
        Finding(section="grid", text=_at_floor(cells, in_grid=len(compared))),
        *_worst_layer(frames),
        *_committees(frames),
        *_steps(frames),
        *_ranks(frames),
    ]


def _name(label: object) -> str:
    return shorten(plain(label), 48)


def _real_first(rows: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Rows of real text and what to call them; all rows where none is real."""
    real = rows[rows["kind"] == "real"]
    return (real, "real text") if len(real) else (rows, "the data given")


def _concentration(cells: pd.DataFrame, phase: str) -> list[str]:
    """Most and least concentrated model, on real text where there is some."""
    preferred, where = _real_first(cells)
    per_model = (
        preferred.groupby("label", sort=False)[["gini", "gini_low", "gini_high", "gini_floor"]]
        .mean()
        .sort_values("gini", ascending=False)
    )
    first = per_model.iloc[0]
    values = (
        f"Gini {number(first.gini)} ({interval(first.gini_low, first.gini_high)}), "
        f"floor {number(first.gini_floor)}"
    )
    if len(per_model) == 1:
        return [f"In {phase}, {_name(per_model.index[0])} has {values} on {where}."]
    second, last = per_model.iloc[1], per_model.iloc[-1]
    sentence = (
        f"In {phase}, {_name(per_model.index[0])} is the most concentrated on {where}: {values}; "
        f"{_name(per_model.index[-1])} is the least: {number(last.gini)} "
        f"({interval(last.gini_low, last.gini_high)}), floor {number(last.gini_floor)}."
    )
    if not first.gini_low > second.gini_high:
        has_intervals = pd.notna(first.gini_low) and pd.notna(second.gini_high)
        sentence += (
            f" {_name(per_model.index[0])} and {_name(per_model.index[1])} do not differ beyond the interval."
            if has_intervals
            else " There are too few steps for intervals, so the order is not certain."
        )
    return [sentence]


def _one_model(frames: ReportFrames, cells: pd.DataFrame, phase: str) -> list[str]:
    """Concentration of a model that is there alone, but under several names, as with several ranks."""
    preferred, where = _real_first(cells)
    if preferred["label"].nunique() == 1:
        return _concentration(cells, phase)
    return [
        f"In {phase}, {_name(frames.facts[0].manifest.model.name)} has Gini "
        f"{spread(preferred['gini'], number)} in its {len(preferred)} runs on {where}, floor "
        f"{spread(preferred['gini_floor'], number)}."
    ]


def _mock(ratios: pd.DataFrame, phase: str) -> list[Finding]:
    if ratios.empty:
        return []
    parts = []
    for verdict, verb in (("over", "overstates"), ("under", "understates")):
        of_verdict = ratios[ratios["verdict"] == verdict]
        if len(of_verdict):
            row = of_verdict.sort_values("ratio", ascending=verdict == "under").iloc[0]
            parts.append(
                f"{verb} Gini in {len(of_verdict)} of {len(ratios)} models (furthest: {_name(row['label'])}, "
                f"{times(row['ratio'])} real text, interval "
                f"{interval(row['ratio_low'], row['ratio_high'], 2)})"
            )
    for verdict, words in (
        ("same", "shows no difference beyond the interval in"),
        ("unknown", "cannot be judged (too few steps for intervals) in"),
    ):
        of_verdict = ratios[ratios["verdict"] == verdict]
        if len(of_verdict):
            parts.append(f"{words} {listing([_name(label) for label in of_verdict['label']])}")
    text = f"In {phase}, mock data {listing(parts, most=9)}."
    return [Finding(section="mock", text=text, keys={"phase": phase})]


def _at_floor(cells: pd.DataFrame, *, in_grid: int) -> str:
    """Runs and phases that uniform routing could have produced; so many of them are cells of the grid."""
    limit = cells["gini_uniform_limit"]
    below = cells[cells["gini"] <= limit]
    if below.empty:
        named = "cells of the grid" if len(cells) == in_grid else "runs and phases"
        return (
            f"All {len(cells)} {named} lie above what uniform routing of as many tokens exceeds in about one "
            "window of a thousand."
        )
    names = [f"{plain(model_on(row.label, row.condition))} ({row.phase})" for row in each_row(below)]
    return f"Not distinguishable from uniform routing at this sample size: {listing(names)}."


def _worst_layer(frames: ReportFrames) -> list[Finding]:
    layers, where = _real_first(worst_layers(frames, most=None))
    if layers.empty:
        return []
    row = layers.iloc[0]
    text = (
        f"The most concentrated layer on {where} is layer {row['layer']} of "
        f"{plain(model_on(row['label'], row['condition']))} ({row['phase']}): Gini {number(row['gini'])} "
        f"against a floor of {number(row['gini_floor'])}, busiest expert "
        f"{times(row['expert_max_over_mean'])} the mean."
    )
    return [_of_place("layers", text, row)]


def _of_place(section: str, text: str, row: pd.Series[Any]) -> Finding:
    """A finding about the run and phase of a row."""
    keys = run_keys(str(row["label"]), str(row["condition"]), str(row["phase"]))
    return Finding(section=section, text=text, keys=keys)


def _committees(frames: ReportFrames) -> list[Finding]:
    """Whether the experts that hold half of the load are the same ones on another real text."""
    overlaps = committee_overlaps(frames)
    sentences = []
    for phase in phases_of(overlaps)[:1]:
        of_phase = overlaps[overlaps["phase"] == phase]
        per_model = of_phase.groupby(["with_kind", "label"])[["jaccard", "jaccard_chance"]].mean()
        means = {row.Index: row for row in each_row(per_model.groupby(level="with_kind").mean())}
        if {"same", "real"} <= means.keys():
            text = (
                f"In {phase}, the experts that hold half of a layer's load on one real text overlap by "
                f"{number(means['real'].jaccard, 2)} with those on another (Jaccard index, mean over "
                f"models; chance {number(means['real'].jaccard_chance, 2)}), and by "
                f"{number(means['same'].jaccard, 2)} between even and odd steps of the same text."
            )
            sentences.append(Finding(section="committee", text=text, keys={"phase": phase}))
    return sentences


def _steps(frames: ReportFrames) -> list[Finding]:
    layers = frames.layers.dropna(subset=["step_gini_p50", "gini"]).merge(frames.runs, on="run")
    sentences = []
    for phase in phases_of(layers):
        preferred, where = _real_first(layers[layers["phase"] == phase])
        step, window, step_floor, floor = (
            number(preferred[name].mean())
            for name in ("step_gini_p50", "gini", "step_gini_floor", "gini_floor")
        )
        text = (
            f"In {phase}, a single step has a median Gini of {step} where the whole window has {window} "
            f"(means over all layers of all runs on {where}); the floor of one step is {step_floor}, of the "
            f"window {floor}."
        )
        sentences.append(Finding(section="steps", text=text, keys={"phase": phase}))
    return sentences


def _ranks(frames: ReportFrames) -> list[Finding]:
    if frames.scan.empty:
        return []
    means = mean_over_layers(frames.scan).merge(frames.runs[["run", "label", "condition", "kind"]], on="run")
    means, where = _real_first(means.dropna(subset=["rank_max_over_mean"]))
    shared = means[means["ep"] < means["experts"]]  # one expert per rank says nothing new about ranks
    several = ", more than one expert per rank" if len(shared) else ""
    means = shared if len(shared) else means
    if means.empty:
        return []
    means = means[means["phase"] == phases_of(means)[0]]
    row = means.sort_values("rank_max_over_mean").iloc[-1]
    step = row["rank_max_over_mean_step_p90"]
    tail = f" and {times(step)} at the 90th percentile of its steps" if pd.notna(step) else ""
    text = (
        f"The busiest rank on {where} ({row['phase']}{several}) is that of "
        f"{plain(model_on(row['label'], row['condition']))} laid out over EP {row['ep']}: "
        f"{times(row['rank_max_over_mean'])} the mean over the window{tail} "
        f"(mean over layers, {row['placement']} placement). Its busiest expert "
        f"has {times(row['expert_max_over_mean'])} at any EP degree."
    )
    return [_of_place("ep", text, row)]
