"""Which placement of experts, and how many replicas: chosen on the first steps of a run, judged on the rest.

Shapes: S steps, L layers, E experts, P ranks, K slots of each rank.

A layout scores the load of the busiest rank, added up over steps and layers, over that of perfectly balanced
ranks: every layer of every step waits for its busiest rank. A placement that was made on a mean looks three
times as good on that mean as it is on steps that follow, so what it promises and what it holds are shown next
to each other, and only what it holds decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from observatory.advice.placement_floor import AT_FLOOR, routing_floor
from observatory.advice.placement_layouts import (
    Solver,
    hindsight_layout,
    nodes_by_step,
    plain_layouts,
)
from observatory.advice.placement_scores import PlacementRules, Scorer
from observatory.advice.placement_times import StepTimer
from observatory.analysis.parallel.balancing import Float64, Int64, holders, lower_bound, replicas_for
from observatory.analysis.parallel.balancing.forecast import forecast
from observatory.analysis.parallel.balancing.solving import Solution
from observatory.analysis.parallel.dispatch_rules import DispatchRule, balancing_shares
from observatory.analysis.parallel.step_loads import FEWEST_STEPS, StepLoads
from observatory.analysis.parallel.token_samples import LayerTokens
from observatory.analysis.statistics import Interval
from observatory.errors import PlacementError
from observatory.reasons import Reason
from observatory.text import counted

#: Replicas are proposed where without more of them no layout can be below this.
_ONE_EXPERT = 1.05


class PlacementCode(StrEnum):
    """What a verdict on a placement states."""

    CHANGE = "change"
    NO_GAIN = "no_gain"
    WORSE = "worse"
    AT_FLOOR = "at_floor"
    REST_IS_CHANCE = "rest_is_chance"
    MORE_REPLICAS = "more_replicas"
    BALANCE = "balance"
    LAYERS_KEPT = "layers_kept"
    GROUPS_COST = "groups_cost"
    SLOTS_DIFFER = "slots_differ"
    NODES_LESS = "nodes_less"
    NODES_LIKE = "nodes_like"
    NODES_MORE = "nodes_more"
    STRUCTURE = "structure"
    NO_STRUCTURE = "no_structure"
    TIME_LESS = "time_less"
    TIME_LIKE = "time_like"
    TIME_MORE = "time_more"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidate:
    """One layout with its scores.

    Attributes:
        name: how it was made.
        replicas: copies beyond one of each expert.
        slot_LPK: the layout.
        promised: score on the steps that it was made on.
        held_out: score on the others, with its 90 % interval.
        moved: copies that a rank does not hold today, per layer; None for what only hindsight could choose.
        share_LPK: share of its expert's load for each slot; None: equal shares, or chosen step by step.
        step_us: time of a held-out step, mean; None without times of experts.
        nodes_per_token: of held-out tokens; None without samples or nodes.
    """

    name: str
    replicas: int
    slot_LPK: Int64
    promised: float
    held_out: Interval
    moved: float | None = None
    share_LPK: Float64 | None = None
    nodes_per_token: float | None = None
    step_us: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacementAdvice:
    """Candidates and the verdict on the chosen one.

    Attributes:
        layers: numbers of the layers.
        ranks: P.
        rules: what was asked for.
        steps: steps that layouts were made on, and judged on.
        candidates: today's layout first; the chosen one is named ``chosen``.
        bound: what no layout could have promised to be below, as a score; None where activated experts count
            or ranks differ in speed.
        floor: score of uniform routing of as many tokens without replicas; None likewise, where top-k is not
            known, and where the experts alone do not fill the ranks evenly.
        gain: share of the busiest ranks' load that the chosen layout removes on held-out steps.
        verdict: codes and values.
    """

    layers: tuple[int, ...]
    ranks: int
    rules: PlacementRules
    steps: tuple[int, int]
    candidates: tuple[Candidate, ...]
    bound: float | None
    floor: float | None
    gain: Interval
    verdict: tuple[Reason, ...]

    @property
    def is_better(self) -> bool:
        """Whether the chosen layout gains beyond its interval in what decides, or in time."""
        better = {PlacementCode.CHANGE, PlacementCode.NODES_LESS, PlacementCode.TIME_LESS}
        return any(reason.code in better for reason in self.verdict)

    @property
    def chosen(self) -> Candidate:
        """The layout that is judged."""
        return next(candidate for candidate in self.candidates if candidate.name == "chosen")


def advise_placement(
    loads: StepLoads,
    *,
    ranks: int,
    today: Int64,
    named_today: str,
    today_share_LPK: Float64 | None = None,
    replicas: int = 0,
    train_share: float = 0.5,
    rules: PlacementRules | None = None,
    tokens: Sequence[LayerTokens] | None = None,
    timer: StepTimer | None = None,
    seed: int = 0,
) -> PlacementAdvice:
    """Choose a layout on the first steps of each phase and judge it on the others.

    Args:
        loads: loads of single steps.
        ranks: P.
        today: today's layout, (L, P, K).
        named_today: its name.
        today_share_LPK: share of its expert's load for each slot of it; None: equal shares.
        replicas: copies beyond one of each expert, in each layer.
        train_share: share of the steps of each phase that layouts are made on.
        rules: objective, dispatch, nodes, speeds, moves; by default loads, equal shares and no limits.
        tokens: sampled tokens of each layer; None: there are none.
        timer: times of steps; None: loads alone are judged.
        seed: of the search and of the resamples.

    Raises:
        PlacementError: the copies do not fill the ranks evenly, the rules do not fit them, or steps or token
            samples are missing.
    """
    rules = rules or PlacementRules()
    train_S = _split(loads, train_share)
    train_SLE = loads.load_SLE[train_S].astype(np.float64)
    test_SLE = loads.load_SLE[~train_S].astype(np.float64)
    if rules.objective == "nodes" and tokens is None:
        raise PlacementError(
            "the run has no token samples, which nodes per token take; profile it again with --sample-tokens"
        )
    if rules.objective == "time" and timer is None:
        raise PlacementError("the time of a step takes times of experts; give --experts, of `bench experts`")
    solver = Solver(loads, train_S, ranks, replicas, today, rules, tokens, seed)
    solution = solver.solve(rules)
    early_S, late_S = np.flatnonzero(train_S), np.flatnonzero(~train_S)
    if rules.objective == "time" and timer is not None:
        other = solver.solve(replace(rules, objective="activated"))
        solution = min((solution, other), key=lambda made: float(timer.us_S(early_S, made.slot_LPK).mean()))
    experts = loads.load_SLE.shape[2]
    layouts = plain_layouts(solver, named_today)
    layouts["chosen"] = replicas, solution.slot_LPK
    train, test = Scorer(train_SLE, rules, seed=seed), Scorer(test_SLE, rules, seed=seed)
    expected_LE = forecast(train_SLE)[0]
    share_LPK = balancing_shares(expected_LE, solution.slot_LPK, rules.speed_P) if replicas else None
    rule = rules.dispatch if replicas else "equal"

    def candidate(
        name: str, count: int, slot_LPK: Int64, *, rule: DispatchRule = "equal", named_moved: bool = True
    ) -> Candidate:
        shares = share_LPK if rule == "weighted" else None
        if slot_LPK is today and today_share_LPK is not None:
            rule, shares = "weighted", today_share_LPK
        nodes = nodes_by_step(solver, slot_LPK)
        return Candidate(
            name=name,
            replicas=count,
            slot_LPK=slot_LPK,
            share_LPK=shares,
            promised=train.score(slot_LPK, rule=rule, share_LPK=shares),
            held_out=test.scored(slot_LPK, rule=rule, share_LPK=shares),
            moved=_moved(today, slot_LPK, experts) if named_moved else None,
            nodes_per_token=None if nodes is None else nodes[0],
            step_us=None
            if timer is None
            else float(timer.us_S(late_S, slot_LPK, rule=rule, share_LPK=shares).mean()),
        )

    candidates = [
        candidate(name, count, slot_LPK, rule=rule if name == "chosen" else "equal")
        for name, (count, slot_LPK) in layouts.items()
    ]
    others: tuple[DispatchRule, ...] = ("equal", "weighted", "per-step")
    if rules.objective == "activated":
        others += ("one-copy",)
    candidates += [
        candidate(f"chosen, {other}", replicas, solution.slot_LPK, rule=other)
        for other in others
        if replicas and other != rule
    ]
    if rules.groups > 1:
        free = replace(rules, groups=1, max_moves=-1)
        candidates.append(candidate("no groups", replicas, solver.solve(free).slot_LPK))
    candidates += [
        candidate(name, replicas, solver.solve(replace(rules, max_moves=moves)).slot_LPK)
        for name, moves in _fewer_moves(rules.max_moves)
        if moves >= experts + replicas - today[0].size
    ]
    hindsight = hindsight_layout(solver, test, layouts)
    candidates.append(candidate("hindsight", replicas, hindsight, named_moved=False))
    weight_L = np.maximum(train_SLE.mean(axis=0).sum(axis=1), 1e-300)
    bound_L = lower_bound(train_SLE.mean(axis=0), ranks, replicas)
    is_plain = rules.objective != "activated" and rules.speed_P is None
    chosen = next(item for item in candidates if item.name == "chosen")
    gain = test.gain(
        today, solution.slot_LPK, rule=rule, share_LPK=chosen.share_LPK, today_share_LPK=today_share_LPK
    )
    nodes = _nodes(solver, solution, today, test)
    has_floor = is_plain and experts % ranks == 0
    floor = routing_floor(test_SLE, ranks, loads.top_k) if has_floor else None
    bound = float(np.average(bound_L, weights=weight_L)) if is_plain else None
    return PlacementAdvice(
        layers=loads.layers,
        ranks=ranks,
        rules=rules,
        steps=(len(train_SLE), len(test_SLE)),
        candidates=tuple(candidates),
        bound=bound,
        floor=floor,
        gain=gain,
        verdict=(
            *([] if timer is None else [_timed(timer, late_S, candidates[0], chosen, rule, test)]),
            *nodes,
            *_verdict(
                train_SLE.mean(axis=0),
                bound,
                gain,
                ranks,
                replicas,
                floor=floor,
                today=candidates[0].held_out.value,
                chosen=chosen.held_out.value,
                objective=rules.objective,
            )[rules.objective == "time" or len(nodes) > 1 :],
            *(
                [_balance(test, candidates[0], chosen, rule)]
                if rules.objective == "activated" or len(nodes) > 1
                else []
            ),
            *_about(solution, candidates, rules),
        ),
    )


def _timed(
    timer: StepTimer,
    late_S: NDArray[np.intp],
    today: Candidate,
    chosen: Candidate,
    rule: DispatchRule,
    test: Scorer,
) -> Reason:
    """What the chosen layout does to the time of a step."""
    before_S = timer.us_S(late_S, today.slot_LPK, rule=_rule_of(today), share_LPK=today.share_LPK)
    after_S = timer.us_S(late_S, chosen.slot_LPK, rule=rule, share_LPK=chosen.share_LPK)
    left = test.ratio(after_S, before_S)
    assert left.low is not None
    assert left.high is not None
    values: dict[str, JsonValue] = {
        "today_us": float(before_S.mean()),
        "chosen_us": float(after_S.mean()),
        "gain": 1 - left.value,
        "gain_low": 1 - left.high,
        "gain_high": 1 - left.low,
        "has_exchanges": timer.network is not None,
    }
    code = PlacementCode.TIME_LESS if left.high < 1 else PlacementCode.TIME_LIKE
    return Reason(PlacementCode.TIME_MORE if left.low > 1 else code, values)


def _rule_of(today: Candidate) -> DispatchRule:
    """How the copies of today's layout share."""
    return "equal" if today.share_LPK is None else "weighted"


