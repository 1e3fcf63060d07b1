"""Throughput of a device against that of a user, for the set-ups of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from observatory.reports.figures.base import axis, empty_figure, line
from observatory.reports.text import figure_text
from observatory.reports.theme import light

_LOOKS = (("blue", "circle"), ("orange", "square"), ("green", "diamond"), ("purple", "triangle-up"))


def plan_plane(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    """One mark per set-up and batch that meets every target; a line through those that no other beats.

    Args:
        rows: candidates of a plan, the best first, as in the document of ``observatory plan``.
    """
    figure = empty_figure(
        380,
        x=axis("tokens/s of a user", rangemode="tozero"),
        y=axis("tokens/s of a device", rangemode="tozero"),
    )
    names = list(dict.fromkeys(str(row["hardware"]) for row in rows))
    for index, name in enumerate(names):
        colour, marker = _LOOKS[index % len(_LOOKS)]
        own = [row for row in rows if row["hardware"] == name]
        figure.add_scatter(
            x=[row["tokens_per_s_user"] for row in own],
            y=[row["tokens_per_s_gpu"] for row in own],
            mode="markers",
            name=figure_text(name, 24),
            marker={"color": light(colour), "symbol": marker, "size": 6},
            hovertemplate="%{x:.1f} tokens/s of a user, %{y:.0f} of a device<extra></extra>",
        )
    front = sorted((row for row in rows if row["is_pareto"]), key=lambda row: float(row["tokens_per_s_user"]))
    figure.add_scatter(
        x=[row["tokens_per_s_user"] for row in front],
        y=[row["tokens_per_s_gpu"] for row in front],
        mode="lines",
        name="none better in both",
        line=line("ink", 1, "dot"),
        hoverinfo="skip",
    )
    best = rows[0]
    figure.add_scatter(
        x=[best["tokens_per_s_user"]],
        y=[best["tokens_per_s_gpu"]],
        mode="markers",
        name="fewest devices",
        marker={"color": light("ink"), "symbol": "x", "size": 11},
        hoverinfo="skip",
    )
    return figure
