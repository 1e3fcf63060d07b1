"""The look that all figures share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from observatory.reports.text import bytes_text, figure_label, figure_text, microseconds
from observatory.reports.theme import FONT, light

#: Logarithmic axes with fewer decades than this also label 2 and 5 of each.
_FEW_DECADES = 2.2
#: Height of a line of `model_rows`.
_LINE_PX = 17
#: Labels of sizes stand at least so far apart, as a share of the axis: what one takes on a phone.
_LABEL_SHARE = 0.19


def axis(title: str, **options: Any) -> dict[str, Any]:
    """Axis settings: thin rules, labels that make their own room."""
    settings: dict[str, Any] = {
        "title": {"text": title, "standoff": 10, "font": {"size": 13, "color": light("muted")}},
        "automargin": True,
        "gridcolor": light("grid"),
        "linecolor": light("rule"),
        "tickcolor": light("rule"),
        "tickfont": {"size": 12, "color": light("muted")},
        "ticks": "outside",
        "ticklen": 4,
        "zeroline": False,
        "showline": True,
        "fixedrange": True,
    }
    return settings | options


def time_axis(title: str, values_us: Iterable[float], **options: Any) -> dict[str, Any]:
    """Logarithmic axis of times in microseconds that holds all positive ``values_us``."""
    exponents = [math.log10(value) for value in values_us if value > 0 and math.isfinite(value)] or [0.0]
    low, high = min(exponents) - 0.06, max(exponents) + 0.06
    steps = (1, 2, 5) if high - low < _FEW_DECADES else (1,)
    ticks = [
        step * 10.0**decade
        for decade in range(math.floor(low), math.ceil(high) + 1)
        for step in steps
        if low <= math.log10(step * 10.0**decade) <= high
    ]
    return axis(
        title,
        type="log",
        range=[low, high],
        tickmode="array",
        tickvals=ticks,
        ticktext=[_short(microseconds(tick)) for tick in ticks],
        minor={"ticks": ""},
        **options,
    )


def size_axis(title: str, sizes_bytes: Iterable[float], **options: Any) -> dict[str, Any]:
    """Logarithmic axis of sizes in bytes; labels stand at measured sizes, as many as there is room for."""
    sizes = sorted({size for size in sizes_bytes if size > 0}, reverse=True)
    ticks = sizes[:1]
    for size in sizes[1:]:
        if math.log(ticks[-1] / size) >= _LABEL_SHARE * math.log(sizes[0] / sizes[-1]):
            ticks.append(size)
    return axis(
        title,
        type="log",
        tickmode="array",
        tickvals=ticks,
        ticktext=[_short(bytes_text(tick)) for tick in ticks],
        tickangle=0,
        minor={"ticks": ""},
        **options,
    )


def _short(text: str) -> str:
    """A label without zeros behind the point: ``1 ms`` for ``1.00 ms``."""
    value, _, unit = text.partition(" ")
    return f"{value.rstrip('0').rstrip('.') if '.' in value else value} {unit}"


def line(colour: str, width: float = 2.0, dash: str = "solid") -> dict[str, Any]:
    """Line settings with a theme colour's name."""
    return {"color": light(colour), "width": width, "dash": dash}


def bars(
    middle: pd.Series[float],
    low: pd.Series[float],
    high: pd.Series[float],
    colour: str,
    *,
    width: float = 3,
) -> dict[str, Any]:
    """Error bars from ``low`` to ``high`` around ``middle``; none where an end is missing."""
    ends = {"array": high - middle, "arrayminus": middle - low}
    return {
        "type": "data",
        "symmetric": False,
        **{name: np.nan_to_num(end.clip(lower=0).to_numpy(np.float64)) for name, end in ends.items()},
        "color": light(colour),
        "thickness": 1.5,
        "width": width,
    }


def colour_bar(**options: Any) -> dict[str, Any]:
    """Settings of a colour bar that lies above the plot."""
    settings: dict[str, Any] = {
        "orientation": "h",
        "x": 0,
        "xanchor": "left",
        "y": 1.0,
        "yref": "container",
        "yanchor": "top",
        "xpad": 0,
        "ypad": 0,
        "len": 0.72,
        "thickness": 9,
        "outlinewidth": 0,
        "tickfont": {"size": 11, "color": light("muted")},
    }
    return settings | options


def empty_figure(height: int, *, x: dict[str, Any], y: dict[str, Any], legend: bool = True) -> go.Figure:
    """Figure without traces; the legend stands below the plot, at any width.

    An empty template is given so that plotly's own, 7 kB of settings, is not stored with every figure.
    """
    return go.Figure(
        layout={
            "template": go.layout.Template(),
            "height": height,
            "margin": {"l": 8, "r": 14, "t": 10, "b": 8},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": FONT, "size": 13, "color": light("ink")},
            "showlegend": legend,
            "legend": {
                "orientation": "h",
                "x": 0,
                "xanchor": "left",
                "y": 0,
                "yref": "container",
                "yanchor": "bottom",
                "font": {"size": 12, "color": light("ink")},
                "itemclick": False,
                "itemdoubleclick": False,
            },
            "hoverlabel": {
                "bgcolor": light("panel"),
                "bordercolor": light("rule"),
                "font": {"family": FONT, "size": 12, "color": light("ink")},
                "align": "left",
                "namelength": -1,
            },
            "dragmode": False,
            "xaxis": x,
            "yaxis": y,
        }
    )


def model_rows(points: pd.DataFrame, x: dict[str, Any]) -> tuple[pd.DataFrame, go.Figure]:
    """A figure with one line per row, those of a model below its name, and the rows with their ``y``.

    Args:
        points: ``label`` (model) and whatever is drawn, in the order in which lines are to stand.
        x: settings of the horizontal axis.
    """
    y, names, top = np.zeros(len(points)), [], 0.0
    for label in dict.fromkeys(points["label"]):
        text = figure_label(label, line=15)
        of_model = np.flatnonzero(points["label"] == label)
        high = max(len(of_model), 1.0 + text.count("<br>")) + 1.0
        names.append((top - high / 2, text))
        y[of_model] = top - high / 2 + (len(of_model) - 1) / 2 - np.arange(len(of_model))
        top -= high
    points = points.reset_index(drop=True).assign(y=y)
    figure = empty_figure(
        round(96 - _LINE_PX * top),
        x=x,
        y=axis(
            "",
            tickvals=[centre for centre, _ in names],
            ticktext=[text for _, text in names],
            showgrid=False,
            ticks="",
            range=[top, 0],
        ),
    )
    return points, figure


def name_rows(
    figure: go.Figure, names: pd.Series[str], *, x: pd.Series[float], y: pd.Series[float], sides: list[str]
) -> None:
    """Name of each line at ``x``, on its side ("middle left" or "middle right")."""
    figure.add_scatter(
        x=x,
        y=y,
        mode="text",
        text=[f"  {figure_text(name, 13)}  " for name in names],
        textposition=sides,
        textfont={"size": 11, "color": light("muted")},
        hoverinfo="skip",
        showlegend=False,
        cliponaxis=False,
    )
