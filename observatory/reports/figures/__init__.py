"""Figures: tidy frames in, plotly figures out. Nothing here reads a run, and no figure shows itself."""

from observatory.reports.figures.ep_scan import crossing_shares, ep_profile, rank_imbalance
from observatory.reports.figures.heatmap import expert_shares
from observatory.reports.figures.lorenz import LORENZ_GRID, floor_lorenz, lorenz_curves
from observatory.reports.figures.mock import condition_dots
from observatory.reports.figures.steps import step_profile

__all__ = [
    "LORENZ_GRID",
    "condition_dots",
    "crossing_shares",
    "ep_profile",
    "expert_shares",
    "floor_lorenz",
    "lorenz_curves",
    "rank_imbalance",
    "step_profile",
]
