"""Changes of who computes what: each one function of the lab, which returns its verdicts.

Shapes: S judged steps, L layers, E experts, P ranks, K slots of each rank, G sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from observatory.advice.mitigations.change import Change
from observatory.advice.mitigations.lab import (
    Float64,
    Int64,
    Lab,
    not_applicable,
    not_known,
)
from observatory.advice.mitigations.verdict import Mitigation, MitigationCode, Premise, Verdict
from observatory.analysis.experts.step_time import LayerWork
from observatory.analysis.parallel.balancing import lower_bound, rank_loads
from observatory.analysis.parallel.dispatch_rules import DispatchRule, balancing_shares
from observatory.reasons import Reason

#: Ranks with more than this times the mean load spill (the threshold of LLEP, arXiv 2601.17111).
_SPILL_ABOVE = 1.3
#: What a plan of each layer-step costs, microseconds: a linear programme on one GPU (README of LPLB, 2025).
_PLAN_US = 100.0
#: A rank this much over the mean is unequal.
_UNEQUAL = 1.05


def reference_rows(lab: Lab) -> Iterator[Verdict]:
    """Today's set-up, forced balance, and what nothing on these ranks can be faster than."""
    yield lab.reference(Mitigation.TODAY, lab.today, setting=lab.trace.named_today)
    yield lab.reference(Mitigation.PERFECT_BALANCE, lab.timed(Change(work=lab.balanced_work)))
    yield lab.reference(Mitigation.CEILING, lab.ceiling)


def placement(lab: Lab) -> Iterator[Verdict]:
    """Experts on other ranks, no replicas."""
    ranks = lab.setup.ranks
    if lab.experts % ranks:
        yield not_applicable(Mitigation.PLACEMENT, MitigationCode.UNEVEN, experts=lab.experts, ranks=ranks)
        return
    layout = lab.chosen_layout(0)
    promised = _score(lab.train_SLE, lab.trace.today_LPK) - _score(lab.train_SLE, layout)
    held_out = _score(lab.test_SLE, lab.trace.today_LPK) - _score(lab.test_SLE, layout)
    yield lab.judge(
        Mitigation.PLACEMENT,
        Change(work=lab.work(layout), slot_LPK=layout),
        premise=Premise(
            reason=Reason(MitigationCode.STABLE, {"promised": promised, "held_out": held_out}),
            holds=held_out > 0.5 * promised > 0,
        ),
    )


def replicas(lab: Lab) -> Iterator[Verdict]:
    """More copies of busy experts, sharing equally."""
    bound = None
    if lab.experts % lab.setup.ranks == 0:
        bound = float(np.mean(lower_bound(lab.train_SLE.mean(axis=0), lab.setup.ranks, 0)))
    premise = Premise(
        reason=Reason(MitigationCode.ONE_EXPERT_DECIDES, {"bound": bound}),
        holds=None if bound is None else bound > _UNEQUAL,
    )
    for count in _replica_counts(lab):
        yield lab.judge(
            Mitigation.REPLICAS,
            _with_replicas(lab, count, "equal"),
            setting=f"{count} replicas",
            premise=premise,
            adds=True,
        )


def dispatch_rules(lab: Lab) -> Iterator[Verdict]:
    """The smallest number of replicas with shares by weight, and with shares of each step."""
    count = _replica_counts(lab)[0]
    layout = lab.chosen_layout(count)
    promised, held_out = _score(lab.train_SLE, layout), _score(lab.test_SLE, layout)
    premise = Premise(
        reason=Reason(MitigationCode.LOADS_VARY, {"train": promised, "held_out": held_out}),
        holds=held_out > _UNEQUAL,
    )
    planned_us_S = np.full(len(lab.judged_S), _PLAN_US * lab.layers)
    per_step = replace(_with_replicas(lab, count, "per-step"), extra_us_S=planned_us_S, assumed=True)
    for mitigation, change in (
        (Mitigation.WEIGHTED_DISPATCH, _with_replicas(lab, count, "weighted")),
        (Mitigation.PER_STEP_DISPATCH, per_step),
    ):
        yield lab.judge(mitigation, change, setting=f"{count} replicas", premise=premise, adds=True)


def activated_dispatch(lab: Lab) -> Iterator[Verdict]:
    """One copy of each activated expert, so that weights are read once; where batches are small."""
    active = float((lab.test_SLE > 0).mean())
    if active > 0.98:
        yield not_applicable(Mitigation.ACTIVATED_DISPATCH, MitigationCode.ALL_ACTIVE, activated=active)
        return
    cost, work = lab.models.experts, lab.today_work
    assigned, activated = float(work.assignments_SLP.mean()), float(work.activated_SLP.mean())
    whole, fewer = float(cost.seconds(assigned, activated)), float(cost.seconds(assigned, 0.9 * activated))
    saved = (whole - fewer) / max(whole, 1e-300)
    count = _replica_counts(lab)[0]
    yield lab.judge(
        Mitigation.ACTIVATED_DISPATCH,
        _with_replicas(lab, count, "one-copy"),
        setting=f"{count} replicas",
        premise=Premise(
            reason=Reason(MitigationCode.WEIGHTS_DECIDE, {"activated": active, "saved_by_tenth": saved}),
            holds=saved > 0.02,
        ),
        adds=True,
    )


