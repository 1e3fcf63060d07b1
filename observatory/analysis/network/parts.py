"""Ranks, pairs and nodes whose bytes cost more than those of the others, each with a factor of its own.

Shapes: C cases of one set of ranks, P ranks, K parts, S scales of the model, B costs per byte.

A part is what one rank sends, receives, or both; what one rank sends another; what one node sends or
receives. Ranks of the same number, counted from the first or from the last, are also tried together over all
sets of ranks. All parts are first compared by a bound that costs nothing to compute: an exchange lasts at
least as long as the part is busy, and the other costs may be smaller than a fit says that has bent to the
slow part,

    t = latency + max(s * (model - latency), b * bytes through the part).

The best of each kind is then tried in the model itself: its bytes count ``factor`` times, all coefficients
are fitted again. A part is kept when it lowers the error by more than the criterion of Schwarz (1978) allows
for one more parameter, patterns counted as the observations, and for the number of parts that were compared;
in the end again. A part of one set of ranks must also explain errors that are larger than the measurement
leaves one to expect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.network.features import Factors

Code = Literal["rank_sends", "rank_receives", "rank", "pair", "node_sends", "node_receives"]
Floats = NDArray[np.float64]

_SMALLEST_ERROR = 1e-3
#: Mean error, in units of what is expected, that leaves nothing to explain; and the one up to which a part of
#: one set of ranks is not believed: nothing that was measured by itself agrees with it.
_NOTHING = 0.3
_EXPECTED = 1.0
_LEAST_FACTOR = 1.2
_LEAST_PATTERNS = 4
_LEAST_CASES = 16
_MOST_FOUND = 16
_MOST_RANKS = 256
MOST_CASES = 200
#: Pairs grow with the square of the ranks, and so does the evidence that one of them needs.
_MOST_RANKS_OF_PAIRS = 12
_SCALES = np.geomspace(0.15, 1.0, 8)
_COSTS = np.geomspace(0.25, 16.0, 13)
_FACTORS = (1.5, 2.2, 3.3, 5.0, 8.0)
_FINER = (0.82, 1.22, 0.91, 1.1)
#: Errors count up to so many times what is expected.
_CUT_OFF = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of the fabric of one set of ranks.

    Attributes:
        code: what of it.
        who: the rank, the sending and the receiving rank, or the node.
        node_of_P: the ranks.
        factor: how many times as much a byte costs there.
    """

    code: Code
    who: tuple[int, ...]
    node_of_P: tuple[int, ...]
    factor: float = 1.0

    def through_PP(self) -> NDArray[np.bool_]:
        """Entries of a matrix that pass it; of a rank both ways its row alone."""
        place_P = np.array(self.node_of_P) if self.code.startswith("node") else np.arange(len(self.node_of_P))
        own_P, others_P = place_P == self.who[0], place_P != self.who[0]
        if self.code == "pair":
            others_P = place_P == self.who[1]
        passing_PP: NDArray[np.bool_] = own_P[:, None] & others_P[None, :]
        return passing_PP.T if self.code.endswith("receives") else passing_PP


def factors_of(parts: Sequence[Part], node_of_P: tuple[int, ...]) -> Factors | None:
    """What bytes count on a set of ranks; None where no part is slower there."""
    here = [part for part in parts if part.node_of_P == node_of_P]
    if not here:
        return None
    out_PP, in_PP = np.ones((2, len(node_of_P), len(node_of_P)))
    for part in here:
        mask_PP = part.through_PP()
        if not part.code.endswith("receives"):
            out_PP[mask_PP] *= part.factor
        if not part.code.endswith("sends"):
            in_PP[mask_PP.T if part.code == "rank" else mask_PP] *= part.factor
    return Factors(out_PP=out_PP, in_PP=in_PP)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class World:
    """Cases of one algorithm on the same ranks.

    Attributes:
        node_of_P: node of each rank.
        case_C: places of the cases among all.
        bytes_CPP: bytes from rank i to rank j over all stages of each case.
        group_C: number of the pattern of each case.
        us_C: measured microseconds.
        noise_C: expected relative error.
    """

    node_of_P: tuple[int, ...]
    case_C: NDArray[np.int64]
    bytes_CPP: NDArray[np.int64]
    group_C: NDArray[np.int64]
    us_C: Floats
    noise_C: Floats


