"""The layout whose busiest rank has least of given loads.

Shapes: S steps, L layers, E experts, P ranks, K slots of each rank, N = P * K slots in all; A: some layers.

Four stages, each for all layers at once:

1. How many copies each expert gets: the expert of the largest share is split next, until no copy is left
   (water-filling). Water-filled counts ignore that a rank has few slots, so counts that give a part of the
   copies to the lightest experts are tried as well. Copies are packed: the largest share first, to the
   emptiest rank that has a free slot and no copy of the expert.
2. Exchanges: a slot of the busiest rank is exchanged with that slot of another rank after which the busier
   of the two has least, while that is less than before.
3. Copies: an expert of the busiest rank gets a slot of an expert with several copies, by chance; exchanges
   follow, and what is worse is dropped.
4. Exchanges that may make it worse: the best one is made even where it helps nothing, and neither rank takes
   part in one with the busiest again for some rounds. The best layout on the way is kept.

The first stage with water-filled counts is what the published greedy balancers do, and is given as such for
comparison (`greedy_layout`).
"""

from __future__ import annotations

import numpy as np

from observatory.analysis.parallel.balancing.layouts import (
    Float64,
    Int64,
    copies,
    holders,
    lower_bound,
    pack,
    slots_per_rank,
    water_filled,
)

#: A busiest rank within this of the mean, or of the lower bound, is as good as can be wished for.
_CLOSE = 1e-3
#: Parts of the replicas that go to the lightest experts instead of the heaviest.
_SPARED = np.arange(1, 8) / 10
#: Rounds of exchanges: from a packed layout, after a copy, and of those that may make it worse, with
#: replicas and without.
_ROUNDS, _COPY_ROUNDS, _FREE_ROUNDS, _PLAIN_FREE_ROUNDS = 400, 60, 200, 60
#: Rounds in which ranks that have exchanged a slot take part in no other one: at most so many, and so
#: many for each rank.
_BARRED_ROUNDS, _BARRED_PART = 20, 0.25
#: How often copies are tried where the busiest rank is this far above the goal, and how many of the
#: experts that can best spare one may lose it.
_COPIES, _FAR, _DONORS = 70, 0.002, 48
#: Layers times ranks times copies above which less is tried.
_LARGE = 20_000_000


def balanced_layout(
    load_LE: Float64, ranks: int, replicas: int, *, speed_LP: Float64 | None = None, seed: int = 0
) -> Int64:
    """The layout whose busiest rank has least of these loads, (L, P, K); never worse than the greedy one.

    Args:
        load_LE: loads, not negative; a layer without load is laid out like any other.
        ranks: P.
        replicas: copies beyond one of each expert, in each layer.
        speed_LP: speeds of the ranks, in any unit; None: all alike.
        seed: of the copies that are tried.

    Raises:
        PlacementError: the copies do not fill the ranks evenly.
    """
    layers, experts = load_LE.shape
    slots = slots_per_rank(experts, ranks, replicas)
    share_LE = load_LE / np.maximum(load_LE.sum(axis=1, keepdims=True), 1e-300)
    speed_LP = np.ones((layers, ranks)) if speed_LP is None else speed_LP / speed_LP.mean(axis=1)[:, None]
    best = _Best(share_LE, speed_LP, pack(share_LE, water_filled(share_LE, replicas, ranks), ranks, speed_LP))
    effort = min(1.0, _LARGE / (layers * ranks * ranks * slots))
    parts = _SPARED[:: round(1 / effort)]
    for spared in sorted({round(part * replicas) for part in parts} - {0}):
        left = best.unfinished()
        if not len(left):
            break
        count_AE = water_filled(share_LE[left], replicas - spared, ranks, spared=spared)
        fits_A = count_AE.max(axis=1) <= ranks
        if fits_A.any():
            best.offer(left[fits_A], count_AE[fits_A])
    generator = np.random.default_rng(seed)
    for _ in range(round(_COPIES * effort) if replicas else 0):
        left = best.unfinished(_FAR)
        if not len(left):
            break
        more = _with_a_copy(share_LE[left], best.slot_LPK[left], best.time_LP[left], generator)
        best.keep(left, more, rounds=_COPY_ROUNDS)
    left = best.unfinished()
    if len(left):
        rounds = round((_FREE_ROUNDS if replicas else _PLAIN_FREE_ROUNDS) * effort)
        best.keep(left, best.slot_LPK[left], rounds=rounds, is_free=True)
    return best.slot_LPK


