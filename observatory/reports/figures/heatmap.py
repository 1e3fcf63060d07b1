"""Which experts take the load, layer by layer."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from observatory.reports.figures.base import axis, colour_bar, empty_figure
from observatory.reports.theme import DIVERGING

#: Shares from a quarter of the uniform share to four times it are distinguished, evenly in their logarithm.
_OCTAVES = 2
_TOP_PERCENT = 100 * 2**_OCTAVES


def _colourscale() -> list[list[float | str]]:
    """Stops on a linear percentage axis whose colours are even in the logarithm."""
    octaves = np.linspace(-_OCTAVES, _OCTAVES, len(DIVERGING))
    stops: list[list[float | str]] = [[0.0, DIVERGING[0]]]
    stops += [[float(2.0**o / 2**_OCTAVES), colour] for o, colour in zip(octaves, DIVERGING, strict=True)]
    return stops


def expert_shares(loads: pd.DataFrame) -> go.Figure:
    """Share of the assignments each expert takes, relative to the uniform share, layers as rows.

    Percentages are stored as whole numbers (100 is the uniform share), so that a page can hold many maps.

    Args:
        loads: one row per ``layer`` and ``expert`` of one run and phase, with its ``load``.
    """
    wide = loads.pivot_table(index="layer", columns="expert", values="load", aggfunc="sum").sort_index()
    mean = wide.mean(axis=1)
    share = wide.div(mean.where(mean > 0), axis=0) * 100
    values = share.to_numpy(dtype=float).round()
    ragged = bool(np.isnan(values).any())
    rows = len(wide)
    figure = empty_figure(
        104 + min(max(rows * 24, 48), 560),
        x=axis("expert, in the model's own order", showgrid=False),
        y=axis("layer", type="category", showgrid=False, autorange="reversed"),
        legend=False,
    )
    figure.update_layout(margin_t=46)
    figure.add_heatmap(
        z=values.astype(np.float32) if ragged else np.minimum(values, 65535).astype(np.uint16),
        x0=int(wide.columns[0]) if rows else 0,
        dx=1,
        y=[str(layer) for layer in wide.index],
        zmin=0,
        zmax=_TOP_PERCENT,
        colorscale=_colourscale(),
        hovertemplate="layer %{y}, expert %{x}<br>%{z} % of the uniform share<extra></extra>",
        colorbar=colour_bar(
            tickvals=[0, 50, 100, 200, 300, 400], ticktext=["0", "½×", "1×", "2×", "3×", "≥ 4×"]
        ),
    )
    return figure
