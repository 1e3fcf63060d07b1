"""Placement problems whose best answers are known beforehand, and files that are not to be trusted."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from observatory.advice.placement_problem import layout_file, problem_document
from observatory.analysis.parallel.balancing import (
    Float64,
    Int64,
    greedy_layout,
    holders,
    linear_layout,
    rank_times,
)
from observatory.analysis.parallel.balancing.coactivation import nodes_touched, structure
from observatory.analysis.parallel.balancing.decision import shrunk
from observatory.analysis.parallel.balancing.forecast import forecast, half_life
from observatory.analysis.parallel.balancing.moves import moved_layouts, renumbered
from observatory.analysis.parallel.balancing.nodes import node_bound
from observatory.analysis.parallel.balancing.problem import Objective, Problem, read_problem
from observatory.analysis.parallel.balancing.solving import solve
from observatory.analysis.parallel.placement import load_placement
from observatory.cli import main
from observatory.errors import PlacementError
from tests.analysis.parallel.test_balancing import doubled, drifting, loads_of, ratio


def held(slot_LPK: Int64, experts: int) -> np.ndarray:
    return holders(slot_LPK, experts).astype(np.int8)


def received(slot_LPK: Int64, today_LPK: Int64, experts: int) -> np.ndarray:
    """Copies that ranks receive, per layer."""
    return (holders(slot_LPK, experts) & ~holders(today_LPK, experts)).sum(axis=(1, 2))


def on_steps(load_SLE: Float64, slot_LPK: Int64) -> float:
    return float(rank_times(load_SLE, slot_LPK).max(axis=2).mean())


def steps_of(mean_E: list[float], steps: int = 16, layers: int = 1) -> Float64:
    return np.random.default_rng(0).poisson(mean_E, (steps, layers, len(mean_E))).astype(np.float64)


def test_groups_stay_on_nodes_and_the_heaviest_goes_with_the_lightest() -> None:
    """Groups of 8, 6, 4 and 2: only {8, 2} and {6, 4} weigh 10 each."""
    load_E = np.repeat([4.0, 3.0, 2.0, 1.0], 2)
    problem = Problem(load_SLE=load_E[None, None], ranks=4, nodes=2, groups=4, objective=Objective.MEAN)
    slot_LPK = solve(problem).slot_LPK
    nodes = [sorted(set((slot_LPK[0, node : node + 2] // 2).ravel().tolist())) for node in (0, 2)]
    assert sorted(nodes) == [[0, 3], [1, 2]]
    assert ratio(load_E[None], slot_LPK)[0] == 1.0
    assert node_bound(load_E[None], nodes=2, groups=4)[0] == 1.0


def test_a_rank_that_is_twice_as_fast_takes_twice_the_load() -> None:
    load_E = np.array([2.0, 2.0, 1.0, 1.0])
    problem = Problem(
        load_SLE=load_E[None, None], ranks=2, speed_P=np.array([1.0, 2.0]), objective=Objective.MEAN
    )
    slot_LPK = solve(problem).slot_LPK
    assert sorted(slot_LPK[0, 1].tolist()) == [0, 1]
    assert rank_times(load_E[None, None], slot_LPK, problem.speed_P).max() == 1.0


@pytest.mark.parametrize(("ranks", "replicas", "spread"), [(32, 32, 0.077), (64, 64, 0.277)])
def test_speeds_that_differ_cost_next_to_nothing(ranks: int, replicas: int, spread: float) -> None:
    """Ranks of which one is half the spread slower: 4 % and 16 % if that is not taken into account."""
    load_LE = loads_of("zipf 0.8", layers=8)
    speed_P = 1 + spread * (np.random.default_rng(0).random(ranks) - 0.5)
    problem = Problem(
        load_SLE=load_LE[None], ranks=ranks, replicas=replicas, speed_P=speed_P, objective=Objective.MEAN
    )
    layouts = solve(problem).slot_LPK, greedy_layout(load_LE, ranks, replicas)
    aware, unaware = (rank_times(load_LE[None], layout, speed_P).max(axis=2).mean() for layout in layouts)
    assert aware <= 1.003
    assert unaware > 1 + 0.35 * spread


def test_one_exchange_is_two_moves_and_one_move_is_a_copy() -> None:
    """Ranks {0, 1} and {2, 3} of 6 and 2: an exchange levels them at 4; today's are left without moves."""
    load_LE, today = np.array([[3.0, 3.0, 1.0, 1.0]]), np.array([[[0, 1], [2, 3]]])
    ones, node_P = np.ones(2), np.zeros(2, dtype=np.int64)
    for moves, best in ((0, 1.5), (1, 1.5), (2, 1.0)):
        slot_LPK, frontier = moved_layouts(load_LE, today, most_moves=moves, speed_P=ones, node_P=node_P)
        assert frontier[-1, 0] == best
        assert received(slot_LPK, today, 4)[0] == (2 if moves == 2 else 0)
    # Expert 1 is on both ranks and expert 0 on one: one move gives 0 a second copy in the place of a 1.
    load_LE, today = np.array([[6.0, 2.0, 2.0]]), np.array([[[0, 1], [1, 2]]])
    slot_LPK, frontier = moved_layouts(load_LE, today, most_moves=1, speed_P=ones, node_P=node_P)
    assert frontier[:, 0].tolist() == [1.4, 1.0]
    assert [sorted(slot_K) for slot_K in slot_LPK[0].tolist()] == [[0, 1], [0, 2]]


