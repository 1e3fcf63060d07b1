"""Which experts to send tokens to, which to fetch, and which to keep on every rank, from captured loads.

Shapes: S steps, L layers, E experts, P ranks, B bootstrap samples.

The time of a layer-step is that of the slowest rank:

    dispatch and combine   a trip, and the rows of the rank that sends or receives most, both ways
    fetch                  a trip, and the weights of the rank that sends or receives most
    experts                the rank that computes longest: experts it holds, and its share of the others

Tokens come from all ranks alike. A fetched expert serves one step: its weights go to every rank that has a
token for it, which computes its own. A kept expert is on all ranks and moves nothing. In each layer experts
of the busiest ranks are kept (as many as there is room for), then fetched, one by one while that shortens the
layer on the steps that it is chosen on.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.parallel.step_loads import FEWEST_STEPS
from observatory.analysis.route_fetch.costs import TERMS, Constants
from observatory.analysis.statistics import (
    Interval,
    block_count,
    block_weights,
    few_blocks_widening,
    sample_interval,
)
from observatory.errors import BenchmarkError

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

_RESAMPLES = 100
#: Only what the busiest ranks have most of can shorten a layer by much.
_BUSIEST_RANKS, _EXPERTS_OF_RANK = 2, 4


class Choice(IntEnum):
    """What to do with an expert."""

    ROUTE = 0
    FETCH = 1
    KEEP = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """Experts of a model.

    Attributes:
        hidden: hidden size.
        expert_bytes: bytes of one expert's weights.
        element_bytes: bytes of one value.
    """

    hidden: int
    expert_bytes: int
    element_bytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one token, one way."""
        return self.hidden * self.element_bytes

    @property
    def token_operations(self) -> float:
        """Operations of one token in one expert: a multiplication and an addition for each weight."""
        return 2.0 * self.expert_bytes / self.element_bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertDecisions:
    """What to do with each expert, and what that saves.

    Attributes:
        choice_LE: `Choice` of each expert.
        tokens_LE: tokens of a step, mean over the steps that it was chosen on.
        route_us_LE, fetch_us_LE: what moving the tokens, or the weights, of that expert alone takes.
        break_even_tokens: tokens of an expert in a step from which on fetching it alone takes less time.
        today_us, chosen_us: time of a step on the steps that were not used to choose; without the experts'
            own time where the constants say nothing about it.
        saved_us: what the choice saves there, with its 90 % interval (steps and constants).
        saved_us_L: the same by layer.
        saved_experts_us: part of it that is the experts' own time, as more ranks compute them.
        keep_bytes: memory that kept experts take on each rank.
        keep_us: time to bring them there, once.
        steps: steps that it was chosen on, and judged on.
        without_compute: whether the constants say nothing about the experts' own time.
    """

    choice_LE: Int64
    tokens_LE: Float64
    route_us_LE: Float64
    fetch_us_LE: Float64
    break_even_tokens: float | None
    today_us: float
    chosen_us: float
    saved_us: Interval
    saved_us_L: Float64
    saved_experts_us: float
    keep_bytes: int
    keep_us: float
    steps: tuple[int, int]
    without_compute: bool