class _Best:
    """The best layout of each layer so far."""

    def __init__(self, share_LE: Float64, speed_LP: Float64, slot_LPK: Int64) -> None:
        ranks = speed_LP.shape[1]
        bound_L = lower_bound(share_LE, ranks, slot_LPK[0].size - share_LE.shape[1])
        self.goal_L = np.maximum(bound_L / speed_LP.max(axis=1), 1.0) * (1 + _CLOSE)
        self.share_LE, self.speed_LP, self.slot_LPK = share_LE, speed_LP, slot_LPK
        self.time_LP = _exchange(share_LE, slot_LPK, self.goal_L, speed_LP, rounds=_ROUNDS)

    def unfinished(self, above: float = 0.0) -> Int64:
        """Layers that are further above their goal than this part of it."""
        return np.flatnonzero(self.time_LP.max(axis=1) > self.goal_L * (1 + above))

    def offer(self, layer_A: Int64, count_AE: Int64) -> None:
        """Pack copies of the experts of some layers, and keep what is not worse than before."""
        ranks = self.speed_LP.shape[1]
        self.keep(layer_A, pack(self.share_LE[layer_A], count_AE, ranks, self.speed_LP[layer_A]))

    def keep(self, layer_A: Int64, slot_APK: Int64, *, rounds: int = _ROUNDS, is_free: bool = False) -> None:
        """Improve layouts of some layers by exchanges and keep those that are not worse than before."""
        share_AE, goal_A, speed_AP = self.share_LE[layer_A], self.goal_L[layer_A], self.speed_LP[layer_A]
        time_AP = _exchange(share_AE, slot_APK, goal_A, speed_AP, rounds=rounds, is_free=is_free)
        kept_A = time_AP.max(axis=1) <= self.time_LP[layer_A].max(axis=1)
        self.time_LP[layer_A[kept_A]] = time_AP[kept_A]
        self.slot_LPK[layer_A[kept_A]] = slot_APK[kept_A]


def _with_a_copy(
    load_AE: Float64, slot_APK: Int64, time_AP: Float64, generator: np.random.Generator
) -> Int64:
    """Layouts with one more copy of an expert of the busiest rank, in a slot of one that can spare it."""
    layers, _, slots = slot_APK.shape
    row_A = np.arange(layers)
    count_AE = copies(slot_APK, load_AE.shape[1])
    more_A = slot_APK[row_A, time_AP.argmax(axis=1), generator.integers(slots, size=(layers,))]
    share_AE = np.where(count_AE > 1, load_AE / np.maximum(count_AE - 1, 1), np.inf)  # with a copy less
    share_AE[row_A, more_A] = np.inf
    donors = min(_DONORS, load_AE.shape[1])
    less_A = share_AE.argsort(axis=1)[row_A, generator.integers(donors, size=(layers,))]
    has_it_AP = (slot_APK == more_A[:, None, None]).any(axis=2)
    at_APK = (slot_APK == less_A[:, None, None]) & ~has_it_AP[:, :, None]
    time_AN = np.where(at_APK, time_AP[:, :, None], np.inf).reshape(layers, -1)
    slot_A: Int64 = time_AN.argmin(axis=1)
    fits_A = np.isfinite(share_AE[row_A, less_A]) & np.isfinite(time_AN[row_A, slot_A])
    more_APK = slot_APK.copy()
    more_APK.reshape(layers, -1)[row_A[fits_A], slot_A[fits_A]] = more_A[fits_A]
    return more_APK


