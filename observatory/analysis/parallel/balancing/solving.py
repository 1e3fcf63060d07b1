"""Solve a placement problem.

Shapes: S steps, L layers, E experts, P ranks, K slots of each rank, M moves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from observatory.analysis.parallel.balancing.coactivation import (
    Structure,
    exchanged,
    nodes_per_token,
    structure,
)
from observatory.analysis.parallel.balancing.decision import expected_gain
from observatory.analysis.parallel.balancing.forecast import forecast
from observatory.analysis.parallel.balancing.layouts import (
    Bool,
    Float64,
    Int64,
    holders,
    pack,
    slots_per_rank,
    water_filled,
    without_seconds,
    written_times,
)
from observatory.analysis.parallel.balancing.moves import moved_layouts, renumbered, slots_of
from observatory.analysis.parallel.balancing.nodes import grouped_experts, on_nodes
from observatory.analysis.parallel.balancing.problem import Objective, Problem
from observatory.analysis.parallel.balancing.search import balanced_layout
from observatory.analysis.parallel.balancing.steps import steps_layout
from observatory.errors import PlacementError

#: Weight of an expert's load next to the probability that it is activated.
_TIE = 0.005
#: Fewer steps do not show which experts are activated together; and standard errors that count as scatter.
_FEWEST_JUDGED, _BEYOND_SCATTER = 8, 2.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Solution:
    """A layout and what it rests on.

    Attributes:
        slot_LPK: the layout.
        is_changed_L: layers that are not left as they are today; None where nothing is held today.
        gain_L: likely gain over today's layout, changed or not, in units of the ratio of the busiest to the
            mean rank: on steps that follow, and for a mean on itself; None without a layout of today, and
            where the steps are too few for an estimate. Where tokens decide the nodes, the part of the nodes
            that is saved is added in the first layer, and a loss of balance is not taken off.
        frontier_ML: ratio of the expected loads after each number of moves; None where moves are not limited.
        structure: what the sampled tokens of the first layer say; None unless nodes are the objective.
        is_forced: whether ranks have other numbers of slots today, so that every layer changes. With more
            slots than today, ``is_changed_L`` and ``gain_L`` are relative to today's with new slots filled.
    """

    slot_LPK: Int64
    is_changed_L: Bool | None = None
    gain_L: Float64 | None = None
    frontier_ML: Float64 | None = None
    structure: Structure | None = None
    is_forced: bool = False


def solve(problem: Problem, *, seed: int = 0) -> Solution:
    """The layout that is best for the problem's objective, as far as its steps show.

    Raises:
        PlacementError: moves are limited, but ranks have fewer slots than today, or more than moves fill.
    """
    if problem.objective is Objective.ACTIVE and problem.is_all_active:
        problem = replace(problem, objective=Objective.STEP)
    load_SLE = problem.load_SLE
    tokens = _structure(problem, seed)
    held_LPE = problem.current_LPE
    if held_LPE is None:
        return Solution(slot_LPK=_fresh(problem, load_SLE, tokens, seed), structure=tokens)
    today_LPK, frontier_ML = slots_of(held_LPE), None
    slots = slots_per_rank(load_SLE.shape[2], problem.ranks, problem.replicas)
    is_forced = today_LPK.shape[2] != slots
    base_LPK, base_ML = _filled(problem, load_SLE, today_LPK, slots)
    is_limited = problem.max_moves >= 0

    def make(load_SLE: Float64) -> Int64:
        if is_limited:
            return _moved(problem, load_SLE, today_LPK, tokens)[0]
        return _fresh(problem, load_SLE, tokens, seed)

    def judge(load_SLE: Float64, slot_LPK: Int64) -> Float64:
        if problem.objective is Objective.ACTIVE:
            load_SLE = (load_SLE > 0).astype(np.float64)
        return np.asarray(written_times(load_SLE, slot_LPK, problem.speed_P).max(axis=2))

    if is_limited:
        slot_LPK, frontier_ML = _moved(problem, load_SLE, today_LPK, tokens)
        if is_forced:
            frontier_ML[len(base_ML) - 1 :] = np.minimum(frontier_ML[len(base_ML) - 1 :], base_ML[-1])
    else:
        slot_LPK = make(load_SLE)
        if problem.speed_P is None:
            node_P = problem.node_P if tokens is None else _blocks(problem)
            slot_LPK = renumbered(slot_LPK, held_LPE > 0, node_P)
    if problem.is_of_mean:
        mean_SLE = load_SLE.mean(axis=0)[None]
        gain_L: Float64 | None = (judge(mean_SLE, base_LPK) - judge(mean_SLE, slot_LPK))[0]
    else:
        gain_L = expected_gain(load_SLE, base_LPK, make, judge)
        if gain_L is not None and tokens is not None and uses_tokens(problem, tokens):
            gain_L[0] = max(gain_L[0], 0.0) + _part_of_nodes(problem, tokens, today_LPK)
    is_changed_L = (
        np.full(len(today_LPK), problem.move_cost == 0) if gain_L is None else gain_L > problem.move_cost
    )
    if base_LPK.shape != slot_LPK.shape:
        is_changed_L = np.ones(len(today_LPK), dtype=bool)
    else:
        if problem.move_cost == 0:  # a file cannot hold second copies: it is free to put others there
            is_changed_L |= _seconds(slot_LPK) < _seconds(base_LPK)
        slot_LPK = np.where(is_changed_L[:, None, None], slot_LPK, base_LPK)
    return Solution(
        slot_LPK=slot_LPK,
        is_changed_L=is_changed_L,
        gain_L=gain_L,
        frontier_ML=frontier_ML,
        structure=tokens,
        is_forced=is_forced,
    )


def _filled(problem: Problem, load_SLE: Float64, today_LPK: Int64, slots: int) -> tuple[Int64, Float64]:
    """Today's layout with slots filled that it does not have, and the ratios on the way, (M + 1, L)."""
    layers, ranks, held = today_LPK.shape
    if held >= slots:
        return today_LPK, np.full((1, layers), np.inf)
    return _moved(replace(problem, max_moves=ranks * (slots - held)), load_SLE, today_LPK, None)


