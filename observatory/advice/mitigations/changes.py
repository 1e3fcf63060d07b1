"""Every change as one function of the lab, which returns its verdicts.

Shapes: S judged steps, L layers, E experts, P ranks, K slots of each rank, G sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from observatory.analysis.parallel.balancing.problem import Objective, Problem
from observatory.analysis.parallel.balancing.solving import solve
from observatory.analysis.parallel.dispatch_rules import DispatchRule, balancing_shares
from observatory.analysis.parallel.token_samples import LayerTokens, places_touched
from observatory.reasons import Reason
from observatory.run.exchange_algorithms import Algorithm

#: Ranks with more than this times the mean load spill (the threshold of LLEP, arXiv 2601.17111).
_SPILL_ABOVE = 1.3
#: What a plan of each layer-step costs, microseconds: a linear programme on one GPU (README of LPLB, 2025).
_PLAN_US = 100.0
#: A rank this much over the mean is unequal; a part of a step this large decides something.
_UNEQUAL, _DECIDES = 1.05, 0.2
#: Copies of a token that share a rank, and sequences that prefer ranks, beyond what is noise.
_SHARED, _PREFERS = 0.05, 0.02
_MOST_SEQUENCES = 512


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
            beyond=_simpler(lab),
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
        yield lab.judge(
            mitigation, change, setting=f"{count} replicas", premise=premise, beyond=_simpler(lab)
        )


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
        beyond=_simpler(lab),
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
        Change(work=work, extra_us_S=extra_us_S, assumed=True),
        setting=f"above {_SPILL_ABOVE} x mean",
        premise=_unequal(lab),
    )


def sharding(lab: Lab) -> Iterator[Verdict]:
    """Every rank holds a part of every expert and sees every token: balanced, at the price of a gather."""
    missing = _missing(lab, "gather")
    if missing is not None:
        yield replace(missing, mitigation=Mitigation.SHARDING)
        return
    recut = lab.held_bytes * (1 - 1 / lab.setup.ranks)
    yield lab.judge(
        Mitigation.SHARDING,
        Change(
            work=lab.balanced_work, algorithm="gather", deduplicate=False, moved_bytes=recut, assumed=True
        ),
        premise=_unequal(lab),
    )


def exchanges(lab: Lab) -> Iterator[Verdict]:
    """Other algorithms of the exchange for the same layout."""
    ways: tuple[tuple[Mitigation, Algorithm], ...] = (
        (Mitigation.FLAT, "flat"),
        (Mitigation.HIERARCHICAL, "hierarchical"),
        (Mitigation.GATHER, "gather"),
    )
    for mitigation, algorithm in ways:
        missing = _missing(lab, algorithm)
        if lab.setup.algorithm == algorithm:
            if mitigation is not Mitigation.FLAT:
                yield not_applicable(mitigation, MitigationCode.IN_USE)
        elif algorithm == "hierarchical" and lab.setup.nodes == 1:
            yield not_applicable(mitigation, MitigationCode.ONE_NODE)
        elif missing is not None:
            yield replace(missing, mitigation=mitigation)
        else:
            yield lab.judge(
                mitigation,
                Change(work=lab.today_work, algorithm=algorithm),
                premise=_between_nodes(lab) if algorithm == "hierarchical" else fabric_premise(lab),
            )


def deduplication(lab: Lab) -> Iterator[Verdict]:
    """A token is sent once to each rank that has several of its experts; also with the chosen layout."""
    if lab.setup.deduplicate or lab.setup.algorithm == "gather":
        yield not_applicable(Mitigation.DEDUPLICATION, MitigationCode.IN_USE)
        return
    missing = _missing(lab, lab.setup.algorithm)
    if missing is not None:
        yield replace(missing, mitigation=Mitigation.DEDUPLICATION)
        return
    touched = None
    if lab.has_tokens:
        assert lab.trace.tokens is not None
        shares = [
            places_touched(tokens.experts_TK, lab.homes(slot_PK)).mean() / tokens.experts_TK.shape[1]
            for tokens, slot_PK in zip(lab.trace.tokens, lab.trace.today_LPK, strict=True)
        ]
        touched = float(np.mean(shares))
    premise = Premise(
        reason=Reason(MitigationCode.COPIES_SHARE_RANKS, {"rows_left": touched}),
        holds=None if touched is None else touched < 1 - _SHARED,
    )
    once = Change(work=lab.today_work, deduplicate=True, assumed=touched is None)
    yield lab.judge(Mitigation.DEDUPLICATION, once, premise=premise)
    simpler = _simpler(lab)
    if simpler is not None:
        both = replace(simpler, deduplicate=True, assumed=touched is None)
        yield lab.judge(Mitigation.COMBINED, both, premise=premise, beyond=simpler)


def node_placement(lab: Lab) -> Iterator[Verdict]:
    """Experts that tokens choose together go to one node."""
    nodes, ranks = lab.setup.nodes, lab.setup.ranks
    if nodes == 1:
        yield not_applicable(Mitigation.NODE_PLACEMENT, MitigationCode.ONE_NODE)
        return
    if not lab.has_tokens:
        yield not_known(Mitigation.NODE_PLACEMENT, MitigationCode.NO_TOKENS)
        return
    algorithm: Algorithm = "hierarchical" if _missing(lab, "hierarchical") is None else lab.setup.algorithm
    missing = _missing(lab, algorithm)
    if missing is not None or lab.experts % ranks or ranks % nodes:
        uneven = not_applicable(
            Mitigation.NODE_PLACEMENT, MitigationCode.UNEVEN, experts=lab.experts, ranks=ranks
        )
        yield uneven if missing is None else replace(missing, mitigation=Mitigation.NODE_PLACEMENT)
        return
    assert lab.trace.tokens is not None
    layouts, touched, independent, structured = [], [], [], []
    for layer, tokens in enumerate(lab.trace.tokens):
        problem = Problem(
            load_SLE=lab.train_SLE[:, layer : layer + 1],
            ranks=ranks,
            nodes=nodes,
            objective=Objective.NODES,
            token_TK=tokens.experts_TK,
            token_step_T=tokens.step_T,
        )
        solution = solve(problem)
        assert solution.structure is not None
        layouts.append(solution.slot_LPK[0])
        touched.append(solution.structure.touched)
        independent.append(solution.structure.independent)
        structured.append(solution.structure.is_there)
    layout = np.stack(layouts)
    yield lab.judge(
        Mitigation.NODE_PLACEMENT,
        Change(work=lab.work(layout), slot_LPK=layout, algorithm=algorithm),
        setting=algorithm,
        premise=Premise(
            reason=Reason(
                MitigationCode.CO_ACTIVATION,
                {"touched": float(np.mean(touched)), "independent": float(np.mean(independent))},
            ),
            holds=sum(structured) > len(structured) / 2,
        ),
    )


def sample_placement(lab: Lab) -> Iterator[Verdict]:
    """Sequences start on the rank that holds most of their experts."""
    missing = _missing(lab, lab.setup.algorithm)
    if missing is not None:
        yield replace(missing, mitigation=Mitigation.SAMPLE_PLACEMENT)
        return
    if not lab.has_tokens:
        yield not_known(Mitigation.SAMPLE_PLACEMENT, MitigationCode.NO_TOKENS)
        return
    assert lab.trace.tokens is not None
    is_known = lab.trace.phase == "decode" or lab.trace.sequence_tokens
    local = _sequence_shares(lab, lab.trace.tokens) if is_known else None
    if local is None:
        yield not_known(Mitigation.SAMPLE_PLACEMENT, MitigationCode.NO_SEQUENCES)
        return
    before, after = local
    yield lab.judge(
        Mitigation.SAMPLE_PLACEMENT,
        Change(work=_localised(lab.today_work, (1 - after) / max(1 - before, 1e-9)), assumed=True),
        premise=Premise(
            reason=Reason(MitigationCode.SEQUENCES_DIFFER, {"local_before": before, "local_after": after}),
            holds=after - before > _PREFERS,
        ),
    )


#: All changes on today's ranks, in the order of the table.
CHANGES: tuple[Callable[[Lab], Iterator[Verdict]], ...] = (
    reference_rows,
    placement,
    replicas,
    dispatch_rules,
    activated_dispatch,
    spill,
    sharding,
    exchanges,
    deduplication,
    node_placement,
    sample_placement,
)


def _replica_counts(lab: Lab) -> list[int]:
    """The smallest numbers of replicas that fill all ranks: one slot more on each, two, and four."""
    ranks, first = lab.setup.ranks, -lab.experts % lab.setup.ranks
    counts = [first + more * ranks for more in (1, 2, 4)]
    most = lab.experts * (ranks - 1)
    return [count for count in counts if count <= min(most, 2 * lab.experts)] or [counts[0]]


def _missing(lab: Lab, algorithm: str) -> Verdict | None:
    """A verdict that says what is missing to predict exchanges by an algorithm; None where nothing is."""
    if lab.models.network is None:
        return not_known(Mitigation.TODAY, MitigationCode.NO_NETWORK)
    if algorithm not in {fit.algorithm for fit in lab.models.network.fits}:
        return not_known(Mitigation.TODAY, MitigationCode.NO_ALGORITHM, algorithm=algorithm)
    return None


def _simpler(lab: Lab) -> Change | None:
    """The chosen layout without replicas where that is better than today's; None where it is not."""
    if lab.experts % lab.setup.ranks:
        return None
    layout = lab.chosen_layout(0)
    change = Change(work=lab.work(layout), slot_LPK=layout)
    return change if lab.timed(change).total_S.sum() < lab.today.total_S.sum() else None


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


