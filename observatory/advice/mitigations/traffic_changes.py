"""Changes of what ranks exchange: each one function of the lab, which returns its verdicts.

Shapes: T tokens, L layers, E experts, P ranks, G sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from observatory.advice.mitigations.change import Change
from observatory.advice.mitigations.lab import Lab, not_applicable, not_known
from observatory.advice.mitigations.timed import Float64
from observatory.advice.mitigations.verdict import Mitigation, MitigationCode, Premise, Verdict
from observatory.analysis.experts.step_time import LayerWork
from observatory.analysis.parallel.balancing.coactivation import nodes_touched
from observatory.analysis.parallel.balancing.problem import Objective, Problem
from observatory.analysis.parallel.balancing.solving import solve
from observatory.analysis.parallel.token_samples import LayerTokens
from observatory.reasons import Reason
from observatory.run.exchange_algorithms import Algorithm

#: A part of a step this large decides something.
_DECIDES = 0.2
#: Copies of a token that share a rank, and sequences that prefer ranks, beyond what is noise.
_SHARED, _PREFERS = 0.05, 0.02
_MOST_SEQUENCES = 512


def exchanges(lab: Lab) -> Iterator[Verdict]:
    """Other algorithms of the exchange for the same layout."""
    ways: tuple[tuple[Mitigation, Algorithm], ...] = (
        (Mitigation.FLAT, "flat"),
        (Mitigation.HIERARCHICAL, "hierarchical"),
        (Mitigation.GATHER, "gather"),
    )
    for mitigation, algorithm in ways:
        missing = lab.missing(mitigation, algorithm)
        if lab.setup.algorithm == algorithm:
            if mitigation is not Mitigation.FLAT:
                yield not_applicable(mitigation, MitigationCode.IN_USE)
        elif algorithm == "hierarchical" and lab.setup.nodes == 1:
            yield not_applicable(mitigation, MitigationCode.ONE_NODE)
        elif missing is not None:
            yield missing
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
    missing = lab.missing(Mitigation.DEDUPLICATION, lab.setup.algorithm)
    if missing is not None:
        yield missing
        return
    touched = None
    if lab.has_tokens:
        assert lab.trace.tokens is not None
        shares = [
            nodes_touched(tokens.experts_TK, lab.homes(slot_PK), lab.setup.ranks).mean()
            / tokens.experts_TK.shape[1]
            for tokens, slot_PK in zip(lab.trace.tokens, lab.trace.today_LPK, strict=True)
        ]
        touched = float(np.mean(shares))
    premise = Premise(
        reason=Reason(MitigationCode.COPIES_SHARE_RANKS, {"rows_left": touched}),
        holds=None if touched is None else touched < 1 - _SHARED,
    )
    once = Change(work=lab.today_work, deduplicate=True, assumed=touched is None)
    yield lab.judge(Mitigation.DEDUPLICATION, once, premise=premise)
    simpler = lab.simpler
    if simpler is not None:
        both = replace(simpler, deduplicate=True, assumed=touched is None)
        yield lab.judge(Mitigation.COMBINED, both, premise=premise, adds=True)


def node_placement(lab: Lab) -> Iterator[Verdict]:
    """Experts that tokens choose together go to one node."""
    nodes, ranks = lab.setup.nodes, lab.setup.ranks
    if nodes == 1:
        yield not_applicable(Mitigation.NODE_PLACEMENT, MitigationCode.ONE_NODE)
        return
    if not lab.has_tokens:
        yield not_known(Mitigation.NODE_PLACEMENT, MitigationCode.NO_TOKENS)
        return
    hierarchical = lab.missing(Mitigation.NODE_PLACEMENT, "hierarchical") is None
    algorithm: Algorithm = "hierarchical" if hierarchical else lab.setup.algorithm
    missing = lab.missing(Mitigation.NODE_PLACEMENT, algorithm)
    if missing is not None or lab.experts % ranks or ranks % nodes:
        uneven = not_applicable(
            Mitigation.NODE_PLACEMENT, MitigationCode.UNEVEN, experts=lab.experts, ranks=ranks
        )
        yield uneven if missing is None else missing
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
    missing = lab.missing(Mitigation.SAMPLE_PLACEMENT, lab.setup.algorithm)
    if missing is not None:
        yield missing
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