def _seconds(slot_LPK: Int64) -> Int64:
    """Slots of each layer with a second copy of an expert of their rank, (L,)."""
    return np.asarray((without_seconds(slot_LPK, -1) == -1).sum(axis=(1, 2)))


def uses_tokens(problem: Problem, tokens: Structure) -> bool:
    """Whether tokens decide the nodes of experts: neither groups do, nor limited moves of replicas."""
    return tokens.is_there and problem.groups == 1 and not (problem.max_moves >= 0 and problem.replicas)


def _part_of_nodes(problem: Problem, tokens: Structure, today_LPK: Int64) -> float:
    """Part of the nodes that later tokens touch today which a layout made on earlier ones saves."""
    assert problem.token_TK is not None
    assert problem.token_step_T is not None
    assert tokens.today is not None
    touched = tokens.touched
    if problem.max_moves >= 0:
        token_TK = problem.token_TK[np.argsort(problem.token_step_T, kind="stable")]
        first_TK, second_TK = np.array_split(token_TK, 2)
        load_E = problem.load_SLE[:, 0].mean(axis=0)
        moved_PK = exchanged(first_TK, today_LPK[0], load_E, problem.nodes, problem.max_moves)
        touched = nodes_per_token(second_TK, moved_PK, len(load_E), problem.nodes)
    return 1 - touched / tokens.today


def _structure(problem: Problem, seed: int) -> Structure | None:
    if problem.objective is not Objective.NODES:
        return None
    assert problem.token_TK is not None
    assert problem.token_step_T is not None
    load_E = _forecast(problem, problem.load_SLE[:, :1])[0][0]
    today_PK = None if problem.current_LPE is None else slots_of(problem.current_LPE[:1])[0]
    return structure(
        problem.token_TK, problem.token_step_T, load_E, problem.nodes, today_PK=today_PK, seed=seed
    )


def _forecast(problem: Problem, load_SLE: Float64) -> tuple[Float64, Float64]:
    """Expected loads and scenarios of the steps that follow."""
    return forecast(load_SLE) if problem.is_ordered else (load_SLE.mean(axis=0), load_SLE)


