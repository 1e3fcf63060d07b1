"""How the assignments of an expert are split among its copies.

Shapes: S steps, L layers, E experts, P ranks, K slots of each rank; N = P * K slots.

A layout says which expert each slot holds, (L, P, K); a rule says what share of the expert's load a slot
gets:

* equal: all copies the same, in whole assignments; the remainder goes to the copies of the first ranks.
* weighted: shares that were chosen before, on other steps.
* per step: shares chosen for each step, so that its last rank is done earliest: a linear programme.
* one copy: every expert's whole load goes to one of its copies, so that the rank with most activated experts
  has fewest. It reads each activated expert's weights once (the idea of METRO, arXiv 2512.09277).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from observatory.errors import PlacementError

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

DispatchRule = Literal["equal", "weighted", "per-step", "one-copy"]


def slot_loads(
    load_SLE: Int64 | Float64,
    slot_LPK: Int64,
    *,
    rule: DispatchRule = "equal",
    share_LPK: Float64 | None = None,
    speed_P: Float64 | None = None,
) -> Float64:
    """Assignments that each slot gets, (S, L, P, K).

    Args:
        load_SLE: assignments per expert.
        slot_LPK: expert of each slot; every expert with assignments must have one.
        rule: how copies share.
        share_LPK: of ``weighted``: share of its expert's load that each slot gets.
        speed_P: of ``per-step``: speeds of the ranks; None: all alike.

    Raises:
        PlacementError: ``weighted`` without shares, or shares that do not add up to one for an expert.
    """
    if rule == "weighted":
        return _weighted(load_SLE, slot_LPK, share_LPK)
    if rule == "per-step":
        return np.stack(list(map(_LeastBusiest(slot_LPK, speed_P), load_SLE)))
    if rule == "one-copy":
        return _one_copy(load_SLE, slot_LPK)
    at_SLN = _of_slots(load_SLE, slot_LPK)
    copies_LN, place_LN = _copies_and_places(slot_LPK, load_SLE.shape[2])
    # Whole assignments where loads are whole; loads that were spread over sources as estimates are not.
    whole_SLN = np.floor((at_SLN + copies_LN - 1 - place_LN) / copies_LN)
    is_whole = bool(np.all(load_SLE == np.rint(load_SLE)))
    shared_SLN = whole_SLN if is_whole else at_SLN / copies_LN
    return np.asarray(shared_SLN.reshape(len(load_SLE), *slot_LPK.shape))


def balancing_shares(load_LE: Float64, slot_LPK: Int64, speed_P: Float64 | None = None) -> Float64:
    """Share of its expert's load for each slot, (L, P, K): the last rank is done with these loads earliest.

    Args:
        load_LE: loads.
        slot_LPK: expert of each slot.
        speed_P: speeds of the ranks; None: all alike.
    """
    got_LPK = _LeastBusiest(slot_LPK, speed_P)(load_LE)
    load_LPK = np.take_along_axis(load_LE, slot_LPK.reshape(len(slot_LPK), -1), axis=1).reshape(
        slot_LPK.shape
    )
    copies_LN, _ = _copies_and_places(slot_LPK, load_LE.shape[1])
    equal_LPK = 1.0 / copies_LN.reshape(slot_LPK.shape)
    return np.where(load_LPK > 0, got_LPK / np.maximum(load_LPK, 1e-300), equal_LPK)


def _of_slots(load_SLE: Int64 | Float64, slot_LPK: Int64) -> Float64:
    """Load of the expert of every slot, (S, L, N)."""
    layers = len(slot_LPK)
    return np.take_along_axis(np.asarray(load_SLE, dtype=np.float64), slot_LPK.reshape(1, layers, -1), axis=2)


def _copies_and_places(slot_LPK: Int64, experts: int) -> tuple[Int64, Int64]:
    """Copies of every slot's expert, and the slot's place among them in the order of ranks, (L, N) each."""
    slot_LN = slot_LPK.reshape(len(slot_LPK), -1)
    copies_LN, place_LN = np.empty_like(slot_LN), np.empty_like(slot_LN)
    for layer, slot_N in enumerate(slot_LN):
        copies_E = np.bincount(slot_N, minlength=experts)
        order_N = np.argsort(slot_N, kind="stable")
        first_E = np.cumsum(copies_E) - copies_E
        place_LN[layer, order_N] = np.arange(slot_N.size) - first_E[slot_N[order_N]]
        copies_LN[layer] = copies_E[slot_N]
    return copies_LN, place_LN


def _weighted(load_SLE: Int64 | Float64, slot_LPK: Int64, share_LPK: Float64 | None) -> Float64:
    if share_LPK is None or share_LPK.shape != slot_LPK.shape:
        raise PlacementError(
            "dispatch by weights without a share for every slot", expected="as many shares as slots"
        )
    for slot_PK, share_PK in zip(slot_LPK, share_LPK, strict=True):
        total_E = np.bincount(slot_PK.ravel(), weights=share_PK.ravel(), minlength=load_SLE.shape[2])
        held_E = np.bincount(slot_PK.ravel(), minlength=load_SLE.shape[2]) > 0
        if not np.allclose(total_E[held_E], 1.0, atol=1e-6) or share_PK.min() < 0:
            raise PlacementError(
                "shares of an expert's copies do not add up to 1", expected="non-negative shares that do"
            )
    return np.asarray(_of_slots(load_SLE, slot_LPK).reshape(len(load_SLE), *slot_LPK.shape) * share_LPK)


class _LeastBusiest:
    """Splits loads so that the last rank of each layer is done earliest: one linear programme for all layers.

    Variables: what each slot of a replicated expert gets, and the time of the last rank of each layer.
    """

    def __init__(self, slot_LPK: Int64, speed_P: Float64 | None) -> None:
        from scipy.sparse import coo_array

        self.slot_LPK = slot_LPK
        layers, ranks, slots = slot_LPK.shape
        experts = int(slot_LPK.max()) + 1
        copies_LN, _ = _copies_and_places(slot_LPK, experts)
        self.is_free_M = (copies_LN > 1).ravel()
        free_M = np.flatnonzero(self.is_free_M)
        layer_V = free_M // (ranks * slots)
        rank_V = free_M // slots  # of all layers
        _, expert_V = np.unique(layer_V * experts + slot_LPK.ravel()[free_M], return_inverse=True)
        self.expert_V, self.free_M = expert_V, free_M
        variables = free_M.size + layers
        speed_R = np.ones(layers * ranks) if speed_P is None else np.tile(speed_P / speed_P.mean(), layers)
        busiest_R = free_M.size + np.arange(layers * ranks) // ranks
        rows_R = np.arange(layers * ranks)
        self.rank_rows = coo_array(
            (
                np.concatenate([np.ones(free_M.size), -speed_R]),
                (np.concatenate([rank_V, rows_R]), np.concatenate([np.arange(free_M.size), busiest_R])),
            ),
            shape=(layers * ranks, variables),
        ).tocsr()
        self.expert_rows = coo_array(
            (np.ones(free_M.size), (expert_V, np.arange(free_M.size))),
            shape=(int(expert_V.max()) + 1 if free_M.size else 0, variables),
        ).tocsr()
        self.cost_V = np.concatenate([np.zeros(free_M.size), np.ones(layers)])

    def __call__(self, load_LE: Int64 | Float64) -> Float64:
        """What every slot gets, (L, P, K)."""
        from scipy import optimize

        linprog: Any = optimize.linprog  # its stubs know no sparse arrays

        layers, ranks, slots = self.slot_LPK.shape
        scale = max(float(np.max(load_LE)), 1e-300)
        load_1LE = np.asarray(load_LE, dtype=np.float64)[None] / scale
        load_M = _of_slots(load_1LE, self.slot_LPK).ravel()
        got_M = np.where(self.is_free_M, 0.0, load_M)
        if self.free_M.size:
            fixed_R = got_M.reshape(layers * ranks, slots).sum(axis=1)
            total_G = np.zeros(self.expert_rows.shape[0])
            total_G[self.expert_V] = load_M[self.free_M]
            solved = linprog(
                self.cost_V,
                A_ub=self.rank_rows,
                b_ub=-fixed_R,
                A_eq=self.expert_rows,
                b_eq=total_G,
                method="highs",
            )
            if solved.x is None:
                raise PlacementError(f"the split of loads among copies was not found: {solved.message}")
            got_M[self.free_M] = np.maximum(solved.x[: self.free_M.size], 0.0)
        return np.asarray(got_M.reshape(self.slot_LPK.shape) * scale)


def _one_copy(load_SLE: Int64 | Float64, slot_LPK: Int64) -> Float64:
    """Experts with fewest copies first, each to the holder with fewest activated experts so far."""
    steps, layers, experts = load_SLE.shape
    _, ranks, slots = slot_LPK.shape
    got_SLPK = np.zeros((steps, layers, ranks, slots))
    for layer, slot_PK in enumerate(slot_LPK):
        active_SP = np.zeros((steps, ranks))
        busy_SP = np.zeros((steps, ranks))
        load_SE = np.asarray(load_SLE[:, layer], dtype=np.float64)
        most = max(float(load_SE.sum(axis=1).max()), 1.0)
        copies_E = np.bincount(slot_PK.ravel(), minlength=experts)
        for expert in np.argsort(copies_E, kind="stable"):
            rank_C, slot_C = np.nonzero(slot_PK == expert)
            if not rank_C.size:
                continue
            # Of holders with equally many activated experts, the one with least load.
            cost_SC = active_SP[:, rank_C] + busy_SP[:, rank_C] / (2 * most)
            chosen_S = np.argmin(cost_SC, axis=1)
            at_S = np.arange(steps)
            got_SLPK[at_S, layer, rank_C[chosen_S], slot_C[chosen_S]] = load_SE[:, expert]
            active_SP[at_S, rank_C[chosen_S]] += load_SE[:, expert] > 0
            busy_SP[at_S, rank_C[chosen_S]] += load_SE[:, expert]
    return got_SLPK