#: Predicted microseconds of all cases with some parts, and what of them is latency.
Predict = Callable[[Sequence[Part]], tuple[Floats, Floats]]
#: The same part of one or several sets of ranks.
Parts = tuple[Part, ...]


def searched(worlds: Sequence[World]) -> list[World]:
    """Sets of ranks that are looked at: of at most 256 ranks, with enough patterns and cases."""
    return [
        world
        for world in worlds
        if len(set(world.group_C.tolist())) >= _LEAST_PATTERNS
        and len(world.us_C) >= _LEAST_CASES
        and 1 < len(world.node_of_P) <= _MOST_RANKS
    ]


def find_parts(worlds: Sequence[World], predict: Predict) -> list[Part]:
    """Parts that are slower, those of one set of ranks together.

    Args:
        worlds: sets of ranks that are looked at.
        predict: fits the model again with some parts, to the cases of all worlds, one world after another.
    """
    return [part for parts in _Search(worlds, predict).run() for part in parts] if worlds else []


class _Search:
    """Adds what explains most, one after another, then takes away what the others explain as well."""

    def __init__(self, worlds: Sequence[World], predict: Predict) -> None:
        self._worlds = worlds
        self._predict = predict
        self._us_C = np.concatenate([world.us_C for world in worlds])
        self._noise_C = np.concatenate([world.noise_C for world in worlds])
        self._own_C = np.split(
            np.arange(len(self._us_C)), np.cumsum([len(world.us_C) for world in worlds])[:-1]
        )
        self._patterns = len({group for world in worlds for group in world.group_C.tolist()})
        self._candidates = _candidates([world.node_of_P for world in worlds])
        self._bytes_KC = np.array([_bytes_C(parts, worlds) for parts in self._candidates])

    def run(self) -> list[Parts]:
        found: list[Parts] = []
        error = self._error(found)
        while len(found) < _MOST_FOUND and error >= _NOTHING and self._candidates:
            more, less = self._with_slowest(found, error)
            if not self._proven(error, less):
                break
            found, error = more, less
        return self._without_needless(found, error)

    def _proven(self, before: float, after: float) -> bool:
        gain = self._patterns * np.log(before / max(after, _SMALLEST_ERROR))
        return bool(gain > 0.5 * np.log(self._patterns) + np.log(len(self._candidates)))

    def _without_needless(self, found: list[Parts], error: float) -> list[Parts]:
        """Parts that the others do not explain as well, taken away one after another."""
        for place in range(len(found)):
            left = found[:place] + found[place + 1 :]
            without = self._error(left)
            doubtful = len(found[place]) == 1 and self._worst(left) < _EXPECTED
            if doubtful or not self._proven(without, error):
                return self._without_needless(left, without)
        return found

    def _error(self, found: Sequence[Parts]) -> float:
        us_C, _ = self._predict([part for parts in found for part in parts])
        return float(self._error_C(us_C).mean())

    def _worst(self, found: Sequence[Parts]) -> float:
        """Mean error of the set of ranks that has most."""
        error_C = self._error_C(self._predict([part for parts in found for part in parts])[0])
        return max(float(error_C[own_C].mean()) for own_C in self._own_C)

    def _error_C(self, us_C: Floats) -> Floats:
        """Errors in units of what is expected; the last axis is C."""
        error_C: Floats = np.minimum(np.abs(np.log(us_C / self._us_C)) / self._noise_C, _CUT_OFF)
        return error_C

    def _with_slowest(self, found: list[Parts], error: float) -> tuple[list[Parts], float]:
        """The best of each kind added, and its factor and those of the others improved."""
        best, least = found, error
        known = {(part.code, part.who, part.node_of_P) for parts in found for part in parts}
        tried: dict[tuple[str, int], Parts] = {}
        for k in np.argsort(self._bound(found), kind="stable"):
            parts = self._candidates[k]
            if not any((part.code, part.who, part.node_of_P) in known for part in parts):
                tried.setdefault((parts[0].code, len(parts)), parts)
        for parts in tried.values():
            for factor in _FACTORS:
                more = [*found, _with_factor(parts, factor)]
                if (now := self._error(more)) < least:
                    best, least = more, now
        for place in range(len(best)) if best is not found else ():
            for finer in _FINER:
                changed = _with_factor(best[place], best[place][0].factor * finer)
                more = [*best[:place], changed, *best[place + 1 :]]
                if changed[0].factor > _LEAST_FACTOR and (now := self._error(more)) < least:
                    best, least = more, now
        return best, least

    def _bound(self, found: Sequence[Parts]) -> Floats:
        """Smallest error of each candidate under the bound, (K,)."""
        before_C, latency_C = self._predict([part for parts in found for part in parts])
        beyond_C = np.maximum(before_C - latency_C, 1e-3)
        busiest_C = np.maximum(self._bytes_KC.max(axis=0), 1.0)
        usual = float(np.median((beyond_C / busiest_C)[busiest_C >= np.median(busiest_C)]))
        least_K = np.full(len(self._candidates), np.inf)
        for scale in _SCALES:
            for cost in _COSTS * usual:
                us_KC = latency_C + np.maximum(scale * beyond_C, cost * self._bytes_KC)
                least_K = np.minimum(least_K, self._error_C(us_KC).sum(axis=1))
        return least_K


