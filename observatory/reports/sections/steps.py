"""Single steps and the whole window."""

from __future__ import annotations

import pandas as pd

from observatory.reports.figures import step_profile
from observatory.reports.frames.report import ReportFrames, each_row
from observatory.reports.page import FigureBlock, Section, Variant, table
from observatory.reports.sections.common import NO_LOADS, layer_window_text, run_choice
from observatory.reports.text import interval, number, shorten


def step_section(frames: ReportFrames) -> Section:
    """One figure per run and phase; windows folded on capture have no single steps."""
    title = "One step is not the whole run"
    layers = dict(iter(frames.layers.groupby(["run", "phase"], sort=False)))
    variants = [
        _variant(layers[run, phase], label, condition, phase)
        for run, label, condition, phase in frames.cells_in_order()
        if (run, phase) in layers and layers[run, phase]["step_gini_p50"].notna().any()
    ]
    if not variants:
        folded = len(frames.layers) > 0
        reason = "Every run here was captured with several steps per row: Gini of single steps is not known."
        return Section(
            id="steps", title=title, short="Steps and window", reason=reason if folded else NO_LOADS
        )
    return Section(
        id="steps",
        title=title,
        short="Steps and window",
        lead=(
            "The exchange of a step waits for that step's imbalance, not for the average of the run. A "
            "single step looks less balanced as a rule: it has fewer tokens, so its sampling floor is "
            "higher. Compare each diamond with the upper dotted line, each dot with the lower one.",
        ),
        blocks=(
            FigureBlock(
                id="step-gini",
                title="Gini per layer: single steps and whole window",
                caption="Experts; diamonds over single steps (median, bars from p10 to p90), dots over the "
                "whole window "
                "(gini, under Methods); dotted lines are the sampling floors (gini_floor) of each.",
                choice="Run",
                variants=tuple(variants),
            ),
        ),
    )


def _variant(layers: pd.DataFrame, label: str, condition: str, phase: str) -> Variant:
    per_step = float((layers["tokens"] / layers["steps"]).mean())
    return Variant(
        group=shorten(label),
        label=run_choice(label, condition, phase),
        figure=step_profile(layers),
        alt=f"Gini per layer for {shorten(label)} on {shorten(condition)}, {phase}: single steps have a "
        f"median of {layers['step_gini_p50'].mean():.3f}, the whole window {layers['gini'].mean():.3f}, "
        "means over layers.",
        note=f"{shorten(label)} on {shorten(condition)}, {phase}. {layer_window_text(layers)} One step: "
        f"{per_step:,.0f} tokens per layer, floor {number(float(layers['step_gini_floor'].mean()))}.",
        numbers=table(
            f"{shorten(label)} on {shorten(condition)}, {phase}: Gini of single steps and of the window",
            [
                "Layer",
                "Window",
                "95 % interval",
                "Window floor",
                "Step p10",
                "Step p50",
                "Step p90",
                "Step floor",
            ],
            [
                [
                    str(row.layer),
                    number(row.gini),
                    interval(row.gini_low, row.gini_high),
                    number(row.gini_floor),
                    number(row.step_gini_p10),
                    number(row.step_gini_p50),
                    number(row.step_gini_p90),
                    number(row.step_gini_floor),
                ]
                for row in each_row(layers.sort_values("layer"))
            ],
        ),
    )
