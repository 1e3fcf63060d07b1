"""What other expert-parallel degrees would see of the captured loads."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from observatory.reports.figures.base import axis, bars, empty_figure, line
from observatory.reports.text import figure_text
from observatory.reports.theme import MARKERS, SERIES, light

_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


def _degree_axis(degrees: list[int]) -> dict[str, object]:
    """Logarithmic axis of EP degrees, each degree labelled."""
    return axis(
        "expert-parallel degree (ranks)",
        type="log",
        tickmode="array",
        tickvals=degrees,
        ticktext=[str(degree) for degree in degrees],
        showgrid=False,
        minor={"ticks": ""},
    )


def _degrees(frame: pd.DataFrame) -> list[int]:
    return [int(degree) for degree in sorted(frame["ep"].unique())]


def rank_imbalance(scan: pd.DataFrame) -> go.Figure:
    """Busiest rank over mean rank against the EP degree, one line per model, and the sampling floor.

    The floor is one line where all models have the same, else one in each model's colour.

    Args:
        scan: one row per ``label`` and ``ep``, whole window, means over layers: ``rank_max_over_mean``,
            ``rank_max_over_mean_floor``.
    """
    floors = scan.pivot(index="ep", columns="label", values="rank_max_over_mean_floor")
    shared = bool((floors.max(axis=1) - floors.min(axis=1)).lt(5e-3).all())
    figure = empty_figure(
        380 + 12 * scan["label"].nunique(),
        x=_degree_axis(_degrees(scan)),
        y=axis("busiest rank ÷ mean rank"),
    )
    for index, (label, rows) in enumerate(scan.sort_values("ep").groupby("label", sort=False)):
        colour = SERIES[index % len(SERIES)]
        if index == 0 or not shared:
            figure.add_scatter(
                x=rows["ep"],
                y=rows["rank_max_over_mean_floor"],
                mode="lines",
                name="uniform routing of as many tokens",
                showlegend=index == 0,
                line={"color": light("muted") if shared else colour, "width": 1.5, "dash": "dot"},
                hovertemplate="EP %{x}, uniform routing: %{y:.2f}×<extra></extra>",
            )
        figure.add_scatter(
            x=rows["ep"],
            y=rows["rank_max_over_mean"],
            mode="lines+markers",
            name=figure_text(label, 34),
            line={"color": colour, "width": 2, "dash": _DASHES[index // len(SERIES) % len(_DASHES)]},
            marker={"color": colour, "symbol": MARKERS[index % len(MARKERS)], "size": 9},
            customdata=[[figure_text(label)]] * len(rows),
            hovertemplate="%{customdata[0]}<br>EP %{x}: %{y:.2f}×<extra></extra>",
        )
    return figure


def ep_profile(scan: pd.DataFrame) -> go.Figure:
    """Experts and ranks of one run against the EP degree, single steps and the whole window.

    Args:
        scan: one row per ``ep``, means over layers: ``expert_max_over_mean``, ``rank_max_over_mean``,
            ``rank_max_over_mean_floor``, ``rank_max_over_mean_step_p50``, ``_p90``, ``_max``, ``_floor``.
    """
    scan = scan.sort_values("ep")
    figure = empty_figure(400, x=_degree_axis(_degrees(scan)), y=axis("busiest ÷ mean"))
    for column, name, colour in (
        ("rank_max_over_mean_step_floor", "uniform routing, one step", "purple"),
        ("rank_max_over_mean_floor", "uniform routing, whole window", "blue"),
    ):
        figure.add_scatter(
            x=scan["ep"],
            y=scan[column],
            mode="lines",
            name=name,
            line=line(colour, 1.5, "dot"),
            hovertemplate="EP %{x}, " + name + ": %{y:.2f}×<extra></extra>",
        )
    median = scan["rank_max_over_mean_step_p50"]
    figure.add_scatter(
        x=scan["ep"],
        y=scan["rank_max_over_mean_step_max"],
        mode="markers",
        name="ranks, worst step",
        marker={"color": light("purple"), "symbol": "line-ew", "size": 14, "line": line("purple", 2)},
        hovertemplate="EP %{x}, ranks, worst step: %{y:.2f}×<extra></extra>",
    )
    figure.add_scatter(
        x=scan["ep"],
        y=median,
        mode="markers",
        name="ranks, single steps: median to p90",
        marker={"color": light("purple"), "symbol": "diamond", "size": 9},
        error_y=bars(median, median, scan["rank_max_over_mean_step_p90"], "purple", width=5),
        customdata=scan[["rank_max_over_mean_step_p90"]].to_numpy(),
        hovertemplate="EP %{x}, ranks, steps: median %{y:.2f}×, p90 %{customdata[0]:.2f}×<extra></extra>",
    )
    figure.add_scatter(
        x=scan["ep"],
        y=scan["rank_max_over_mean"],
        mode="lines+markers",
        name="ranks, whole window",
        line=line("blue"),
        marker={"color": light("blue"), "symbol": "circle", "size": 9},
        hovertemplate="EP %{x}, ranks, whole window: %{y:.2f}×<extra></extra>",
    )
    figure.add_scatter(
        x=scan["ep"],
        y=scan["expert_max_over_mean"],
        mode="lines+markers",
        name="experts, whole window (does not depend on EP)",
        line=line("slate", 2, "dash"),
        marker={"color": light("slate"), "symbol": "x", "size": 8},
        hovertemplate="EP %{x}, experts: %{y:.2f}×<extra></extra>",
    )
    return figure


def crossing_shares(scan: pd.DataFrame) -> go.Figure:
    """Share of assignments that leave their rank, and their node, against the EP degree.

    Args:
        scan: one row per ``ep``, means over layers: ``cross_rank_fraction``, ``cross_node_fraction``.
    """
    scan = scan.sort_values("ep")
    figure = empty_figure(
        340,
        x=_degree_axis(_degrees(scan)),
        y=axis("share of assignments", tickformat=".0%", range=[0, 1.04]),
    )
    for column, name, colour, dash, marker in (
        ("cross_rank_fraction", "to another rank", "blue", "solid", "circle"),
        ("cross_node_fraction", "to another node", "orange", "dash", "square"),
    ):
        figure.add_scatter(
            x=scan["ep"],
            y=scan[column],
            mode="lines+markers",
            name=name,
            line=line(colour, 2, dash),
            marker={"color": light(colour), "symbol": marker, "size": 9},
            hovertemplate="EP %{x}, " + name + ": %{y:.1%}<extra></extra>",
        )
    return figure
