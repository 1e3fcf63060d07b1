"""Assign copies of experts to the slots of ranks, so that the busiest rank has little more than its share."""

from observatory.analysis.parallel.balancing.layouts import (
    Float64,
    Int64,
    copies,
    greedy_layout,
    holders,
    linear_layout,
    lower_bound,
    rank_loads,
    rank_times,
    replicas_for,
    round_robin_layout,
    slots_per_rank,
    without_seconds,
    written_times,
)
from observatory.analysis.parallel.balancing.moves import slots_of
from observatory.analysis.parallel.balancing.search import balanced_layout
from observatory.analysis.parallel.balancing.steps import steps_layout

__all__ = [
    "Float64",
    "Int64",
    "balanced_layout",
    "copies",
    "greedy_layout",
    "holders",
    "linear_layout",
    "lower_bound",
    "rank_loads",
    "rank_times",
    "replicas_for",
    "round_robin_layout",
    "slots_of",
    "slots_per_rank",
    "steps_layout",
    "without_seconds",
    "written_times",
]
