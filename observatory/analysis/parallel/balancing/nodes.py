"""Layouts under the rule that a group of experts stays on one node.

Shapes: L layers, E experts, P ranks, K slots of each rank, M nodes, G groups.

Groups are assigned to nodes first, as experts without replicas are to ranks; then each node is laid out like
a layer with experts of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from observatory.analysis.parallel.balancing.layouts import Float64, Int64
from observatory.analysis.parallel.balancing.search import balanced_layout

#: Makes a layout of loads (L, E) on ranks with replicas and speeds (L, P).
Maker = Callable[[Float64, int, int, Float64], Int64]


def grouped_layout(
    load_LE: Float64, ranks: int, replicas: int, *, nodes: int, groups: int, speed_LP: Float64, make: Maker
) -> Int64:
    """A layout of which every node has whole groups, (L, P, K).

    Args:
        load_LE: loads.
        ranks: P, in M contiguous blocks.
        replicas: copies beyond one of each expert, equally many on each node.
        nodes: M.
        groups: G contiguous blocks of equally many experts.
        speed_LP: speeds of the ranks.
        make: makes the layout of a node.
    """
    layers, experts = load_LE.shape
    speed_LMP = speed_LP.reshape(layers, nodes, -1)
    group_LMG = balanced_layout(
        load_LE.reshape(layers, groups, -1).sum(axis=2), nodes, 0, speed_LP=speed_LMP.sum(axis=2)
    )
    expert_GE = np.arange(experts).reshape(groups, -1)
    expert_ME = expert_GE[group_LMG].reshape(layers * nodes, -1)
    load_ME = load_LE[np.arange(layers).repeat(nodes)[:, None], expert_ME]
    slot_MPK = make(load_ME, ranks // nodes, replicas // nodes, speed_LMP.reshape(layers * nodes, -1))
    slot_MN = np.take_along_axis(expert_ME, slot_MPK.reshape(layers * nodes, -1), axis=1)
    return slot_MN.reshape(layers, ranks, -1)


def node_bound(load_LE: Float64, *, nodes: int, groups: int) -> Float64:
    """What the busiest rank cannot be below when groups stay on nodes: that of the heaviest node, (L,)."""
    layers = len(load_LE)
    load_LG = load_LE.reshape(layers, groups, -1).sum(axis=2)
    slot_LMG = balanced_layout(load_LG, nodes, 0)
    load_LM = (
        np.take_along_axis(load_LG, slot_LMG.reshape(layers, -1), axis=1)
        .reshape(layers, nodes, -1)
        .sum(axis=2)
    )
    return np.asarray(load_LM.max(axis=1) / np.maximum(load_LM.mean(axis=1), 1e-300))
