"""Which placement of experts, and how many replicas: chosen on the first steps of a run, judged on the rest.

Shapes: S steps, L layers, E experts, P ranks, K slots of each rank.

A layout scores the load of the busiest rank, added up over steps and layers, over that of perfectly balanced
ranks: every layer of every step waits for its busiest rank. A placement that was made on a mean looks three
times as good on that mean as it is on steps that follow, so what it promises and what it holds are shown next
to each other, and only what it holds decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from observatory.analysis.parallel.balancing import (
    balanced_layout,
    greedy_layout,
    holders,
    linear_layout,
    lower_bound,
    rank_loads,
    replicas_for,
    round_robin_layout,
    slots_per_rank,
    steps_layout,
)
from observatory.analysis.parallel.placement import load_placement
from observatory.analysis.parallel.step_loads import FEWEST_STEPS, StepLoads
from observatory.analysis.routing.floor import max_over_mean_floor
from observatory.analysis.statistics import (
    Interval,
    block_count,
    block_weights,
    few_blocks_widening,
    sample_interval,
)
from observatory.errors import PlacementError
from observatory.reasons import Reason

if TYPE_CHECKING:
    from observatory.run import Run

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

_RESAMPLES = 1000
#: A layout is as even as chance makes it within this part of the floor, which is itself known to 1 %.
_AT_FLOOR = 0.01
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidate:
    """One layout with its scores.

    Attributes:
        name: how it was made.
        replicas: copies beyond one of each expert.
        slot_LPK: the layout; None for what only hindsight could choose.
        promised: score on the steps that it was made on.
        held_out: score on the others, with its 90 % interval.
        moved: copies that a rank does not hold today, per layer; None where today's layout is not known.
    """

    name: str
    replicas: int
    slot_LPK: Int64 | None
    promised: float
    held_out: Interval
    moved: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacementAdvice:
    """Candidates and the verdict on the chosen one.

    Attributes:
        layers: numbers of the layers.
        ranks: P.
        steps: steps that layouts were made on, and judged on.
        candidates: today's layout first; the chosen one is named ``chosen``.
        bound: what no layout could have promised to be below, as a score.
        floor: score of uniform routing of as many tokens, without replicas; None where top-k is not known.
        gain: share of the busiest ranks' load that the chosen layout removes on held-out steps.
        verdict: codes and values.
    """

    layers: tuple[int, ...]
    ranks: int
    steps: tuple[int, int]
    candidates: tuple[Candidate, ...]
    bound: float
    floor: float | None
    gain: Interval
    verdict: tuple[Reason, ...]

    @property
    def chosen(self) -> Candidate:
        """The layout that is judged."""
        return next(candidate for candidate in self.candidates if candidate.name == "chosen")


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


def advise_placement(
    loads: StepLoads,
    *,
    ranks: int,
    today: Int64,
    named_today: str,
    replicas: int = 0,
    train_share: float = 0.5,
    seed: int = 0,
) -> PlacementAdvice:
    """Choose a layout on the first steps of each phase and judge it on the others.

    Args:
        loads: loads of single steps.
        ranks: P.
        today: today's layout, (L, P, K).
        named_today: its name.
        replicas: copies beyond one of each expert, in each layer.
        train_share: share of the steps of each phase that layouts are made on.
        seed: of the search and of the resamples.

    Raises:
        PlacementError: the copies do not fill the ranks evenly.
    """
    experts = loads.load_SLE.shape[2]
    slots_per_rank(experts, ranks, replicas)
    train_S = _first_of_each_phase(loads.phase_S, train_share)
    train_SLE = loads.load_SLE[train_S].astype(np.float64)
    test_SLE = loads.load_SLE[~train_S].astype(np.float64)
    steps = len(train_SLE), len(test_SLE)
    for phase in sorted(set(loads.phase_S)):
        of_phase_S = np.array(loads.phase_S) == phase
        parts = int((of_phase_S & train_S).sum()), int((of_phase_S & ~train_S).sum())
        if min(parts) < FEWEST_STEPS:
            raise PlacementError(
                f"{parts[0]} steps of {phase} to choose on and {parts[1]} to judge on are too few; expected "
                f"at least {FEWEST_STEPS} of each: profile again with more --steps"
            )
    mean_LE = train_SLE.mean(axis=0)
    layers = len(mean_LE)
    layouts: dict[str, tuple[int, Int64]] = {
        f"{named_today} (today)": (today.shape[1] * today.shape[2] - experts, today)
    }
    if experts % ranks == 0:
        layouts["linear"] = 0, linear_layout(layers, experts, ranks)
        layouts["round-robin"] = 0, round_robin_layout(layers, experts, ranks)
    makers: dict[str, Callable[[Float64], Int64]] = {
        "greedy": lambda mean_LE: greedy_layout(mean_LE, ranks, replicas),
        "mean": lambda mean_LE: balanced_layout(mean_LE, ranks, replicas, seed=seed),
    }
    layouts |= {name: (replicas, make(mean_LE)) for name, make in makers.items()}
    start = _better_start(train_SLE, np.array(loads.phase_S)[train_S], makers)
    layouts["chosen"] = replicas, steps_layout(train_SLE, layouts[start][1])
    layouts.pop(named_today, None)
    layouts = {
        name: (count, slot_LPK if slot_LPK is today else _renumbered(slot_LPK, today, experts))
        for name, (count, slot_LPK) in layouts.items()
    }
    weight_BS = block_weights(steps[1], _RESAMPLES, seed)
    widening = few_blocks_widening(block_count(steps[1]))
    candidates = [
        Candidate(
            name=name,
            replicas=count,
            slot_LPK=slot_LPK,
            promised=_score(train_SLE, slot_LPK),
            held_out=_scored(test_SLE, slot_LPK, weight_BS, widening),
            moved=_moved(today, slot_LPK, experts),
        )
        for name, (count, slot_LPK) in layouts.items()
    ]
    hindsight = min(
        (
            steps_layout(test_SLE, start)
            for start in (
                greedy_layout(test_SLE.mean(axis=0), ranks, replicas),
                *(slot_LPK for count, slot_LPK in layouts.values() if count == replicas),
            )
        ),
        key=lambda layout: _score(test_SLE, layout),
    )
    candidates.append(
        Candidate(
            name="hindsight",
            replicas=replicas,
            slot_LPK=None,
            promised=_score(test_SLE, hindsight),
            held_out=_scored(test_SLE, hindsight, weight_BS, widening),
        )
    )
    weight_L = np.maximum(mean_LE.sum(axis=1), 1e-300)
    bound = float(np.average(lower_bound(mean_LE, ranks, replicas), weights=weight_L))
    floor = _floor(test_SLE, ranks, loads.top_k)
    gain = _gain(test_SLE, today, layouts["chosen"][1], weight_BS, widening)
    return PlacementAdvice(
        layers=loads.layers,
        ranks=ranks,
        steps=steps,
        candidates=tuple(candidates),
        bound=bound,
        floor=floor,
        gain=gain,
        verdict=_verdict(
            mean_LE,
            bound,
            gain,
            ranks,
            replicas,
            floor=floor,
            today=candidates[0].held_out.value,
            chosen=next(item.held_out.value for item in candidates if item.name == "chosen"),
        ),
    )


def _better_start(
    load_SLE: Float64, phase_S: NDArray[np.str_], makers: Mapping[str, Callable[[Float64], Int64]]
) -> str:
    """Whose layout, improved for the first half of these steps, does better on the second half.

    Tight numbers of copies pay where loads stay, risk-averse ones where they drift.
    """
    first_S = _first_of_each_phase(phase_S.tolist(), 0.5)
    first_SLE, second_SLE = load_SLE[first_S], load_SLE[~first_S]
    mean_LE = first_SLE.mean(axis=0)
    return min(makers, key=lambda name: _score(second_SLE, steps_layout(first_SLE, makers[name](mean_LE))))


def _first_of_each_phase(phase_S: Sequence[str], share: float) -> NDArray[np.bool_]:
    """Whether a step is among the first ``share`` of its phase."""
    train_S = np.zeros(len(phase_S), dtype=bool)
    for phase in set(phase_S):
        at = np.flatnonzero(np.array(phase_S) == phase)
        train_S[at[: int(share * len(at) + 0.5)]] = True
    return train_S


def _busiest_and_mean(load_SLE: Float64, slot_LPK: Int64) -> tuple[Float64, Float64]:
    """Load of the busiest rank and of the mean rank, added up over layers, (S,) each."""
    load_SLP = rank_loads(load_SLE, slot_LPK)
    return load_SLP.max(axis=2).sum(axis=1), load_SLP.mean(axis=2).sum(axis=1)


def _score(load_SLE: Float64, slot_LPK: Int64) -> float:
    busiest_S, mean_S = _busiest_and_mean(load_SLE, slot_LPK)
    return float(busiest_S.sum() / max(mean_S.sum(), 1e-300))


def _scored(load_SLE: Float64, slot_LPK: Int64, weight_BS: Float64, widening: float) -> Interval:
    busiest_S, mean_S = _busiest_and_mean(load_SLE, slot_LPK)
    value = _score(load_SLE, slot_LPK)
    sample_B = (weight_BS @ busiest_S) / np.maximum(weight_BS @ mean_S, 1e-300)
    return sample_interval(value, value + widening * (sample_B - value))


def _gain(load_SLE: Float64, today: Int64, chosen: Int64, weight_BS: Float64, widening: float) -> Interval:
    """Share of the busiest ranks' load that the chosen layout removes; steps are paired."""
    before_S, _ = _busiest_and_mean(load_SLE, today)
    after_S, _ = _busiest_and_mean(load_SLE, chosen)
    value = 1.0 - float(after_S.sum() / max(before_S.sum(), 1e-300))
    sample_B = 1.0 - (weight_BS @ after_S) / np.maximum(weight_BS @ before_S, 1e-300)
    return sample_interval(value, value + widening * (sample_B - value))


