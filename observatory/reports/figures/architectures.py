"""Models next to each other: their imbalance on each data condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from observatory.reports.figures.base import axis, empty_figure, line
from observatory.reports.text import figure_text
from observatory.reports.theme import MARKERS, SERIES, light

_ROW_HEIGHT = 30


def model_dots(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    """A dot for each model and data condition, and a line from the least to the most even of a model.

    Args:
        rows: of the architectures of ``observatory compare``, of one phase; with ``ginis``.
    """
    labels = [_label(row) for row in rows]
    figure = empty_figure(
        110 + _ROW_HEIGHT * len(rows),
        x=axis("Gini of expert loads"),
        y=axis("", type="category", autorange="reversed", showgrid=False, ticks=""),
    )
    for label, row in zip(labels, rows, strict=True):
        figure.add_scatter(
            x=[row["gini_least"], row["gini_most"]],
            y=[label, label],
            mode="lines",
            line=line("rule", 2),
            showlegend=False,
            hoverinfo="skip",
        )
    conditions = dict.fromkeys(item["condition"] for row in rows for item in row["ginis"])
    for index, condition in enumerate(conditions):
        points = [
            (label, item["gini"])
            for label, row in zip(labels, rows, strict=True)
            for item in row["ginis"]
            if item["condition"] == condition and item["gini"] is not None
        ]
        figure.add_scatter(
            x=[gini for _, gini in points],
            y=[label for label, _ in points],
            mode="markers",
            name=figure_text(condition, 24),
            marker={
                "color": SERIES[index % len(SERIES)],
                "symbol": MARKERS[index % len(MARKERS)],
                "size": 9,
                "line": {"width": 1, "color": light("panel")},
            },
            hovertemplate=f"%{{y}}, {figure_text(condition, 24)}: %{{x:.3f}}<extra></extra>",
        )
    return figure


def _label(row: Mapping[str, Any]) -> str:
    mixer = f" ({row['mixer']})" if row["mixer"] else ""
    return figure_text(f"{row['model']}{mixer}", 30)
