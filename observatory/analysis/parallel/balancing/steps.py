"""Layouts for single steps: the busiest ranks of the steps that were given have least on average.

Shapes: S steps, L layers, E experts, P ranks, K slots of each rank, N = P * K slots in all.

Exchanges as in the search on a mean, but each is judged by the mean over steps of the busiest rank. Numbers
of copies are kept: counts that fit a mean tightly do worse on steps that follow (docs/placement.md).
"""

from __future__ import annotations

import numpy as np

from observatory.analysis.parallel.balancing.layouts import Float64, Int64, copies, holders

#: Rounds of exchanges.
_ROUNDS = 400
#: Ranks that are tried as the one to relieve, and part of the steps that their mean is added as: a pull
#: towards the mean, as single steps are noisy.
_RELIEVED, _MEAN_ROWS = 3, 1.0
#: Of more steps than this some are left out, evenly: memory and time grow with them.
_MOST_STEPS = 256


def steps_layout(
    load_SLE: Float64, start_LPK: Int64, *, speed_P: Float64 | None = None, node_P: Int64 | None = None
) -> Int64:
    """A layout improved for single steps by exchanges, (L, P, K): its busiest ranks have less on average.

    Args:
        load_SLE: loads of single steps, not negative.
        start_LPK: a layout; its numbers of copies are kept.
        speed_P: speeds of the ranks; None: all alike.
        node_P: node of each rank, between which nothing is exchanged; None: there is one.
    """
    ranks = start_LPK.shape[1]
    slowness_P = np.ones(ranks) if speed_P is None else speed_P.mean() / speed_P
    node_P = np.zeros(ranks, dtype=np.int64) if node_P is None else node_P
    mean_LE = load_SLE.mean(axis=0)
    load_SLE = load_SLE[:: -(-len(load_SLE) // _MOST_STEPS)]
    rows = round(_MEAN_ROWS * len(load_SLE))
    slot_LPK = start_LPK.copy()
    for layer, slot_PK in enumerate(slot_LPK):
        load_SE = np.concatenate([load_SLE[:, layer], np.repeat(mean_LE[layer][None], rows, axis=0)])
        _exchange(load_SE, slot_PK, slowness_P, node_P)
    return slot_LPK


def _exchange(load_SE: Float64, slot_PK: Int64, slowness_P: Float64, node_P: Int64) -> None:
    """Exchange slots of one layer while the mean over steps of the busiest rank falls, in place."""
    ranks, slots = slot_PK.shape
    if ranks < 2:
        return
    share_SE = load_SE / np.maximum(copies(slot_PK[None], load_SE.shape[1])[0], 1)
    share_SPK = share_SE[:, slot_PK]
    time_SP = share_SPK.sum(axis=2) * slowness_P
    holds_PE = holders(slot_PK[None], load_SE.shape[1])[0]
    rank_N = np.repeat(np.arange(ranks), slots)
    for _ in range(_ROUNDS):
        for mine in _to_relieve(time_SP):
            less_SKN = share_SPK[:, mine][:, :, None] - share_SPK.reshape(len(load_SE), 1, -1)
            busiest_SKN = np.maximum(
                time_SP[:, mine, None, None] - less_SKN * slowness_P[mine],
                time_SP[:, rank_N][:, None, :] + less_SKN * slowness_P[rank_N],
            )
            np.maximum(busiest_SKN, _busiest_of_others(time_SP, mine)[:, rank_N][:, None, :], out=busiest_SKN)
            mean_KN: Float64 = busiest_SKN.mean(axis=0)
            they_hold, i_hold = holds_PE[:, slot_PK[mine]].T[:, rank_N], holds_PE[mine, slot_PK.ravel()]
            mean_KN[they_hold | i_hold | (node_P != node_P[mine])[rank_N]] = np.inf
            k, n = divmod(int(mean_KN.argmin()), ranks * slots)
            if mean_KN[k, n] < time_SP.max(axis=1).mean() * (1 - 1e-6):
                break
        else:
            return
        other, q = divmod(n, slots)
        given, taken = slot_PK[mine, k], slot_PK[other, q]
        moved_S = share_SPK[:, mine, k] - share_SPK[:, other, q]
        slot_PK[mine, k], slot_PK[other, q] = taken, given
        share_SPK[:, mine, k] -= moved_S
        share_SPK[:, other, q] += moved_S
        time_SP[:, mine] -= moved_S * slowness_P[mine]
        time_SP[:, other] += moved_S * slowness_P[other]
        holds_PE[mine, given] = holds_PE[other, taken] = False
        holds_PE[mine, taken] = holds_PE[other, given] = True


def _to_relieve(time_SP: Float64) -> list[int]:
    """Ranks that are the busiest in some steps, those by most first."""
    top_SP = np.argsort(-time_SP, axis=1)[:, :2]
    first_S2: Float64 = np.take_along_axis(time_SP, top_SP, axis=1)
    by_P = np.bincount(top_SP[:, 0], first_S2[:, 0] - first_S2[:, 1], minlength=time_SP.shape[1])
    return [int(rank) for rank in np.argsort(-by_P)[:_RELIEVED] if by_P[rank] > 0]


def _busiest_of_others(time_SP: Float64, mine: int) -> Float64:
    """For each rank the largest load of all but that rank and ``mine``, (S, P); -inf where there is none."""
    row_S = np.arange(len(time_SP))
    others_SP = time_SP.copy()
    others_SP[:, mine] = -np.inf
    first_S = others_SP.argmax(axis=1)
    result_SP = np.repeat(others_SP[row_S, first_S][:, None], time_SP.shape[1], axis=1)
    others_SP[row_S, first_S] = -np.inf
    result_SP[row_S, first_S] = others_SP.max(axis=1)
    return result_SP
