"""What to do where the experts of a rank do not fit into its memory.

Shapes: S judged steps, L layers, P ranks, K slots of each rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from observatory.advice.mitigations.lab import Lab, code_of, not_applicable, not_known, shown
from observatory.advice.mitigations.timed import Float64, Int64
from observatory.advice.mitigations.verdict import Mitigation, MitigationCode, Premise, Verdict, VerdictCode
from observatory.analysis.parallel.expert_reuse import NextLayer, next_layer, recent_misses
from observatory.reasons import Reason

Bool = NDArray[np.bool_]

#: Random orders of the steps that hits by recency are compared with.
_ORDERS = 3
#: Hits beyond those of random order or of the most used experts that are no noise.
_MORE = 0.02
#: Fewer tokens of a pair of layers do not show how one predicts the next.
_FEWEST_TOKENS = 200


def expert_cache(lab: Lab) -> Iterator[Verdict]:
    """Experts that do not fit are fetched from the host: which to keep, and which to fetch ahead.

    The first row keeps what the training steps used most; the others are judged by what they add to it.
    """
    memory = lab.setup.memory_bytes
    if memory is None:
        yield not_known(Mitigation.EXPERT_CACHE, MitigationCode.NO_MEMORY)
        return
    premise = Premise(
        reason=Reason(
            MitigationCode.EXPERTS_DO_NOT_FIT, {"held_bytes": lab.held_bytes, "memory_bytes": int(memory)}
        ),
        holds=lab.over_memory(0),
    )
    if not premise.holds:
        fits = not_applicable(Mitigation.EXPERT_CACHE, MitigationCode.EXPERTS_DO_NOT_FIT)
        yield replace(fits, premise=premise)
        return
    if lab.setup.host_bytes_per_s is None:
        missing = not_known(Mitigation.EXPERT_CACHE, MitigationCode.NO_HOST_RATE)
        yield replace(missing, premise=premise)
        return
    cache = _Cache(lab, memory, lab.setup.host_bytes_per_s)
    kept, slots = cache.kept(0), lab.trace.today_LPK.shape[2]
    used = cache.row(
        Mitigation.EXPERT_CACHE,
        f"{kept} of {slots}, most used",
        cache.active_SLPK & ~cache.most_used(kept),
        premise,
    )
    yield used.verdict
    last_used_SLPK = recent_misses(lab.trace.loads.load_SLE, lab.trace.today_LPK, kept)[lab.judged_S]
    yield cache.row(
        Mitigation.EXPERT_CACHE,
        f"{kept} of {slots}, last used",
        last_used_SLPK,
        _used_again(lab, cache, last_used_SLPK, kept),
        beyond_S=used.total_S,
    ).verdict
    yield _prefetch(lab, cache, used.total_S)


def _prefetch(lab: Lab, cache: _Cache, used_S: Float64) -> Verdict:
    """While a layer computes, the likely experts of the next are fetched into room that is kept for them."""
    if lab.layers < 2:
        return not_applicable(Mitigation.EXPERT_PREFETCH, MitigationCode.ONE_LAYER)
    steps, train = lab.trace.loads.step_S, lab.trace.train_steps
    shown_by = None
    if lab.trace.tokens is not None:
        first = train if steps is None else steps[train]
        shown_by = next_layer(lab.trace.tokens, lab.experts, first, fewest=_FEWEST_TOKENS)
    if shown_by is None:
        return not_known(Mitigation.EXPERT_PREFETCH, MitigationCode.NO_TOKENS)
    layer_us = float(lab.today.total_S.mean()) / lab.layers
    slots = lab.trace.today_LPK.shape[2]
    most = min(slots, max(1, int(layer_us / cache.expert_us)))
    # More than all that are not kept cannot be fetched.
    ahead = next((count for count in range(1, most) if count + cache.kept(count) >= slots), most)
    kept = cache.kept(ahead)
    is_kept_LPK = cache.most_used(kept)
    missed_SLPK = cache.active_SLPK & ~is_kept_LPK
    missed_SLPK &= ~_fetched_ahead(lab, shown_by, is_kept_LPK, ahead)
    # What does not arrive within a layer keeps the next one waiting.
    late_us = (lab.layers - 1) * max(0.0, ahead * cache.expert_us - layer_us)
    return cache.row(
        Mitigation.EXPERT_PREFETCH,
        f"{kept} of {slots}, {ahead} ahead",
        missed_SLPK,
        Premise(
            reason=Reason(
                MitigationCode.NEXT_PREDICTED, {"recall": shown_by.recall, "popular": shown_by.popular}
            ),
            holds=shown_by.recall - shown_by.popular > _MORE,
        ),
        beyond_S=used_S,
        late_us=late_us,
    ).verdict


def _fetched_ahead(lab: Lab, shown_by: NextLayer, is_kept_LPK: Bool, ahead: int) -> Bool:
    """Slots whose experts are fetched while the layer before computes, by what its loads predict."""
    slot_LPK = lab.trace.today_LPK
    ahead_SLPK = np.zeros((len(lab.judged_S), *slot_LPK.shape), dtype=bool)
    for layer in range(1, lab.layers):
        likely_SE = lab.test_SLE[:, layer - 1] @ shown_by.follow_LEE[layer - 1]
        likely_SPK = np.where(is_kept_LPK[layer], -np.inf, likely_SE[:, slot_LPK[layer]])
        order_SPK = np.argsort(-likely_SPK, axis=2, kind="stable")
        np.put_along_axis(ahead_SLPK[:, layer], order_SPK[..., :ahead], True, axis=2)
    return ahead_SLPK


def _used_again(lab: Lab, cache: _Cache, missed_SLPK: Bool, kept: int) -> Premise:
    """Whether consecutive steps share experts beyond what the most used ones make likely."""
    load_SLE, train = lab.trace.loads.load_SLE, lab.trace.train_steps
    generator = np.random.default_rng(0)
    hits = []
    for _ in range(_ORDERS):
        shuffled_SLE = load_SLE[generator.permutation(len(load_SLE))]
        by_chance_SLPK = recent_misses(shuffled_SLE, lab.trace.today_LPK, kept)[train:]
        active_SLPK = _active(shuffled_SLE[train:], lab.trace.today_LPK)
        hits.append(1.0 - by_chance_SLPK.sum() / max(active_SLPK.sum(), 1))
    hit = 1.0 - float(missed_SLPK.sum() / max(cache.active_SLPK.sum(), 1))
    shuffled = float(np.mean(hits))
    return Premise(
        reason=Reason(MitigationCode.USED_AGAIN, {"hit": hit, "shuffled": shuffled}),
        holds=hit - shuffled > _MORE,
    )


def _active(load_SLE: Int64 | Float64, slot_LPK: Int64) -> Bool:
    """Slots whose expert has an assignment, (S, L, P, K)."""
    layer_L11 = np.arange(len(slot_LPK))[:, None, None]
    return np.asarray(load_SLE[:, layer_L11, slot_LPK] > 0)


@dataclass(frozen=True, slots=True)
class _Row:
    verdict: Verdict
    total_S: Float64


class _Cache:
    """What experts that are not kept cost on one set-up.

    Args:
        lab: of one phase.
        memory_bytes: room for experts on a rank.
        host_bytes_per_s: rate at which they are fetched.
    """

    def __init__(self, lab: Lab, memory_bytes: float, host_bytes_per_s: float) -> None:
        self._lab, self._memory_bytes = lab, memory_bytes
        self._expert_bytes = lab.models.experts.shape.expert_bytes
        self.expert_us = 1e6 * self._expert_bytes / host_bytes_per_s
        self.active_SLPK = _active(lab.test_SLE, lab.trace.today_LPK)
        self._uses_LPK = _active(lab.train_SLE, lab.trace.today_LPK).sum(axis=0)

    def kept(self, ahead: int) -> int:
        """Experts of each layer that a rank has room for besides those fetched ahead."""
        room_bytes = self._memory_bytes - ahead * self._expert_bytes
        return max(0, int(room_bytes // (self._lab.layers * self._expert_bytes)))

    def most_used(self, kept: int) -> Bool:
        """Slots whose experts most training steps activated, (L, P, K)."""
        is_kept_LPK = np.zeros(self._uses_LPK.shape, dtype=bool)
        order_LPK = np.argsort(-self._uses_LPK, axis=2, kind="stable")
        np.put_along_axis(is_kept_LPK, order_LPK[..., :kept], True, axis=2)
        return is_kept_LPK

    def row(
        self,
        mitigation: Mitigation,
        setting: str,
        missed_SLPK: Bool,
        premise: Premise,
        *,
        beyond_S: Float64 | None = None,
        late_us: float = 0.0,
    ) -> _Row:
        """Time with fetches of the rank that waits longest in each layer.

        Args:
            mitigation: which change.
            setting: what of it.
            missed_SLPK: slots whose expert is fetched when it is needed.
            premise: what it rests on.
            beyond_S: time of each step that it is judged against; None for what is needed anyway.
            late_us: wait of a step for what was fetched ahead.
        """
        lab = self._lab
        fetched_SL = missed_SLPK.sum(axis=3).max(axis=2)
        extra_us_S = fetched_SL.sum(axis=1) * self.expert_us + late_us
        total_S = lab.today.total_S + extra_us_S
        beyond = None if beyond_S is None else lab.paired(beyond_S, total_S)
        verdict = Verdict(
            mitigation=mitigation,
            setting=setting,
            code=VerdictCode.NEEDED if beyond is None else code_of(beyond),
            beyond=beyond,
            memory_bytes=int(self._memory_bytes) - lab.held_bytes,
            premise=premise,
            grades=lab.grades(assumed=True),
            **shown(lab.today, total_S, extra_us_S),
        )
        return _Row(verdict, total_S)