def _moved(
    problem: Problem, load_SLE: Float64, today_LPK: Int64, tokens: Structure | None
) -> tuple[Int64, Float64]:
    experts = load_SLE.shape[2]
    slots = slots_per_rank(experts, problem.ranks, problem.replicas)
    layers, ranks, held = today_LPK.shape
    if held > slots:
        raise PlacementError(
            f"{held} slots of a rank today and {slots} with {problem.replicas} replicas; expected at least "
            f"{held * ranks - experts} replicas, or no limit of moves, as moves take no slots away"
        )
    if slots > held + problem.max_moves // ranks:
        raise PlacementError(
            f"{held} slots of a rank today and {slots} with {problem.replicas} replicas; expected as many "
            f"where moves are limited, or no more than {problem.max_moves} moves fill"
        )
    today_LPK = np.concatenate([today_LPK, np.full((layers, ranks, slots - held), experts)], axis=2)
    expected_LE = load_SLE.mean(axis=0) if problem.is_of_mean else _forecast(problem, load_SLE)[0]
    slot_LPK, best_ML = moved_layouts(
        expected_LE,
        today_LPK,
        most_moves=problem.max_moves,
        speed_P=problem.speeds,
        node_P=problem.node_P,
    )
    if tokens is not None and uses_tokens(problem, tokens):
        assert problem.token_TK is not None
        first_PK = exchanged(problem.token_TK, today_LPK[0], expected_LE[0], problem.nodes, problem.max_moves)
        received = int((holders(first_PK[None], experts) & ~holders(today_LPK[:1], experts)).sum())
        first_1PK, first_M1 = moved_layouts(
            expected_LE[:1],
            first_PK[None],
            most_moves=problem.max_moves - received,
            speed_P=problem.speeds,
            node_P=np.arange(problem.ranks) // (problem.ranks // problem.nodes),
        )
        slot_LPK[:1] = first_1PK
        best_ML[-1, 0] = first_M1[-1, 0]
    return slot_LPK, best_ML


def _fresh(problem: Problem, load_SLE: Float64, tokens: Structure | None, seed: int) -> Int64:
    """A layout that owes nothing to today's."""
    if problem.is_of_mean:
        return layout_of_mean(problem, load_SLE.mean(axis=0), seed=seed)
    if problem.objective is Objective.ACTIVE and problem.replicas and problem.groups == 1:
        return _few_activated(problem, load_SLE)
    if problem.objective is Objective.ACTIVE:
        return _activation_layout(problem, load_SLE, seed)
    expected_LE, scenario_SLE = _forecast(problem, load_SLE)
    start = layout_of_mean(problem, expected_LE, tokens, is_greedy=True)
    node_P = problem.node_P
    if tokens is None or not tokens.is_there:
        return steps_layout(scenario_SLE, start, speed_P=problem.speed_P, node_P=node_P)
    first = steps_layout(scenario_SLE[:, :1], start[:1], speed_P=problem.speed_P, node_P=_blocks(problem))
    others = steps_layout(scenario_SLE[:, 1:], start[1:], speed_P=problem.speed_P, node_P=node_P)
    return np.concatenate([first, others])


def _activated(problem: Problem, load_SLE: Float64) -> Float64:
    """Probability that the next steps activate each expert, (L, E).

    What the mean load implies if tokens choose independently of each other, and the share of steps in which
    it was active: the first is less noisy, the second right for bursts. Loads decide between equals.
    """
    expected_LE, _ = _forecast(problem, load_SLE)
    active_LE, _ = _forecast(problem, (load_SLE > 0).astype(np.float64))
    tie_LE = expected_LE / np.maximum(expected_LE.mean(axis=1), 1e-300)[:, None]
    return np.asarray((1 - np.exp(-expected_LE) + active_LE) / 2 + _TIE * tie_LE)


def _activation_layout(problem: Problem, load_SLE: Float64, seed: int) -> Int64:
    """A layout without replicas, or in groups, that lets the rank with most activated experts have few.

    Made for the probability that experts are activated, each by itself; in layers where steps activate
    experts together, for the steps. These are the layers in which such a layout of the earlier half of the
    steps is better on the later half, beyond the scatter of these.
    """

    def alone(load_SLE: Float64) -> Int64:
        return layout_of_mean(problem, _activated(problem, load_SLE), seed=seed)

    slot_LPK = alone(load_SLE)
    first_SLE, second_SLE = np.array_split(load_SLE, 2)
    if problem.groups > 1 or problem.speed_P is not None or len(second_SLE) < _FEWEST_JUDGED:
        return slot_LPK
    active_SLE = (second_SLE > 0).astype(np.float64)
    most_SL, most_parted_SL = (
        written_times(active_SLE, made_LPK, None).max(axis=2)
        for made_LPK in (alone(first_SLE), _parted(problem, first_SLE))
    )
    gain_SL = most_SL - most_parted_SL
    error_L = gain_SL.std(axis=0) / np.sqrt(len(gain_SL))
    is_together_L = gain_SL.mean(axis=0) > _BEYOND_SCATTER * error_L
    if is_together_L.any():
        slot_LPK = np.where(is_together_L[:, None, None], _parted(problem, load_SLE), slot_LPK)
    return slot_LPK


