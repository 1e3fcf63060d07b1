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
#: Ranks that are tried as the one to relieve, and weight of their mean next to all of them: a pull
#: towards the mean, as single steps are noisy.
_RELIEVED, _MEAN_ROWS = 3, 1.0
#: Exchanges are first tried on about so many steps; so many of the best on all.
_COARSE_STEPS, _FINE = 12, 96
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
    weight_S = np.append(np.ones(len(load_SLE)), _MEAN_ROWS * len(load_SLE))
    slot_LPK = start_LPK.copy()
    for layer, slot_PK in enumerate(slot_LPK):
        load_SE = np.concatenate([load_SLE[:, layer], mean_LE[layer][None]])
        _exchange(load_SE, weight_S / weight_S.sum(), slot_PK, slowness_P, node_P)
    return slot_LPK


def _exchange(
    load_SE: Float64, weight_S: Float64, slot_PK: Int64, slowness_P: Float64, node_P: Int64
) -> None:
    """Exchange slots of one layer while the mean over steps of the busiest rank falls, in place."""
    ranks, slots = slot_PK.shape
    if ranks < 2:
        return
    share_SE = load_SE / np.maximum(copies(slot_PK[None], load_SE.shape[1])[0], 1)
    share_SN = share_SE[:, slot_PK.ravel()]
    time_SP = share_SN.reshape(len(load_SE), ranks, slots).sum(axis=2) * slowness_P
    holds_PE = holders(slot_PK[None], load_SE.shape[1])[0]
    rank_N = np.repeat(np.arange(ranks), slots)
    some_S = np.unique(np.r_[np.arange(0, len(load_SE), -(-len(load_SE) // _COARSE_STEPS)), len(load_SE) - 1])

    def after(at_S: Int64, mine: int, one_C: Int64, other_C: Int64) -> Float64:
        """Mean over some steps of the busiest rank after each exchange of a slot of ``mine``, (C,)."""
        less_SC = share_SN[np.ix_(at_S, one_C)] - share_SN[np.ix_(at_S, other_C)]
        rank_C = rank_N[other_C]
        busiest_SC = time_SP[np.ix_(at_S, rank_C)] + less_SC * slowness_P[rank_C]
        np.maximum(busiest_SC, time_SP[at_S, mine, None] - less_SC * slowness_P[mine], out=busiest_SC)
        np.maximum(busiest_SC, _busiest_of_others(time_SP[at_S], mine)[:, rank_C], out=busiest_SC)
        return np.asarray(weight_S[at_S] @ busiest_SC)

    for _ in range(_ROUNDS):
        before = float(weight_S @ time_SP.max(axis=1))
        for mine in _to_relieve(time_SP, weight_S):
            refused = holds_PE[:, slot_PK[mine]].T[:, rank_N] | holds_PE[mine, slot_PK.ravel()]
            k_C, other_C = np.nonzero(~(refused | (node_P != node_P[mine])[rank_N]))
            one_C = mine * slots + k_C
            if len(one_C) > _FINE and len(some_S) < len(load_SE):
                best_C = np.argpartition(after(some_S, mine, one_C, other_C), _FINE)[:_FINE]
                one_C, other_C = one_C[best_C], other_C[best_C]
            if not len(one_C):
                continue
            mean_C = after(np.arange(len(load_SE)), mine, one_C, other_C)
            choice = int(mean_C.argmin())
            if mean_C[choice] < before * (1 - 1e-6):
                break
        else:
            return
        one, two = int(one_C[choice]), int(other_C[choice])
        other = int(rank_N[two])
        given, taken = slot_PK.flat[one], slot_PK.flat[two]
        moved_S = share_SN[:, one] - share_SN[:, two]
        slot_PK.flat[one], slot_PK.flat[two] = taken, given
        share_SN[:, one] -= moved_S
        share_SN[:, two] += moved_S
        time_SP[:, mine] -= moved_S * slowness_P[mine]
        time_SP[:, other] += moved_S * slowness_P[other]
        holds_PE[mine, given] = holds_PE[other, taken] = False
        holds_PE[mine, taken] = holds_PE[other, given] = True


def _to_relieve(time_SP: Float64, weight_S: Float64) -> list[int]:
    """Ranks that are the busiest in some steps, those by most first."""
    top_SP = np.argpartition(-time_SP, 1, axis=1)[:, :2]
    first_S2: Float64 = np.take_along_axis(time_SP, top_SP, axis=1)
    busiest_S = np.take_along_axis(top_SP, first_S2.argmax(axis=1)[:, None], axis=1)[:, 0]
    above_S = np.abs(first_S2[:, 0] - first_S2[:, 1]) * weight_S
    by_P = np.bincount(busiest_S, above_S, minlength=time_SP.shape[1])
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
