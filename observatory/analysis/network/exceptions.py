"""Ranks, directions, pairs and nodes that a fitted network model does not describe, because they differ.

Shapes: C cases of one set of ranks, P ranks, K candidates, S scales of the model, B costs per byte.

The model knows one cost for all ranks. A candidate is a part of the fabric with a cost of its own: what one
rank sends, receives, or both; what one rank sends another; what one node exchanges with others. An exchange
then lasts at least as long as that part is busy:

    t = max(model with its costs per byte scaled by s,  latency + b * bytes through the candidate)

with the best s and b of a grid. Errors count in units of what repeats scatter (|log measured / predicted|
over the expected error, cut off where one case would decide alone). A candidate must explain more than the
same rule for *all* ranks would (the busiest rank, or pair, whichever it is): otherwise the form of the model
is at fault and no rank.

How many candidates are tried is part of the test: labels of the ranks are permuted (nodes stay together), for
every pattern anew and for all its sizes alike, and the best of all candidates is taken each time. It must do
better with the true labels than with 99 others, which happens by chance in one fit of a hundred.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["rank_sends", "rank_receives", "rank", "pair", "node_sends", "node_receives"]
#: How bytes of a candidate are counted: as its kind says; of a rank both ways together, or the larger; of two
#: ranks the larger of either.
_Count = Literal["one", "sum", "larger", "either"]
Floats = NDArray[np.float64]

#: Largest share of permutations that may do as well.
_FALSE_ALARMS = 0.01
_PERMUTATIONS = 99
#: Least that it must explain: of the error, and on average of the error that is expected of one case, of
#: which the best candidate by chance explains up to 0.12 where forms are right.
_LEAST_EXPLAINED = 0.1
_LEAST_PER_CASE = 0.15
#: Patterns in which it decides the time.
_LEAST_PATTERNS = 3
_MOST_FOUND = 16
#: Ranks and cases of one set that are looked at: labels are permuted hundreds of times.
_MOST_RANKS = 256
MOST_CASES = 200
#: Pairs grow with the square of the ranks, and so does the evidence that one of them needs.
_MOST_RANKS_OF_PAIRS = 12
_SCALES = np.geomspace(0.1, 1.25, 10)
_PLAIN_SCALES = np.geomspace(0.1, 1.6, 7)
_COSTS = np.concatenate([[0.0], np.geomspace(0.25, 16.0, 13)])
#: Errors count up to so many times what is expected.
_CUT_OFF = 8.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class World:
    """Cases of one algorithm on the same ranks.

    Attributes:
        node_of_P: node of each rank.
        bytes_CPP: bytes from rank i to rank j over all stages of each case.
        group_C: cases of one group are the same matrix at several sizes.
        us_C: measured microseconds.
        noise_C: expected relative error.
        latency_us_C: what the model says without its costs per byte.
        floor: whether bytes pass during the latency, so that the longer of the two counts, not the sum.
        model_us_SC: what it says with these scaled by each of ``scales()``.
    """

    node_of_P: tuple[int, ...]
    bytes_CPP: NDArray[np.int64]
    group_C: Sequence[object]
    us_C: Floats
    noise_C: Floats
    latency_us_C: Floats
    floor: bool
    model_us_SC: Floats

    @staticmethod
    def scales() -> Floats:
        """S factors of the model's costs per byte."""
        return _SCALES

    def with_latency(self, us_C: Floats) -> Floats:
        """Times of bytes alone, with the latency of their case; the last axis is C."""
        whole_C: Floats = np.maximum(self.latency_us_C, us_C) if self.floor else self.latency_us_C + us_C
        return whole_C


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A part of the fabric: its kind, the rank, node, or two ranks, and how its bytes are counted."""

    kind: Kind
    who: tuple[int, ...]
    counted: _Count = "one"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A candidate that differs.

    Attributes:
        world: where.
        kind, who: what, of which rank, node, or sending and receiving rank.
        us_per_byte: its own cost.
        p_value: share of relabelled measurements in which the best candidate does as well.
        cases: cases in which it decides.
    """

    world: World
    kind: Kind
    who: tuple[int, ...]
    us_per_byte: float
    p_value: float
    cases: int


