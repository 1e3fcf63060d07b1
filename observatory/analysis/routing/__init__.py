"""Imbalance of expert routing: metrics, sampling floors, intervals, bands, committees, locality."""

from observatory.analysis.routing.bands import Band, ConditionGini, band_words, classify
from observatory.analysis.routing.committee import (
    committee_stability,
    jaccard,
    jaccard_by_chance,
    standing_committee,
)
from observatory.analysis.routing.floor import gini_floor, gini_uniform_limit, max_over_mean_floor
from observatory.analysis.routing.imbalance import (
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
from observatory.analysis.routing.loads import LayerLoads, RunLoads, collect_layer_loads
from observatory.analysis.routing.locality import local_consistency
from observatory.analysis.routing.summary import layer_metrics, phase_summary, run_summary

__all__ = [
    "Band",
    "ConditionGini",
    "LayerLoads",
    "RunLoads",
    "balancedness",
    "band_words",
    "classify",
    "coefficient_of_variation",
    "collect_layer_loads",
    "committee_stability",
    "entropy_bits",
    "gini",
    "gini_floor",
    "gini_rows",
    "gini_uniform_limit",
    "idle_experts",
    "jaccard",
    "jaccard_by_chance",
    "layer_metrics",
    "local_consistency",
    "lorenz_curve",
    "max_over_mean",
    "max_over_mean_floor",
    "max_over_mean_rows",
    "phase_summary",
    "run_summary",
    "standing_committee",
]
