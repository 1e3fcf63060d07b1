"""The layers that stand out most."""

from __future__ import annotations

import pandas as pd

from observatory.reports.frames.report import ReportFrames, each_row
from observatory.reports.page import Cell, Head, Section, table
from observatory.reports.sections.common import NO_LOADS
from observatory.reports.text import count, interval, number, shorten, times

_MOST_ROWS = 20


def worst_layers(frames: ReportFrames, most: int | None = _MOST_ROWS) -> pd.DataFrame:
    """Layers with the largest excess of Gini over the sampling floor, the largest first; None for all."""
    known = frames.layers.dropna(subset=["gini_excess"])
    ranked = known.sort_values("gini_excess", ascending=False, kind="stable")
    ranked = ranked if most is None else ranked.head(most)
    return ranked.merge(frames.runs[["run", "label", "condition", "kind"]], on="run")


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
            "Gini over the sampling floor first. All numbers are of experts over the whole window; "
            "definitions are under Methods. The full table: observatory routing RUN --json.",
        ),
        blocks=(
            table(
                "Layers by excess over the sampling floor",
                [
                    "Model",
                    "Data",
                    "Layer",
                    "Experts",
                    "Tokens",
                    Head(title="Gini", detail="95 % interval"),
                    Head(title="Excess", detail="floor"),
                    Head(title="Max/mean", detail="floor"),
                    "CV",
                    "Entropy, bits",
                    "Idle",
                ],
                [
                    [
                        shorten(row.label),
                        Cell(text=shorten(row.condition, 24), detail=row.phase),
                        str(row.layer),
                        Cell(
                            text=str(row.experts),
                            detail=f"top-{'k varies' if pd.isna(row.top_k) else row.top_k}",
                        ),
                        count(row.tokens),
                        Cell(text=number(row.gini), detail=interval(row.gini_low, row.gini_high)),
                        Cell(text=number(row.gini_excess), detail=number(row.gini_floor)),
                        Cell(
                            text=times(row.expert_max_over_mean),
                            detail=times(row.expert_max_over_mean_floor),
                        ),
                        number(row.cv, 2),
                        number(row.entropy_bits, 2),
                        count(row.idle_experts),
                    ]
                    for row in each_row(rows)
                ],
                text=2,
            ),
        ),
    )