def find_exceptions(worlds: Sequence[World], *, seed: int = 0) -> list[Found]:
    """Parts that differ, the most important first; empty where none can be found.

    Sets of more than 256 ranks are not looked at, single pairs and two ranks together up to 12.
    """
    worlds = [world for world in worlds if 1 < len(world.node_of_P) <= _MOST_RANKS]
    generator = np.random.default_rng(seed)
    searches = [_Search(world) for world in worlds if len(world.node_of_P) > 1 and world.bytes_CPP.any()]
    exceptions: list[Found] = []
    while len(exceptions) < _MOST_FOUND and searches:
        gain, parts = _best(searches, None)
        if not parts:
            break
        p_value = _p_value(searches, gain, generator)
        if p_value > _FALSE_ALARMS:
            break
        exceptions += [item for part in parts for item in part.search.accept(part, p_value)]
    return exceptions


def _best(searches: Sequence[_Search], generator: np.random.Generator | None) -> tuple[float, list[_Part]]:
    """What the best candidate explains beyond a rule for all ranks, and its parts in one world or several.

    Ranks are the same in several worlds where their numbers are, counted from the first or from the last.
    """
    gains: dict[tuple[object, ...], float] = defaultdict(float)
    parts: dict[tuple[object, ...], list[_Part]] = defaultdict(list)
    least: dict[tuple[object, ...], float] = defaultdict(float)
    for place, search in enumerate(searches):
        unexplained, world_parts = search.parts(search.bytes_KC(generator))
        last = len(search.world.node_of_P)
        for part in world_parts:
            kind, who = (part.candidate.kind, part.candidate.counted), part.candidate.who
            from_last = tuple(number - last for number in who)
            for key in ((kind, place, who), (kind, None, who), (kind, None, from_last)):
                gains[key] += max(part.gain, 0.0)
                least[key] += max(_LEAST_EXPLAINED * unexplained, _LEAST_PER_CASE * len(search.world.us_C))
                parts[key].append(part)
    best = max(gains, key=lambda key: gains[key], default=None)
    if best is None or gains[best] < least[best]:
        return 0.0, []
    return gains[best], [part for part in parts[best] if part.significant]


