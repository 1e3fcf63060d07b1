"""Improve the layout of today by few moves: how much balance each copy that a rank has to receive buys.

Shapes: L layers, E experts, P ranks, K slots of each rank, N = P * K slots in all; A: layers that go on.

The busiest rank of each layer is relieved again and again, by the change that lowers the sum over ranks of
time ** q by most for each move that it takes. Changes are exchanges of two slots, and a slot of an expert
with several copies that is overwritten: on the busiest rank by any expert, elsewhere by one of the busiest
rank's, which then has more copies to share its load.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.parallel.balancing.layouts import (
    Bool,
    Float64,
    Int64,
    holders,
    without_seconds,
)

#: Power of the sum over ranks: high, so that the busiest ones count.
_POWER = 24.0
#: Moves of a change that takes none count as this many, so that it is not preferred to everything.
_LEAST_COST = 0.5
#: A layer is done when its busiest rank is within this of a perfect balance.
_CLOSE = 1e-3
#: Changes of a layer that are tried before it is left: estimates leave out what two experts share.
_TRIALS = 16


def moved_layouts(
    load_LE: Float64, today_LPK: Int64, *, most_moves: int, speed_P: Float64, node_P: Int64
) -> tuple[Int64, Float64]:
    """Layouts within so many moves of today's, and what the moves on the way to them bought.

    Args:
        load_LE: loads.
        today_LPK: the layout of today; may have two copies of an expert on a rank, and E for empty slots.
        most_moves: copies that ranks may receive, in each layer.
        speed_P: speeds of the ranks.
        node_P: node of each rank; changes stay inside nodes.

    Returns:
        The layouts, (L, P, K), and the busiest rank's time over that of perfectly balanced ranks after 0, 1,
        ... ``most_moves`` moves, (most_moves + 1, L), where second copies on a rank take no load; the last
        is that of the layouts.
    """
    state = _State(load_LE, today_LPK, speed_P, node_P, most_moves)
    best_ML = state.run()
    return state.written(), best_ML


class _State:
    """Layouts on their way. An empty slot, left by a second copy on one rank, holds expert E of no load.

    Each empty slot takes a move to fill: as many moves are kept back, where there are enough for all of them.
    """

    def __init__(
        self, load_LE: Float64, today_LPK: Int64, speed_P: Float64, node_P: Int64, most_moves: int
    ) -> None:
        layers, self.ranks, self.slots = today_LPK.shape
        self.experts = load_LE.shape[1]
        load_LE = load_LE / np.maximum(load_LE.sum(axis=1, keepdims=True), 1e-300) * speed_P.sum()
        self.load_LE = np.concatenate([load_LE, np.zeros((layers, 1))], axis=1)
        self.speed_P, self.node_P, self.most_moves = speed_P, node_P, most_moves
        self.slot_LPK = without_seconds(today_LPK, self.experts)
        self.today_LPE = self._held(np.arange(layers))
        self.moves_L = np.zeros(layers, dtype=np.int64)
        self.best_ML = np.full((most_moves + 1, layers), np.inf)
        self.best_LPK = self.slot_LPK.copy()
        self.least_L2 = np.full((layers, 2), np.inf)  # empty slots, and the busiest rank's time

    def run(self) -> Float64:
        """Change layouts while that helps; the best ratio after each number of moves, (M + 1, L)."""
        layer_L = np.arange(len(self.slot_LPK))
        self._improve(layer_L)
        emptied_A = np.flatnonzero(self._empty(layer_L) > 0)
        if len(emptied_A):
            self._fill()
            self._improve(emptied_A)
        best_ML = np.asarray(np.minimum.accumulate(self.best_ML, axis=0))
        best_ML[-1] = self.least_L2[:, 1]
        return best_ML

    def written(self) -> Int64:
        """The best layouts; slots that are still empty get a second copy of the rank's first expert."""
        for layer, rank, k in np.argwhere(self.best_LPK == self.experts).tolist():
            slot_K = self.best_LPK[layer, rank]
            slot_K[k] = slot_K[slot_K < self.experts][0]
        return self.best_LPK

    def _improve(self, layer_A: Int64) -> None:
        for _ in range(2 * self.most_moves + 8):
            layer_A = layer_A[self._note(layer_A) > 1 + _CLOSE] if len(layer_A) else layer_A
            if not len(layer_A):
                break
            layer_A = self._change(layer_A)

    def _note(self, layer_A: Int64) -> Float64:
        """Keep layouts that are the best so far, full ones before others; the busiest ranks' times, (A,)."""
        worst_A, moves_A = self._times(layer_A).max(axis=1), self.moves_L[layer_A]
        self.best_ML[moves_A, layer_A] = np.minimum(self.best_ML[moves_A, layer_A], worst_A)
        for layer, empty, worst in zip(layer_A, self._empty(layer_A), worst_A, strict=True):
            if (empty, worst) < tuple(self.least_L2[layer]):
                self.least_L2[layer] = empty, worst
                self.best_LPK[layer] = self.slot_LPK[layer]
        return np.asarray(worst_A)

    def _empty(self, layer_A: Int64) -> Int64:
        """Empty slots of layers, (A,)."""
        return np.asarray((self.slot_LPK[layer_A] == self.experts).sum(axis=(1, 2)))

    def _fill(self) -> None:
        """Put into empty slots, while moves are left, the expert whose copy there balances best."""
        for layer, rank, k in np.argwhere(self.slot_LPK == self.experts).tolist():
            held_PE = self._held(np.array([layer]))[0]
            near_E = held_PE[self.node_P == self.node_P[rank]].any(axis=0) & ~held_PE[rank]
            if self.moves_L[layer] == self.most_moves or not near_E.any():
                continue
            count_E = held_PE.sum(axis=0)
            fresh_E = self.load_LE[layer] / (count_E + 1)
            less_E = self.load_LE[layer] / np.maximum(count_E, 1) - fresh_E
            load_PE = (held_PE * (self.load_LE[layer] / np.maximum(count_E, 1))).sum(axis=1, keepdims=True)
            load_PE = load_PE - held_PE * less_E
            load_PE[rank] += fresh_E
            worst_E = (load_PE / self.speed_P[:, None]).max(axis=0) + 1e-9 * fresh_E
            expert = int(np.where(near_E, worst_E, np.inf).argmin())
            self.moves_L[layer] += not self.today_LPE[layer, rank, expert]
            self.slot_LPK[layer, rank, k] = expert

    def _held(self, layer_A: Int64) -> Bool:
        held_APE = holders(self.slot_LPK[layer_A], self.experts + 1)
        held_APE[:, :, self.experts] = False
        return held_APE

    def _times(self, layer_A: Int64) -> Float64:
        slot_APK = self.slot_LPK[layer_A]
        share_AE = self.load_LE[layer_A] / np.maximum(self._held(layer_A).sum(axis=1), 1)
        share_AN = np.take_along_axis(share_AE, slot_APK.reshape(len(layer_A), -1), axis=1)
        return np.asarray(share_AN.reshape(slot_APK.shape).sum(axis=2) / self.speed_P)

    def _change(self, layer_A: Int64) -> Int64:
        """Make the best change of each layer that lowers its sum; the layers that have been changed."""
        view = _View(self, layer_A)
        options = [view.exchanges(), view.copies_elsewhere(), view.copies_here()]
        left_A11 = (self.most_moves - self.moves_L[layer_A])[:, None, None]
        empty_A11 = self._empty(layer_A)[:, None, None]
        kept_A11 = np.where(empty_A11 <= left_A11, empty_A11, 0)
        is_fill = [
            np.zeros((1, 1, 1), dtype=bool),
            (view.slot_AN == self.experts)[:, None, :],
            (view.mine_AK == self.experts)[:, :, None],
        ]
        rate_AC = np.concatenate(
            [
                np.where(
                    cost > left_A11 - np.where(fills, 0, kept_A11),
                    np.inf,
                    gain / np.maximum(cost, _LEAST_COST),
                ).reshape(len(layer_A), -1)
                for (gain, cost), fills in zip(options, is_fill, strict=True)
            ],
            axis=1,
        )
        sizes = np.cumsum([0, *(gain[0].size for gain, _ in options)])
        changed = []
        for a, rate_C in enumerate(rate_AC):
            for choice in self._likely(rate_C):
                kind = int(np.searchsorted(sizes, choice, side="right")) - 1
                gain, cost = options[kind]
                k, n = divmod(choice - int(sizes[kind]), gain.shape[2])
                before_PK = self.slot_LPK[layer_A[a]].copy()
                view.apply(a, kind, k, n)
                after_A = view.power(self._times(layer_A[a : a + 1]))
                if after_A[0] < view.power(view.time_AP[a : a + 1])[0]:
                    self.moves_L[layer_A[a]] += int(cost[a, k, n])
                    changed.append(a)
                    break
                self.slot_LPK[layer_A[a]] = before_PK
        return layer_A[changed]

    @staticmethod
    def _likely(rate_C: Float64) -> Iterator[int]:
        """Changes that are estimated to help, the best first, and no more than are worth a trial."""
        for _ in range(_TRIALS):
            choice = int(rate_C.argmin())
            if rate_C[choice] >= 0:
                return
            yield choice
            rate_C[choice] = np.inf