def decide_experts(
    load_SLE: Int64,
    rank_of_LE: Int64,
    shape: ExpertShape,
    constants: Constants,
    *,
    ranks: int,
    copies: int = 0,
    train_share: float = 0.5,
    seed: int = 0,
) -> ExpertDecisions:
    """Choose on the first steps, judge on the others.

    Args:
        load_SLE: tokens of each expert in each step and layer, from all ranks.
        rank_of_LE: rank that holds each expert.
        shape: of the experts.
        constants: of this fabric, or published.
        ranks: P.
        copies: experts of a layer that every rank has room to keep besides its own.
        train_share: share of the steps that the choice is made on.
        seed: of the resamples.

    Raises:
        BenchmarkError: fewer than `FEWEST_STEPS` on either side, or constants without transfers.
    """
    train = int(train_share * len(load_SLE) + 0.5)
    if min(train, len(load_SLE) - train) < FEWEST_STEPS:
        raise BenchmarkError(
            f"{train} steps to choose on and {len(load_SLE) - train} to judge on are too few",
            expected=f"at least {FEWEST_STEPS} of each",
            remedy="profile again with more --steps",
        )
    if "transfer" not in constants.stages:
        raise BenchmarkError(f"{constants.source} says nothing about transfers")
    choice_LE = choose_experts(load_SLE[:train], rank_of_LE, shape, constants, ranks=ranks, copies=copies)
    model = _LayerTimes(shape, constants, ranks)
    test_SLE = load_SLE[train:].astype(np.float64)
    today_LE = np.zeros_like(choice_LE)
    today_SL, chosen_SL = (
        _step_times(model, test_SLE, rank_of_LE, choice) for choice in (today_LE, choice_LE)
    )
    saved = _saving(constants, shape, ranks, test_SLE, rank_of_LE, choice_LE, today_SL - chosen_SL, seed)
    today_experts_us, chosen_experts_us = (
        sum(
            float(model.experts_us_S(test_SLE[:, layer], rank_of_LE[layer], of_LE[layer]).mean())
            for layer in range(test_SLE.shape[1])
        )
        for of_LE in (today_LE, choice_LE)
    )
    tokens_LE = load_SLE[:train].mean(axis=0)
    _, _, back = constants.stages["transfer"].us_F
    row_us, fetch_us = _alone_us(shape, constants, ranks)
    kept_L = (choice_LE == Choice.KEEP).sum(axis=1)
    return ExpertDecisions(
        choice_LE=choice_LE,
        tokens_LE=tokens_LE,
        route_us_LE=tokens_LE * row_us,
        fetch_us_LE=np.full(tokens_LE.shape, fetch_us),
        break_even_tokens=break_even_tokens(shape, constants, ranks),
        today_us=float(today_SL.sum(axis=1).mean()),
        chosen_us=float(chosen_SL.sum(axis=1).mean()),
        saved_us=saved,
        saved_us_L=(today_SL - chosen_SL).mean(axis=0),
        saved_experts_us=today_experts_us - chosen_experts_us,
        keep_bytes=int(kept_L.sum()) * shape.expert_bytes,
        keep_us=float(kept_L.sum() * (ranks - 1) * shape.expert_bytes * back),
        steps=(train, len(load_SLE) - train),
        without_compute="experts" not in constants.stages,
    )


def choose_experts(
    load_SLE: Int64 | Float64,
    rank_of_LE: Int64,
    shape: ExpertShape,
    constants: Constants,
    *,
    ranks: int,
    copies: int = 0,
) -> Int64:
    """`Choice` of each expert, (L, E), on these steps; arguments as of `decide_experts`."""
    model = _LayerTimes(shape, constants, ranks)
    return np.stack(
        [
            _choose(model, load_SLE[:, layer].astype(np.float64), rank_of_LE[layer], copies)
            for layer in range(load_SLE.shape[1])
        ]
    )


def break_even_tokens(shape: ExpertShape, constants: Constants, ranks: int) -> float | None:
    """Tokens of an expert in a step from which on fetching it alone takes less time; None: never."""
    row_us, fetch_us = _alone_us(shape, constants, ranks)
    return float(fetch_us / row_us) if row_us > 0 else None


def _alone_us(shape: ExpertShape, constants: Constants, ranks: int) -> tuple[float, float]:
    """Microseconds to send a token there and back, and to fetch an expert to all ranks."""
    trip, out, back = constants.stages["transfer"].us_F
    row_us = (ranks - 1) / ranks * shape.row_bytes * (out + back)
    return float(row_us), float(trip + (ranks - 1) * shape.expert_bytes * back)