def _with_factor(parts: Parts, factor: float) -> Parts:
    return tuple(replace(part, factor=factor) for part in parts)


def _bytes_C(parts: Parts, worlds: Sequence[World]) -> Floats:
    """Bytes through a part in all cases, 0 where the set of ranks is another, (C,)."""
    of_world = {part.node_of_P: part for part in parts}
    return np.concatenate(
        [
            _through_C(of_world[world.node_of_P], world.bytes_CPP.astype(np.float64))
            if world.node_of_P in of_world
            else np.zeros(len(world.us_C))
            for world in worlds
        ]
    )


def _through_C(part: Part, bytes_CPP: Floats) -> Floats:
    mask_PP = part.through_PP()
    sent_C: Floats = (bytes_CPP * mask_PP).sum(axis=(1, 2))
    return sent_C if part.code != "rank" else np.maximum(sent_C, (bytes_CPP * mask_PP.T).sum(axis=(1, 2)))


def _candidates(sets: Sequence[tuple[int, ...]]) -> list[Parts]:
    """Parts of each set of ranks; and of all that have them, of the same number or the same from the end."""
    together: dict[tuple[object, ...], list[Part]] = {}
    for node_of_P in sets:
        for part in _parts_of(node_of_P):
            count = len(set(node_of_P)) if part.code.startswith("node") else len(node_of_P)
            from_end = tuple(number - count for number in part.who)
            for key in ((part.code, part.who), (part.code, from_end), (part.code, part.who, node_of_P)):
                together.setdefault(key, []).append(part)
    return list(dict.fromkeys(map(tuple, together.values())))


def _parts_of(node_of_P: tuple[int, ...]) -> list[Part]:
    ranks = range(len(node_of_P))
    # Of two ranks, one slow and both slow are the same.
    whose: list[tuple[Code, tuple[int, ...]]] = [
        (code, (rank,))
        for code in ("rank", "rank_sends", "rank_receives")
        for rank in ranks
        if len(ranks) > 2
    ]
    if 1 < len(set(node_of_P)) < len(node_of_P):
        whose += [
            (code, (node,)) for code in ("node_sends", "node_receives") for node in sorted(set(node_of_P))
        ]
    if len(ranks) <= _MOST_RANKS_OF_PAIRS:
        whose += [("pair", (i, j)) for i in ranks for j in ranks if i != j]
    return [Part(code=code, who=who, node_of_P=node_of_P) for code, who in whose]
