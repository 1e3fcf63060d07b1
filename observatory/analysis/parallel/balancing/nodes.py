"""Layouts of which each node holds given experts, as where a group of experts stays on one node.

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


def grouped_experts(load_LE: Float64, *, nodes: int, groups: int, speed_P: Float64) -> Int64:
    """Experts of each node, (L, M, E / M): whole groups, and nodes about as loaded as they are fast.

    Args:
        load_LE: loads.
        nodes: M.
        groups: G contiguous blocks of equally many experts.
        speed_P: speeds of the ranks, in M contiguous blocks.
    """
    layers, experts = load_LE.shape
    speed_LM = np.tile(speed_P.reshape(nodes, -1).sum(axis=1), (layers, 1))
    group_LMG = balanced_layout(load_LE.reshape(layers, groups, -1).sum(axis=2), nodes, 0, speed_LP=speed_LM)
    return np.arange(experts).reshape(groups, -1)[group_LMG].reshape(layers, nodes, -1)


def on_nodes(
    load_LE: Float64, expert_LME: Int64, *, ranks: int, replicas: int, speed_P: Float64, make: Maker
) -> Int64:
    """A layout of which each node holds copies of its own experts only, (L, P, K).

    Args:
        load_LE: loads.
        expert_LME: experts of each node.
        ranks: P, in M contiguous blocks.
        replicas: copies beyond one of each expert, equally many on each node.
        speed_P: speeds of the ranks.
        make: makes the layouts of nodes.
    """
    layers, nodes, _ = expert_LME.shape
    expert_NE = expert_LME.reshape(layers * nodes, -1)
    load_NE = load_LE[np.arange(layers).repeat(nodes)[:, None], expert_NE]
    speed_NP = np.tile(speed_P.reshape(nodes, -1), (layers, 1))
    slot_NPK = make(load_NE, ranks // nodes, replicas // nodes, speed_NP)
    slot_NS = np.take_along_axis(expert_NE, slot_NPK.reshape(layers * nodes, -1), axis=1)
    return slot_NS.reshape(layers, ranks, -1)


def node_bound(load_LE: Float64, *, nodes: int, groups: int) -> Float64:
    """The heaviest node over the mean when groups stay on nodes, (L,): no busiest rank can be below it."""
    layers = len(load_LE)
    expert_LME = grouped_experts(load_LE, nodes=nodes, groups=groups, speed_P=np.ones(nodes))
    load_LM = load_LE[np.arange(layers)[:, None, None], expert_LME].sum(axis=2)
    return np.asarray(load_LM.max(axis=1) / np.maximum(load_LM.mean(axis=1), 1e-300))