class _LayerTimes:
    """Times of one layer for any choice of what to fetch and keep."""

    def __init__(
        self, shape: ExpertShape, constants: Constants, ranks: int, sample: int | None = None
    ) -> None:
        def costs(stage: str) -> Float64:
            if stage not in constants.stages:
                return np.zeros(len(TERMS[stage]))  # type: ignore[index]  # a literal
            known = constants.stages[stage]  # type: ignore[index]  # likewise
            return known.us_F if sample is None else known.samples_BF[sample % len(known.samples_BF)]

        self.shape, self.ranks = shape, ranks
        self.trip, self.out, self.back = costs("transfer")
        self.call, self.operation, self.byte = costs("experts")

    def us_S(self, load_SE: Float64, rank_of_E: Int64, choice_E: Int64) -> Float64:
        """Time of the layer in each step, (S,)."""
        ranks, shape = self.ranks, self.shape
        home_EP = (rank_of_E[:, None] == np.arange(ranks)).astype(np.float64)
        routed_E = choice_E == Choice.ROUTE
        # Rows: every rank has an equal share of each expert's tokens.
        share_SE = load_SE * routed_E / ranks
        arrive_SP = (ranks - 1) * share_SE @ home_EP
        leave_SP = share_SE.sum(axis=1, keepdims=True) - share_SE @ home_EP
        rows_S = np.maximum(arrive_SP, leave_SP).max(axis=1)
        us_S: Float64 = np.where(rows_S > 0, self.trip, 0.0) + rows_S * shape.row_bytes * (
            self.out + self.back
        )
        # Weights: to each rank that has a token for the expert.
        wanted_SE = (1.0 - (1.0 - 1.0 / ranks) ** load_SE) * (choice_E == Choice.FETCH)
        send_SP = (ranks - 1) * wanted_SE @ home_EP
        receive_SP = wanted_SE.sum(axis=1, keepdims=True) - wanted_SE @ home_EP
        weights_S = np.maximum(send_SP, receive_SP).max(axis=1) * shape.expert_bytes
        us_S += np.where(weights_S > 0, self.trip, 0.0) + weights_S * self.back
        return us_S + self.experts_us_S(load_SE, rank_of_E, choice_E)

    def mean_us(self, load_SE: Float64, rank_of_E: Int64, choice_E: Int64) -> float:
        """Time of the layer, mean over steps."""
        return float(self.us_S(load_SE, rank_of_E, choice_E).mean())

    def experts_us_S(self, load_SE: Float64, rank_of_E: Int64, choice_E: Int64) -> Float64:
        """The longest computing rank: experts with tokens at their home, an equal share of the others."""
        shape, ranks = self.shape, self.ranks
        home_EP = (rank_of_E[:, None] == np.arange(ranks)).astype(np.float64)
        routed_E = choice_E == Choice.ROUTE
        each = self.call + self.byte * shape.expert_bytes
        token = self.operation * shape.token_operations
        home_SE = (each * (load_SE > 0) + token * load_SE) * routed_E
        active_SE = (1.0 - (1.0 - 1.0 / ranks) ** load_SE) * ~routed_E
        shared_S = (each * active_SE + token * load_SE * ~routed_E / ranks).sum(axis=1)
        longest_S: Float64 = (home_SE @ home_EP).max(axis=1) + shared_S
        return longest_S


def _choose(model: _LayerTimes, load_SE: Float64, rank_of_E: Int64, copies: int) -> Int64:
    """Keep, then fetch, experts while that shortens the layer."""
    choice_E = np.zeros(load_SE.shape[1], dtype=np.int64)
    choice_E = _improved(model, load_SE, rank_of_E, choice_E, Choice.KEEP, copies)
    # To fetch from one rank may not pay while others are as busy: start with the busiest expert of each.
    load_E = load_SE.mean(axis=0) * (choice_E == Choice.ROUTE)
    order_E = np.lexsort((-load_E, _place_in_rank(load_E, rank_of_E)))
    tried_E, best_us, since = choice_E.copy(), model.mean_us(load_SE, rank_of_E, choice_E), 0
    for expert in order_E:
        if choice_E[expert] != Choice.ROUTE or since >= model.ranks:
            break
        tried_E[expert], since = Choice.FETCH, since + 1
        tried_us = model.mean_us(load_SE, rank_of_E, tried_E)
        if tried_us < best_us:
            choice_E, best_us, since = tried_E.copy(), tried_us, 0
    return _improved(model, load_SE, rank_of_E, choice_E, Choice.FETCH, len(choice_E))


