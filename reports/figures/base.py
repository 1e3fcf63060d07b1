"""The look that all figures share."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from reports.theme import FONT, light

__all__ = ["axis", "empty_figure", "line"]


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


def line(colour: str, width: float = 2.0, dash: str = "solid") -> dict[str, Any]:
    """Line settings with a theme colour's name."""
    return {"color": light(colour), "width": width, "dash": dash}


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
