"""Single steps and the whole window."""

from __future__ import annotations

import pandas as pd

from observatory.analysis.columns import Column
from observatory.reports.figures import step_profile
from observatory.reports.frames.report import ReportFrames
from observatory.reports.page import FigureBlock, Section, Variant, frame_table
from observatory.reports.sections.common import NO_LOADS, layer_window_text, model_on, run_choice, run_keys
from observatory.reports.text import count, number, shorten
from observatory.run.documents.writing import frame_records

_GINI = (
    Column(name="layer", title="layer"),
    Column(
        name="gini",
        title="window",
        digits=3,
        interval=("gini_low", "gini_high"),
        legend="with its 95 % interval (bootstrap over steps)",
    ),
    Column(name="gini_floor", title="window floor", digits=3),
    Column(name="step_gini_p10", title="step p10", digits=3),
    Column(name="step_gini_p50", title="step p50", digits=3),
    Column(name="step_gini_p90", title="step p90", digits=3),
    Column(name="step_gini_floor", title="step floor", digits=3),
)


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
        keys=run_keys(label, condition, phase),
        figure=step_profile(layers),
        alt=f"Gini per layer for {model_on(label, condition)}, {phase}: single steps have a "
        f"median of {layers['step_gini_p50'].mean():.3f}, the whole window {layers['gini'].mean():.3f}, "
        "means over layers.",
        note=f"{model_on(label, condition)}, {phase}. {layer_window_text(layers)} One step: "
        f"{count(per_step)} tokens per layer, floor {number(float(layers['step_gini_floor'].mean()))}.",
        numbers=frame_table(
            f"{model_on(label, condition)}, {phase}: Gini of single steps and of the window",
            _GINI,
            frame_records(layers.sort_values("layer")),
        ),
    )
