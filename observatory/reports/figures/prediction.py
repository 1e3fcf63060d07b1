"""Predicted against measured times of exchanges."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from observatory.reports.figures.base import empty_figure, line, time_axis
from observatory.reports.frames.report import each_row
from observatory.reports.text import figure_text, microseconds
from observatory.reports.theme import light

#: Colour and marker of each phase; those that are extrapolated are open.
_PHASES: dict[str, tuple[str, str]] = {
    "prefill": ("blue", "circle"),
    "decode": ("orange", "square"),
    "train_forward": ("green", "diamond"),
    "train_backward": ("purple", "triangle-up"),
}
_OTHER = ("slate", "cross")
#: How far beyond the points intervals are shown.
_REACH = 2.5


def predicted_and_measured(checked: pd.DataFrame) -> go.Figure:
    """Scatter of predicted against measured times on equal logarithmic axes, with intervals.

    Args:
        checked: one row per exchange: ``phase``, ``layer``, ``step``, ``role``, ``measured_us``,
            ``predicted_us``, ``low_us``, ``high_us``, ``extrapolated`` (missing: inside what was measured).
    """
    times_us = np.concatenate([checked["measured_us"], checked["predicted_us"]])
    low, high = float(times_us.min()), float(times_us.max())
    # An interval far beyond all points would leave nothing of them; it is cut off at the edge.
    reach = [max(checked["low_us"].min(), low / _REACH), min(checked["high_us"].max(), high * _REACH)]
    reach += [low / 1.2, high * 1.2]
    figure = empty_figure(590, x=time_axis("measured", reach), y=time_axis("predicted", reach))
    ends = np.array([low, high]) * [0.01, 100]
    guides = ((1.0, "predicted = measured", "solid"), (2.0, "off by a factor of 2", "dot"), (0.5, "", "dot"))
    for factor, name, dash in guides:
        figure.add_scatter(
            x=ends,
            y=ends * factor,
            mode="lines",
            name=name,
            showlegend=bool(name),
            line=line("muted", 1.5 if factor == 1 else 1, dash),
            hoverinfo="skip",
        )
    _add_intervals(figure, checked)
    for phase, of_phase in checked.groupby("phase", sort=False):
        colour, marker = _PHASES.get(str(phase), _OTHER)
        outside = of_phase["extrapolated"].notna()
        for selected, ending, symbol in (
            (of_phase[~outside], "", marker),
            (of_phase[outside], ", extrapolated", f"{marker}-open"),
        ):
            if selected.empty:
                continue
            figure.add_scatter(
                x=selected["measured_us"],
                y=selected["predicted_us"],
                mode="markers",
                name=figure_text(phase, 24) + ending,
                marker={"color": light(colour), "symbol": symbol, "size": 7, "line": line("paper", 0.75)}
                if not ending
                else {"color": light(colour), "symbol": symbol, "size": 8},
                customdata=[_hover(row) for row in each_row(selected)],
                hovertemplate="%{customdata[0]}<br>measured %{customdata[1]}, predicted %{customdata[2]} "
                "(%{customdata[3]})%{customdata[4]}<extra></extra>",
            )
    return figure


def _add_intervals(figure: go.Figure, checked: pd.DataFrame) -> None:
    """One upright line per exchange from end to end of its interval."""
    none = np.full(len(checked), np.nan)
    figure.add_scatter(
        x=np.stack([checked["measured_us"], checked["measured_us"], none], axis=1).ravel(),
        y=np.stack([checked["low_us"].clip(lower=1e-3), checked["high_us"], none], axis=1).ravel(),
        mode="lines",
        name="90 % interval of the prediction",
        line=line("thin", 1),
        opacity=0.55,
        hoverinfo="skip",
    )


def _hover(row: Any) -> list[str]:
    where = f"step {row.step}, layer {row.layer}, {row.role}"
    low, high = microseconds(row.low_us), microseconds(row.high_us)
    why = "" if pd.isna(row.extrapolated) else f"<br>{figure_text(row.extrapolated, 90)}"
    times = (microseconds(row.measured_us), microseconds(row.predicted_us))
    return [figure_text(where), *times, f"{low} to {high}", why]
