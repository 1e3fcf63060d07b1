"""Benchmarked exchanges against their size, with the fitted model between the points."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from observatory.reports.figures.base import axis, bars, empty_figure, line, size_axis, time_axis
from observatory.reports.frames.report import each_row
from observatory.reports.text import bytes_text, figure_text, microseconds
from observatory.reports.theme import light

_ALGORITHMS = {
    "flat": ("blue", "circle", "solid"),
    "hierarchical": ("orange", "square", "dash"),
    "gather": ("green", "diamond", "dashdot"),
}
_OTHER = ("purple", "triangle-up", "dot")
#: How far beyond points and lines a band is shown.
_REACH = 4


def bandwidth_curves(points: pd.DataFrame, curves: pd.DataFrame) -> go.Figure:
    """Time above, bus bandwidth below, against the mean bytes a rank sends; algorithms in one picture.

    Args:
        points: measured exchanges of one benchmark and pattern with ``size_bytes`` above 0: ``algorithm``,
            ``seed``, ``us``, ``p10_us``, ``p90_us``, ``algbw``, ``busbw``.
        curves: the model's: ``algorithm``, ``leaving``, ``size_bytes``, ``us``, ``low_us``, ``high_us``;
            empty without a model.
    """
    sizes, ends = points["size_bytes"], [*points["p10_us"], *points["p90_us"], *curves["us"]]
    # A band far beyond all points would leave nothing of them; it is cut off at the edge.
    low, high = min(ends) / _REACH, max(ends) * _REACH
    ends += [*curves["low_us"].clip(lower=low), *curves["high_us"].clip(upper=high)]
    figure = empty_figure(
        640,
        x=size_axis("", sizes, showticklabels=False, ticks="", anchor="y"),
        y=time_axis("time of the slowest rank", ends, domain=[0.5, 1.0]),
    )
    figure.update_layout(
        xaxis2=size_axis("mean bytes a rank sends, its own included", sizes, anchor="y2", matches="x"),
        yaxis2=axis("bus bandwidth, GB/s", domain=[0.0, 0.43], anchor="x2", rangemode="tozero"),
    )
    for algorithm, of_algorithm in points.groupby("algorithm", sort=False):
        colour, marker, dash = _ALGORITHMS.get(str(algorithm), _OTHER)
        model = curves[curves["algorithm"] == algorithm].sort_values("size_bytes")
        name = figure_text(algorithm, 24)
        if len(model):
            _add_model(figure, model, name, colour, dash)
        _add_points(figure, of_algorithm.sort_values("size_bytes"), name, colour, marker)
    return figure


def _add_model(figure: go.Figure, model: pd.DataFrame, name: str, colour: str, dash: str) -> None:
    """Line and band of one algorithm in both panels."""
    size = [*model["size_bytes"], *model["size_bytes"][::-1]]
    gb_per_s = {
        end: model["size_bytes"] * model["leaving"] / model[end].where(model[end] > 0) / 1e3
        for end in ("us", "low_us", "high_us")
    }
    for axes, middle, low, high in (
        (("x", "y"), model["us"], model["low_us"], model["high_us"]),
        (("x2", "y2"), gb_per_s["us"], gb_per_s["high_us"], gb_per_s["low_us"]),
    ):
        where: dict[str, Any] = {"xaxis": axes[0], "yaxis": axes[1], "hoverinfo": "skip", "legendgroup": name}
        figure.add_scatter(
            x=size,
            y=[*high, *low[::-1]],
            fill="toself",
            fillcolor=light(colour),
            opacity=0.16,
            mode="none",
            name=f"{name}, model's 90 % interval",
            showlegend=axes[0] == "x",
            **where,
        )
        figure.add_scatter(
            x=model["size_bytes"],
            y=middle,
            mode="lines",
            name=f"{name}, fitted model",
            line=line(colour, 2, dash),
            showlegend=axes[0] == "x",
            **where,
        )


def _add_points(figure: go.Figure, points: pd.DataFrame, name: str, colour: str, marker: str) -> None:
    """Measured exchanges of one algorithm in both panels, with the spread of their repeats."""
    moved = points["busbw"] * points["us"]  # the bandwidth that another time of the same exchange would mean
    for axes, middle, low, high in (
        (("x", "y"), points["us"], points["p10_us"], points["p90_us"]),
        (("x2", "y2"), points["busbw"], moved / points["p90_us"], moved / points["p10_us"]),
    ):
        figure.add_scatter(
            x=points["size_bytes"],
            y=middle,
            xaxis=axes[0],
            yaxis=axes[1],
            mode="markers",
            cliponaxis=False,
            name=f"{name}, measured (bar: p10 to p90 of repeats)",
            legendgroup=name,
            showlegend=axes[0] == "x",
            marker={"color": light(colour), "symbol": marker, "size": 9},
            error_y=bars(middle, low, high, colour),
            customdata=[
                [
                    bytes_text(row.size_bytes),
                    microseconds(row.us),
                    f"{microseconds(row.p10_us)} to {microseconds(row.p90_us)}",
                    row.algbw,
                    row.busbw,
                ]
                for row in each_row(points)
            ],
            hovertemplate=f"{name}, %{{customdata[0]}}: %{{customdata[1]}} (%{{customdata[2]}})<br>"
            "algbw %{customdata[3]:.3g} GB/s, busbw %{customdata[4]:.3g} GB/s<extra></extra>",
        )