def spill(lab: Lab) -> Iterator[Verdict]:
    """Ranks above a threshold hand tokens and weights of experts to the least loaded, in every step."""
    load_SLP = lab.today_work.assignments_SLP
    ratio_SL = load_SLP.max(axis=2) / np.maximum(load_SLP.mean(axis=2), 1e-300)
    if not (ratio_SL > _SPILL_ABOVE).any():
        yield not_applicable(Mitigation.SPILL, MitigationCode.IMBALANCED, ratio=float(ratio_SL.mean()))
        return
    if lab.trace.today_LPK[0].size > lab.experts:
        yield not_applicable(Mitigation.SPILL, MitigationCode.REPLICATED_TODAY)
        return
    if lab.move_rate is None:
        yield not_known(Mitigation.SPILL, MitigationCode.NO_MOVE_RATE)
        return
    work, fetched_SL = _spilled(lab)
    extra_us_S = 1e6 * fetched_SL.sum(axis=1) * lab.models.experts.shape.expert_bytes / lab.move_rate
    yield lab.judge(
        Mitigation.SPILL,
        Change(work=work, extra_us_S=extra_us_S, assumed=True, of_phase=True),
        setting=f"above {_SPILL_ABOVE} x mean",
        premise=_unequal(lab),
    )


def sharding(lab: Lab) -> Iterator[Verdict]:
    """Every rank holds a part of every expert and sees every token: balanced, at the price of a gather."""
    missing = lab.missing(Mitigation.SHARDING, "gather")
    if missing is not None:
        yield missing
        return
    recut = lab.held_bytes * (1 - 1 / lab.setup.ranks)
    yield lab.judge(
        Mitigation.SHARDING,
        Change(
            work=lab.balanced_work, algorithm="gather", deduplicate=False, moved_bytes=recut, assumed=True
        ),
        premise=_unequal(lab),
    )


def _replica_counts(lab: Lab) -> list[int]:
    """The smallest numbers of replicas that fill all ranks: one slot more on each, two, and four."""
    ranks, first = lab.setup.ranks, -lab.experts % lab.setup.ranks
    counts = [first + more * ranks for more in (1, 2, 4)]
    most = lab.experts * (ranks - 1)
    return [count for count in counts if count <= min(most, 2 * lab.experts)] or [counts[0]]


def _with_replicas(lab: Lab, count: int, rule: DispatchRule) -> Change:
    layout = lab.chosen_layout(count)
    share_LPK = balancing_shares(lab.train_SLE.mean(axis=0), layout) if rule == "weighted" else None
    more = layout.shape[2] - lab.trace.today_LPK.shape[2]
    return Change(
        work=lab.work(layout, rule=rule, share_LPK=share_LPK),
        slot_LPK=layout,
        rule=rule,
        memory_bytes=more * lab.layers * lab.models.experts.shape.expert_bytes,
    )


def _score(load_SLE: Float64, slot_LPK: Int64) -> float:
    """Load of the busiest rank over the mean, added up over steps and layers."""
    load_SLP = rank_loads(load_SLE, slot_LPK)
    return float(load_SLP.max(axis=2).sum() / max(load_SLP.mean(axis=2).sum(), 1e-300))


def _unequal(lab: Lab) -> Premise:
    ratio = _score(lab.test_SLE, lab.trace.today_LPK)
    return Premise(reason=Reason(MitigationCode.IMBALANCED, {"ratio": ratio}), holds=ratio > _UNEQUAL)


def _spilled(lab: Lab) -> tuple[LayerWork, Float64]:
    """Work after spilling, and experts whose weights the rank that fetches most gets, (S, L).

    The busiest rank hands its largest expert, as much of it as the emptiest rank can take below the mean,
    until it is below the threshold.
    """
    slot_LPK = lab.trace.today_LPK
    rows_SLRP = lab.today_work.rows_SLRP.copy()
    activated_SLP = lab.today_work.activated_SLP.copy()
    fetched_SL = np.zeros(rows_SLRP.shape[:2])
    for step, layer in np.ndindex(*fetched_SL.shape):
        load_E = lab.test_SLE[step, layer]
        load_P = rows_SLRP[step, layer].sum(axis=0)
        mean = load_P.mean()
        left = {
            rank: sorted(((load_E[e], e) for e in slot_LPK[layer, rank]), reverse=True)
            for rank in range(len(load_P))
        }
        got_P = np.zeros(len(load_P))
        while load_P.max() > _SPILL_ABOVE * mean:
            giver, taker = int(load_P.argmax()), int(load_P.argmin())
            if not left[giver] or load_P[taker] >= mean:
                break
            amount, expert = left[giver].pop(0)
            moved = min(amount, load_P[giver] - mean, mean - load_P[taker])
            if moved < 1:
                continue
            source_R = lab.sources_SLPE[step, layer, :, expert]
            given_R = source_R * (moved / max(source_R.sum(), 1e-300))
            rows_SLRP[step, layer, :, giver] -= given_R
            rows_SLRP[step, layer, :, taker] += given_R
            load_P[giver] -= moved
            load_P[taker] += moved
            activated_SLP[step, layer, taker] += 1
            activated_SLP[step, layer, giver] -= moved >= amount
            got_P[taker] += 1
            if moved < amount:
                left[giver].append((amount - moved, expert))
                left[giver].sort(reverse=True)
        fetched_SL[step, layer] = got_P.max()
    return LayerWork(rows_SLRP=np.maximum(rows_SLRP, 0.0), activated_SLP=activated_SLP), fetched_SL
