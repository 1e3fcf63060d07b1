"""Whether to send rows to data or to bring the data: over rows and sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from observatory.reports.figures.base import axis, colour_bar, empty_figure, line
from observatory.reports.theme import DIVERGING, light

#: Ratios of costs up to this power of two have a colour of their own.
_OCTAVES = 3


def decision_map(
    cells: Sequence[Mapping[str, Any]], even: Sequence[Mapping[str, Any]], *, x_title: str, y_title: str
) -> go.Figure:
    """Cost of routing over that of fetching, with the line where they are equal and its interval.

    Args:
        cells: rows of ``map`` of one shape, as in the document of ``observatory route-fetch``.
        even: rows of ``break_even`` of the shape.
        x_title: what rows are.
        y_title: what sizes are.
    """
    rows = sorted({row["rows"] for row in cells})
    sizes = sorted({row["size"] for row in cells})
    ratio = {(row["size"], row["rows"]): row["route_us"] / max(row["fetch_us"], 1e-9) for row in cells}
    octaves = np.array([[math.log2(max(ratio[size, row], 1e-9)) for row in rows] for size in sizes])
    figure = empty_figure(
        430,
        x=axis(x_title, **_ticks(rows), showgrid=False),
        y=axis(y_title, **_ticks(sizes), showgrid=False),
    )
    figure.update_layout(margin_t=46)
    figure.add_heatmap(
        z=np.clip(octaves, -_OCTAVES, _OCTAVES).round(2).astype(np.float32),
        x=np.log2(rows),
        y=np.log2(sizes),
        zmin=-_OCTAVES,
        zmax=_OCTAVES,
        colorscale=[[index / (len(DIVERGING) - 1), colour] for index, colour in enumerate(DIVERGING)],
        customdata=np.stack(np.broadcast_arrays(np.array(rows)[None, :], np.array(sizes)[:, None]), axis=2),
        hovertemplate=f"%{{customdata[0]}} {x_title}, %{{customdata[1]}} {y_title}<br>routing costs "
        "2^%{z} of fetching<extra></extra>",
        colorbar=colour_bar(
            tickvals=[-3, -2, -1, 0, 1, 2, 3], ticktext=["≤ ⅛×", "¼×", "½×", "1×", "2×", "4×", "≥ 8×"]
        ),
    )
    inside = [row for row in even if row["rows"] is not None and rows[0] <= row["rows"] <= rows[-1]]
    for name, dash, width in (("rows", "solid", 2.5), ("rows_low", "dot", 1.5), ("rows_high", "dot", 1.5)):
        drawn = [row for row in inside if row[name] is not None and rows[0] <= row[name] <= rows[-1]]
        figure.add_scatter(
            x=[math.log2(row[name]) for row in drawn],
            y=[math.log2(row["size"]) for row in drawn],
            mode="lines",
            line=line("ink", width, dash),
            name="costs are equal" if name == "rows" else "90 % interval",
            showlegend=name != "rows_high",
            hoverinfo="skip",
        )
    beyond = [row for row in cells if not row["measured"]]
    if beyond:
        figure.add_scatter(
            x=[math.log2(row["rows"]) for row in beyond],
            y=[math.log2(row["size"]) for row in beyond],
            mode="markers",
            marker={"symbol": "circle", "size": 3, "color": light("muted")},
            name="beyond what was measured",
            hoverinfo="skip",
        )
    return figure


def _ticks(values: Sequence[float]) -> dict[str, Any]:
    """Powers of four or so, as whole numbers, on an axis of binary logarithms."""
    low, high = math.log2(values[0]), math.log2(values[-1])
    step = max(1, round((high - low) / 5))
    exponents = list(range(math.ceil(low), math.floor(high) + 1, step))
    half = (high - low) / max(1, len(values) - 1) / 2
    return {
        "tickmode": "array",
        "tickvals": exponents,
        "ticktext": [str(2**exponent) for exponent in exponents],
        "range": [low - half, high + half],
    }
