"""Solve a placement problem.

Shapes: S steps, L layers, E experts, P ranks, K slots of each rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from observatory.analysis.parallel.balancing.layouts import Float64, Int64, greedy_layout
from observatory.analysis.parallel.balancing.nodes import grouped_layout
from observatory.analysis.parallel.balancing.problem import Objective, Problem
from observatory.analysis.parallel.balancing.search import balanced_layout
from observatory.analysis.parallel.balancing.steps import steps_layout


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Solution:
    """A layout and what it rests on.

    Attributes:
        slot_LPK: the layout.
    """

    slot_LPK: Int64


def solve(problem: Problem, *, seed: int = 0) -> Solution:
    """The layout that is best for the problem's objective, as far as its steps show."""
    if problem.objective in (Objective.MEAN, Objective.MOVES):
        return Solution(slot_LPK=mean_layout(problem, problem.load_SLE.mean(axis=0), seed=seed))
    load_SLE = problem.load_SLE
    if problem.objective is Objective.ACTIVE:
        load_SLE = (load_SLE > 0).astype(np.float64)
    start = mean_layout(problem, load_SLE.mean(axis=0), seed=seed, is_greedy=True)
    return Solution(slot_LPK=steps_layout(load_SLE, start))


def mean_layout(problem: Problem, load_LE: Float64, *, seed: int = 0, is_greedy: bool = False) -> Int64:
    """The layout for given loads, under the rules of the problem."""
    layers = len(load_LE)
    speed_P = np.ones(problem.ranks) if problem.speed_P is None else problem.speed_P
    speed_LP = np.tile(speed_P, (layers, 1))

    def make(load_AE: Float64, ranks: int, replicas: int, speed_AP: Float64) -> Int64:
        if is_greedy:
            return greedy_layout(load_AE, ranks, replicas)
        return balanced_layout(load_AE, ranks, replicas, speed_LP=speed_AP, seed=seed)

    if problem.groups == 1:
        return make(load_LE, problem.ranks, problem.replicas, speed_LP)
    return grouped_layout(
        load_LE,
        problem.ranks,
        problem.replicas,
        nodes=problem.nodes,
        groups=problem.groups,
        speed_LP=speed_LP,
        make=make,
    )
