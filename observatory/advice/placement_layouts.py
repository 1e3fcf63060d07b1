"""The layouts that a placement is chosen from: today's, the baselines, and the solver's.

Shapes: S steps, L layers, E experts, P ranks, K slots of each rank; of tokens: T tokens, K experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from observatory.advice.placement_scores import PlacementRules, Scorer
from observatory.analysis.parallel.balancing import (
    Float64,
    Int64,
    holders,
    linear_layout,
    round_robin_layout,
    steps_layout,
)
from observatory.analysis.parallel.balancing.coactivation import nodes_of_tokens
from observatory.analysis.parallel.balancing.moves import renumbered
from observatory.analysis.parallel.balancing.problem import Objective, Problem
from observatory.analysis.parallel.balancing.solving import Solution, layout_of_mean, solve
from observatory.analysis.parallel.placement import load_placement
from observatory.analysis.parallel.step_loads import StepLoads
from observatory.analysis.parallel.token_samples import LayerTokens, layer_tokens
from observatory.errors import PlacementError

if TYPE_CHECKING:
    from observatory.run import Run

_OBJECTIVES = {
    "load": Objective.STEP,
    "activated": Objective.ACTIVE,
    "nodes": Objective.NODES,
    "time": Objective.STEP,
}


def token_samples(run: Run, loads: StepLoads) -> list[LayerTokens] | None:
    """Sampled tokens of each layer in the steps of the loads; None where the run has none of some layer.

    Raises:
        RunFormatError: rows that cannot be true.
    """
    samples = run.token_samples()
    if loads.step_S is None:
        return None
    kept = samples["step"].isin(loads.step_S) & samples["phase"].isin(loads.phases)
    return layer_tokens(samples[kept], loads.layers)


def replicas_of_slots(experts: int, ranks: int, slots: int, replicas: int) -> int:
    """Replicas that fill so many slots of every rank.

    Raises:
        PlacementError: replicas are given as well, or the slots do not hold the experts.
    """
    if replicas:
        raise PlacementError("replicas and slots per rank both say how many copies there are; expected one")
    if slots * ranks < experts:
        raise PlacementError(
            f"{ranks} ranks of {slots} slots do not hold {experts} experts; expected at least "
            f"{-(-experts // ranks)} slots"
        )
    return slots * ranks - experts


def current_layout(
    run: Run, loads: StepLoads, *, ranks: int, given: str | Path | None = None
) -> tuple[Int64, str]:
    """Today's layout, (L, P, K), and its name.

    Args:
        run: an open run.
        loads: its loads.
        ranks: P.
        given: ``linear``, ``round-robin`` or a placement file; None: that of the run if it was spread over as
            many ranks, else linear.

    Raises:
        PlacementError: it does not fit, is not known, or ranks hold different numbers of experts.
    """
    experts, layers = loads.load_SLE.shape[2], len(loads.layers)
    topology = run.manifest.topology
    was_spread = topology.ep == ranks > 1
    if given is None and was_spread and topology.placement is None:
        raise PlacementError(
            f"the run was on {ranks} ranks and does not say which held which expert; expected today's "
            "placement: give --current, linear or a file"
        )
    if isinstance(given, Path):
        opened = load_placement(given)
        ranks_LE = [opened.holders(layer, experts=experts, ep=ranks) for layer in loads.layers]
        name = opened.name
    elif given is None and was_spread:
        ranks_LE = [list(topology.placement or ())] * layers
        name = "recorded"
    else:
        if experts % ranks:
            fitting = ", ".join(str(number) for number in range(2, experts + 1) if experts % number == 0)
            raise PlacementError(
                f"{experts} experts do not fill {ranks} ranks evenly, so there is no plain placement to "
                f"compare with; numbers of ranks that do: {fitting}"
            )
        simple = round_robin_layout if given == "round-robin" else linear_layout
        return simple(layers, experts, ranks), str(given or "linear")
    held_LPE = np.zeros((len(ranks_LE), ranks, experts), dtype=bool)
    for layer, ranks_E in enumerate(ranks_LE):
        for expert, at in enumerate(ranks_E):
            held_LPE[layer, list(at), expert] = True
    held_LP = held_LPE.sum(axis=2)
    if held_LP.min() != held_LP.max():
        raise PlacementError(
            f"placement {name} gives ranks {held_LP.min()} to {held_LP.max()} experts; expected as many on "
            "every rank"
        )
    return np.nonzero(held_LPE)[2].reshape(len(ranks_LE), ranks, -1), name


def current_shares(path: Path, loads: StepLoads, today: Int64) -> Float64 | None:
    """Share of its expert's load for each slot of today's layout, (L, P, K); None: the file has equal ones.

    Args:
        path: the placement file that the layout was read from.
        loads: loads of a run.
        today: the layout.

    Raises:
        PlacementError: as `load_placement` has it.
    """
    opened = load_placement(path)
    if opened.shares is None:
        return None
    experts, ranks = loads.load_SLE.shape[2], today.shape[1]
    share_LPK = np.empty(today.shape)
    for layer, slot_PK, share_PK in zip(loads.layers, today, share_LPK, strict=True):
        holders_E = opened.holders(layer, experts=experts, ep=ranks)
        shares_E = opened.shares_of(layer) or [(1 / len(at),) * len(at) for at in holders_E]
        share_PE = np.zeros((ranks, experts))
        for expert, (at, shares) in enumerate(zip(holders_E, shares_E, strict=True)):
            share_PE[list(at), expert] = shares
        share_PK[:] = np.take_along_axis(share_PE, slot_PK, axis=1)
    return share_LPK


class Solver:
    """Makes layouts of the steps that are chosen on."""

    def __init__(
        self,
        loads: StepLoads,
        train_S: NDArray[np.bool_],
        ranks: int,
        replicas: int,
        today: Int64,
        rules: PlacementRules,
        tokens: Sequence[LayerTokens] | None,
        seed: int,
    ) -> None:
        train = loads.of_steps(np.flatnonzero(train_S))
        place_S = np.empty(len(train.phase_S))
        for phase in train.phases:
            at = np.flatnonzero(np.array(train.phase_S) == phase)
            place_S[at] = np.arange(len(at)) / len(at)
        # The phases take turns, so that each part of the steps has some of all.
        self.load_SLE = train.load_SLE[np.argsort(place_S, kind="stable")].astype(np.float64)
        self.is_ordered = len(train.phases) == 1
        self.ranks, self.replicas, self.today, self.seed = ranks, replicas, today, seed
        self.tokens, self.rules = tokens, rules
        chosen_on = {loads.step_S[at] for at in np.flatnonzero(train_S)} if loads.step_S else set()
        self.is_early = [np.isin(sample.step_T, list(chosen_on)) for sample in tokens or ()]

    def solve(self, rules: PlacementRules) -> Solution:
        """The layout for these rules; with nodes as the objective each layer has tokens of its own."""
        if rules.objective != "nodes":
            return solve(self.problem(rules), seed=self.seed)
        layers = range(self.load_SLE.shape[1])
        parts = [solve(self.problem(rules, layer), seed=self.seed) for layer in layers]
        changes = [part.is_changed_L for part in parts if part.is_changed_L is not None]
        return Solution(
            slot_LPK=np.concatenate([part.slot_LPK for part in parts]),
            is_changed_L=np.concatenate(changes),
            is_forced=parts[0].is_forced,
            structure=min(
                (part.structure for part in parts if part.structure is not None),
                key=lambda structure: structure.touched / structure.independent,
                default=None,
            ),
        )

    def problem(self, rules: PlacementRules, layer: int | None = None) -> Problem:
        """The problem of all layers, or of one with its tokens.

        Raises:
            PlacementError: the rules do not fit the layers, or the layer has no token samples.
        """
        at = slice(None) if layer is None else slice(layer, layer + 1)
        sample = None if layer is None or self.tokens is None else self.tokens[layer]
        early_T = np.zeros(0, dtype=bool) if layer is None else self.is_early[layer]
        if sample is not None and early_T.sum() < 2:
            raise PlacementError("a layer has no token samples of the steps that are chosen on; sample more")
        objective = _OBJECTIVES[rules.objective]
        return Problem(
            load_SLE=self.load_SLE[:, at],
            ranks=self.ranks,
            replicas=self.replicas,
            nodes=rules.nodes,
            groups=rules.groups,
            objective=Objective.STEP if layer is None and objective is Objective.NODES else objective,
            speed_P=rules.speed_P,
            current_LPE=_held(self.today, self.load_SLE.shape[2])[at],
            move_cost=rules.move_cost,
            max_moves=rules.max_moves,
            token_TK=None if sample is None else sample.experts_TK[early_T],
            token_step_T=None if sample is None else sample.step_T[early_T],
            is_ordered=self.is_ordered,
        )


def plain_layouts(solver: Solver, named_today: str) -> dict[str, tuple[int, Int64]]:
    """Today's layout and the baselines, with their replicas; ranks are numbered like today's."""
    mean_LE = solver.load_SLE.mean(axis=0)
    (layers, experts), ranks, today = mean_LE.shape, solver.ranks, solver.today
    layouts: dict[str, tuple[int, Int64]] = {}
    if experts % ranks == 0:
        layouts["linear"] = 0, linear_layout(layers, experts, ranks)
        layouts["round-robin"] = 0, round_robin_layout(layers, experts, ranks)
    problem = solver.problem(solver.rules)
    layouts["greedy"] = (
        solver.replicas,
        layout_of_mean(replace(problem, speed_P=None), mean_LE, is_greedy=True),
    )
    layouts["mean"] = solver.replicas, layout_of_mean(problem, mean_LE, seed=solver.seed)
    layouts.pop(named_today, None)
    held_LPE = _held(today, experts) > 0
    named = {f"{named_today} (today)": (today.shape[1] * today.shape[2] - experts, today)}
    return named | {
        name: (
            count,
            slot_LPK if problem.speed_P is not None else renumbered(slot_LPK, held_LPE, problem.node_P),
        )
        for name, (count, slot_LPK) in layouts.items()
    }


def hindsight_layout(solver: Solver, test: Scorer, layouts: Mapping[str, tuple[int, Int64]]) -> Int64:
    """The best layout for the held-out steps under the same rules, which nothing can know beforehand."""
    problem = solver.problem(solver.rules)
    is_free = problem.groups == 1
    load_SLE = test.load_SLE
    if problem.objective is Objective.ACTIVE:
        load_SLE = (load_SLE > 0).astype(np.float64)
    starts = [layout_of_mean(problem, load_SLE.mean(axis=0), is_greedy=True)]
    starts += [
        layout
        for name, (count, layout) in layouts.items()
        if name == "chosen" or (is_free and count == solver.replicas)
    ]
    ends = [steps_layout(load_SLE, start, speed_P=problem.speed_P, node_P=problem.node_P) for start in starts]
    return min(ends, key=test.score)


def nodes_by_step(solver: Solver, slot_LPK: Int64) -> tuple[float, Float64] | None:
    """Nodes per held-out token, mean over layers, and added up over the tokens of each step, (S,).

    None without samples of held-out steps, or nodes. Copies of an expert are taken by chance.
    """
    experts, nodes = solver.load_SLE.shape[2], solver.rules.nodes
    if solver.tokens is None or nodes == 1 or all(early_T.all() for early_T in solver.is_early):
        return None
    touched, step = [], []
    for slot_PK, sample, early_T in zip(slot_LPK, solver.tokens, solver.is_early, strict=True):
        if not early_T.all():
            touched.append(nodes_of_tokens(sample.experts_TK[~early_T], slot_PK, experts, nodes))
            step.append(sample.step_T[~early_T])
    _, at = np.unique(np.concatenate(step), return_inverse=True)
    per_token = float(np.mean([touched_T.mean() for touched_T in touched]))
    return per_token, np.bincount(at.ravel(), np.concatenate(touched)).astype(np.float64)


def _held(slot_LPK: Int64, experts: int) -> NDArray[np.int8]:
    return holders(slot_LPK, experts).astype(np.int8)
