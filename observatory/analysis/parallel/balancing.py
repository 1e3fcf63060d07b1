"""Assign copies of experts to the slots of ranks, so that the busiest rank has little more than its share.

Shapes: S steps, L layers, E experts, P ranks, K slots of each rank, N = P * K slots in all.

A layout is an array (L, P, K) of expert numbers. All ranks have equally many slots, and all copies of an
expert take equal shares of its load. Three stages, each for all layers at once:

1. How many copies each expert gets: the expert of the largest share is split next, until no copy is left
   (water-filling). Water-filled counts ignore that a rank has few slots, so counts that give a part of the
   copies to the lightest experts are tried as well, and where that leaves much, single copies are moved.
2. Packing: the largest share first, to the emptiest rank that has a free slot and no copy of the expert.
3. Exchanges: a slot of the busiest rank is exchanged with that slot of another rank after which the busier
   of the two has least; random exchanges leave what no single one improves.

The first two stages with water-filled counts are what the published greedy balancers do, and are given as
such for comparison. Loads of single steps are balanced by exchanges alone, from there: counts that fit a
mean tightly do worse on steps that follow (docs/placement.md).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from observatory.errors import PlacementError

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]

#: A busiest rank within this of the mean, or of the lower bound, is as good as can be wished for.
_CLOSE = 1e-3
#: Parts of the replicas that go to the lightest experts instead of the heaviest.
_SPARED = np.arange(1, 8) / 10
#: Rounds of exchanges, and how often random exchanges are tried where they ended.
_ROUNDS, _KICKS, _MOST_KICKED = 400, 30, 3
#: How often other counts are tried where the busiest rank is this far above the goal, and how many of the
#: experts that can best spare a copy may lose one.
_RECOUNTS, _FAR, _DONORS = 20, 0.01, 16
#: Exchanges on steps: ranks that are tried as the one to relieve, and part of the steps that their mean is
#: added as: a pull towards the mean, as single steps are noisy.
_RELIEVED, _MEAN_ROWS = 3, 0.5
#: Of more steps than this some are left out, evenly: memory and time grow with them.
_MOST_STEPS = 256


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
    return _pack(load_LE, _water_filled(load_LE, replicas, ranks), ranks)


def balanced_layout(load_LE: Float64, ranks: int, replicas: int, *, seed: int = 0) -> Int64:
    """The layout whose busiest rank has least of these loads, (L, P, K); never worse than the greedy one.

    Args:
        load_LE: loads, not negative; a layer without load is laid out like any other.
        ranks: P.
        replicas: copies beyond one of each expert, in each layer.
        seed: of the random exchanges.

    Raises:
        PlacementError: the copies do not fill the ranks evenly.
    """
    slots_per_rank(load_LE.shape[1], ranks, replicas)
    share_LE = load_LE / np.maximum(load_LE.sum(axis=1, keepdims=True), 1e-300)
    goal_L = np.maximum(lower_bound(share_LE, ranks, replicas), 1.0) * (1 + _CLOSE)
    slot_LPK = greedy_layout(share_LE, ranks, replicas)
    _exchange(share_LE, slot_LPK, goal_L)
    best = _Best(share_LE, slot_LPK, goal_L)
    for spared in sorted({round(part * replicas) for part in _SPARED} - {0}):
        left = best.unfinished()
        if not len(left):
            break
        count_AE = _water_filled(share_LE[left], replicas - spared, ranks, spared=spared)
        fits_A = count_AE.max(axis=1) <= ranks
        if fits_A.any():
            best.offer(left[fits_A], _pack(share_LE[left][fits_A], count_AE[fits_A], ranks))
    generator = np.random.default_rng(seed)
    for _ in range(_RECOUNTS if replicas else 0):
        left = best.unfinished(_FAR)
        if not len(left):
            break
        count_AE = _recounted(share_LE[left], best.slot_LPK[left], generator)
        best.offer(left, _pack(share_LE[left], count_AE, ranks))
    for _ in range(_KICKS):
        left = best.unfinished()
        if not len(left):
            break
        best.offer(left, _kicked(share_LE[left], best.slot_LPK[left], generator))
    return best.slot_LPK


class _Best:
    """The best layout of each layer so far."""

    def __init__(self, share_LE: Float64, slot_LPK: Int64, goal_L: Float64) -> None:
        self.share_LE, self.slot_LPK, self.goal_L = share_LE, slot_LPK, goal_L
        self.ratio_L = _max_over_mean(share_LE, slot_LPK)

    def unfinished(self, above: float = 0.0) -> Int64:
        """Layers that are further above their goal than this part of it."""
        return np.flatnonzero(self.ratio_L > self.goal_L * (1 + above))

    def offer(self, layer_A: Int64, slot_APK: Int64) -> None:
        """Improve layouts of some layers by exchanges and keep those that are not worse than before."""
        _exchange(self.share_LE[layer_A], slot_APK, self.goal_L[layer_A])
        ratio_A = _max_over_mean(self.share_LE[layer_A], slot_APK)
        kept_A = ratio_A <= self.ratio_L[layer_A]
        self.ratio_L[layer_A[kept_A]] = ratio_A[kept_A]
        self.slot_LPK[layer_A[kept_A]] = slot_APK[kept_A]


def steps_layout(load_SLE: Float64, start_LPK: Int64) -> Int64:
    """A layout improved for single steps by exchanges, (L, P, K): its busiest ranks have less on average.

    Args:
        load_SLE: loads of single steps, not negative.
        start_LPK: a layout; its numbers of copies are kept.
    """
    mean_LE = load_SLE.mean(axis=0)
    load_SLE = load_SLE[:: -(-len(load_SLE) // _MOST_STEPS)]
    rows = round(_MEAN_ROWS * len(load_SLE))
    slot_LPK = start_LPK.copy()
    for layer, slot_PK in enumerate(slot_LPK):
        load_SE = np.concatenate([load_SLE[:, layer], np.repeat(mean_LE[layer][None], rows, axis=0)])
        _exchange_on_steps(load_SE, slot_PK)
    return slot_LPK


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


def _max_over_mean(load_LE: Float64, slot_LPK: Int64) -> Float64:
    load_LP = rank_loads(load_LE[None], slot_LPK)[0]
    return np.asarray(load_LP.max(axis=1) / np.maximum(load_LP.mean(axis=1), 1e-300))


def _water_filled(load_LE: Float64, replicas: int, ranks: int, *, spared: int = 0) -> Int64:
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


def _recounted(load_AE: Float64, slot_APK: Int64, generator: np.random.Generator) -> Int64:
    """Copies with one more of an expert on the busiest rank, and one less of an expert that can spare it."""
    layers, ranks, slots = slot_APK.shape
    row_A = np.arange(layers)
    count_AE = copies(slot_APK, load_AE.shape[1])
    busiest_A = rank_loads(load_AE[None], slot_APK)[0].argmax(axis=1)
    more_A = slot_APK[row_A, busiest_A, generator.integers(slots, size=(layers,))]
    share_AE = np.where(count_AE > 1, load_AE / np.maximum(count_AE - 1, 1), np.inf)  # with a copy less
    share_AE[row_A, more_A] = np.inf
    donor = min(_DONORS, load_AE.shape[1])
    less_A = share_AE.argsort(axis=1)[row_A, generator.integers(donor, size=(layers,))]
    fits_A = np.isfinite(share_AE[row_A, less_A]) & (count_AE[row_A, more_A] < ranks)
    count_AE[row_A[fits_A], more_A[fits_A]] += 1
    count_AE[row_A[fits_A], less_A[fits_A]] -= 1
    return count_AE


def _pack(load_LE: Float64, count_LE: Int64, ranks: int) -> Int64:
    """Largest share first, to the emptiest rank that has a free slot and no copy of the expert."""
    layers = len(load_LE)
    copies_in_all = int(count_LE[0].sum())
    slots = copies_in_all // ranks
    share_LE = load_LE / count_LE
    order_LE = np.argsort(-share_LE, axis=1, kind="stable")
    repeat = np.take_along_axis(count_LE, order_LE, axis=1)
    expert_LN = np.repeat(order_LE.ravel(), repeat.ravel()).reshape(layers, copies_in_all)
    share_LN = np.take_along_axis(share_LE, expert_LN, axis=1)
    row_L = np.arange(layers)
    load_LP, free_LP = np.zeros((layers, ranks)), np.full((layers, ranks), slots)
    holds_LP = np.zeros((layers, ranks), dtype=bool)  # a copy of the expert that is placed
    slot_LPK = np.empty((layers, ranks, slots), dtype=np.int64)
    for n in range(copies_in_all):
        if n:
            holds_LP[expert_LN[:, n] != expert_LN[:, n - 1]] = False
        last_resort = np.where(holds_LP, load_LP + 1e18, load_LP)
        rank_L = np.where(free_LP == 0, np.inf, last_resort).argmin(axis=1)
        slot_LPK[row_L, rank_L, slots - free_LP[row_L, rank_L]] = expert_LN[:, n]
        free_LP[row_L, rank_L] -= 1
        load_LP[row_L, rank_L] += share_LN[:, n]
        holds_LP[row_L, rank_L] = True
    for slot_PK, share_E in zip(slot_LPK, share_LE, strict=True):
        _separate(slot_PK, share_E)
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


def holders(slot_LPK: Int64, experts: int) -> Bool:
    """Whether a rank holds an expert, (L, P, E)."""
    layers, ranks, _ = slot_LPK.shape
    holds_LPE = np.zeros((layers, ranks, experts), dtype=bool)
    holds_LPE[np.arange(layers)[:, None, None], np.arange(ranks)[None, :, None], slot_LPK] = True
    return holds_LPE


def _exchange(load_LE: Float64, slot_LPK: Int64, goal_L: Float64) -> None:
    """Exchange slots of the busiest rank with others while the busier of the two gets less, in place.

    Args:
        load_LE: loads.
        slot_LPK: the layout.
        goal_L: max/mean at which a layer is done.
    """
    layers, ranks, slots = slot_LPK.shape
    share_LE = load_LE / np.maximum(copies(slot_LPK, load_LE.shape[1]), 1)
    share_LPK = np.take_along_axis(share_LE, slot_LPK.reshape(layers, -1), axis=1).reshape(slot_LPK.shape)
    load_LP = share_LPK.sum(axis=2)
    holds_LPE = holders(slot_LPK, load_LE.shape[1])
    goal_L = goal_L * load_LP.mean(axis=1)
    rank_N = np.repeat(np.arange(ranks), slots)
    layer_A = np.arange(layers)
    for _ in range(_ROUNDS):
        layer_A = layer_A[load_LP[layer_A].max(axis=1) > goal_L[layer_A]]
        if not len(layer_A):
            return
        row_A = np.arange(len(layer_A))
        busiest_A = load_LP[layer_A].argmax(axis=1)
        most_A = load_LP[layer_A, busiest_A]
        mine_AK = slot_LPK[layer_A, busiest_A]
        slot_AN = slot_LPK[layer_A].reshape(len(layer_A), -1)
        share_AN = share_LPK[layer_A].reshape(len(layer_A), -1)
        less_AKN = share_LPK[layer_A, busiest_A][:, :, None] - share_AN[:, None, :]
        other_AKN = np.repeat(load_LP[layer_A], slots, axis=1)[:, None, :] + less_AKN
        busier_AKN = np.maximum(other_AKN, most_A[:, None, None] - less_AKN)
        they_hold = np.take_along_axis(holds_LPE[layer_A], mine_AK[:, None, :], axis=2).transpose(0, 2, 1)
        i_hold = np.take_along_axis(holds_LPE[layer_A, busiest_A], slot_AN, axis=1)
        busier_AKN[they_hold[:, :, rank_N] | i_hold[:, None, :] | (less_AKN <= 0)] = np.inf
        flat = busier_AKN.reshape(len(layer_A), -1)
        choice_A = flat.argmin(axis=1)
        better_A = flat[row_A, choice_A] < most_A * (1 - 1e-9)
        layer_A, mine_A, choice_A = layer_A[better_A], busiest_A[better_A], choice_A[better_A]
        k_A, n_A = np.divmod(choice_A, ranks * slots)
        other_A, q_A = np.divmod(n_A, slots)
        given_A, taken_A = slot_LPK[layer_A, mine_A, k_A], slot_LPK[layer_A, other_A, q_A]
        moved_A = share_LPK[layer_A, mine_A, k_A] - share_LPK[layer_A, other_A, q_A]
        slot_LPK[layer_A, mine_A, k_A], slot_LPK[layer_A, other_A, q_A] = taken_A, given_A
        share_LPK[layer_A, mine_A, k_A] -= moved_A
        share_LPK[layer_A, other_A, q_A] += moved_A
        load_LP[layer_A, mine_A] -= moved_A
        load_LP[layer_A, other_A] += moved_A
        holds_LPE[layer_A, mine_A, given_A] = holds_LPE[layer_A, other_A, taken_A] = False
        holds_LPE[layer_A, mine_A, taken_A] = holds_LPE[layer_A, other_A, given_A] = True


def _kicked(load_LE: Float64, slot_LPK: Int64, generator: np.random.Generator) -> Int64:
    """A copy with a few random exchanges, the first of them from the busiest rank."""
    layers, ranks, slots = slot_LPK.shape
    slot_LPK, row_L = slot_LPK.copy(), np.arange(layers)
    mine_L: Int64 = np.asarray(rank_loads(load_LE[None], slot_LPK)[0].argmax(axis=1))
    for _ in range(generator.integers(1, _MOST_KICKED + 1)):
        other_L = generator.integers(ranks, size=(layers,))
        k_L, q_L = generator.integers(slots, size=(2, layers))
        given_L, taken_L = slot_LPK[row_L, mine_L, k_L], slot_LPK[row_L, other_L, q_L]
        fits_L = (
            (mine_L != other_L)
            & ~(slot_LPK[row_L, other_L] == given_L[:, None]).any(axis=1)
            & ~(slot_LPK[row_L, mine_L] == taken_L[:, None]).any(axis=1)
        )
        slot_LPK[row_L[fits_L], mine_L[fits_L], k_L[fits_L]] = taken_L[fits_L]
        slot_LPK[row_L[fits_L], other_L[fits_L], q_L[fits_L]] = given_L[fits_L]
        mine_L = generator.integers(ranks, size=(layers,))
    return slot_LPK


def _exchange_on_steps(load_SE: Float64, slot_PK: Int64) -> None:
    """Exchange slots of one layer while the mean over steps of the busiest rank falls, in place."""
    ranks, slots = slot_PK.shape
    if ranks < 2:
        return
    share_SE = load_SE / np.maximum(copies(slot_PK[None], load_SE.shape[1])[0], 1)
    share_SPK = share_SE[:, slot_PK]
    load_SP = share_SPK.sum(axis=2)
    holds_PE = holders(slot_PK[None], load_SE.shape[1])[0]
    rank_N = np.repeat(np.arange(ranks), slots)
    for _ in range(_ROUNDS):
        for mine in _to_relieve(load_SP):
            less_SKN = share_SPK[:, mine][:, :, None] - share_SPK.reshape(len(load_SE), 1, -1)
            busiest_SKN = np.maximum(
                load_SP[:, mine, None, None] - less_SKN, load_SP[:, rank_N][:, None, :] + less_SKN
            )
            np.maximum(busiest_SKN, _busiest_of_others(load_SP, mine)[:, rank_N][:, None, :], out=busiest_SKN)
            mean_KN: Float64 = busiest_SKN.mean(axis=0)
            mean_KN[holds_PE[:, slot_PK[mine]].T[:, rank_N] | holds_PE[mine, slot_PK.ravel()]] = np.inf
            k, n = divmod(int(mean_KN.argmin()), ranks * slots)
            if mean_KN[k, n] < load_SP.max(axis=1).mean() * (1 - 1e-6):
                break
        else:
            return
        other, q = divmod(n, slots)
        given, taken = slot_PK[mine, k], slot_PK[other, q]
        moved_S = share_SPK[:, mine, k] - share_SPK[:, other, q]
        slot_PK[mine, k], slot_PK[other, q] = taken, given
        share_SPK[:, mine, k] -= moved_S
        share_SPK[:, other, q] += moved_S
        load_SP[:, mine] -= moved_S
        load_SP[:, other] += moved_S
        holds_PE[mine, given] = holds_PE[other, taken] = False
        holds_PE[mine, taken] = holds_PE[other, given] = True


def _to_relieve(load_SP: Float64) -> list[int]:
    """Ranks that are the busiest in some steps, those by most first."""
    top_SP = np.argsort(-load_SP, axis=1)[:, :2]
    first_S2: Float64 = np.take_along_axis(load_SP, top_SP, axis=1)
    by_P = np.bincount(top_SP[:, 0], first_S2[:, 0] - first_S2[:, 1], minlength=load_SP.shape[1])
    return [int(rank) for rank in np.argsort(-by_P)[:_RELIEVED] if by_P[rank] > 0]


def _busiest_of_others(load_SP: Float64, mine: int) -> Float64:
    """For each rank the largest load of all but that rank and ``mine``, (S, P); -inf where there is none."""
    row_S = np.arange(len(load_SP))
    others_SP = load_SP.copy()
    others_SP[:, mine] = -np.inf
    first_S = others_SP.argmax(axis=1)
    result_SP = np.repeat(others_SP[row_S, first_S][:, None], load_SP.shape[1], axis=1)
    others_SP[row_S, first_S] = -np.inf
    result_SP[row_S, first_S] = others_SP.max(axis=1)
    return result_SP