def _p_value(searches: Sequence[_Search], gain: float, generator: np.random.Generator) -> float:
    """Share of permutations whose best candidate gains as much; larger than it is once it is too large."""
    as_good, allowed = 0, int(_FALSE_ALARMS * (_PERMUTATIONS + 1)) - 1
    for done in range(1, _PERMUTATIONS + 1):
        as_good += _best(searches, generator)[0] >= gain
        if as_good > allowed:
            return (as_good + 1) / (done + 1)
    return (as_good + 1) / (_PERMUTATIONS + 1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Part:
    """What one candidate does in one world: its scale and cost, and where it decides."""

    search: _Search
    candidate: Candidate
    gain: float
    us_per_byte: float
    bytes_C: Floats
    cases: int
    significant: bool


class _Search:
    """Tries every candidate of one world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._log_us_C = np.log(world.us_C)
        busiest_C = np.maximum(world.bytes_CPP.sum(axis=1), world.bytes_CPP.sum(axis=2)).max(axis=1)
        some = busiest_C > 0
        # What a byte of the busiest rank costs on the whole: the grid of costs lies around it.
        beyond_C = np.maximum(world.us_C - world.latency_us_C, 0.0)[some] / busiest_C[some]
        usual = float(np.median(beyond_C[np.argsort(busiest_C[some])[-max(len(beyond_C) // 2, 1) :]]))
        self._costs_B = _COSTS * max(usual, 1e-12)
        # The fit that is to be judged has bent to what differs: plain rules for all ranks stand next to it.
        plain_XC = _plain_bytes(world.bytes_CPP.astype(np.float64))
        plain_us = np.multiply.outer(_PLAIN_SCALES * max(usual, 1e-12), plain_XC).reshape(-1, len(world.us_C))
        self._log_model_SC = np.log(np.concatenate([world.model_us_SC, world.with_latency(plain_us)]))
        groups = list(dict.fromkeys(world.group_C))
        self._group_C = np.array([groups.index(group) for group in world.group_C])
        self._candidates = _candidates(world.node_of_P)
        self._kind_K = np.array([candidate.kind + candidate.counted for candidate in self._candidates])

    def bytes_KC(self, generator: np.random.Generator | None = None) -> Floats:
        """Bytes through every candidate, with labels permuted group by group where a generator is given."""
        world = self.world
        label_GP = np.tile(np.arange(len(world.node_of_P)), (self._group_C.max() + 1, 1))
        if generator is not None:
            label_GP = np.array([_relabelled(world.node_of_P, generator) for _ in label_GP])
        label_CP = label_GP[self._group_C]
        case_C = np.arange(len(label_CP))[:, None, None]
        bytes_CPP = world.bytes_CPP[case_C, label_CP[:, :, None], label_CP[:, None, :]].astype(np.float64)
        bytes_CPP[:, *np.diag_indices(len(world.node_of_P))] = 0.0
        return _through(bytes_CPP, world.node_of_P)

    def parts(self, bytes_KC: Floats) -> tuple[float, list[_Part]]:
        """The error under the best rule for all ranks, and what every candidate does beyond it."""
        kinds = list(dict.fromkeys(self._kind_K))
        free_KC = np.array([bytes_KC[self._kind_K == kind].max(axis=0) for kind in kinds])
        loss_K, scale_K, cost_K = self._loss(bytes_KC)
        free = float(self._loss(free_KC)[0].min())
        return free, [
            self._part(
                candidate,
                gain=free - float(loss_K[index]),
                rest_us_C=np.exp(self._log_model_SC[scale_K[index]]),
                us_per_byte=float(self._costs_B[cost_K[index]]),
                bytes_C=bytes_KC[index],
            )
            for index, candidate in enumerate(self._candidates)
        ]

    def _part(
        self, candidate: Candidate, *, gain: float, rest_us_C: Floats, us_per_byte: float, bytes_C: Floats
    ) -> _Part:
        part_us_C = self.world.with_latency(us_per_byte * bytes_C)
        decides_C = (part_us_C > rest_us_C) & (bytes_C > 0)
        patterns = len(np.unique(self._group_C[decides_C]))
        return _Part(
            search=self,
            candidate=candidate,
            gain=gain,
            us_per_byte=us_per_byte,
            bytes_C=bytes_C,
            cases=int(decides_C.sum()),
            significant=gain > 0 and patterns >= _LEAST_PATTERNS,
        )

    def accept(self, part: _Part, p_value: float) -> list[Found]:
        """Add it to the known parts, so that further ones are searched in addition."""
        part_us_C = self.world.with_latency(part.us_per_byte * part.bytes_C)
        self._log_model_SC = np.maximum(self._log_model_SC, np.log(part_us_C))
        each = part.candidate.counted == "either"
        return [
            Found(
                world=self.world,
                kind=part.candidate.kind,
                who=who,
                us_per_byte=part.us_per_byte,
                p_value=p_value,
                cases=part.cases,
            )
            for who in ([(rank,) for rank in part.candidate.who] if each else [part.candidate.who])
        ]

    def _loss(self, bytes_KC: Floats) -> tuple[Floats, NDArray[np.intp], NDArray[np.intp]]:
        """Smallest error with each candidate, and the scale and cost that have it, each (K,)."""
        noise_C = self.world.noise_C
        loss_KSB = np.empty((len(bytes_KC), len(self._log_model_SC), len(self._costs_B)))
        for place, cost in enumerate(self._costs_B):
            part_KC = np.log(self.world.with_latency(cost * bytes_KC))
            error_KSC = np.abs(np.maximum(self._log_model_SC, part_KC[:, None, :]) - self._log_us_C) / noise_C
            loss_KSB[:, :, place] = np.minimum(error_KSC, _CUT_OFF).sum(axis=2)
        flat = loss_KSB.reshape(len(bytes_KC), -1)
        at = flat.argmin(axis=1)
        scale, cost = np.divmod(at, len(self._costs_B))
        return flat[np.arange(len(flat)), at], scale, cost


def _candidates(node_of_P: tuple[int, ...]) -> list[Candidate]:
    """In the order of ``_through``."""
    ranks = range(len(node_of_P))
    kinds: tuple[tuple[Kind, _Count], ...] = (
        ("rank_sends", "one"), ("rank_receives", "one"), ("rank", "sum"), ("rank", "larger"),
    )  # fmt: skip
    candidates = [Candidate(kind=kind, who=(rank,), counted=how) for kind, how in kinds for rank in ranks]
    if len(ranks) <= _MOST_RANKS_OF_PAIRS:
        candidates += [
            Candidate(kind="rank", who=(i, j), counted="either") for i, j in combinations(ranks, 2)
        ]
        candidates += [Candidate(kind="pair", who=(i, j)) for i in ranks for j in ranks if i != j]
    if _has_larger_nodes(node_of_P):
        both: tuple[Kind, ...] = ("node_sends", "node_receives")
        candidates += [Candidate(kind=kind, who=(node,)) for kind in both for node in sorted(set(node_of_P))]
    return candidates


def _through(bytes_CPP: Floats, node_of_P: tuple[int, ...]) -> Floats:
    """Bytes through every candidate, (K, C)."""
    out_PC, in_PC = bytes_CPP.sum(axis=2).T, bytes_CPP.sum(axis=1).T
    parts = [out_PC, in_PC, out_PC + in_PC, np.maximum(out_PC, in_PC)]
    ranks = len(node_of_P)
    if ranks <= _MOST_RANKS_OF_PAIRS:
        first, second = np.triu_indices(ranks, 1)
        parts.append(np.maximum(parts[3][first], parts[3][second]))
        parts.append(bytes_CPP[:, ~np.eye(ranks, dtype=bool)].T)
    if _has_larger_nodes(node_of_P):
        node_P = np.array(node_of_P)
        across_CPP = np.where(node_P[:, None] == node_P[None, :], 0.0, bytes_CPP)
        for axis in (2, 1):
            of_rank_CP = across_CPP.sum(axis=axis)
            parts.append(
                np.array([of_rank_CP[:, node_P == node].sum(axis=1) for node in sorted(set(node_of_P))])
            )
    return np.concatenate(parts)


def _plain_bytes(bytes_CPP: Floats) -> Floats:
    """Bytes of the busiest rank under rules for all, (X, C): full duplex, two ways in turns, half duplex."""
    bytes_CPP = bytes_CPP * ~np.eye(bytes_CPP.shape[1], dtype=bool)
    out_CP, in_CP = bytes_CPP.sum(axis=2), bytes_CPP.sum(axis=1)
    both_ways_CP = np.minimum(bytes_CPP, bytes_CPP.transpose(0, 2, 1)).sum(axis=2)
    larger_CP = np.maximum(out_CP, in_CP)
    rules = (larger_CP, larger_CP + 0.8 * both_ways_CP, out_CP + in_CP)
    return np.array([bytes_CP.max(axis=1) for bytes_CP in rules])


def _has_larger_nodes(node_of_P: tuple[int, ...]) -> bool:
    return 1 < len(set(node_of_P)) < len(node_of_P)


def _relabelled(node_of_P: tuple[int, ...], generator: np.random.Generator) -> NDArray[np.int64]:
    """Ranks in another order that leaves together what shares a node; nodes of one size change places."""
    node_P = np.array(node_of_P)
    members = {node: np.flatnonzero(node_P == node) for node in np.unique(node_P)}
    label_P = np.arange(len(node_P))
    for size in {len(ranks) for ranks in members.values()}:
        same_size = [node for node, ranks in members.items() if len(ranks) == size]
        within = generator.permutation(
            size
        )  # the same in all nodes: hierarchical exchanges pair equal places
        for node, other in zip(same_size, generator.permutation(same_size), strict=True):
            label_P[members[node]] = members[other][within]
    return label_P