def _moved(today: Int64, slot_LPK: Int64, experts: int) -> float:
    """Copies that ranks have to receive, per layer, after the new ranks were numbered like today's."""
    held, wanted = (holders(layout, experts) for layout in (today, slot_LPK))
    return float((wanted & ~held).sum() / len(today))


def _renumbered(slot_LPK: Int64, today: Int64, experts: int) -> Int64:
    """The same layout with its ranks numbered so that today's ranks keep most of their experts."""
    from scipy.optimize import linear_sum_assignment

    held_LPE, wanted_LPE = holders(today, experts), holders(slot_LPK, experts)
    result = np.empty_like(slot_LPK)
    for layer, slot_PK in enumerate(slot_LPK):
        kept_PP = held_LPE[layer].astype(np.int64) @ wanted_LPE[layer].T
        _, numbered_P = linear_sum_assignment(-kept_PP)
        result[layer] = slot_PK[numbered_P]
    return result


def _floor(load_SLE: Float64, ranks: int, top_k: int | None) -> float | None:
    """Score of uniform routing of the same tokens of each step, on ranks of equally many experts."""
    experts = load_SLE.shape[2]
    if not top_k or top_k > experts:
        return None
    tokens_SL = np.rint(load_SLE.sum(axis=2) / top_k).astype(np.int64)
    ratio_SL = [
        [
            max_over_mean_floor(tokens=tokens, top_k=top_k, experts=experts, groups=ranks) or 1.0
            for tokens in row
        ]
        for row in tokens_SL.tolist()
    ]
    return float(np.average(ratio_SL, weights=np.maximum(tokens_SL, 1e-9)))