def _place_in_rank(load_E: Float64, rank_of_E: Int64) -> Int64:
    """How many experts of the same rank have more tokens, (E,)."""
    place_E = np.zeros(len(load_E), dtype=np.int64)
    for rank in np.unique(rank_of_E):
        of_rank = np.flatnonzero(rank_of_E == rank)
        place_E[of_rank[np.argsort(-load_E[of_rank], kind="stable")]] = np.arange(len(of_rank))
    return place_E


def _improved(
    model: _LayerTimes, load_SE: Float64, rank_of_E: Int64, choice_E: Int64, choice: Choice, most: int
) -> Int64:
    """At most so many experts more with a choice, each the one that shortens the layer most."""
    choice_E, mean_E = choice_E.copy(), load_SE.mean(axis=0)
    best_us = model.mean_us(load_SE, rank_of_E, choice_E)
    for _ in range(most):
        tried: dict[int, float] = {}
        for expert in _candidates(mean_E * (choice_E == Choice.ROUTE), rank_of_E, model.ranks):
            tried_E = choice_E.copy()
            tried_E[expert] = choice
            tried[expert] = model.mean_us(load_SE, rank_of_E, tried_E)
        best = min(tried, key=tried.__getitem__, default=None)
        if best is None or tried[best] >= best_us:
            break
        choice_E[best], best_us = choice, tried[best]
    return choice_E


def _candidates(routed_E: Float64, rank_of_E: Int64, ranks: int) -> list[int]:
    """The experts with most tokens on the ranks that receive most."""
    routed_P = np.bincount(rank_of_E, weights=routed_E, minlength=ranks)
    order_E = np.argsort(-routed_E, kind="stable")
    busiest = np.argsort(-routed_P, kind="stable")[:_BUSIEST_RANKS]
    return [
        int(expert)
        for rank in busiest
        for expert in order_E[(rank_of_E == rank)[order_E]][:_EXPERTS_OF_RANK]
        if routed_E[expert] > 0
    ]


def _step_times(model: _LayerTimes, load_SLE: Float64, rank_of_LE: Int64, choice_LE: Int64) -> Float64:
    """Time of every layer in every step, (S, L)."""
    return np.stack(
        [
            model.us_S(load_SLE[:, layer], rank_of_LE[layer], choice_LE[layer])
            for layer in range(load_SLE.shape[1])
        ],
        axis=1,
    )


def _saving(
    constants: Constants, shape: ExpertShape, ranks: int, load_SLE: Float64, rank_of_LE: Int64,
    choice_LE: Int64, saved_SL: Float64, seed: int,
) -> Interval:  # fmt: skip
    """Mean saving of a step: steps are resampled in blocks, constants from their own samples."""
    value = float(saved_SL.sum(axis=1).mean())
    if not choice_LE.any():
        return Interval(value=0.0, low=0.0, high=0.0)
    changed_L = choice_LE.any(axis=1)
    load_SLE, rank_of_LE, choice_LE = load_SLE[:, changed_L], rank_of_LE[changed_L], choice_LE[changed_L]
    today_LE = np.zeros_like(choice_LE)
    steps = len(load_SLE)
    weight_BS = block_weights(steps, _RESAMPLES, seed)
    sampled = []
    for index, weight_S in enumerate(weight_BS):
        model = _LayerTimes(shape, constants, ranks, sample=index)
        saved_S = sum(
            sign * _step_times(model, load_SLE, rank_of_LE, choice).sum(axis=1)
            for sign, choice in ((1.0, today_LE), (-1.0, choice_LE))
        )
        sampled.append(float(np.asarray(saved_S) @ weight_S / steps))
    widening = few_blocks_widening(max(2, block_count(steps)))
    return sample_interval(value, value + widening * (np.array(sampled) - value))
