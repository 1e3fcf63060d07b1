"""Power, clocks and temperature of one device over time, with what ran and what held the clock."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from observatory.devices.event_reasons import HOLDING_BITS, reason_name
from observatory.reports.figures.base import axis, empty_figure, line
from observatory.reports.frames.report import each_row
from observatory.reports.text import figure_text
from observatory.reports.theme import light

PHASE_COLOURS: dict[str, str] = {
    "prefill": "blue",
    "decode": "orange",
    "train_forward": "green",
    "train_backward": "purple",
    "unknown": "slate",
}
_SOURCES = {
    "instant": "power",
    "average": "power, mean of the last second",
    "counter": "power by the counter",
}
#: Height of a panel and of a lane, and of what lies between panels, in pixels.
_POWER_PX, _PANEL_PX, _LANE_PX, _BETWEEN_PX, _FRAME_PX = 190, 110, 22, 18, 130
_UNITS = {"power": "W", "limit": "W", "sm_clock": "MHz", "memory_clock": "MHz", "temperature": "°C"}
#: quantity -> name, colour, dash.
_LINES: dict[str, tuple[str, str, str]] = {
    "power": ("power", "ink", "solid"),
    "limit": ("power limit", "warn", "dash"),
    "sm_clock": ("SM clock", "green", "solid"),
    "memory_clock": ("memory clock", "thin", "dot"),
    "temperature": ("temperature", "purple", "solid"),
}


def power_timeline(
    samples: pd.DataFrame,
    bands: pd.DataFrame,
    reasons: pd.DataFrame,
    *,
    idle_w: float | None = None,
    source: str = "instant",
    ended_s: float | None = None,
) -> go.Figure:
    """Panels above each other: power, clocks, temperature, and lanes of phases and event reasons.

    Panels of what the device does not report are left out.

    Args:
        samples: of one device: ``quantity``, ``segment``, ``time_s``, ``value``.
        bands: ``phase``, ``start_s``, ``end_s``; drawn behind all panels and as lanes.
        reasons: ``bit``, ``start_s``, ``end_s``.
        idle_w: power of the idle device; None when not known.
        source: where the power comes from.
        ended_s: when the samples ended, where the phases went on; None where they did not.
    """
    quantities = set(samples["quantity"])
    panels = [
        (("power", "limit"), "W", _POWER_PX),
        (("sm_clock", "memory_clock"), "MHz", _PANEL_PX),
        (("temperature",), "°C", _PANEL_PX),
    ]
    shown = [panel for panel in panels if quantities & {panel[0][0], panel[0][-1]}]
    lanes = [str(phase) for phase in dict.fromkeys(bands["phase"])]
    lanes += [reason_name(int(bit)) for bit in sorted(set(reasons["bit"]))]
    heights = [height for _, _, height in shown] + ([_LANE_PX * len(lanes)] if lanes else [])
    if not heights:
        return empty_figure(_FRAME_PX, x=axis("seconds since the first sample"), y=axis(""))
    whole = sum(heights) + _BETWEEN_PX * (len(heights) - 1)
    figure = empty_figure(whole + _FRAME_PX, x={}, y={})
    domains, top = [], float(whole)
    for height in heights:
        domains.append([max(0.0, (top - height) / whole), top / whole])
        top -= height + _BETWEEN_PX
    for index, ((names, unit, _), domain) in enumerate(zip(shown, domains, strict=False)):
        options: dict[str, Any] = {"domain": domain, "anchor": "x", "rangemode": "tozero", "nticks": 5}
        if names == ("temperature",):
            options["rangemode"] = "normal"
        figure.update_layout({f"yaxis{_number(index)}": axis(unit, **options)})
        for name in names:
            _add_line(figure, samples[samples["quantity"] == name], name, f"y{_number(index)}", source)
    if "power" in quantities and idle_w is not None:
        _add_level(figure, samples, idle_w)
    last = len(heights) - 1
    if lanes:
        _add_lanes(figure, bands, reasons, lanes, f"y{_number(last)}")
        figure.update_layout(
            {
                f"yaxis{_number(last)}": axis(
                    "", domain=domains[-1], anchor="x", ticks="", showgrid=False, tickmode="array",
                    tickvals=list(range(len(lanes))), ticktext=[figure_text(name, 18) for name in lanes],
                    range=[len(lanes) - 0.5, -0.5],
                )
            }
        )  # fmt: skip
    _add_shading(figure, bands)
    if ended_s is not None:
        _add_end(figure, ended_s)
    ends = [*samples["time_s"], *bands["start_s"], *bands["end_s"]]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    margin = 0.01 * max(high - low, 1e-9)
    figure.update_layout(
        xaxis=axis(
            "seconds since the first sample", anchor=f"y{_number(last)}", range=[low - margin, high + margin]
        )
    )
    return figure


def _number(index: int) -> str:
    return "" if index == 0 else str(index + 1)


def _add_line(figure: go.Figure, rows: pd.DataFrame, quantity: str, yaxis: str, source: str) -> None:
    """One quantity, interrupted where samples are missing."""
    if rows.empty:
        return
    name, colour, dash = _LINES[quantity]
    name = _SOURCES.get(source, name) if quantity == "power" else name
    x: list[float | None] = []
    y: list[float | None] = []
    for _, segment in rows.groupby("segment", sort=True):
        x += [None] if x else []
        y += [None] if y else []
        x += np.round(segment["time_s"].to_numpy(np.float64), 4).tolist()
        y += np.round(segment["value"].to_numpy(np.float64), 3).tolist()
    lonely = len(rows) == rows["segment"].nunique()
    figure.add_scatter(
        x=x,
        y=y,
        yaxis=yaxis,
        mode="markers" if lonely else "lines",
        name=name,
        line=line(colour, 1.6, dash),
        marker={"color": light(colour), "size": 5},
        connectgaps=False,
        hovertemplate=f"%{{x:.2f}} s: {name} %{{y:.4g}} {_UNITS[quantity]}<extra></extra>",
    )


def _add_level(figure: go.Figure, samples: pd.DataFrame, idle_w: float) -> None:
    ends = [float(samples["time_s"].min()), float(samples["time_s"].max())]
    figure.add_scatter(
        x=ends,
        y=[idle_w, idle_w],
        mode="lines",
        name="idle power",
        line=line("muted", 1.3, "dot"),
        hovertemplate=f"idle power {idle_w:.4g} W<extra></extra>",
    )


def _add_lanes(
    figure: go.Figure, bands: pd.DataFrame, reasons: pd.DataFrame, lanes: list[str], yaxis: str
) -> None:
    """A bar for each stretch of a phase or of a reason; phases alone stand in the legend."""
    stretches = [(str(row.phase), True, row.start_s, row.end_s) for row in each_row(bands)]
    stretches += [
        (reason_name(int(row.bit)), bool(int(row.bit) & HOLDING_BITS), row.start_s, row.end_s)
        for row in each_row(reasons)
    ]
    phases = set(bands["phase"])
    for position, name in enumerate(lanes):
        lane = [stretch for stretch in stretches if stretch[0] == name]
        is_phase = name in phases and position < len(phases)
        colour = PHASE_COLOURS.get(name, "slate") if is_phase else "warn" if lane[0][1] else "thin"
        figure.add_bar(
            orientation="h",
            y=[position] * len(lane),
            base=[round(stretch[2], 4) for stretch in lane],
            x=[round(stretch[3] - stretch[2], 4) for stretch in lane],
            width=0.62,
            yaxis=yaxis,
            name=figure_text(name, 24),
            showlegend=is_phase,
            marker={"color": light(colour), "line": {"width": 0}},
            customdata=[[round(stretch[2], 3), round(stretch[3], 3)] for stretch in lane],
            hovertemplate=f"{figure_text(name, 24)}: %{{customdata[0]:.2f}} to %{{customdata[1]:.2f}} s"
            "<extra></extra>",
        )


def _add_end(figure: go.Figure, ended_s: float) -> None:
    """Where the samples end before the program does."""
    figure.add_shape(
        type="line", x0=ended_s, x1=ended_s, yref="paper", y0=0, y1=1, line=line("warn", 1.5, "dot")
    )
    figure.add_annotation(
        x=ended_s, yref="paper", y=0.995, xanchor="left", yanchor="top", showarrow=False,
        text=" samples end", font={"size": 12, "color": light("warn")},
    )  # fmt: skip


def _add_shading(figure: go.Figure, bands: pd.DataFrame) -> None:
    """Phases behind everything, over the whole height."""
    figure.update_layout(
        barmode="overlay",
        shapes=[
            {
                "type": "rect", "layer": "below", "xref": "x", "yref": "paper", "y0": 0, "y1": 1,
                "x0": round(row.start_s, 4), "x1": round(row.end_s, 4), "line": {"width": 0}, "opacity": 0.13,
                "fillcolor": light(PHASE_COLOURS.get(str(row.phase), "slate")),
            }
            for row in each_row(bands)
        ],
    )  # fmt: skip
