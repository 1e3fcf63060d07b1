"""What ``observatory place --problem`` prints, and the placement that it writes."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import numpy as np

from observatory.advice.placement_floor import AT_FLOOR, routing_floor
from observatory.analysis.columns import Column, Table
from observatory.analysis.parallel.balancing import (
    Float64,
    Int64,
    greedy_layout,
    holders,
    lower_bound,
    rank_times,
    slots_of,
    without_seconds,
    written_times,
)
from observatory.analysis.parallel.balancing.coactivation import nodes_per_token
from observatory.analysis.parallel.balancing.nodes import node_bound
from observatory.analysis.parallel.balancing.problem import Objective, Problem
from observatory.analysis.parallel.balancing.solving import Solution, uses_tokens
from observatory.analysis.parallel.dispatch_rules import slot_loads
from observatory.reasons import Reason
from observatory.run.documents.printed import printed_document
from observatory.text import counted

#: A layout within this of its bound is called the best.
_PROVEN = 1.1e-3

COLUMNS = (
    Column(name="candidate", title="placement", text=True, key=True),
    Column(name="of_mean", title="of mean", digits=3, legend="busiest rank over the mean: of the mean step"),
    Column(name="of_steps", title="of steps", digits=3, legend="of each step, mean over steps"),
    Column(name="moved", title="moved", digits=1, legend="copies that ranks have to receive, per layer"),
)
LAYER_COLUMNS = (
    Column(name="layer", title="layer", key=True),
    Column(name="of_mean", title="of mean", digits=3, legend="busiest rank over the mean, of the mean step"),
    Column(name="bound", title="bound", digits=3, legend="what no placement can be below, of the mean step"),
    Column(name="changed", title="changed", text=True, legend="whether it is not left as it is today"),
    Column(name="gain", title="gain", digits=4, legend="likely gain on steps that follow, in of steps"),
)


class ProblemCode(StrEnum):
    """What is stated about the solution of a problem."""

    PROVEN = "proven"
    GROUPS_COST = "groups_cost"
    CHANGED = "changed"
    LEFT = "left"
    TOO_SHORT = "too_short"
    AT_FLOOR = "at_floor"
    MOVES = "moves"
    ACTIVATED = "activated"
    ALL_ACTIVE = "all_active"
    FORCED = "forced"
    DROPPED = "dropped"
    NODES = "nodes"
    TOKENS_UNUSED = "tokens_unused"
    STRUCTURE = "structure"
    NO_STRUCTURE = "no_structure"


def problem_document(problem: Problem, solution: Solution, cpu_s: float) -> dict[str, Any]:
    """The solution as ``--json`` prints it (docs/json.md).

    Args:
        problem: the problem.
        solution: its solution.
        cpu_s: processor time of the solver.
    """
    mean_LE = problem.load_SLE.mean(axis=0)
    layers, experts = mean_LE.shape
    layouts = (
        {"greedy": greedy_layout(mean_LE, problem.ranks, problem.replicas)} if problem.groups == 1 else {}
    )
    if problem.current_LPE is not None:
        layouts["today"] = slots_of(problem.current_LPE)
    layouts["solution"] = solution.slot_LPK
    of_mean_L = written_times(mean_LE[None], solution.slot_LPK, problem.speed_P).max(axis=2)[0]
    bound_L = _bounds(problem, mean_LE)
    changed_L, gain_L = solution.is_changed_L, solution.gain_L
    return printed_document(
        "placement_problem",
        {
            "objective": problem.objective.value,
            "ranks": problem.ranks,
            "replicas": problem.replicas,
            "steps": len(problem.load_SLE),
            "layers": layers,
            "experts": experts,
            "cpu_s": cpu_s,
            "bound": _loaded_mean(bound_L[None], mean_LE[None]),
            "gain": None if gain_L is None else float(gain_L.mean()),
            "verdict": [reason.document() for reason in _verdict(problem, solution, of_mean_L, bound_L)],
            "candidates": [_row(problem, name, layout) for name, layout in layouts.items()],
            "by_layer": [
                {
                    "layer": layer,
                    "of_mean": float(of_mean_L[layer]),
                    "bound": float(bound_L[layer]),
                    "changed": None if changed_L is None else bool(changed_L[layer]) or solution.is_forced,
                    "gain": None if gain_L is None else float(gain_L[layer]),
                }
                for layer in range(layers)
            ],
            "frontier": None
            if solution.frontier_ML is None
            else [
                {"moves": moves, "of_mean": _loaded_mean(ratio_L[None], mean_LE[None])}
                for moves, ratio_L in enumerate(solution.frontier_ML)
            ],
        },
    )


def problem_tables(document: dict[str, Any]) -> list[Table]:
    """The candidates and layers of the document."""
    title = (
        f"{document['experts']} experts and {counted(document['replicas'], 'replica')} on "
        f"{document['ranks']} ranks, {counted(document['layers'], 'layer')}, made on "
        f"{counted(document['steps'], 'step')}"
    )
    return [
        Table(name="candidates", columns=COLUMNS, rows=document["candidates"], title=title),
        Table(name="layers", columns=LAYER_COLUMNS, rows=document["by_layer"], title="Layers"),
    ]


def layout_file(
    slot_LPK: Int64, experts: int, layers: tuple[int, ...], share_LPK: Float64 | None = None
) -> dict[str, Any]:
    """A layout as a placement file: for every layer and expert the ranks that hold it, and their shares."""
    held_LPE = holders(slot_LPK, experts)
    shares: dict[str, Any] = {}
    if share_LPK is not None:
        share_LPE = np.zeros(held_LPE.shape)
        np.put_along_axis(share_LPE, slot_LPK, share_LPK, axis=2)
        shares["shares"] = {
            str(layer): [
                (share_P[held_P] / share_P[held_P].sum()).tolist()
                for share_P, held_P in zip(share_PE.T, held_PE.T, strict=True)
            ]
            for layer, share_PE, held_PE in zip(layers, share_LPE, held_LPE, strict=True)
        }
    return {
        "ranks": slot_LPK.shape[1],
        "layers": {
            str(layer): [np.flatnonzero(held_P).tolist() for held_P in held_PE.T]
            for layer, held_PE in zip(layers, held_LPE, strict=True)
        },
        **shares,
    }


def _bounds(problem: Problem, mean_LE: Float64) -> Float64:
    """What no layout can be below, (L,)."""
    bound_L = lower_bound(mean_LE, problem.ranks, problem.replicas)
    if problem.speed_P is not None:
        bound_L = np.maximum(bound_L * problem.speed_P.mean() / problem.speed_P.max(), 1.0)
    elif problem.groups > 1:
        bound_L = np.maximum(bound_L, node_bound(mean_LE, nodes=problem.nodes, groups=problem.groups))
    return bound_L


def _rule(problem: Problem) -> str:
    """What the bound rests on."""
    if problem.speed_P is not None:
        return "speeds"
    if problem.groups > 1:
        return "nodes"
    return "copies" if problem.replicas else "slots"


def _row(problem: Problem, name: str, slot_LPK: Int64) -> dict[str, Any]:
    mean_LE = problem.load_SLE.mean(axis=0)
    moved = None
    if problem.current_LPE is not None:
        held_LPE = holders(slot_LPK, mean_LE.shape[1])
        moved = float((held_LPE & (problem.current_LPE == 0)).sum() / len(slot_LPK))
    times = rank_times if name == "today" else written_times
    return {
        "candidate": name,
        "of_mean": _loaded_mean(times(mean_LE[None], slot_LPK, problem.speed_P).max(axis=2), mean_LE[None]),
        "of_steps": _loaded_mean(
            times(problem.load_SLE, slot_LPK, problem.speed_P).max(axis=2), problem.load_SLE
        ),
        "moved": moved,
    }


def _loaded_mean(ratio_SL: Float64, load_SLE: Float64) -> float:
    """Mean over layer-steps that have load; 1.0 where none has."""
    loaded_SL = load_SLE.sum(axis=2) > 0
    return float(ratio_SL[loaded_SL].mean()) if loaded_SL.any() else 1.0


def _verdict(problem: Problem, solution: Solution, of_mean_L: Float64, bound_L: Float64) -> Iterator[Reason]:
    layers, mean_1LE = len(of_mean_L), problem.load_SLE.mean(axis=0)[None]
    proven = int((of_mean_L <= bound_L * (1 + _PROVEN)).sum())
    if proven and problem.is_of_mean:
        values: dict[str, Any] = {
            "proven": proven,
            "layers": layers,
            "bound": _loaded_mean(bound_L[None], mean_1LE),
            "rule": _rule(problem),
        }
        yield Reason(ProblemCode.PROVEN, values)
    if problem.groups > 1:
        free = lower_bound(problem.load_SLE.mean(axis=0), problem.ranks, problem.replicas)
        yield Reason(
            ProblemCode.GROUPS_COST,
            {
                "with_groups": _loaded_mean(of_mean_L[None], mean_1LE),
                "without": _loaded_mean(free[None], mean_1LE),
            },
        )
    if problem.objective is Objective.STEP and problem.groups == 1 and problem.speed_P is None:
        greedy = greedy_layout(problem.load_SLE.mean(axis=0), problem.ranks, problem.replicas)
        of_steps = _loaded_mean(rank_times(problem.load_SLE, greedy).max(axis=2), problem.load_SLE)
        floor = routing_floor(problem.load_SLE, problem.ranks, problem.top_k)
        if floor is not None and of_steps <= floor * (1 + AT_FLOOR):
            yield Reason(ProblemCode.AT_FLOOR, {"greedy": of_steps, "floor": floor})
    if solution.frontier_ML is not None:
        first, last = (_loaded_mean(ratio_L[None], mean_1LE) for ratio_L in solution.frontier_ML[[0, -1]])
        yield Reason(ProblemCode.MOVES, {"moves": problem.max_moves, "before": first, "after": last})
    if solution.is_changed_L is not None:
        yield _changed(problem, solution, int(solution.is_changed_L.sum()), layers)
    experts = problem.load_SLE.shape[2]
    dropped = int((without_seconds(solution.slot_LPK, experts) == experts).sum())
    if dropped:
        yield Reason(ProblemCode.DROPPED, {"dropped": dropped})
    if problem.objective is Objective.ACTIVE:
        yield from _activated(problem, solution)
    if solution.structure is not None:
        code = ProblemCode.STRUCTURE if solution.structure.is_there else ProblemCode.NO_STRUCTURE
        touched, independent = solution.structure.touched, solution.structure.independent
        yield Reason(code, {"nodes": touched, "independent_nodes": independent})
        if solution.structure.is_there and not uses_tokens(problem, solution.structure):
            yield Reason(ProblemCode.TOKENS_UNUSED, {"by": "groups" if problem.groups > 1 else "moves"})
        yield Reason(
            ProblemCode.NODES,
            {
                "before": None
                if problem.current_LPE is None
                else _nodes(problem, slots_of(problem.current_LPE[:1])[0]),
                "after": _nodes(problem, solution.slot_LPK[0]),
            },
        )


def _activated(problem: Problem, solution: Solution) -> Iterator[Reason]:
    """Activated experts and the load of the busiest rank, today and on the solution."""
    if problem.is_all_active:
        yield Reason(ProblemCode.ALL_ACTIVE, {})
    layouts = {"after": solution.slot_LPK}
    if problem.current_LPE is not None:
        layouts["before"] = slots_of(problem.current_LPE)
    values: dict[str, Any] = {}
    for name, slot_LPK in layouts.items():
        active_SLP = (slot_loads(problem.load_SLE, slot_LPK) > 0).sum(axis=3)
        time_SLP = rank_times(problem.load_SLE, slot_LPK, problem.speed_P)
        values[name] = float(active_SLP.max(axis=2).mean())
        values[f"load_{name}"] = _loaded_mean(time_SLP.max(axis=2), problem.load_SLE)
    yield Reason(ProblemCode.ACTIVATED, values)


def _nodes(problem: Problem, slot_PK: Int64) -> float:
    """Nodes per token of the first layer, of all samples."""
    assert problem.token_TK is not None
    return nodes_per_token(problem.token_TK, slot_PK, problem.load_SLE.shape[2], problem.nodes)


def _changed(problem: Problem, solution: Solution, changed: int, layers: int) -> Reason:
    values: dict[str, Any] = {"changed": changed, "layers": layers, "move_cost": problem.move_cost}
    if solution.is_forced:
        return Reason(ProblemCode.FORCED, values | {"filled": layers - changed})
    if solution.gain_L is None:
        return Reason(ProblemCode.TOO_SHORT, values | {"steps": len(problem.load_SLE)})
    assert solution.is_changed_L is not None
    gain_A = solution.gain_L[solution.is_changed_L] if changed else solution.gain_L
    values["gain"] = float(gain_A.mean())
    return Reason(ProblemCode.CHANGED if changed else ProblemCode.LEFT, values)
