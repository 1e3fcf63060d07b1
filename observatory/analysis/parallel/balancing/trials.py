"""Trials of placement solvers: problems, what they are judged on, and what simple layouts reach.

Shapes: S steps, L layers, E experts, P ranks, K slots of each rank, T tokens, K experts of a token.

A solver sees the first steps of a trial and is judged on the others. Scores are lower for better placements.
The set is fixed by its version and the seed, so that results can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.parallel.balancing.coactivation import nodes_touched
from observatory.analysis.parallel.balancing.families import (
    drifting_loads,
    popularity,
    still_loads,
    topic_tokens,
)
from observatory.analysis.parallel.balancing.layouts import Float64, Int64, greedy_layout, holders
from observatory.analysis.parallel.balancing.moves import slots_of
from observatory.analysis.parallel.balancing.problem import Objective, Problem
from observatory.analysis.parallel.balancing.solving import layout_of_mean, solve
from observatory.analysis.parallel.balancing.steps import steps_layout

#: Changes with every change of the trials or of how they are judged.
VERSION = "1"
_LAYERS, _STEPS = 4, 32


class Unit(StrEnum):
    """What a score is."""

    RATIO = "busiest rank over the mean"
    EXPERTS = "activated experts of the busiest rank"
    NODES = "nodes per token"


class Fault(StrEnum):
    """Why a placement is not one of the problem."""

    EXPERT_MISSING = "expert_missing"
    TOO_MANY_COPIES = "too_many_copies"
    GROUP_SPLIT = "group_split"
    TOO_MANY_MOVES = "too_many_moves"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trial:
    """A problem and the steps that its solution is judged on.

    Attributes:
        name: which one.
        problem: what the solver sees.
        test_SLE: loads of the steps after those of the problem.
        test_token_TK: sampled tokens of these steps, of the first layer; None where nodes do not count.
    """

    name: str
    problem: Problem
    test_SLE: Float64
    test_token_TK: Int64 | None = None

    @property
    def unit(self) -> Unit:
        """What its score is."""
        units = {Objective.ACTIVE: Unit.EXPERTS, Objective.NODES: Unit.NODES}
        return units.get(self.problem.objective, Unit.RATIO)

    def fault(self, share_LPE: Float64) -> Fault | None:
        """Why shares of experts on ranks are no solution of the problem; None where they are one."""
        problem, held_LPE = self.problem, share_LPE > 0
        layers, ranks, experts = held_LPE.shape
        if not np.allclose(share_LPE.sum(axis=1), 1.0):
            return Fault.EXPERT_MISSING
        if held_LPE.sum(axis=2).max() > (experts + problem.replicas) // ranks:
            return Fault.TOO_MANY_COPIES
        if problem.groups > 1:
            shape = layers, problem.nodes, -1, problem.groups, experts // problem.groups
            if held_LPE.reshape(shape).any(axis=(2, 4)).sum(axis=1).max() > 1:
                return Fault.GROUP_SPLIT
        if problem.max_moves >= 0 and problem.current_LPE is not None:
            moves_L = (held_LPE & (problem.current_LPE == 0)).sum(axis=(1, 2))
            if moves_L.max() > problem.max_moves:
                return Fault.TOO_MANY_MOVES
        return None

    def score(self, share_LPE: Float64) -> float:
        """What shares of experts on ranks reach on the steps that were not seen."""
        problem = self.problem
        if problem.objective is Objective.NODES:
            assert self.test_token_TK is not None
            rank_E = share_LPE[0].argmax(axis=0)
            node_E = rank_E // (problem.ranks // problem.nodes)
            return float(nodes_touched(self.test_token_TK, node_E, problem.nodes).mean())
        if problem.objective is Objective.ACTIVE:
            active_SLE, held_LPE = (self.test_SLE > 0).astype(np.float64), share_LPE > 0
            return float(np.einsum("sle,lpe->slp", active_SLE, held_LPE).max(axis=2).mean())
        load_SLE = self.test_SLE.mean(axis=0)[None] if problem.is_of_mean else self.test_SLE
        time_SLP = np.einsum("sle,lpe->slp", load_SLE, share_LPE) / problem.speeds
        perfect_SL = load_SLE.sum(axis=2) / problem.speeds.sum()
        ratio = float((time_SLP.max(axis=2) / np.maximum(perfect_SL, 1e-300)).mean())
        if problem.current_LPE is None:
            return ratio
        changed_L = ((share_LPE > 0) != (problem.current_LPE > 0)).any(axis=(1, 2))
        return ratio + problem.move_cost * float(changed_L.mean())


def shares_of(slot_LPK: Int64, experts: int) -> Float64:
    """Equal shares of the holders of a layout, (L, P, E)."""
    held_LPE = holders(slot_LPK, experts)
    return np.asarray(held_LPE / np.maximum(held_LPE.sum(axis=1, keepdims=True), 1))


def baselines(trial: Trial) -> Mapping[str, Float64]:
    """Shares of simple solutions: today's, the published greedy way's, the observatory's, and hindsight's.

    The greedy way knows no speeds, moves or tokens; where that makes it no solution it is left out.
    """
    problem, experts = trial.problem, trial.problem.load_SLE.shape[2]
    unaware = replace(problem, speed_P=None)
    greedy = layout_of_mean(unaware, problem.load_SLE.mean(axis=0), is_greedy=True)
    test_SLE = trial.test_SLE
    if problem.objective is Objective.ACTIVE:
        test_SLE = (test_SLE > 0).astype(np.float64)
    after = layout_of_mean(problem, test_SLE.mean(axis=0), is_greedy=not problem.is_of_mean)
    if not problem.is_of_mean:
        after = steps_layout(test_SLE, after, speed_P=problem.speed_P, node_P=problem.node_P)
    layouts = {"greedy": greedy, "observatory": solve(problem).slot_LPK}
    if problem.current_LPE is not None:
        layouts = {"stay": slots_of(problem.current_LPE)} | layouts
    elif problem.token_TK is None and problem.max_moves < 0:
        layouts["hindsight"] = after
    shares = {name: shares_of(layout, experts) for name, layout in layouts.items()}
    return {name: share_LPE for name, share_LPE in shares.items() if trial.fault(share_LPE) is None}


def generated_trials(seed: int = 0) -> Iterator[Trial]:
    """The trials of generated loads: skew, groups, speeds, moves, drift, change, activation and topics."""
    for name, ranks, replicas in (
        ("zipf 1.2", 64, 64),
        ("log-normal 0.5", 64, 0),
        ("dirichlet 0.3", 64, 64),
    ):
        load_SLE = _counted(popularity(name, layers=_LAYERS, seed=seed), seed)
        problem = Problem(
            load_SLE=load_SLE[:_STEPS], ranks=ranks, replicas=replicas, objective=Objective.MEAN
        )
        yield Trial(name=f"skew {name}, {ranks} + {replicas}", problem=problem, test_SLE=load_SLE[_STEPS:])
    load_SLE = _counted(popularity("zipf 1.0", layers=_LAYERS, seed=seed), seed)
    even = Problem(load_SLE=load_SLE[:_STEPS], ranks=64, replicas=64, objective=Objective.MEAN)
    for nodes in (4, 8):
        problem = replace(even, nodes=nodes, groups=8)
        yield Trial(name=f"groups on {nodes} nodes", problem=problem, test_SLE=load_SLE[_STEPS:])
    speed_P = 1 + 0.277 * (np.random.default_rng(seed).random(64) - 0.5)
    yield Trial(name="speeds", problem=replace(even, speed_P=speed_P), test_SLE=load_SLE[_STEPS:])
    yield from _moves(even, load_SLE, seed)
    for drift in (0.0, 0.3, 0.6):
        yield _drift(drift, seed)
    yield from _changes(seed)
    load_SLE = _stacked([still_loads(1.0, seed=seed + layer) for layer in range(8)])
    problem = Problem(load_SLE=load_SLE[:_STEPS], ranks=32, objective=Objective.ACTIVE)
    yield Trial(name="activated, 16 tokens", problem=problem, test_SLE=load_SLE[_STEPS:])
    for strength in (3.0, 0.0):
        yield _topics(strength, seed)


def captured_trials(name: str, load_SLE: NDArray[np.int64]) -> Iterator[Trial]:
    """Trials of captured steps: on 8 ranks, or as many as divide the experts; without replicas and with."""
    steps, _, experts = load_SLE.shape
    fitting = [ranks for ranks in (8, 4, 2) if experts % ranks == 0 and experts > ranks]
    for replicas in (0, *fitting[:1]) if fitting else ():
        problem = Problem(
            load_SLE=load_SLE[: steps // 2].astype(np.float64), ranks=fitting[0], replicas=replicas
        )
        yield Trial(
            name=f"{name}, {fitting[0]} + {replicas}",
            problem=problem,
            test_SLE=load_SLE[steps // 2 :].astype(np.float64),
        )


def _moves(even: Problem, load_SLE: Float64, seed: int) -> Iterator[Trial]:
    """Popularity has moved since today's layout was made."""
    before_LE = load_SLE.mean(axis=0)
    moved_LE = before_LE * np.exp(0.4 * np.random.default_rng(seed).standard_normal(before_LE.shape))
    today = holders(greedy_layout(before_LE, 64, 64), before_LE.shape[1]).astype(np.int8)
    after_SLE = _counted(moved_LE, seed)
    for moves in (20, 80):
        problem = replace(
            even,
            load_SLE=after_SLE[:_STEPS],
            current_LPE=today,
            max_moves=moves,
            objective=Objective.MOVES,
        )
        yield Trial(name=f"at most {moves} moves", problem=problem, test_SLE=after_SLE[_STEPS:])


