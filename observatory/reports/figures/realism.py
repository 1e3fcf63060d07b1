"""What captured traffic costs compared with uniform traffic of equal volume."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from observatory.reports.figures.base import axis, bars, empty_figure, line
from observatory.reports.frames.report import each_row
from observatory.reports.text import figure_text, microseconds, times
from observatory.reports.theme import light

_ROLES = {"dispatch": ("blue", "circle"), "combine": ("orange", "square")}
_MOST_LABELS = 16
#: How far the roles of a layer stand apart, in layers.
_APART = 0.14


def realism_by_layer(rows: pd.DataFrame) -> go.Figure:
    """Ratio above, microseconds below, per layer and role with intervals.

    Args:
        rows: one row per ``layer`` and ``role`` of one replay, algorithm and phase, with the columns of
            ``observatory.analysis.network.realism``.
    """
    layers = sorted(int(layer) for layer in rows["layer"].unique())
    every = -(-len(layers) // _MOST_LABELS)
    places = {
        "tickmode": "array",
        "tickvals": list(range(0, len(layers), every)),
        "ticktext": [str(layer) for layer in layers[::every]],
        "range": [-0.6, len(layers) - 0.4],
        "showgrid": False,
    }
    figure = empty_figure(
        520,
        x=axis("", **places, showticklabels=False, ticks="", anchor="y"),
        y=axis("captured ÷ uniform", domain=[0.54, 1.0]),
    )
    figure.update_layout(
        xaxis2=axis("layer", **places, anchor="y2", matches="x"),
        yaxis2=axis("extra per exchange, ms", domain=[0.0, 0.46], anchor="x2"),
    )
    for yaxis, level in (("y", 1.0), ("y2", 0.0)):
        figure.add_shape(
            type="line", xref="paper", x0=0, x1=1, yref=yaxis, y0=level, y1=level, line=line("muted", 1.5)
        )  # fmt: skip
    position = {layer: index for index, layer in enumerate(layers)}
    for index, (role, of_role) in enumerate(rows.groupby("role", sort=False)):
        colour, marker = _ROLES.get(str(role), ("slate", "x"))
        x = [position[int(layer)] + (2 * index - 1) * _APART for layer in of_role["layer"]]
        hover = [_hover(row) for row in each_row(of_role)]
        for axes, column, unit in ((("x", "y"), "ratio", 1.0), (("x2", "y2"), "extra", 1e-3)):
            names = [column, f"{column}_low", f"{column}_high"]
            if column == "extra":
                names = ["extra_us", "extra_low_us", "extra_high_us"]
            middle, low, high = (of_role[name] * unit for name in names)
            figure.add_scatter(
                x=x,
                y=middle,
                xaxis=axes[0],
                yaxis=axes[1],
                mode="markers",
                name=figure_text(role, 24),
                showlegend=column == "ratio",
                marker={"color": light(colour), "symbol": marker, "size": 9},
                error_y=bars(middle, low, high, colour),
                customdata=hover,
                hovertemplate="%{customdata[0]}<br>%{customdata[1]}<br>%{customdata[2]}<extra></extra>",
            )
    return figure


def _hover(r: Any) -> list[str]:
    return [
        figure_text(f"layer {r.layer}, {r.role}: {r.exchanges} exchanges"),
        f"{times(r.ratio)} ({times(r.ratio_low)} to {times(r.ratio_high)})",
        f"captured {microseconds(r.captured_us)}, uniform {microseconds(r.uniform_us)}, "
        f"extra {microseconds(r.extra_us, signed=True)}",
    ]
