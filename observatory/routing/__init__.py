"""Imbalance of expert routing: metrics, sampling floors, intervals, bands, committees, locality."""

from observatory.routing.floor import gini_floor, gini_uniform_limit, max_over_mean_floor
from observatory.routing.imbalance import (
    balancedness,
    coefficient_of_variation,
    entropy_bits,
    gini,
    gini_rows,
    idle_experts,
    lorenz_curve,
    max_over_mean,
    max_over_mean_rows,
)
from observatory.routing.loads import LayerLoads, RunLoads, collect_layer_loads
from observatory.routing.summary import layer_metrics, run_summary

__all__ = [
    "LayerLoads",
    "RunLoads",
    "balancedness",
    "coefficient_of_variation",
    "collect_layer_loads",
    "entropy_bits",
    "gini",
    "gini_floor",
    "gini_rows",
    "gini_uniform_limit",
    "idle_experts",
    "layer_metrics",
    "lorenz_curve",
    "max_over_mean",
    "max_over_mean_floor",
    "max_over_mean_rows",
    "run_summary",
]