class _View:
    """Some layers before a change: what each change would do to the sum over ranks of time ** q."""

    def __init__(self, state: _State, layer_A: Int64) -> None:
        self.state, self.layer_A = state, layer_A
        layers, ranks, slots = len(layer_A), state.ranks, state.slots
        self.row_A = np.arange(layers)
        self.rank_N = np.repeat(np.arange(ranks), slots)
        self.slot_AN = state.slot_LPK[layer_A].reshape(layers, -1)
        self.held_APE, self.new_APE = state._held(layer_A), ~state.today_LPE[layer_A]
        self.new_APE[:, :, state.experts] = False
        self.load_AE, self.count_AE = state.load_LE[layer_A], self.held_APE.sum(axis=1)
        self.share_AE = self.load_AE / np.maximum(self.count_AE, 1)
        self.share_AN = np.take_along_axis(self.share_AE, self.slot_AN, axis=1)
        self.time_AP = self.share_AN.reshape(layers, ranks, slots).sum(axis=2) / state.speed_P
        self.mine_A = self.time_AP.argmax(axis=1)
        self.most_A = self.time_AP[self.row_A, self.mine_A]
        self.mine_AK = state.slot_LPK[layer_A, self.mine_A]
        self.time_AN, self.speed_N = self.time_AP[:, self.rank_N], state.speed_P[self.rank_N]
        self.far_AN = (self.rank_N == self.mine_A[:, None]) | (
            state.node_P[self.rank_N] != state.node_P[self.mine_A][:, None]
        )
        # Of an expert that loses a copy, and of one that gets one more: the change over its holders.
        self.fewer_AE = self.load_AE / np.maximum(self.count_AE - 1, 1) - self.share_AE
        self.fresh_AE = self.load_AE / (self.count_AE + 1)
        self.rise_AN, self.rise_AE = self._over_holders(self.fewer_AE)
        _, self.fall_AE = self._over_holders(self.fresh_AE - self.share_AE)
        self.last_AE = self.count_AE == 1

    def power(self, time_AP: Float64) -> Float64:
        """Sum over ranks of time ** q, in units of the busiest rank before the change."""
        return np.asarray(((time_AP / self.most_A.max()) ** _POWER).sum(axis=1))

    def exchanges(self) -> tuple[Float64, Int64]:
        """Gain and moves of exchanging slot k of the busiest rank with slot n, (A, K, N)."""
        less_AKN = self._of(self.share_AE, self.mine_AK)[:, :, None] - self.share_AN[:, None, :]
        mine_AKN = self.most_A[:, None, None] - less_AKN / self.state.speed_P[self.mine_A][:, None, None]
        gain = self._gain(self.time_AN[:, None, :], self.time_AN[:, None, :] + less_AKN / self.speed_N)
        gain += self._gain(self.most_A[:, None, None], mine_AKN)
        gain[self._at_others(self.held_APE) | self._here(self.held_APE) | (less_AKN <= 0)] = np.inf
        gain[np.broadcast_to(self.far_AN[:, None, :], gain.shape)] = np.inf
        new: Int64 = self.new_APE.astype(np.int64)
        cost: Int64 = self._at_others(new) + self._here(new)
        cost = cost - new[self.row_A[:, None], self.mine_A[:, None], self.mine_AK][:, :, None]
        cost = cost - new[self.row_A[:, None], self.rank_N, self.slot_AN][:, None, :]
        return gain, cost

    def copies_elsewhere(self) -> tuple[Float64, Int64]:
        """Gain and moves of overwriting slot n by a copy of what is in slot k of the busiest rank."""
        after = (
            self.time_AN[:, None, :]
            + (self._of(self.fresh_AE, self.mine_AK)[:, :, None] - self.share_AN[:, None, :]) / self.speed_N
        )
        gain = self._gain(self.time_AN[:, None, :], after)
        gain += (self._of(self.rise_AE, self.slot_AN) - self.rise_AN)[:, None, :]
        gain += self._of(self.fall_AE, self.mine_AK)[:, :, None] + self._at_both()
        refused = self.far_AN | self._of(self.last_AE, self.slot_AN)
        empty = (self.mine_AK == self.state.experts)[:, :, None]
        gain[self._at_others(self.held_APE) | refused[:, None, :] | empty] = np.inf
        new = self.new_APE.astype(np.int64)
        return gain, self._at_others(new) - new[self.row_A[:, None], self.rank_N, self.slot_AN][:, None, :]

    def copies_here(self) -> tuple[Float64, Int64]:
        """Gain and moves of overwriting slot k of the busiest rank by expert n, (A, K, E)."""
        at_AK = self.row_A[:, None], self.mine_A[:, None], self.mine_AK
        speed_A11 = self.state.speed_P[self.mine_A][:, None, None]
        share_AK = self._of(self.share_AE, self.mine_AK)
        after = self.most_A[:, None, None] + (self.fresh_AE[:, None, :] - share_AK[:, :, None]) / speed_A11
        gain = self._gain(self.most_A[:, None, None], after) + self.fall_AE[:, None, :]
        rise_AK = self.rise_AN.reshape(len(self.row_A), -1, self.state.slots)[self.row_A, self.mine_A]
        gain += (self._of(self.rise_AE, self.mine_AK) - rise_AK)[:, :, None]
        near_AP = self.state.node_P == self.state.node_P[self.mine_A][:, None]
        there_AE = (self.held_APE & near_AP[:, :, None]).any(axis=1)
        refused = self.held_APE[self.row_A, self.mine_A] | ~there_AE
        gain[refused[:, None, :] | self._of(self.last_AE, self.mine_AK)[:, :, None]] = np.inf
        new = self.new_APE.astype(np.int64)
        return gain, new[self.row_A, self.mine_A][:, None, :] - new[at_AK][:, :, None]

    def apply(self, a: int, kind: int, k: int, n: int) -> None:
        """Make change (k, n) of a kind: 0 exchange, 1 copy elsewhere, 2 copy here."""
        slot_PK = self.state.slot_LPK[self.layer_A[a]]
        mine = int(self.mine_A[a])
        expert = int(slot_PK[mine, k])
        if kind == 2:
            slot_PK[mine, k] = n
            return
        rank, j = divmod(n, self.state.slots)
        if kind == 0:
            slot_PK[mine, k] = slot_PK[rank, j]
        slot_PK[rank, j] = expert

    def _at_both(self) -> Float64:
        """What the sum misses where the busiest rank also holds the overwritten expert, (A, K, N)."""
        speed_A1 = self.state.speed_P[self.mine_A][:, None]
        more_AN = self._of(self.fewer_AE, self.slot_AN) / speed_A1
        less_AK = self._of(self.share_AE - self.fresh_AE, self.mine_AK) / speed_A1
        most_A1 = self.most_A[:, None]
        both_AKN = self.most_A[:, None, None] + more_AN[:, None, :] - less_AK[:, :, None]
        missed = self._gain(self.most_A[:, None, None], both_AKN)
        missed -= self._gain(most_A1, most_A1 + more_AN)[:, None, :]
        missed -= self._gain(most_A1, most_A1 - less_AK)[:, :, None]
        return np.where(self._here(self.held_APE), missed, 0.0)

    def _over_holders(self, more_AE: Float64) -> tuple[Float64, Float64]:
        """Change of the sum where every holder of an expert gets so much more: per slot, and per expert."""
        more_AN = np.take_along_axis(more_AE, self.slot_AN, axis=1)
        gain_AN = self._gain(self.time_AN, self.time_AN + more_AN / self.speed_N)
        gain_AN[self.slot_AN == self.state.experts] = 0.0
        flat = self.slot_AN + self.load_AE.shape[1] * self.row_A[:, None]
        gain_E = np.bincount(flat.ravel(), gain_AN.ravel(), minlength=self.load_AE.size)
        return gain_AN, np.asarray(gain_E, dtype=np.float64).reshape(self.load_AE.shape)

    def _gain(self, before: Float64, after: Float64) -> Float64:
        scale = self.most_A.reshape(-1, *[1] * (before.ndim - 1))
        return np.asarray(
            np.maximum(after / scale, 0.0) ** _POWER - np.maximum(before / scale, 0.0) ** _POWER
        )

    def _of(self, value_AE: NDArray[Any], expert_AX: Int64) -> NDArray[Any]:
        return np.take_along_axis(value_AE, expert_AX, axis=1)

    def _at_others(self, value_APE: NDArray[Any]) -> NDArray[Any]:
        """Value of the busiest rank's experts at the rank of each slot, (A, K, N)."""
        at_APK = np.take_along_axis(value_APE, self.mine_AK[:, None, :], axis=2)
        return at_APK.transpose(0, 2, 1)[:, :, self.rank_N]

    def _here(self, value_APE: NDArray[Any]) -> NDArray[Any]:
        """Value of each slot's expert at the busiest rank, (A, 1, N)."""
        return self._of(value_APE[self.row_A, self.mine_A], self.slot_AN)[:, None, :]


def slots_of(held_LPE: NDArray[np.int8]) -> Int64:
    """Layout of copies that ranks hold, as many on every rank, (L, P, K)."""
    layers, ranks, experts = held_LPE.shape
    expert_X = np.tile(np.arange(experts), layers * ranks)
    return np.repeat(expert_X, held_LPE.ravel()).reshape(layers, ranks, -1)


def renumbered(slot_LPK: Int64, today_LPE: Bool, node_P: Int64) -> Int64:
    """The same layout with the ranks of each node numbered so that today's keep most of their experts."""
    from scipy.optimize import linear_sum_assignment

    wanted_LPE = holders(slot_LPK, today_LPE.shape[2])
    result = np.empty_like(slot_LPK)
    for layer, slot_PK in enumerate(slot_LPK):
        kept_PP = today_LPE[layer].astype(np.int64) @ wanted_LPE[layer].T
        kept_PP[node_P[:, None] != node_P[None, :]] = -1
        result[layer] = slot_PK[linear_sum_assignment(-kept_PP)[1]]
    return result
