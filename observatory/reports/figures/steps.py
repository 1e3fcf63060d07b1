"""Whole-window Gini and the distribution of single steps, layer by layer."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from observatory.reports.figures.base import axis, bars, empty_figure, line
from observatory.reports.theme import light

#: Up to this many layers each is labelled.
_EVERY_LAYER = 16
#: Steps and window stand side by side, so that equal values do not hide one another.
_ASIDE = 0.12


def step_profile(layers: pd.DataFrame) -> go.Figure:
    """Per layer: steps from p10 to p90 with their median, the whole window, and the floor of each.

    Args:
        layers: one row per layer of one run and phase: ``layer``, ``gini``, ``gini_floor``,
            ``step_gini_p10``, ``step_gini_p50``, ``step_gini_p90``, ``step_gini_floor``.
    """
    layers = layers.sort_values("layer").reset_index(drop=True)
    position = np.arange(len(layers))
    every = 1 if len(layers) <= _EVERY_LAYER else -(-len(layers) // 10)
    figure = empty_figure(
        400,
        x=axis(
            "layer",
            showgrid=False,
            tickmode="array",
            tickvals=list(position[::every]),
            ticktext=[str(layer) for layer in layers["layer"][::every]],
            range=[-0.6, len(layers) - 0.4],
        ),
        y=axis("Gini of the expert loads", rangemode="tozero"),
    )
    median = layers["step_gini_p50"]
    figure.add_scatter(
        x=position + _ASIDE,
        y=median,
        mode="markers",
        name="single steps: median, p10 to p90",
        marker={"color": light("purple"), "symbol": "diamond", "size": 8},
        error_y=bars(median, layers["step_gini_p10"], layers["step_gini_p90"], "purple", width=4),
        customdata=layers[["layer", "step_gini_p10", "step_gini_p90"]].to_numpy(),
        hovertemplate="layer %{customdata[0]}<br>steps: median %{y:.3f}, p10 %{customdata[1]:.3f}, "
        "p90 %{customdata[2]:.3f}<extra></extra>",
    )
    for column, name, colour, dash in (
        ("step_gini_floor", "floor of one step", "purple", "dot"),
        ("gini_floor", "floor of the window", "blue", "dot"),
    ):
        figure.add_scatter(
            x=position,
            y=layers[column],
            mode="lines" if len(layers) > 1 else "markers",
            name=name,
            line=line(colour, 1.5, dash) | {"shape": "hvh"},
            marker={"symbol": "line-ew", "size": 16, "line": line(colour, 1.5)},
            hovertemplate=name + " %{y:.3f}<extra></extra>",
        )
    figure.add_scatter(
        x=position - _ASIDE,
        y=layers["gini"],
        mode="markers",
        name="whole window",
        marker={"color": light("blue"), "symbol": "circle", "size": 9},
        customdata=layers[["layer"]].to_numpy(),
        hovertemplate="layer %{customdata[0]}<br>whole window %{y:.3f}<extra></extra>",
    )
    return figure