def fabric_premise(lab: Lab) -> Premise:
    """Whether exchanges take a large part of today's steps."""
    share = lab.exchange_share
    return Premise(reason=Reason(MitigationCode.FABRIC_DECIDES, {"share": share}), holds=share > _DECIDES)


def _between_nodes(lab: Lab) -> Premise:
    node_P = np.array(lab.setup.node_of_P)
    rows_PP = lab.today_work.rows_SLRP.sum(axis=(0, 1))
    crossing = float(rows_PP[node_P[:, None] != node_P[None, :]].sum() / max(rows_PP.sum(), 1e-300))
    return Premise(
        reason=Reason(MitigationCode.BETWEEN_NODES, {"crossing": crossing, "share": lab.exchange_share}),
        holds=crossing > _DECIDES and lab.exchange_share > _DECIDES,
    )


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


def _sequence_shares(lab: Lab, tokens: list[LayerTokens]) -> tuple[float, float] | None:
    """Share of assignments that stay on the sequence's rank, before and after; of tokens not chosen on.

    Sequences are put where most assignments of the first half of their tokens go, equally many on each rank,
    and judged on the second half. None where there are fewer sequences than ranks.
    """
    from scipy.optimize import linear_sum_assignment

    ranks, is_decode = lab.setup.ranks, lab.trace.phase == "decode"
    chosen: dict[tuple[int, int, int], list[Float64]] = {}
    for layer_tokens, slot_PK in zip(tokens, lab.trace.today_LPK, strict=True):
        home_E = lab.homes(slot_PK)
        length = lab.trace.sequence_tokens or 1
        sequence_T = layer_tokens.position_T if is_decode else layer_tokens.position_T // length
        group_T = np.zeros_like(layer_tokens.step_T) if is_decode else layer_tokens.step_T
        keys_T3 = np.stack([group_T, layer_tokens.source_T, sequence_T], axis=1)
        keys_G3, number_T = np.unique(keys_T3, axis=0, return_inverse=True)
        for number, key in enumerate(map(tuple, keys_G3[:_MOST_SEQUENCES].tolist())):
            mine = np.flatnonzero(number_T == number)
            halves = chosen.setdefault(key, [np.zeros(ranks), np.zeros(ranks)])
            for place, part in enumerate(np.array_split(mine, 2)):
                halves[place] += np.bincount(home_E[layer_tokens.experts_TK[part]].ravel(), minlength=ranks)
    before = after = total = 0.0
    for group in {key[0] for key in chosen}:
        keys = sorted(key for key in chosen if key[0] == group)
        if len(keys) < ranks:
            continue
        first_GP = np.array([chosen[key][0] for key in keys])
        second_GP = np.array([chosen[key][1] for key in keys])
        seats = -(-len(keys) // ranks)
        rows, columns = linear_sum_assignment(-np.repeat(first_GP, seats, axis=1))
        today_G = np.arange(len(keys)) * ranks // len(keys)
        before += float(second_GP[np.arange(len(keys)), today_G].sum())
        after += float(second_GP[rows, columns // seats].sum())
        total += float(second_GP.sum())
    return (before / total, after / total) if total else None


def _localised(work: LayerWork, factor: float) -> LayerWork:
    """The same load of every rank with this factor on the rows that come from other ranks."""
    rows_SLRP = work.rows_SLRP * min(factor, 1.0)
    away = np.arange(rows_SLRP.shape[3])
    rows_SLRP[..., away, away] = 0.0
    rows_SLRP[..., away, away] = np.maximum(work.assignments_SLP - rows_SLRP.sum(axis=2), 0.0)
    return LayerWork(rows_SLRP=rows_SLRP, activated_SLP=work.activated_SLP)