def test_few_moves_buy_most_of_the_balance() -> None:
    """64 ranks, 64 replicas, popularity that has drifted: a fresh layout takes some 300 moves a layer."""
    old_LE = loads_of("log-normal 1.0", layers=6)
    new_LE = old_LE * np.exp(0.4 * np.random.default_rng(9).standard_normal(old_LE.shape))
    today = greedy_layout(old_LE, 64, 64)
    assert ratio(new_LE, today).mean() > 1.4
    for moves, bar in ((20, 1.25), (40, 1.12), (80, 1.03)):
        problem = Problem(
            load_SLE=new_LE[None],
            ranks=64,
            replicas=64,
            current_LPE=held(today, 256),
            max_moves=moves,
            objective=Objective.MOVES,
        )
        slot_LPK = solve(problem).slot_LPK
        assert ratio(new_LE, slot_LPK).mean() <= bar
        assert received(slot_LPK, today, 256).max() <= moves
        assert doubled(slot_LPK) == 0


@given(st.integers(0, 2**32 - 1), st.integers(0, 12), st.integers(1, 3), st.booleans())
@settings(max_examples=30, deadline=None)
def test_no_layout_takes_more_moves_than_it_may_and_none_loses_an_expert(
    seed: int, moves: int, more: int, is_grouped: bool
) -> None:
    generator = np.random.default_rng(seed)
    load_LE = np.exp(generator.standard_normal((2, 8)))
    rules = {"nodes": 2, "groups": 4} if is_grouped else {}
    replicas = 4 * min(more, 2 if is_grouped else 3)
    today = solve(
        Problem(load_SLE=load_LE[None], ranks=4, replicas=replicas, objective=Objective.MEAN, **rules)
    ).slot_LPK
    new_LE = load_LE * np.exp(generator.standard_normal(load_LE.shape))
    solution = solve(
        Problem(
            load_SLE=new_LE[None],
            ranks=4,
            replicas=replicas,
            current_LPE=held(today, 8),
            max_moves=moves,
            objective=Objective.MOVES,
            **rules,
        )
    )
    assert received(solution.slot_LPK, today, 8).max() <= moves
    assert holders(solution.slot_LPK, 8).any(axis=1).all()
    assert doubled(solution.slot_LPK) == 0
    assert (ratio(new_LE, solution.slot_LPK) <= ratio(new_LE, today) * (1 + 1e-9)).all()
    if is_grouped:
        groups_LMN = solution.slot_LPK.reshape(2, 2, -1) // 2
        for layer in groups_LMN.tolist():
            assert not set(layer[0]) & set(layer[1])