def _nodes(solver: Solver, solution: Solution, today: Int64, test: Scorer) -> list[Reason]:
    """Where nodes are the objective: whether tokens touch fewer of them, and whether they have structure."""
    if solution.structure is None:
        return []
    touched, independent = solution.structure.touched, solution.structure.independent
    values: dict[str, JsonValue] = {"nodes": touched, "independent_nodes": independent}
    before, after = (nodes_by_step(solver, layout) for layout in (today, solution.slot_LPK))
    if not solution.structure.is_there or before is None or after is None:
        is_there = solution.structure.is_there
        return [Reason(PlacementCode.STRUCTURE if is_there else PlacementCode.NO_STRUCTURE, values)]
    left = test.ratio(after[1], before[1])
    assert left.low is not None
    assert left.high is not None
    code = PlacementCode.NODES_LESS if left.high < 1 else PlacementCode.NODES_LIKE
    gains: dict[str, JsonValue] = {
        "today_nodes": before[0],
        "chosen_nodes": after[0],
        "gain": 1 - left.value,
        "gain_low": 1 - left.high,
        "gain_high": 1 - left.low,
    }
    return [
        Reason(PlacementCode.NODES_MORE if left.low > 1 else code, gains),
        Reason(PlacementCode.STRUCTURE, values),
    ]


