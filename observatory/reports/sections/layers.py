"""The layers that stand out most."""

from __future__ import annotations

import pandas as pd

from observatory.analysis.columns import Column
from observatory.analysis.routing.document import LAYER_COLUMNS
from observatory.reports.frames.report import ReportFrames
from observatory.reports.page import Section, frame_table
from observatory.reports.sections.common import NO_LOADS
from observatory.reports.text import shorten
from observatory.run.documents.writing import frame_records

_MOST_ROWS = 20
_MODEL = Column(name="label", title="model", text=True)
_DATA = Column(name="condition", title="data", text=True)
_TOP_K = Column(name="top_k", title="top-k", otherwise="varies")


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
    conditions = [shorten(condition, 24) for condition in rows["condition"]]
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
            frame_table(
                "Layers by excess over the sampling floor",
                (_MODEL, _DATA, *LAYER_COLUMNS, _TOP_K),
                frame_records(rows.assign(label=rows["label"].map(shorten), condition=conditions)),
                leave_out=("committee_experts", "step_gini_p50", "step_gini_floor"),
                folded=("cv", "entropy_bits"),
                below={
                    "condition": "phase",
                    "gini_excess": "gini_floor",
                    "expert_max_over_mean": "expert_max_over_mean_floor",
                },
            ),
        ),
    )
