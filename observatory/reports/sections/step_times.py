"""How long steps take."""

from __future__ import annotations

import pandas as pd

from observatory.analysis.columns import Column
from observatory.reports.figures.step_times import step_time_dots
from observatory.reports.frames.report import ReportFrames, in_reading_order, phases_of
from observatory.reports.page import FigureBlock, Section, Variant, frame_table
from observatory.reports.sections.common import run_keys, spread
from observatory.run.documents.writing import frame_records

_STEPS = (
    Column(name="label", title="model", text=True),
    Column(name="condition", title="data", text=True),
    Column(name="ranks", title="ranks"),
    Column(name="steps", title="steps"),
    Column(name="tokens", title="tokens per step", digits=0, legend="mean, of all ranks"),
    Column(
        name="ms",
        title="time per step",
        unit="ms",
        digits=2,
        interval=("ms_p10", "ms_p90"),
        legend="with p10 and p90 of single steps",
    ),
    Column(name="tokens_per_s", title="tokens/s", digits=0),
    Column(name="exchange_ms", title="in exchanges", unit="ms", digits=2, otherwise="not captured"),
    Column(name="wait_ms", title="of it waiting", unit="ms", digits=2, otherwise="not known"),
)


def step_times_section(frames: ReportFrames) -> Section:
    """One figure per phase, every run that has timed steps on a line of its own."""
    title = "How long a step takes"
    steps = in_reading_order(frames.steps.merge(frames.runs, on="run"))
    if steps.empty:
        return Section(id="step-times", title=title, reason="No run given here has timed steps.")
    return Section(
        id="step-times",
        title=title,
        lead=(
            "A step is one pass of the whole model, capture included; its time is that of the rank that "
            "takes longest. Compare runs only where they have the same tokens per step and the machine "
            "did nothing else.",
        ),
        blocks=(
            FigureBlock(
                id="step-time-dots",
                title="Time per step",
                caption="Each run: mean over steps without the fastest and the slowest tenth, bars from p10 "
                "to p90 of single steps.",
                choice="Phase",
                variants=tuple(_variant(steps[steps["phase"] == phase], phase) for phase in phases_of(steps)),
            ),
        ),
    )


def _variant(steps: pd.DataFrame, phase: str) -> Variant:
    return Variant(
        label=phase,
        keys=run_keys("", "", phase),
        figure=step_time_dots(steps),
        alt=f"Dot plot of the time of a step in {phase}: {len(steps)} runs of {steps['label'].nunique()} "
        f"models, from {steps['ms'].min():.3g} to {steps['ms'].max():.3g} ms.",
        note=f"{spread(steps['steps'])} steps of {spread(steps['tokens'])} tokens, {phase}.",
        numbers=frame_table(f"Time per step, {phase}", _STEPS, frame_records(steps)),
    )
