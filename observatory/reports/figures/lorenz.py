"""Lorenz curves: which share of the assignments the least loaded experts take together."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray
from scipy.stats import norm

from observatory.reports.figures.base import axis, empty_figure, line

#: Shares of the experts at which curves are kept; more points would not be seen.
LORENZ_GRID: NDArray[np.float64] = np.linspace(0.0, 1.0, 41)


def floor_lorenz(gini_floor: float) -> NDArray[np.float64] | None:
    """Expected Lorenz curve, on ``LORENZ_GRID``, of perfectly uniform routing sampled as often as the run.

    Loads of uniform routing are close to normal around their mean; a normal law with coefficient of
    variation c has Gini c / sqrt(pi) and the curve p - c * phi(Phi^-1(p)). The floor's Gini fixes c.

    Returns:
        None where c is above 0.5: loads are too small for the normal law there.
    """
    spread = gini_floor * np.sqrt(np.pi)
    if not spread <= 0.5:
        return None
    inner = LORENZ_GRID[1:-1]
    curve = LORENZ_GRID.copy()
    curve[1:-1] = inner - spread * norm.pdf(norm.ppf(inner))
    return np.asarray(np.clip(curve, 0.0, 1.0), dtype=np.float64)


def lorenz_curves(curves: pd.DataFrame, *, gini_floor: float | None, worst_layer: int | None) -> go.Figure:
    """One thin line per layer, their mean in bold, the diagonal of uniform loads and the sampling floor.

    Args:
        curves: ``layer``, ``x`` (share of experts), ``y`` (share of assignments); each layer on the same x.
        gini_floor: mean floor of the layers; None when it is not known.
        worst_layer: layer to single out; None for none.
    """
    figure = empty_figure(
        520,
        x=axis("share of experts, least loaded first", range=[0, 1.004], tickformat=".0%", dtick=0.25),
        y=axis("share of assignments", range=[0, 1.005], tickformat=".0%", dtick=0.25),
    )
    figure.update_layout(margin_r=30)
    wide = curves.pivot_table(index="x", columns="layer", values="y").sort_index()
    gap = np.array([np.nan])
    x = np.concatenate([np.concatenate([wide.index.to_numpy(), gap]) for _ in wide.columns])
    y = np.concatenate([np.concatenate([wide[layer].to_numpy(), gap]) for layer in wide.columns])
    figure.add_scatter(
        x=x.astype(np.float32),
        y=y.astype(np.float32),
        mode="lines",
        name=f"{len(wide.columns)} layers" if len(wide.columns) != 1 else "1 layer",
        line=line("thin", 1),
        connectgaps=False,
        hoverinfo="skip",
    )
    figure.add_scatter(
        x=[0, 1],
        y=[0, 1],
        mode="lines",
        name="equal loads",
        line=line("muted", 1.2, "dash"),
        hoverinfo="skip",
    )
    floor = None if gini_floor is None else floor_lorenz(gini_floor)
    if floor is not None:
        figure.add_scatter(
            x=LORENZ_GRID.astype(np.float32),
            y=floor.astype(np.float32),
            mode="lines",
            name="uniform routing, same sample size (expected)",
            line=line("green", 1.8, "dot"),
            hovertemplate="uniform routing: %{x:.0%} of experts take %{y:.1%}<extra></extra>",
        )
    if worst_layer is not None:
        figure.add_scatter(
            x=wide.index.to_numpy(dtype=np.float32),
            y=wide[worst_layer].to_numpy(dtype=np.float32),
            mode="lines",
            name=f"most concentrated: layer {worst_layer}",
            line=line("orange", 2, "dashdot"),
            hovertemplate="layer " + str(worst_layer) + ": %{x:.0%} of experts take %{y:.1%}<extra></extra>",
        )
    figure.add_scatter(
        x=wide.index.to_numpy(dtype=np.float32),
        y=wide.mean(axis=1).to_numpy(dtype=np.float32),
        mode="lines",
        name="mean over layers",
        legendrank=1,
        line=line("blue", 3.2),
        hovertemplate="mean over layers: %{x:.0%} of experts take %{y:.1%}<extra></extra>",
    )
    return figure