def _exchange(
    load_LE: Float64,
    slot_LPK: Int64,
    goal_L: Float64,
    speed_LP: Float64,
    *,
    rounds: int,
    is_free: bool = False,
) -> Float64:
    """Exchange slots of the busiest rank with others, in place; the best layout on the way is left.

    Args:
        load_LE: loads that add up to 1, or to 0, in each layer.
        slot_LPK: the layout.
        goal_L: max/mean at which a layer is done.
        speed_LP: speeds of the ranks, whose mean is 1.
        rounds: exchanges of each layer, at most.
        is_free: whether exchanges go on where the busier of the two ranks gets no less; the two take part
            in no other one for some rounds.

    Returns:
        Times of the ranks over that of perfectly balanced ones, (L, P).
    """
    layers, ranks, slots = slot_LPK.shape
    share_LE = ranks * load_LE / np.maximum(copies(slot_LPK, load_LE.shape[1]), 1)
    share_LPK = np.take_along_axis(share_LE, slot_LPK.reshape(layers, -1), axis=1).reshape(slot_LPK.shape)
    holds_LPE = holders(slot_LPK, load_LE.shape[1])
    rank_P1 = np.arange(ranks)[:, None]
    time_LP = share_LPK.sum(axis=2) / speed_LP
    best_LPK, best_LP = (slot_LPK.copy(), time_LP.copy()) if is_free else (slot_LPK, time_LP)
    barred_LP, barred_rounds = np.zeros((layers, ranks)), min(_BARRED_ROUNDS, int(_BARRED_PART * ranks))
    layer_A = np.arange(layers)
    for turn in range(rounds):
        layer_A = layer_A[best_LP[layer_A].max(axis=1) > goal_L[layer_A]]
        if not len(layer_A):
            break
        row_A, layer_A11 = np.arange(len(layer_A)), layer_A[:, None, None]
        busiest_A = time_LP[layer_A].argmax(axis=1)
        most_A, speed_A = time_LP[layer_A, busiest_A], speed_LP[layer_A, busiest_A]
        mine_AK = slot_LPK[layer_A, busiest_A]
        slot_AN = slot_LPK[layer_A].reshape(len(layer_A), -1)
        share_AN = share_LPK[layer_A].reshape(len(layer_A), -1)
        less_AKN = share_LPK[layer_A, busiest_A][:, :, None] - share_AN[:, None, :]
        time_AN, speed_AN = (np.repeat(value_LP[layer_A], slots, axis=1) for value_LP in (time_LP, speed_LP))
        other_AKN = time_AN[:, None, :] + less_AKN / speed_AN[:, None, :]
        busier_AKN = np.maximum(other_AKN, most_A[:, None, None] - less_AKN / speed_A[:, None, None])
        they_hold = holds_LPE[layer_A11, rank_P1, mine_AK[:, None, :]].transpose(0, 2, 1)
        if is_free:
            they_hold = they_hold | (barred_LP[layer_A] > turn)[:, None, :]
        i_hold = holds_LPE[layer_A[:, None], busiest_A[:, None], slot_AN]
        refused = np.repeat(they_hold, slots, axis=2) | i_hold[:, None, :] | (less_AKN <= 0)
        np.copyto(busier_AKN, np.inf, where=refused)
        flat = busier_AKN.reshape(len(layer_A), -1)
        choice_A = flat.argmin(axis=1)
        most_after_A = np.full(len(layer_A), np.inf) if is_free else most_A * (1 - 1e-9)
        goes_on_A = flat[row_A, choice_A] < most_after_A
        layer_A, mine_A, choice_A = layer_A[goes_on_A], busiest_A[goes_on_A], choice_A[goes_on_A]
        k_A, other_A, q_A = np.unravel_index(choice_A, (slots, ranks, slots))
        given_A, taken_A = slot_LPK[layer_A, mine_A, k_A], slot_LPK[layer_A, other_A, q_A]
        moved_A = share_LPK[layer_A, mine_A, k_A] - share_LPK[layer_A, other_A, q_A]
        slot_LPK[layer_A, mine_A, k_A], slot_LPK[layer_A, other_A, q_A] = taken_A, given_A
        share_LPK[layer_A, mine_A, k_A] -= moved_A
        share_LPK[layer_A, other_A, q_A] += moved_A
        time_LP[layer_A, mine_A] -= moved_A / speed_LP[layer_A, mine_A]
        time_LP[layer_A, other_A] += moved_A / speed_LP[layer_A, other_A]
        holds_LPE[layer_A, mine_A, given_A] = holds_LPE[layer_A, other_A, taken_A] = False
        holds_LPE[layer_A, mine_A, taken_A] = holds_LPE[layer_A, other_A, given_A] = True
        if is_free:
            barred_LP[layer_A, mine_A] = barred_LP[layer_A, other_A] = turn + barred_rounds
            better_A = layer_A[time_LP[layer_A].max(axis=1) < best_LP[layer_A].max(axis=1) * (1 - 1e-9)]
            best_LPK[better_A], best_LP[better_A] = slot_LPK[better_A], time_LP[better_A]
    if is_free:
        slot_LPK[:] = best_LPK
    return np.asarray(best_LP)