def _parted(problem: Problem, load_SLE: Float64) -> Int64:
    """A layout without replicas that parts experts which the same steps activate.

    The likeliest first, each goes to the rank on which steps that activate it activate fewest others; then
    experts are exchanged while the rank with most of them has fewer in these steps.
    """
    likely_LE = _activated(problem, load_SLE)
    _, active_SLE = _forecast(problem, (load_SLE > 0).astype(np.float64))
    steps, layers, experts = active_SLE.shape
    slots = slots_per_rank(experts, problem.ranks, 0)
    slot_LPK = np.full((layers, problem.ranks, slots), -1, dtype=np.int64)
    for layer, slot_PK in enumerate(slot_LPK):
        held_P = np.zeros(problem.ranks, dtype=np.int64)
        count_SP = np.zeros((steps, problem.ranks))
        for expert in np.argsort(-likely_LE[layer], kind="stable").tolist():
            active_S = active_SLE[:, layer, expert]
            together_P = active_S @ count_SP + _TIE * count_SP.sum(axis=0)
            rank = int(np.where(held_P < slots, together_P, np.inf).argmin())
            slot_PK[rank, held_P[rank]] = expert
            held_P[rank] += 1
            count_SP[:, rank] += active_S
    return steps_layout(active_SLE, slot_LPK)


def _blocks(problem: Problem) -> Int64:
    """Node of each rank."""
    return np.arange(problem.ranks) // (problem.ranks // problem.nodes)


def _few_activated(problem: Problem, load_SLE: Float64) -> Int64:
    """A layout with replicas of the lightest experts: more copies of others would be activated too."""
    expected_LE, _ = _forecast(problem, load_SLE)
    count_LE = water_filled(expected_LE, 0, problem.ranks, spared=problem.replicas)
    active_LE = count_LE * (1 - np.exp(-expected_LE / count_LE))
    start = pack(active_LE, count_LE, problem.ranks)
    return steps_layout(active_LE[None], start, speed_P=problem.speed_P)


def layout_of_mean(
    problem: Problem,
    load_LE: Float64,
    tokens: Structure | None = None,
    *,
    seed: int = 0,
    is_greedy: bool = False,
) -> Int64:
    """The layout for given loads, under the rules of the problem, (L, P, K).

    Args:
        problem: the problem.
        load_LE: loads.
        tokens: nodes of the experts of the first layer, where tokens have a structure.
        seed: of the search.
        is_greedy: only fill water and pack, as the published greedy balancers do.
    """

    def make(load_AE: Float64, ranks: int, replicas: int, speed_AP: Float64) -> Int64:
        if is_greedy:
            return pack(load_AE, water_filled(load_AE, replicas, ranks), ranks, speed_AP)
        return balanced_layout(load_AE, ranks, replicas, speed_LP=speed_AP, seed=seed)

    def within(load_LE: Float64, expert_LME: Int64) -> Int64:
        return on_nodes(
            load_LE,
            expert_LME,
            ranks=problem.ranks,
            replicas=problem.replicas,
            speed_P=problem.speeds,
            make=make,
        )

    if problem.groups > 1:
        nodes, groups = problem.nodes, problem.groups
        return within(load_LE, grouped_experts(load_LE, nodes=nodes, groups=groups, speed_P=problem.speeds))
    speed_LP = np.tile(problem.speeds, (len(load_LE), 1))
    slot_LPK = make(load_LE, problem.ranks, problem.replicas, speed_LP)
    if tokens is not None and tokens.is_there:
        expert_LME = np.argsort(tokens.node_E, kind="stable").reshape(1, problem.nodes, -1)
        slot_LPK[:1] = within(load_LE[:1], expert_LME)
    return slot_LPK