def _drift(drift: float, seed: int) -> Trial:
    load_SLE = _stacked([drifting_loads(drift, seed=seed + layer) for layer in range(_LAYERS)])
    problem = Problem(load_SLE=load_SLE[:_STEPS], ranks=32, replicas=32)
    return Trial(name=f"drift {drift:g}", problem=problem, test_SLE=load_SLE[_STEPS:])


def _changes(seed: int) -> Iterator[Trial]:
    """Today's layout is that of the window before; a change of a layer costs 0.1."""
    for drift in (0.0, 0.3, 0.6):
        windows = [
            drifting_loads(drift, steps=3 * _STEPS, experts=64, tokens=512, seed=seed + 100 + layer)
            for layer in range(8)
        ]
        load_SLE = _stacked(windows)
        today = solve(Problem(load_SLE=load_SLE[:_STEPS], ranks=16)).slot_LPK
        problem = Problem(
            load_SLE=load_SLE[_STEPS : 2 * _STEPS],
            ranks=16,
            current_LPE=holders(today, 64).astype(np.int8),
            move_cost=0.1,
        )
        yield Trial(name=f"stay or change, drift {drift:g}", problem=problem, test_SLE=load_SLE[2 * _STEPS :])


def _topics(strength: float, seed: int) -> Trial:
    token_TK, step_T = topic_tokens(strength, seed=seed)
    load_SE = np.stack([np.bincount(token_TK[step_T == s].ravel(), minlength=128) for s in range(2 * _STEPS)])
    is_early = step_T < _STEPS
    problem = Problem(
        load_SLE=load_SE[:_STEPS, None].astype(np.float64),
        ranks=32,
        nodes=4,
        objective=Objective.NODES,
        token_TK=token_TK[is_early],
        token_step_T=step_T[is_early],
    )
    return Trial(
        name="strong topics" if strength else "no topics",
        problem=problem,
        test_SLE=load_SE[_STEPS:, None].astype(np.float64),
        test_token_TK=token_TK[~is_early],
    )


def _counted(load_LE: Float64, seed: int) -> Float64:
    """Counts of steps of 64 * 8192 assignments that follow given popularities, (S, L, E)."""
    share_LE = load_LE / load_LE.sum(axis=1, keepdims=True)
    counts = np.random.default_rng(seed + 1).poisson(share_LE * 64 * 8192, (2 * _STEPS, *load_LE.shape))
    return counts.astype(np.float64)


def _stacked(load_SE: list[Int64]) -> Float64:
    return np.stack(load_SE, axis=1).astype(np.float64)
