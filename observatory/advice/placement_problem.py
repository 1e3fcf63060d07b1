"""What ``observatory place --problem`` prints, and the placement that it writes."""

from __future__ import annotations

from typing import Any

import numpy as np

from observatory.analysis.columns import Column, Table
from observatory.analysis.parallel.balancing import Int64, greedy_layout, holders, rank_times
from observatory.analysis.parallel.balancing.problem import Problem
from observatory.analysis.parallel.balancing.solving import Solution
from observatory.run.documents.printed import printed_document

COLUMNS = (
    Column(name="candidate", title="placement", text=True, key=True),
    Column(
        name="of_mean",
        title="of mean",
        digits=3,
        legend="busiest rank over the mean, of the mean of the steps",
    ),
    Column(name="of_steps", title="of steps", digits=3, legend="the same of each step, mean over steps"),
    Column(name="moved", title="moved", digits=1, legend="copies that ranks have to receive, per layer"),
)


def problem_document(problem: Problem, solution: Solution, cpu_s: float) -> dict[str, Any]:
    """The solution as ``--json`` prints it (docs/json.md).

    Args:
        problem: the problem.
        solution: its solution.
        cpu_s: processor time of the solver.
    """
    layouts = {"solution": solution.slot_LPK}
    if problem.groups == 1:
        layouts = {
            "greedy": greedy_layout(problem.load_SLE.mean(axis=0), problem.ranks, problem.replicas)
        } | layouts
    return printed_document(
        "placement_problem",
        {
            "objective": problem.objective.value,
            "ranks": problem.ranks,
            "replicas": problem.replicas,
            "steps": len(problem.load_SLE),
            "layers": problem.load_SLE.shape[1],
            "experts": problem.load_SLE.shape[2],
            "cpu_s": cpu_s,
            "candidates": [_row(problem, name, layout) for name, layout in layouts.items()],
        },
    )


def problem_tables(document: dict[str, Any]) -> list[Table]:
    """The candidates of the document."""
    title = (
        f"{document['experts']} experts and {document['replicas']} replicas on {document['ranks']} ranks, "
        f"{document['layers']} layers, {document['steps']} steps, which the placement was made on"
    )
    return [Table(name="candidates", columns=COLUMNS, rows=document["candidates"], title=title)]


def layout_file(slot_LPK: Int64, experts: int, layers: tuple[int, ...]) -> dict[str, Any]:
    """A layout as a placement file: for every layer and expert the ranks that hold it."""
    held_LPE = holders(slot_LPK, experts)
    return {
        "ranks": slot_LPK.shape[1],
        "layers": {
            str(layer): [np.flatnonzero(held_P).tolist() for held_P in held_PE.T]
            for layer, held_PE in zip(layers, held_LPE, strict=True)
        },
    }


def _row(problem: Problem, name: str, slot_LPK: Int64) -> dict[str, Any]:
    mean_LE = problem.load_SLE.mean(axis=0)
    moved = None
    if problem.current_LPE is not None:
        held_LPE = holders(slot_LPK, mean_LE.shape[1])
        moved = float((held_LPE & (problem.current_LPE == 0)).sum() / len(slot_LPK))
    return {
        "candidate": name,
        "of_mean": float(rank_times(mean_LE[None], slot_LPK, problem.speed_P).max(axis=2).mean()),
        "of_steps": float(rank_times(problem.load_SLE, slot_LPK, problem.speed_P).max(axis=2).mean()),
        "moved": moved,
    }
