"""Who sends how much to whom.

Shapes: S steps, P captured source ranks, R expert-parallel ranks, E experts.

Traffic counts assignments: a token with two experts on one rank counts twice. Dispatchers that send such a
token once move less, so bytes given here are an upper bound for them, exact for one copy per assignment.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.parallel.placement import Placement
from observatory.analysis.parallel.topology import ParallelTopology
from observatory.errors import LoadError, PlacementError

#: Pairs of a captured and an expert-parallel rank: half a GiB of shares. The number of ranks is from a file.
_MOST_SHARES = 1 << 26

#: How captured source ranks became expert-parallel ranks; the last is an estimate.
Sources = Literal["captured", "folded", "spread evenly (estimate)"]


def source_shares(captured: int, ep: int) -> tuple[NDArray[np.float64], Sources]:
    """Share of each captured rank's tokens that each expert-parallel rank holds.

    P = R: as captured. P a multiple of R: P / R neighbouring captured ranks make one rank, exact. R a
    multiple of P: each captured rank's tokens spread evenly over R / P ranks, an estimate. Otherwise all
    tokens spread evenly over all ranks, an estimate.

    Returns:
        (R, P) shares whose columns add up to 1, and which of the cases it was.
    """
    if captured < 1 or ep < 1:
        raise PlacementError(
            f"cannot fold {captured} captured ranks onto EP {ep}; expected at least 1 of each"
        )
    if captured * ep > _MOST_SHARES:
        raise PlacementError(
            f"{captured} captured ranks on EP {ep} are more pairs than are computed ({_MOST_SHARES}); "
            "check topology.ranks in run.json, or choose a smaller degree"
        )
    rank_R1, captured_1P = np.arange(ep)[:, None], np.arange(captured)[None, :]
    if captured % ep == 0:
        share_RP = (captured_1P // (captured // ep) == rank_R1).astype(np.float64)
        return share_RP, "captured" if captured == ep else "folded"
    if ep % captured == 0:
        each = ep // captured
        return (rank_R1 // each == captured_1P) / each, "spread evenly (estimate)"
    return np.full((ep, captured), 1.0 / ep), "spread evenly (estimate)"


def fold_sources(
    load_SPE: NDArray[np.int64], ep: int
) -> tuple[NDArray[np.int64] | NDArray[np.float64], Sources]:
    """Loads by expert-parallel rank instead of captured rank, (S, R, E); see `source_shares`.

    Integers where the folding is exact, real numbers where it is an estimate. Totals are preserved.
    """
    steps, captured, experts = load_SPE.shape
    share_RP, sources = source_shares(captured, ep)
    if captured % ep == 0:
        return load_SPE.reshape(steps, ep, captured // ep, experts).sum(axis=2), sources
    return np.einsum("rp,spe->sre", share_RP, load_SPE), sources


def load_by_rank(load: NDArray[np.int64], placement: Placement) -> NDArray[np.int64]:
    """Add up the last axis, experts, by the rank that holds them: (..., E) to (..., R).

    The replicas of an expert take equal shares, in whole assignments; the remainder goes to its first ranks.
    Where the placement states shares, each takes its own, rounded so that none is lost.

    Raises:
        LoadError: the placement is for another number of experts.
    """
    if load.shape[-1] != placement.rank_of_E.size:
        raise LoadError(
            f"loads of {load.shape[-1]} experts with a placement of {placement.rank_of_E.size}; "
            "expected equal numbers"
        )
    held_R = placement.experts_per_rank_R
    rank_N = placement.rank_of_E
    if placement.holders_E is not None:
        copies_E = np.array([len(ranks) for ranks in placement.holders_E])
        copies_N = np.repeat(copies_E, copies_E)
        place_N = np.concatenate([np.arange(copies) for copies in copies_E])
        rank_N = np.concatenate(placement.holders_E).astype(np.int64)
        load = np.repeat(load, copies_E, axis=-1)
        if placement.shares_E is None:
            load = (load + copies_N - 1 - place_N) // copies_N
        else:
            ends_E = [np.cumsum(shares) for shares in placement.shares_E]
            upto_N = np.concatenate(ends_E)
            from_N = np.concatenate([[0.0, *ends[:-1]] for ends in ends_E])
            load = np.rint(load * upto_N).astype(np.int64) - np.rint(load * from_N).astype(np.int64)
    order_N = np.argsort(rank_N, kind="stable")
    ordered = load if np.all(order_N[1:] > order_N[:-1]) else load[..., order_N]
    some = held_R > 0
    starts = (np.cumsum(held_R) - held_R)[some]
    by_rank = np.zeros((*load.shape[:-1], placement.ep), dtype=load.dtype)
    by_rank[..., some] = np.add.reduceat(ordered, starts, axis=-1)
    return by_rank


def traffic_matrices(
    load_SPE: NDArray[np.int64], placement: Placement
) -> tuple[NDArray[np.int64] | NDArray[np.float64], Sources]:
    """Assignments from each source rank (rows) to each expert rank (columns), per step: (S, R, R)."""
    return fold_sources(load_by_rank(load_SPE, placement), placement.ep)


def cross_rank_fraction(traffic_RR: NDArray[np.int64] | NDArray[np.float64]) -> float | None:
    """Share of assignments that leave their rank; None when there are none."""
    total = float(traffic_RR.sum())
    return None if total == 0 else 1.0 - float(np.trace(traffic_RR)) / total


def cross_node_fraction(
    traffic_RR: NDArray[np.int64] | NDArray[np.float64], topology: ParallelTopology
) -> float | None:
    """Share of assignments that leave their node; None when there are none."""
    total = float(traffic_RR.sum())
    node_R = topology.node_of_rank_R
    same = node_R[:, None] == node_R[None, :]
    return None if total == 0 else 1.0 - float(traffic_RR[same].sum()) / total
