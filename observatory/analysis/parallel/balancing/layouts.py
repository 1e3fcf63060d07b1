"""Layouts: which expert is in which slot of which rank, the simple ones, and what none can be better than.

Shapes: S steps, L layers, E experts, P ranks, K slots of each rank, N = P * K slots in all.

A layout is an array (L, P, K) of expert numbers. All ranks have equally many slots, and all copies of an
expert take equal shares of its load. A rank may be faster than others: its time is its load over its speed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from observatory.errors import PlacementError

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]

#: Added to the load of a rank that is a last resort: it has a copy of the expert.
_HELD = 1e18


def slots_per_rank(experts: int, ranks: int, replicas: int) -> int:
    """K.

    Raises:
        PlacementError: the copies do not fill the ranks evenly, or an expert cannot have so many.
    """
    copies = experts + replicas
    if ranks < 1 or replicas < 0:
        raise PlacementError(f"{ranks} ranks with {replicas} replicas; expected at least 1 rank, 0 replicas")
    if copies % ranks:
        fewer, more = copies - copies % ranks - experts, copies - copies % ranks + ranks - experts
        fitting = f"{fewer} or {more}" if fewer >= 0 else f"{more}"
        raise PlacementError(
            f"{experts} experts and {replicas} replicas do not fill {ranks} ranks evenly; "
            f"numbers of replicas that do: {fitting}"
        )
    if copies > experts * ranks:
        raise PlacementError(
            f"{replicas} replicas are more than {ranks} ranks can hold of {experts} experts once each; "
            f"at most {experts * (ranks - 1)}"
        )
    return copies // ranks


def linear_layout(layers: int, experts: int, ranks: int) -> Int64:
    """Contiguous blocks of experts, (L, P, K), without replicas."""
    return np.tile(np.arange(experts).reshape(ranks, -1), (layers, 1, 1))


def round_robin_layout(layers: int, experts: int, ranks: int) -> Int64:
    """Expert e on rank e mod P, (L, P, K), without replicas."""
    return np.tile(np.arange(experts).reshape(-1, ranks).T, (layers, 1, 1))


def greedy_layout(load_LE: Float64, ranks: int, replicas: int) -> Int64:
    """Water-filled copies packed largest first, (L, P, K)."""
    return pack(load_LE, water_filled(load_LE, replicas, ranks), ranks)


def rank_loads(load_SLE: Float64 | Int64, slot_LPK: Int64) -> Float64:
    """Load of each rank in each step and layer, (S, L, P)."""
    share_SLE = load_SLE / np.maximum(copies(slot_LPK, load_SLE.shape[2]), 1)
    layers, ranks, slots = slot_LPK.shape
    at_SLN = np.take_along_axis(share_SLE, slot_LPK.reshape(1, layers, -1), axis=2)
    return np.asarray(at_SLN.reshape(-1, layers, ranks, slots).sum(axis=3))


def copies(slot_LPK: Int64, experts: int) -> Int64:
    """Copies of each expert, (L, E)."""
    layers = len(slot_LPK)
    flat = slot_LPK.reshape(layers, -1) + experts * np.arange(layers)[:, None]
    return np.bincount(flat.ravel(), minlength=layers * experts).reshape(layers, experts)


def lower_bound(load_LE: Float64, ranks: int, replicas: int) -> Float64:
    """What no layout's busiest rank can be below, as a ratio to the mean rank, (L,).

    Without replicas: of the t * P + 1 heaviest experts some rank holds t + 1, and its other slots hold at
    least the lightest. With replicas: at a busiest rank of T, an expert of load w needs w / T copies.
    """
    slots = slots_per_rank(load_LE.shape[1], ranks, replicas)
    mean_L = load_LE.sum(axis=1) / ranks
    safe_L = np.maximum(mean_L, 1e-300)
    if replicas == 0:
        sorted_LE = -np.sort(-load_LE, axis=1)
        held = [
            sorted_LE[:, t * ranks - t : t * ranks + 1].sum(axis=1)
            + sorted_LE[:, load_LE.shape[1] - (slots - t - 1) :].sum(axis=1)
            for t in range(slots)
        ]
        return np.asarray(np.maximum(np.max(held, axis=0) / safe_L, 1.0))
    low_L, high_L = np.maximum(mean_L, load_LE.max(axis=1) / ranks), load_LE.max(axis=1) + safe_L
    for _ in range(50):
        middle_L = (low_L + high_L) / 2
        needed_L = np.maximum(np.ceil(load_LE / np.maximum(middle_L, 1e-300)[:, None] - 1e-9), 1).sum(axis=1)
        fits_L = needed_L <= load_LE.shape[1] + replicas
        low_L, high_L = np.where(fits_L, low_L, middle_L), np.where(fits_L, middle_L, high_L)
    return np.asarray(np.maximum(low_L / safe_L, 1.0))


def replicas_for(load_E: Float64, ranks: int, ratio: float) -> int:
    """Replicas without which no rank can be below ``ratio`` times the mean; they may not suffice."""
    target = ratio * float(load_E.sum()) / ranks
    return int(np.maximum(np.ceil(load_E / target - 1e-9), 1).sum()) - len(load_E) if target > 0 else 0


def water_filled(load_LE: Float64, replicas: int, ranks: int, *, spared: int = 0) -> Int64:
    """Copies of each expert, (L, E): the largest share is split next, into at most P.

    So many more as are ``spared`` go to the lightest experts, one each in turn.
    """
    row_L = np.arange(len(load_LE))
    count_LE = np.ones(load_LE.shape, dtype=np.int64)
    share_LE = load_LE.astype(np.float64)
    for _ in range(replicas):
        expert_L = share_LE.argmax(axis=1)
        count_LE[row_L, expert_L] += 1
        share_L = load_LE[row_L, expert_L] / count_LE[row_L, expert_L]
        share_LE[row_L, expert_L] = np.where(count_LE[row_L, expert_L] < ranks, share_L, -np.inf)
    experts = load_LE.shape[1]
    lightness_LE = load_LE.argsort(axis=1).argsort(axis=1)  # 0: the lightest
    return np.asarray(count_LE + spared // experts + (lightness_LE < spared % experts))


def pack(load_LE: Float64, count_LE: Int64, ranks: int, speed_LP: Float64 | None = None) -> Int64:
    """Largest share first, to the rank that is done first of those with a free slot and no copy of it."""
    layers = len(load_LE)
    copies_in_all = int(count_LE[0].sum())
    slots = copies_in_all // ranks
    share_LE = load_LE / count_LE
    order_LE = np.argsort(-share_LE, axis=1, kind="stable")
    repeat = np.take_along_axis(count_LE, order_LE, axis=1)
    expert_LN = np.repeat(order_LE.ravel(), repeat.ravel()).reshape(layers, copies_in_all)
    share_LN = np.take_along_axis(share_LE, expert_LN, axis=1)
    row_L = np.arange(layers)
    load_LP, used_LP = np.zeros((layers, ranks)), np.zeros((layers, ranks), dtype=np.int64)
    shut_LP = np.zeros((layers, ranks))  # large where the rank has a copy, infinite where it is full
    slot_LPK = np.empty((layers, ranks, slots), dtype=np.int64)
    is_new_LN = expert_LN[:, 1:] != expert_LN[:, :-1]
    for n in range(copies_in_all):
        if n:
            shut_LP[is_new_LN[:, n - 1, None] & (shut_LP == _HELD)] = 0.0
        done_LP = load_LP if speed_LP is None else (load_LP + share_LN[:, n, None]) / speed_LP
        rank_L: Int64 = (done_LP + shut_LP).argmin(axis=1)
        used_L = used_LP[row_L, rank_L]
        slot_LPK[row_L, rank_L, used_L] = expert_LN[:, n]
        used_LP[row_L, rank_L] = used_L + 1
        load_LP[row_L, rank_L] += share_LN[:, n]
        shut_LP[row_L, rank_L] = np.where(used_L + 1 == slots, np.inf, _HELD)
    sorted_LPK = np.sort(slot_LPK, axis=2)
    for layer in np.flatnonzero((sorted_LPK[:, :, 1:] == sorted_LPK[:, :, :-1]).any(axis=(1, 2))):
        _separate(slot_LPK[layer], share_LE[layer])
    return slot_LPK


def _separate(slot_PK: Int64, share_E: Float64) -> None:
    """Exchange slots until no rank holds two copies of one expert, where that can be done, in place."""
    for rank, slot_K in enumerate(slot_PK):
        if len(set(slot_K.tolist())) == len(slot_K):
            continue
        for k in range(len(slot_K)):
            expert = slot_K[k]
            if (slot_K == expert).sum() == 1:
                continue
            without_P = ~(slot_PK == expert).any(axis=1)
            fits_PK = without_P[:, None] & ~np.isin(slot_PK, slot_K)
            if fits_PK.any():
                cost_PK = np.where(fits_PK, np.abs(share_E[slot_PK] - share_E[expert]), np.inf)
                other, q = np.unravel_index(cost_PK.argmin(), cost_PK.shape)
                slot_PK[rank, k], slot_PK[other, q] = slot_PK[other, q], expert


def without_seconds(slot_LPK: Int64, experts: int) -> Int64:
    """The layout with slots sorted, and those of second copies of an expert on one rank holding expert E."""
    slot_LPK = np.sort(slot_LPK, axis=2)
    slot_LPK[:, :, 1:][slot_LPK[:, :, 1:] == slot_LPK[:, :, :-1]] = experts
    return slot_LPK


def holders(slot_LPK: Int64, experts: int) -> Bool:
    """Whether a rank holds an expert, (L, P, E)."""
    layers, ranks, _ = slot_LPK.shape
    holds_LPE = np.zeros((layers, ranks, experts), dtype=bool)
    holds_LPE[np.arange(layers)[:, None, None], np.arange(ranks)[None, :, None], slot_LPK] = True
    return holds_LPE


def rank_times(load_SLE: Float64 | Int64, slot_LPK: Int64, speed_P: Float64 | None = None) -> Float64:
    """Time of each rank over that of perfectly balanced ones, (S, L, P); ones where there is no load."""
    load_SLP = rank_loads(load_SLE, slot_LPK)
    if speed_P is None:
        speed_P = np.ones(load_SLP.shape[2])
    total_SL = load_SLP.sum(axis=2)[:, :, None]
    time_SLP = load_SLP / speed_P * speed_P.sum(axis=-1, keepdims=True) / np.maximum(total_SL, 1e-300)
    return np.asarray(np.where(total_SL > 0, time_SLP, 1.0))


def written_times(load_SLE: Float64, slot_LPK: Int64, speed_P: Float64 | None = None) -> Float64:
    """`rank_times` of the placement file of a layout: second copies on one rank count once, (S, L, P)."""
    steps, layers, experts = load_SLE.shape
    padded_SLE = np.concatenate([load_SLE, np.zeros((steps, layers, 1))], axis=2)
    return rank_times(padded_SLE, without_seconds(slot_LPK, experts), speed_P)
