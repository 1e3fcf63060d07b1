"""Differences with their intervals, and series with their changes of level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from observatory.reports.figures.base import axis, bars, empty_figure, line
from observatory.reports.text import figure_text
from observatory.reports.theme import light

_ROW_HEIGHT = 26
#: Verdicts of a group, its name, colour and marker.
_GROUPS: tuple[tuple[tuple[str, ...], str, str, str], ...] = (
    (("higher", "lower"), "changed beyond noise", "orange", "diamond"),
    (("perhaps_higher", "perhaps_lower"), "perhaps", "blue", "square"),
    (("same", "identical"), "same within noise", "slate", "circle"),
    (("unknown",), "not known", "slate", "x"),
)
#: Intervals are cut where they reach so many times as far as the largest difference.
_FARTHEST = 2.5


def difference_dots(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    """A dot and an interval for each row, in percent of the baseline, and a line at no difference.

    Args:
        rows: of the document of ``observatory compare``, with a relative difference and ``label`` each.
    """
    names = [figure_text(row["label"], 34) for row in rows]
    reach = _reach(rows)
    figure = empty_figure(
        110 + _ROW_HEIGHT * len(rows),
        x=axis("difference, %", range=[-reach, reach]),
        y=axis("", type="category", autorange="reversed", showgrid=False, ticks=""),
    )
    figure.add_vline(x=0, line=line("ink", 1, "dot"))
    # Unseen, so that the rows keep their order although each verdict has marks of its own.
    figure.add_scatter(
        x=[0.0] * len(names), y=names, mode="markers", marker={"size": 1, "opacity": 0.0}, showlegend=False,
        hoverinfo="skip",
    )  # fmt: skip
    for verdicts, name, colour, symbol in _GROUPS:
        of_group = [
            (label, row) for label, row in zip(names, rows, strict=True) if row["verdict"] in verdicts
        ]
        if not of_group:
            continue
        middle, low, high = (_percent(of_group, key) for key in ("relative", "relative_low", "relative_high"))
        figure.add_scatter(
            x=middle,
            y=[label for label, _ in of_group],
            mode="markers",
            name=name,
            marker={"color": light(colour), "size": 9, "symbol": symbol},
            error_x=bars(middle, low.fillna(middle), high.fillna(middle), colour),
            hovertemplate=f"%{{y}}, {name}: %{{x:.1f}} %<extra></extra>",
        )
    return figure


def layer_dots(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    """The differences of one metric over layers, each with its interval."""
    figure = empty_figure(
        320,
        x=axis("MoE layer", dtick=max(1, len(rows) // 12)),
        y=axis("difference, %", range=[-_reach(rows), _reach(rows)]),
    )
    figure.add_hline(y=0, line=line("ink", 1, "dot"))
    for verdicts, name, colour, symbol in _GROUPS:
        of_group = [("", row) for row in rows if row["verdict"] in verdicts]
        if not of_group:
            continue
        middle, low, high = (_percent(of_group, key) for key in ("relative", "relative_low", "relative_high"))
        figure.add_scatter(
            x=[row["layer"] for _, row in of_group],
            y=middle,
            mode="markers",
            name=name,
            marker={"color": light(colour), "size": 8, "symbol": symbol},
            error_y=bars(middle, low.fillna(middle), high.fillna(middle), colour, width=2),
            hovertemplate=f"layer %{{x}}, {name}: %{{y:.1f}} %<extra></extra>",
        )
    return figure


def level_line(track: Mapping[str, Any], order: str) -> go.Figure:
    """The values of a series, and the levels between its changes; ``order``: what the points are."""
    places, values = track["at"], track["values"]
    figure = empty_figure(300, x=axis(order), y=axis(figure_text(track["metric"], 40)))
    figure.add_scatter(
        x=places,
        y=values,
        mode="markers",
        name="points",
        marker={"color": light("slate"), "size": 6},
        hovertemplate="point %{x}: %{y:.4g}<extra></extra>",
    )
    changes = track["changes"]
    ends = [places[0], *(change["at"] for change in changes), places[-1]]
    levels = [change["before"] for change in changes] + [changes[-1]["after"]] if changes else []
    for index, level in enumerate(levels):
        figure.add_scatter(
            x=[ends[index], ends[index + 1]],
            y=[level, level],
            mode="lines",
            name="level",
            showlegend=index == 0,
            line=line("orange", 2.5),
            hovertemplate="level %{y:.4g}<extra></extra>",
        )
    return figure


def _percent(of_group: Sequence[tuple[str, Mapping[str, Any]]], key: str) -> pd.Series[float]:
    values = [row[key] for _, row in of_group]
    return pd.Series(values, dtype="float64") * 100


def _reach(rows: Sequence[Mapping[str, Any]]) -> float:
    """Half of the axis, in percent: all intervals, but none much farther than the differences."""
    largest = max((abs(row["relative"]) for row in rows), default=0.0)
    ends = [
        abs(row[end]) for row in rows for end in ("relative_low", "relative_high") if row[end] is not None
    ]
    reach = min(max([largest, *ends], default=0.0), max(_FARTHEST * largest, 0.1))
    return 105 * max(reach, 0.01)
