"""Time of a step under each change of a set-up, by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from observatory.reports.figures.base import axis, empty_figure, line
from observatory.reports.figures.exchanges import hatched
from observatory.reports.text import figure_text, percent
from observatory.reports.theme import light

#: Part -> name, colour and hatching, as in the anatomy of a layer.
_PARTS: dict[str, tuple[str, str, str]] = {
    "counts_us": ("counts", "purple", "/"),
    "dispatch_us": ("dispatch", "orange", "/"),
    "experts_us": ("experts, mean rank", "blue", ""),
    "waiting_us": ("waiting for the busiest", "sky", "x"),
    "combine_us": ("combine", "green", "/"),
    "alone_us": ("shared experts, local", "thin", ""),
    "extra_us": ("planning, fetching", "slate", "."),
}
_ROW_HEIGHT = 26
#: Bars longer than this many times today's are cut.
_LONGEST = 1.8


def change_bars(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Stacked bars, one per change with a predicted time, and a line at today's time.

    Args:
        rows: verdicts of one run and phase, as in the document of ``observatory advise``; today's first.
    """
    shown = [row for row in rows if row["step_us"] is not None]
    names = [label(row) for row in shown]
    today_ms = shown[0]["step_us"] / 1e3
    longest = min(max(row["step_us"] for row in shown) / 1e3, _LONGEST * today_ms)
    figure = empty_figure(
        110 + _ROW_HEIGHT * len(shown),
        x=axis("milliseconds of a step", range=[0, 1.3 * longest]),
        y=axis("", type="category", autorange="reversed", showgrid=False, ticks=""),
    )
    figure.update_layout(barmode="stack", bargap=0.3, legend_traceorder="normal")
    for part, (name, colour, hatch) in _PARTS.items():
        if not any(row[part] for row in shown):
            continue
        figure.add_bar(
            orientation="h",
            y=names,
            x=[(row[part] or 0.0) / 1e3 for row in shown],
            name=name,
            marker=hatched(colour, hatch),
            hovertemplate=f"%{{y}}, {name}: %{{x:.3f}} ms<extra></extra>",
        )
    figure.add_scatter(
        x=[min(max(row["step_us"] / 1e3, today_ms), 1.2 * longest) for row in shown],
        y=names,
        mode="text",
        text=[_gain_text(row) for row in shown],
        textposition="middle right",
        textfont={"size": 11, "color": light("ink")},
        showlegend=False,
        hoverinfo="skip",
        cliponaxis=False,
    )
    figure.add_vline(x=today_ms, line=line("ink", 1, "dot"))
    return figure


def label(row: Mapping[str, Any]) -> str:
    """A change as the axis names it."""
    own_name = row["change"] in ("replicas", "EP ranks")
    return figure_text(row["setting"] if own_name else row["change"], 24)


def _gain_text(row: Mapping[str, Any]) -> str:
    if row["gain"] is None:
        return " today" if row["change"] == "today" else ""
    sign = "\u2212" if row["gain"] > 0 else "+"
    return f" {sign}{percent(abs(row['gain']))}"
