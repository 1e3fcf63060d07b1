"""Gini of every data condition compared with the others: real text, altered text, random tokens."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from observatory.reports.figures.base import axis, bars, line, model_rows, name_rows
from observatory.reports.frames.report import each_row
from observatory.reports.text import figure_text
from observatory.reports.theme import light

_KINDS = {
    "real": ("real text", "blue", "circle"),
    "altered": ("real tokens, altered", "green", "diamond"),
    "mock": ("mock (random tokens)", "orange", "square"),
    "unstated": ("origin not stated", "slate", "x"),
}
#: Share of the axis that a name may take on a phone.
_NAME_SHARE = 0.25


def condition_dots(points: pd.DataFrame) -> go.Figure:
    """Dots with intervals, one line per condition, models below each other; the floor is a tick on each line.

    A thin rule joins the mean over real text with mock, where a model has both.

    Args:
        points: one row per model and condition: ``label``, ``condition``, ``kind`` (real, altered, mock,
            unstated), ``gini``, ``gini_low``, ``gini_high``, ``gini_floor``; models and conditions in the
            order in which they are to stand.
    """
    points, figure = model_rows(points, axis("Gini, mean over layers", rangemode="tozero", zeroline=True))
    _add_spans(figure, points)
    for kind, (name, colour, marker) in _KINDS.items():
        rows = points[points["kind"] == kind]
        if rows.empty:
            continue
        figure.add_scatter(
            x=rows["gini"],
            y=rows["y"],
            mode="markers",
            name=name,
            marker={"color": light(colour), "symbol": marker, "size": 9},
            error_x=bars(rows["gini"], rows["gini_low"], rows["gini_high"], colour),
            customdata=[
                [
                    figure_text(row.label),
                    figure_text(row.condition),
                    row.gini_low,
                    row.gini_high,
                    row.gini_floor,
                ]
                for row in each_row(rows)
            ],
            hovertemplate="%{customdata[0]}<br>%{customdata[1]}<br>Gini %{x:.3f} (%{customdata[2]:.3f} to "
            "%{customdata[3]:.3f})<br>floor %{customdata[4]:.3f}<extra></extra>",
        )
    figure.add_scatter(
        x=points["gini_floor"],
        y=points["y"],
        mode="markers",
        name="sampling floor",
        marker={"symbol": "line-ns", "size": 9, "line": line("muted", 2)},
        hovertemplate="sampling floor %{x:.3f}<extra></extra>",
    )
    _add_names(figure, points)
    return figure


def _add_spans(figure: go.Figure, points: pd.DataFrame) -> None:
    """Rules from the mean over real text to mock, on the line of mock."""
    x: list[float | None] = []
    y: list[float | None] = []
    for _, rows in points.groupby("label", sort=False):
        real, mock = rows[rows["kind"] == "real"], rows[rows["kind"] == "mock"]
        if len(real) and len(mock):
            x += [float(real["gini"].mean()), float(mock["gini"].iloc[0]), None]
            y += [float(mock["y"].iloc[0])] * 2 + [None]
    if x:
        figure.add_scatter(
            x=x,
            y=y,
            mode="lines+markers",
            name="from the mean over real text to mock",
            line=line("orange", 1.5, "dot"),
            marker={"symbol": "line-ns", "size": [11, 0, 0] * (len(x) // 3), "line": line("blue", 2.5)},
            hoverinfo="skip",
        )


def _add_names(figure: go.Figure, points: pd.DataFrame) -> None:
    """Name of each condition at the right end of its interval, and room for it.

    Where the rule to the mean over real text leaves mock to the right, its name stands on the left, or
    beyond the rule when there is no room on the left.
    """
    right = points[["gini", "gini_high", "gini_floor"]].max(axis=1)
    left = points[["gini", "gini_low"]].min(axis=1)
    real = points["gini"].where(points["kind"] == "real").groupby(points["label"]).transform("mean")
    ruled = (points["kind"] == "mock") & (real > points["gini"])
    flipped = ruled & (left > _NAME_SHARE * right.max())
    place = right.where(~ruled, real).where(~flipped, left)
    sides = np.where(flipped, "middle left", "middle right").tolist()
    name_rows(figure, points["condition"], x=place, y=points["y"], sides=sides)
    top = float(right.max()) if len(right) else 0.0
    figure.update_xaxes(range=[0, max(top, 1e-3) * 1.28])