def _verdict(
    mean_LE: Float64,
    bound: float,
    gain: Interval,
    ranks: int,
    replicas: int,
    *,
    floor: float | None,
    today: float,
    chosen: float,
) -> tuple[Reason, ...]:
    """Change or leave it; and where one expert outweighs a rank, what would help."""
    assert gain.low is not None
    assert gain.high is not None
    code = PlacementCode.CHANGE if gain.low > 0 else PlacementCode.NO_GAIN
    if gain.high < 0:
        code = PlacementCode.WORSE
    values: dict[str, JsonValue] = {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high}
    reasons = [Reason(code, values)]
    by_chance = None if floor is None or replicas else floor * (1 + _AT_FLOOR)
    if by_chance is not None and code is not PlacementCode.CHANGE and today <= by_chance:
        reasons.append(Reason(PlacementCode.AT_FLOOR, {"today": today, "floor": floor}))
    elif by_chance is not None and chosen <= by_chance:
        reasons.append(Reason(PlacementCode.REST_IS_CHANCE, {"chosen": chosen, "floor": floor}))
    needed = int(np.median([replicas_for(load_E, ranks, _ONE_EXPERT) for load_E in mean_LE]))
    needed += -(mean_LE.shape[1] + needed) % ranks
    if needed > replicas:
        reasons.append(
            Reason(
                PlacementCode.MORE_REPLICAS,
                {"bound": bound, "replicas": replicas, "needed": needed, "ratio": _ONE_EXPERT},
            )
        )
    return tuple(reasons)