def _balance(test: Scorer, today: Candidate, chosen: Candidate, rule: DispatchRule) -> Reason:
    """What a layout that was not chosen for loads does to them."""
    loads = Scorer(test.load_SLE, replace(test.rules, objective="load"))
    values: dict[str, JsonValue] = {
        "today_load": loads.score(today.slot_LPK, rule=_rule_of(today), share_LPK=today.share_LPK),
        "chosen_load": loads.score(chosen.slot_LPK, rule=rule, share_LPK=chosen.share_LPK),
        "objective": test.rules.objective,
    }
    return Reason(PlacementCode.BALANCE, values)


def _fewer_moves(max_moves: int) -> list[tuple[str, int]]:
    """Numbers of moves that are tried as well, to show what they buy, with their names."""
    fewer = sorted({max_moves // part for part in (2, 4, 8)} - {0}) if max_moves > 0 else []
    return [(f"{moves} move" if moves == 1 else f"{moves} moves", moves) for moves in fewer]


def _about(solution: Solution, candidates: Sequence[Candidate], rules: PlacementRules) -> Iterator[Reason]:
    """What else is to be known: layers that stay, and the price of groups."""
    by_name = {candidate.name: candidate for candidate in candidates}
    changed_L = solution.is_changed_L
    if changed_L is not None and (solution.is_forced or not changed_L.all()):
        code = PlacementCode.SLOTS_DIFFER if solution.is_forced else PlacementCode.LAYERS_KEPT
        values: dict[str, JsonValue] = {
            "filled" if solution.is_forced else "kept": int((~changed_L).sum()),
            "layers": len(changed_L),
            "move_cost": rules.move_cost,
        }
        yield Reason(code, values)
    if "no groups" in by_name:
        with_groups, without = by_name["chosen"].held_out.value, by_name["no groups"].held_out.value
        yield Reason(PlacementCode.GROUPS_COST, {"with_groups": with_groups, "without": without})


def _split(loads: StepLoads, train_share: float) -> NDArray[np.bool_]:
    """Whether a step is chosen on.

    Raises:
        PlacementError: a side has too few steps of a phase.
    """
    train_S = _first_of_each_phase(loads.phase_S, train_share)
    for phase in sorted(set(loads.phase_S)):
        of_phase_S = np.array(loads.phase_S) == phase
        parts = int((of_phase_S & train_S).sum()), int((of_phase_S & ~train_S).sum())
        if min(parts) < FEWEST_STEPS:
            raise PlacementError(
                f"{counted(parts[0], 'step')} of {phase} to choose on and {parts[1]} to judge on: too few; "
                f"expected at least {FEWEST_STEPS} of each: profile again with more --steps"
            )
    return train_S


def _first_of_each_phase(phase_S: Sequence[str], share: float) -> NDArray[np.bool_]:
    """Whether a step is among the first ``share`` of its phase."""
    train_S = np.zeros(len(phase_S), dtype=bool)
    for phase in set(phase_S):
        at = np.flatnonzero(np.array(phase_S) == phase)
        train_S[at[: int(share * len(at) + 0.5)]] = True
    return train_S


def _moved(today: Int64, slot_LPK: Int64, experts: int) -> float:
    """Copies that ranks have to receive, per layer, after the new ranks were numbered like today's."""
    held, wanted = (holders(layout, experts) for layout in (today, slot_LPK))
    return float((wanted & ~held).sum() / len(today))


def _verdict(
    mean_LE: Float64,
    bound: float | None,
    gain: Interval,
    ranks: int,
    replicas: int,
    *,
    floor: float | None,
    today: float,
    chosen: float,
    objective: str,
) -> tuple[Reason, ...]:
    """Change or leave it; and where one expert outweighs a rank, what would help."""
    assert gain.low is not None
    assert gain.high is not None
    code = PlacementCode.CHANGE if gain.low > 0 else PlacementCode.NO_GAIN
    if gain.high < 0:
        code = PlacementCode.WORSE
    values: dict[str, JsonValue] = {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high}
    values["objective"] = objective
    reasons = [Reason(code, values)]
    by_chance = None if floor is None else floor * (1 + AT_FLOOR)
    if by_chance is not None and code is not PlacementCode.CHANGE and today <= by_chance:
        reasons.append(Reason(PlacementCode.AT_FLOOR, {"today": today, "floor": floor}))
    elif by_chance is not None and chosen <= by_chance:
        reasons.append(Reason(PlacementCode.REST_IS_CHANCE, {"chosen": chosen, "floor": floor}))
    needed = int(np.median([replicas_for(load_E, ranks, _ONE_EXPERT) for load_E in mean_LE]))
    needed += -(mean_LE.shape[1] + needed) % ranks
    if needed > replicas and bound is not None:
        reasons.append(
            Reason(
                PlacementCode.MORE_REPLICAS,
                {"bound": bound, "replicas": replicas, "needed": needed, "ratio": _ONE_EXPERT},
            )
        )
    return tuple(reasons)