def test_two_copies_on_one_rank_are_parted_by_moves() -> None:
    load_LE, today = np.array([[2.0, 2.0, 2.0]]), np.array([[[0, 0], [1, 2]]])
    slot_LPK, _ = moved_layouts(
        load_LE, today, most_moves=1, speed_P=np.ones(2), node_P=np.zeros(2, dtype=np.int64)
    )
    assert doubled(slot_LPK) == 0


@given(st.integers(0, 2**32 - 1), st.integers(0, 12))
@settings(max_examples=20, deadline=None)
def test_slots_of_second_copies_are_filled_while_there_are_moves_and_scored_as_written(
    seed: int, moves: int
) -> None:
    generator = np.random.default_rng(seed)
    layout_LN = generator.permuted(np.tile(np.arange(12) % 8, (3, 1)), axis=1)
    today = layout_LN.reshape(3, 4, 3)
    problem = Problem(
        load_SLE=np.rint(np.exp(generator.normal(3, 1, (1, 3, 8)))),
        ranks=4,
        replicas=4,
        current_LPE=np.stack([[np.bincount(slot_K, minlength=8) for slot_K in slot_PK] for slot_PK in today]),
        max_moves=moves,
        objective=Objective.MOVES,
    )
    solution = solve(problem)
    document = problem_document(problem, solution, 0.0)
    file = layout_file(solution.slot_LPK, 8, (0, 1, 2))["layers"]
    ratios, dropped = [], 0
    for layer, slot_PK in enumerate(today):
        load_P = np.zeros(4)
        for expert, rank_C in enumerate(file[str(layer)]):
            load_P[rank_C] += problem.load_SLE[0, layer, expert] / len(rank_C)
        ratios.append(load_P.max() / load_P.mean())
        lost = 12 - sum(map(len, file[str(layer)]))
        empty = sum(3 - len(set(slot_K)) for slot_K in slot_PK.tolist())
        assert lost == 0 if moves >= empty else lost >= empty - moves
        dropped += lost
    assert received(solution.slot_LPK, today, 8).max() <= moves
    assert document["candidates"][-1]["of_mean"] == pytest.approx(np.mean(ratios))
    assert document["frontier"][-1]["of_mean"] == pytest.approx(np.mean(ratios))
    codes = {reason["code"]: reason for reason in document["verdict"]}
    assert codes.get("dropped", {"dropped": 0})["dropped"] == dropped


def test_new_ranks_are_numbered_like_those_of_today() -> None:
    today, turned = np.array([[[0, 1], [2, 3], [4, 5]]]), np.array([[[4, 5], [0, 2], [1, 3]]])
    one_node, two_nodes = np.zeros(3, dtype=np.int64), np.array([0, 0, 1])
    assert renumbered(turned, holders(today, 6), one_node)[0, 2].tolist() == [4, 5]
    assert renumbered(turned, holders(today, 6), two_nodes)[0, 2].tolist() == [1, 3]


