"""The layers that stand out most."""

from __future__ import annotations

import pandas as pd

from reports.frames import ReportFrames, each_row
from reports.page import Section, table
from reports.sections.common import NO_LOADS
from reports.text import count, interval, number, shorten, times

__all__ = ["layer_section", "worst_layers"]

_MOST_ROWS = 30


def worst_layers(frames: ReportFrames, most: int = _MOST_ROWS) -> pd.DataFrame:
    """Layers with the largest excess of Gini over the sampling floor, the largest first."""
    known = frames.layers.dropna(subset=["gini_excess"])
    ranked = known.sort_values("gini_excess", ascending=False, kind="stable").head(most)
    return ranked.merge(frames.runs[["run", "label", "condition"]], on="run")


def layer_section(frames: ReportFrames) -> Section:
    """Table of the most concentrated layers."""
    title = "The most concentrated layers"
    rows = worst_layers(frames)
    if rows.empty:
        return Section(id="layers", title=title, short="Top layers", reason=NO_LOADS)
    return Section(
        id="layers",
        title=title,
        short="Top layers",
        lead=(
            f"{len(rows)} of {len(frames.layers)} layers (each phase and run counted), largest excess of "
            "Gini over "
            "the sampling floor first. All numbers are of experts over the whole window; definitions in "
            "docs/metrics.md. The full table: observatory routing RUN --json.",
        ),
        blocks=(
            table(
                "Layers by excess over the sampling floor",
                [
                    "Model",
                    "Condition",
                    "Phase",
                    "Layer",
                    "Experts",
                    "Tokens",
                    "Gini",
                    "95 % interval",
                    "Floor",
                    "Excess",
                    "Max/mean (floor)",
                    "CV",
                    "Entropy, bits",
                    "Idle",
                ],
                [
                    [
                        shorten(row.label),
                        shorten(row.condition),
                        row.phase,
                        str(row.layer),
                        f"{row.experts}, top-{'k varies' if pd.isna(row.top_k) else row.top_k}",
                        count(row.tokens),
                        number(row.gini),
                        interval(row.gini_low, row.gini_high),
                        number(row.gini_floor),
                        number(row.gini_excess),
                        f"{times(row.expert_max_over_mean)} ({times(row.expert_max_over_mean_floor)})",
                        number(row.cv, 2),
                        number(row.entropy_bits, 2),
                        count(row.idle_experts),
                    ]
                    for row in each_row(rows)
                ],
                text=3,
            ),
        ),
    )
