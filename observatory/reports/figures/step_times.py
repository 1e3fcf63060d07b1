"""How long the steps of each run take, by model and data condition."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from observatory.reports.figures.base import axis, bars, model_rows, name_rows, time_axis
from observatory.reports.text import figure_text
from observatory.reports.theme import light

#: Times that differ by more than this factor are drawn on a logarithmic axis.
_WIDE = 20.0
#: Room for names right of the longest bar, as a share of the axis.
_ROOM = 0.28


def step_time_dots(points: pd.DataFrame) -> go.Figure:
    """Dots with bars from p10 to p90 of steps, one line per run, those of a model below its name.

    Args:
        points: one row per run, of one phase: ``label``, ``condition``, ``ms`` > 0,
            ``ms_p10``, ``ms_p90`` (NaN where single steps are not kept), ``exchange_ms`` (NaN where
            exchanges were not captured); in the order in which they are to stand.
    """
    drawn = points[["ms", "ms_p10", "ms_p90", "exchange_ms"]]
    low, high = float(drawn[drawn > 0].min().min()), float(drawn.max().max())
    if high > low * _WIDE:
        x = time_axis("time per step", [low * 1e3, high * 1e3])
        x["range"][1] += _ROOM * (x["range"][1] - x["range"][0])
        scale = 1e3
    else:
        x = axis("milliseconds per step", range=[0, high * (1 + _ROOM)], zeroline=True)
        scale = 1.0
    points, figure = model_rows(points, x)
    times = points[["ms", "ms_p10", "ms_p90", "exchange_ms"]] * scale
    exchanged = points["exchange_ms"] > 0
    if exchanged.any():
        figure.add_scatter(
            x=times["exchange_ms"][exchanged],
            y=points["y"][exchanged],
            mode="markers",
            name="of it in exchanges, waiting included",
            marker={"color": light("orange"), "symbol": "diamond", "size": 8},
            customdata=points[["exchange_ms"]][exchanged].to_numpy(),
            hovertemplate="in exchanges %{customdata[0]:.3f} ms<extra></extra>",
        )
    figure.add_scatter(
        x=times["ms"],
        y=points["y"],
        mode="markers",
        name="whole step: mean, bars from p10 to p90",
        marker={"color": light("blue"), "symbol": "circle", "size": 9},
        error_x=bars(times["ms"], times["ms_p10"], times["ms_p90"], "blue"),
        customdata=[
            [figure_text(label), figure_text(condition), ms]
            for label, condition, ms in zip(points["label"], points["condition"], points["ms"], strict=True)
        ],
        hovertemplate="%{customdata[0]}<br>%{customdata[1]}<br>%{customdata[2]:.3f} ms<extra></extra>",
    )
    right = times[["ms", "ms_p90"]].max(axis=1)
    name_rows(figure, points["condition"], x=right, y=points["y"], sides=["middle right"] * len(points))
    return figure