def test_experts_that_the_same_steps_activate_are_parted() -> None:
    """Two groups of experts take turns: each rank can have one of each, and then one is active."""
    load_SLE = np.zeros((32, 1, 16), dtype=np.int64)
    load_SLE[::2, 0, :8] = load_SLE[1::2, 0, 8:] = np.random.default_rng(0).integers(1, 50, (16, 8))
    slot_PK = solve(Problem(load_SLE=load_SLE, ranks=8, objective=Objective.ACTIVE)).slot_LPK[0]
    assert np.sort(slot_PK // 8, axis=1).tolist() == [[0, 1]] * 8


def test_experts_that_are_always_active_are_parted_where_activation_counts() -> None:
    """Experts 0 and 1 are active in all steps; 2 has all tokens of one step, so its mean load is largest."""
    load_SLE = np.zeros((16, 1, 4))
    load_SLE[:, 0, :2] = 4.0
    load_SLE[3, 0, 2] = 1000.0
    slot_PK = solve(Problem(load_SLE=load_SLE, ranks=2, objective=Objective.ACTIVE)).slot_LPK[0]
    assert all(len({0, 1} & set(slot_K)) == 1 for slot_K in slot_PK.tolist())


def tokens_of(topics: float, seed: int = 1) -> tuple[Int64, Int64]:
    """Experts of 3000 tokens (4 of 32) of 4 topics of 8 experts each, and the steps of the tokens."""
    generator = np.random.default_rng(seed)
    topic_T, topic_E = np.arange(3000) % 4, generator.permutation(np.repeat(np.arange(4), 8))
    score_TE = generator.gumbel(size=(3000, 32)) + topics * (topic_T[:, None] == topic_E)
    return np.argpartition(-score_TE, 4, axis=1)[:, :4], np.sort(generator.integers(32, size=3000))


def test_experts_of_a_topic_go_to_one_node_and_independent_ones_are_called_so() -> None:
    token_TK, step_T = tokens_of(20.0)
    found = structure(token_TK, step_T, np.bincount(token_TK.ravel(), minlength=32).astype(float), 4)
    assert found.is_there
    assert nodes_touched(token_TK, found.node_E, 4).mean() == 1.0
    token_TK, step_T = tokens_of(0.0)
    found = structure(token_TK, step_T, np.bincount(token_TK.ravel(), minlength=32).astype(float), 4)
    assert not found.is_there
    assert found.touched == pytest.approx(found.independent, rel=0.02)


def test_tokens_with_structure_decide_the_nodes_of_the_first_layer_only() -> None:
    token_TK, step_T = tokens_of(20.0)
    load_SE = np.stack([np.bincount(token_TK[step_T == s].ravel(), minlength=32) for s in range(32)])
    problem = Problem(
        load_SLE=np.stack([load_SE, load_SE], axis=1).astype(float),
        ranks=8,
        nodes=4,
        objective=Objective.NODES,
        token_TK=token_TK,
        token_step_T=step_T,
    )
    slot_LPK = solve(problem).slot_LPK
    touched = []
    for slot_PK in slot_LPK:
        node_E = np.empty(32, dtype=np.int64)
        node_E[slot_PK.reshape(4, -1)] = np.arange(4)[:, None]
        touched.append(nodes_touched(token_TK, node_E, 4).mean())
    assert touched[0] == 1.0
    assert touched[1] > 2.0
    assert doubled(slot_LPK) == 0
    today = np.random.default_rng(0).permutation(32).reshape(1, 8, 4).repeat(2, axis=0)
    changed = solve(replace(problem, current_LPE=held(today, 32))).slot_LPK[0]
    node_E[changed.reshape(4, -1)] = np.arange(4)[:, None]
    assert nodes_touched(token_TK, node_E, 4).mean() == 1.0


@pytest.mark.parametrize(("max_moves", "groups", "replicas"), [(-1, 1, 0), (8, 1, 0), (-1, 8, 0), (8, 1, 32)])
def test_nodes_decide_on_a_change_and_those_of_the_written_layout_are_stated(
    max_moves: int, groups: int, replicas: int
) -> None:
    token_TK, step_T = tokens_of(20.0)
    load_SE = np.stack([np.bincount(token_TK[step_T == s].ravel(), minlength=32) for s in range(32)])
    today = linear_layout(1, 32, 8)
    if replicas:
        today = np.concatenate([today, np.roll(today, 1, axis=1)], axis=2)
    problem = Problem(
        load_SLE=load_SE[:, None].astype(float),
        ranks=8,
        replicas=replicas,
        nodes=4,
        groups=groups,
        objective=Objective.NODES,
        current_LPE=held(today, 32),
        move_cost=0.1,
        max_moves=max_moves,
        token_TK=token_TK,
        token_step_T=step_T,
    )
    solution = solve(problem)
    codes = {reason["code"]: reason for reason in problem_document(problem, solution, 0.0)["verdict"]}
    node_E = np.repeat(np.arange(4), 8)
    uses_tokens = groups == 1 and not replicas
    if not replicas:
        assert codes["nodes"]["before"] == pytest.approx(nodes_touched(token_TK, node_E, 4).mean())
        node_E[solution.slot_LPK[0].reshape(4, -1)] = np.arange(4)[:, None]
        assert codes["nodes"]["after"] == pytest.approx(nodes_touched(token_TK, node_E, 4).mean())
    assert ("tokens_unused" in codes) == (not uses_tokens)
    if uses_tokens:
        assert codes["changed"]["gain"] > 0.1
        assert codes["nodes"]["after"] < 0.9 * codes["nodes"]["before"]
    if max_moves >= 0:
        assert received(solution.slot_LPK, today, 32).max() <= max_moves


@pytest.mark.parametrize(("move_cost", "max_moves"), [(10.0, -1), (0.0, -1), (0.0, 12)])
def test_new_slots_force_a_change_that_keeps_the_copies_of_today_unless_more_pays(
    move_cost: float, max_moves: int
) -> None:
    load_LE = loads_of("log-normal 1.0", layers=2)[:, :32]
    today = linear_layout(2, 32, 8)
    problem = Problem(
        load_SLE=np.rint(load_LE * 1e6 / load_LE.sum())[None].repeat(16, axis=0),
        ranks=8,
        replicas=8,
        current_LPE=held(today, 32),
        move_cost=move_cost,
        max_moves=max_moves,
    )
    solution = solve(problem)
    document = problem_document(problem, solution, 0.0)
    codes = {reason["code"]: reason for reason in document["verdict"]}
    assert "changed" not in codes
    assert "left" not in codes
    assert all(row["changed"] for row in document["by_layer"])
    moves_L = received(solution.slot_LPK, today, 32)
    assert doubled(solution.slot_LPK) == 0
    if move_cost:
        assert codes["forced"]["filled"] == 2
        assert moves_L.tolist() == [8, 8]
        assert document["candidates"][-1]["of_steps"] < document["candidates"][1]["of_steps"]
    else:
        assert codes["forced"]["filled"] < 2
        assert (moves_L >= 8).all()
    if max_moves >= 0:
        assert moves_L.max() <= max_moves
        assert document["frontier"][-1]["of_mean"] == pytest.approx(document["candidates"][-1]["of_mean"])
        with pytest.raises(PlacementError, match="7 moves fill"):
            solve(replace(problem, max_moves=7))


def test_activated_experts_and_the_load_that_they_cost_are_stated() -> None:
    load_SLE = np.random.default_rng(4).poisson(np.linspace(0.2, 3.0, 16), (16, 2, 16)).astype(float)
    problem = Problem(
        load_SLE=load_SLE, ranks=4, objective=Objective.ACTIVE, current_LPE=held(linear_layout(2, 16, 4), 16)
    )
    solution = solve(problem)
    codes = {reason["code"]: reason for reason in problem_document(problem, solution, 0.0)["verdict"]}
    held_LPE = holders(solution.slot_LPK, 16)
    active = np.einsum("sle,lpe->slp", load_SLE > 0, held_LPE.astype(int)).max(axis=2).mean()
    assert codes["activated"]["after"] == pytest.approx(active)
    assert codes["activated"]["load_after"] == pytest.approx(on_steps(load_SLE, solution.slot_LPK))
    assert codes["activated"]["before"] >= codes["activated"]["after"]
    every = replace(problem, load_SLE=load_SLE + 1)
    solution = solve(every)
    document = problem_document(every, solution, 0.0)
    assert "all_active" in {reason["code"] for reason in document["verdict"]}
    assert on_steps(every.load_SLE, solution.slot_LPK) == on_steps(
        every.load_SLE, solve(replace(every, objective=Objective.STEP)).slot_LPK
    )


def test_layers_and_steps_without_load_do_not_count() -> None:
    load_SLE = np.random.default_rng(1).poisson(20.0, (16, 3, 16)).astype(float)
    load_SLE[:, 1], load_SLE[3, 2] = 0, 0
    problem = Problem(load_SLE=load_SLE, ranks=4, current_LPE=held(linear_layout(3, 16, 4), 16), max_moves=0)
    document = problem_document(problem, solve(problem), 0.0)
    load_SLP = load_SLE.reshape(16, 3, 4, 4).sum(axis=3)
    loaded_SL = load_SLP.any(axis=2)
    ratio_N = load_SLP.max(axis=2)[loaded_SL] / load_SLP.mean(axis=2)[loaded_SL]
    mean_LP = load_SLP.mean(axis=0)[[0, 2]]
    row = document["candidates"][-1]
    assert row["of_steps"] == pytest.approx(ratio_N.mean())
    assert row["of_mean"] == pytest.approx((mean_LP.max(axis=1) / mean_LP.mean(axis=1)).mean())


def test_steps_that_drift_are_forecast_from_the_last_ones_and_others_from_all() -> None:
    walk_SLE = np.stack([drifting(seed, 0.6, experts=32, tokens=512) for seed in range(3)], axis=1)
    assert half_life(walk_SLE[:32].astype(np.float64)) is not None
    still_SLE = np.random.default_rng(0).poisson(50.0, (32, 3, 32)).astype(np.float64)
    assert half_life(still_SLE) is None
    assert half_life(still_SLE[:7]) is None
    expected_LE, scenario_SLE = forecast(walk_SLE[:32].astype(np.float64))
    assert (scenario_SLE >= 0).all()
    after_LE = walk_SLE[32:].mean(axis=0)
    mean_LE = walk_SLE[:32].mean(axis=0)
    assert ((expected_LE - after_LE) ** 2).sum() < ((mean_LE - after_LE) ** 2).sum()


@pytest.mark.slow
def test_steps_after_a_drift_are_balanced_better_than_by_the_mean() -> None:
    load_SLE = np.stack([drifting(seed, 0.6) for seed in range(4)], axis=1).astype(np.float64)
    train, test = load_SLE[:32], load_SLE[32:]
    here = on_steps(test, solve(Problem(load_SLE=train, ranks=32, replicas=32)).slot_LPK)
    assert here < on_steps(test, greedy_layout(train.mean(axis=0), 32, 32)) - 0.05


def test_a_layer_is_changed_only_where_that_pays() -> None:
    """Layer 0 has its two heavy experts on one rank, layer 1 has them apart."""
    heavy_first, heavy_apart = [300.0, 300.0, 100.0, 100.0], [300.0, 100.0, 300.0, 100.0]
    load_SLE = np.concatenate([steps_of(heavy_first, 32), steps_of(heavy_apart, 32)], axis=1)
    today = np.array([[[0, 1], [2, 3]]] * 2)
    for cost, changed in ((0.1, [True, False]), (0.6, [False, False])):
        problem = Problem(load_SLE=load_SLE, ranks=2, current_LPE=held(today, 4), move_cost=cost)
        solution = solve(problem)
        assert solution.is_changed_L is not None
        assert solution.gain_L is not None
        assert solution.is_changed_L.tolist() == changed
        assert solution.gain_L[0] == pytest.approx(0.5, abs=0.1)
        assert (solution.slot_LPK[1] == today[1]).all()
    few = solve(Problem(load_SLE=load_SLE[:4], ranks=2, current_LPE=held(today, 4), move_cost=0.1))
    assert few.gain_L is None
    assert (few.slot_LPK == today).all()


def test_noisy_gains_of_layers_are_drawn_together_and_clear_ones_are_not() -> None:
    generator = np.random.default_rng(0)
    noise = generator.standard_normal((16, 20))
    assert np.ptp(shrunk(noise)) < 0.5 * np.ptp(noise.mean(axis=0))
    clear = np.arange(20) + 0.01 * noise
    assert np.abs(shrunk(clear) - clear.mean(axis=0)).max() < 0.01


def test_a_layout_with_replicas_is_as_good_as_the_exact_optimum() -> None:
    """HiGHS chooses numbers of copies and ranks together: y[e, c] copies, x[e, c, p] on rank p."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    experts, ranks, replicas = 6, 3, 3
    load_E = np.array([9.0, 7.0, 4.0, 3.0, 2.0, 1.0])
    pairs = [(e, c) for e in range(experts) for c in range(1, ranks + 1)]
    y, x = {}, {}
    for pair in pairs:
        y[pair] = len(y) + len(x)
        for p in range(ranks):
            x[*pair, p] = len(y) + len(x)
    count = len(y) + len(x) + 1  # and the busiest rank
    rows, low, high = [], [], []

    def constrain(entries: dict[int, float], least: float, most: float) -> None:
        row = np.zeros(count)
        for at, value in entries.items():
            row[at] = value
        rows.append(row)
        low.append(least)
        high.append(most)

    for e in range(experts):
        constrain({y[e, c]: 1.0 for c in range(1, ranks + 1)}, 1, 1)
    for e, c in pairs:
        constrain({y[e, c]: -float(c)} | {x[e, c, p]: 1.0 for p in range(ranks)}, 0, 0)
    for p in range(ranks):
        constrain({x[e, c, p]: 1.0 for e, c in pairs}, 3, 3)
        constrain({x[e, c, p]: load_E[e] / c for e, c in pairs} | {count - 1: -1.0}, -np.inf, 0)
    cost = np.zeros(count)
    cost[-1] = 1.0
    exact = milp(
        cost,
        constraints=LinearConstraint(np.array(rows), low, high),
        integrality=np.r_[np.ones(count - 1), 0],
        bounds=Bounds(0, np.r_[np.ones(count - 1), np.inf]),
    )
    problem = Problem(load_SLE=load_E[None, None], ranks=ranks, replicas=replicas, objective=Objective.MEAN)
    here = ratio(load_E[None], solve(problem).slot_LPK)[0] * load_E.sum() / ranks
    assert here == pytest.approx(exact.fun, rel=1e-3)


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **({"loads": np.ones((4, 2, 8), dtype=np.int64), "ranks": 4} | arrays))
    return path


def test_a_problem_goes_in_and_a_placement_comes_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_SLE = np.tile(np.array([400, 200, 100, 100]), (4, 2, 1))
    problem = saved(
        tmp_path / "problem.npz", loads=load_SLE, ranks=2, replicas=np.int32(2), objective="mean", top_k=1
    )
    out = tmp_path / "out.json"
    assert main(["place", "--problem", str(problem), "--out", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["kind"] == "placement_problem"
    assert [row["candidate"] for row in document["candidates"]] == ["greedy", "solution"]
    assert document["verdict"][0]["code"] == "proven"
    file = load_placement(out)
    assert sorted(map(int, file.layers or {})) == [0, 1]
    assert sum(map(len, file.holders(1, experts=4, ep=2))) == 6
    nothing = np.zeros((0, 1))
    saved(
        problem, loads=load_SLE, ranks=2, nodes=0, groups=0, tokens=nothing, token_step=nothing, speed=nothing
    )
    assert main(["place", "--problem", str(problem), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["objective"] == "step"
    saved(problem, loads=load_SLE, ranks=2, replicas=2, objective="mean")
    assert main(["place", "--problem", str(problem), "--wide"]) == 0
    assert "proven to be the best" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"loads": np.ones((4, 8))}, "3 dimensions of whole numbers"),
        ({"loads": np.full((4, 2, 8), -1)}, "expected 0 to"),
        ({"loads": np.ones((0, 2, 8), dtype=np.int64)}, "none empty"),
        ({"loads": np.array([[[{}]]], dtype=object)}, "an array of object"),
        ({"ranks": 0}, "ranks is 0"),
        ({"ranks": np.ones(3)}, "expected one value"),
        ({"ranks": 3}, "do not fill 3 ranks"),
        ({"replicas": 1}, "numbers of replicas that do"),
        ({"nodes": 3}, "4 ranks on 3 nodes"),
        ({"groups": 3, "nodes": 2}, "8 experts in 3 groups"),
        ({"groups": 4, "nodes": 4, "replicas": 4}, "at most one copy of each"),
        (
            {"objective": "nodes", "nodes": 4, "replicas": 4, "tokens": np.zeros((5, 2), dtype=int)},
            "at most one copy of each",
        ),
        ({"objective": "fastest"}, "objective is 'fastest'; expected one of mean, step"),
        ({"objective": "nodes", "nodes": 2}, "without tokens"),
        ({"objective": "moves"}, "expected current"),
        ({"speed": np.zeros(4)}, "positive numbers"),
        ({"speed": np.ones(3)}, "for each of 4 ranks"),
        ({"move_cost": np.nan}, "not negative"),
        ({"current": np.ones((2, 8, 3), dtype=np.int8)}, "layers, experts, ranks"),
        ({"current": np.eye(8, 4, dtype=np.int8)[None].repeat(2, axis=0)}, "at least one of every expert"),
        ({"tokens": np.full((5, 2), 8)}, "expected 0 to 7"),
        (
            {"tokens": np.zeros((5, 2), dtype=int), "token_step": np.zeros(4, dtype=int)},
            "5 tokens with 4 steps",
        ),
    ],
)
def test_problems_that_do_not_fit_together_are_refused_in_one_sentence(
    arrays: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path / "problem.npz", **arrays)
    assert main(["place", "--problem", str(path)]) == 1
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_arrays_that_claim_more_than_their_file_has_are_not_believed(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<i8", "fortran_order": False, "shape": (1 << 40, 2, 8)}
    )
    path = tmp_path / "problem.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("loads.npy", header.getvalue() + bytes(64))
    with pytest.raises(PlacementError, match="not valid"):
        read_problem(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as member:
        for _ in range(1025):
            member.write(bytes(1 << 20))
    with pytest.raises(PlacementError, match="at most 64 of 1024 MiB"):
        read_problem(path)
    for content in (b"", b"no archive", path.read_bytes()[: path.stat().st_size // 2]):
        path.write_bytes(content)
        with pytest.raises(PlacementError, match="not valid"):
            read_problem(path)
    with pytest.raises(PlacementError, match="cannot be read"):
        read_problem(tmp_path / "missing.npz")
    np.savez(path, ranks=4)
    with pytest.raises(PlacementError, match="has no loads"):
        read_problem(path)


def test_a_problem_at_the_noise_floor_is_called_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """8 tokens of 4 distinct experts of 64 a step, all alike."""
    generator = np.random.default_rng(0)
    chosen = np.argsort(generator.random((256, 8, 64)), axis=2)[:, :, :4].reshape(256, -1)
    load_SLE = np.stack([np.bincount(row, minlength=64) for row in chosen]).reshape(32, 8, 64)
    path = saved(tmp_path / "problem.npz", loads=load_SLE, ranks=8, top_k=4)
    assert main(["place", "--problem", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"][0]["code"] == "at_floor"
    saved(path, loads=100 * load_SLE, ranks=8, top_k=4)
    assert main(["place", "--problem", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == []


def test_a_run_is_needed_where_there_is_no_problem(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["run", "--problem", "a.npz"], ["--problem", "a.npz", "--evaluate", "true"]):
        assert main(["place", *arguments]) == 1
        assert "expected one of them" in capsys.readouterr().err
    assert main(["place", "run"]) == 1
    assert "--ranks" in capsys.readouterr().err


def test_whole_numbers_of_another_type_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "p.npz"
    loads = np.arange(32, dtype=np.float32).reshape(2, 2, 8)
    np.savez(path, loads=loads, ranks=np.array(2.0), current=np.zeros((2, 8, 2), dtype=bool))
    problem = read_problem(path)
    assert problem.load_SLE.tolist() == loads.tolist()
    assert problem.ranks == 2
    assert problem.current_LPE is None


def damaged(path: Path, how: str) -> None:
    np.savez_compressed(path, loads=np.arange(4096).reshape(2, 2, 1024), ranks=2)
    content = bytearray(path.read_bytes())
    if how == "stream":
        content[120:160] = b"\xff" * 40
        path.write_bytes(content)
    elif how == "twice":
        with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            archive.writestr("ranks.npy", archive.read("ranks.npy"))
    elif how == "fraction":
        np.savez(path, loads=np.full((2, 2, 8), 0.5), ranks=2)
    else:
        np.savez_compressed(path, loads=np.zeros((2, 1024, 32768), dtype=np.uint8), ranks=2)


@pytest.mark.parametrize("how", ["stream", "twice", "fraction", "bomb"])
def test_damaged_files_are_refused_before_they_are_computed_with(tmp_path: Path, how: str) -> None:
    path = tmp_path / "p.npz"
    damaged(path, how)
    with pytest.raises(PlacementError):
        read_problem(path)
