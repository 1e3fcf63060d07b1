"""Which experts to fetch in every step, or to keep on every rank, instead of sending tokens to them.

Shapes: S judged steps, L layers, E experts, P ranks.

Experts are chosen on the first steps by `choose_experts`, with what the models of the lab say about a trip, a
byte, a token and an activated expert, and judged like every other change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from observatory.advice.mitigations.change import Change
from observatory.advice.mitigations.lab import Lab, not_applicable, not_known
from observatory.advice.mitigations.timed import Float64, Int64
from observatory.advice.mitigations.verdict import (
    ExpertChoice,
    Mitigation,
    MitigationCode,
    Premise,
    Verdict,
)
from observatory.analysis.experts.step_time import LayerWork
from observatory.analysis.route_fetch.costs import Constants, StageCosts
from observatory.analysis.route_fetch.experts import Choice, ExpertShape, break_even_tokens, choose_experts
from observatory.reasons import Reason
from observatory.run.documents.expert_bench import ELEMENT_BYTES

#: Steps that experts are chosen on; of more, some are left out, evenly.
_MOST_STEPS = 64
#: Experts that take this much more than an even part of the load are busy ones.
_MORE = 1.5
#: Around the mean of a rank, to see what one token and one activated expert more take.
_AROUND = 0.1


def route_or_fetch(lab: Lab) -> Iterator[Verdict]:
    """Fetch experts where that shortens the step; also with one expert of each layer kept on all ranks."""
    missing = lab.missing(Mitigation.ROUTE_OR_FETCH, lab.setup.algorithm)
    if missing is not None:
        yield missing
        return
    if lab.trace.today_LPK[0].size > lab.experts:
        yield not_applicable(Mitigation.ROUTE_OR_FETCH, MitigationCode.REPLICATED_TODAY)
        return
    if lab.move_rate is None:
        yield not_known(Mitigation.ROUTE_OR_FETCH, MitigationCode.NO_MOVE_RATE)
        return
    shape, constants = _shape(lab), _constants(lab, lab.move_rate, lab.fitted_rate or lab.move_rate)
    home_LE = np.stack([lab.homes(slot_PK) for slot_PK in lab.trace.today_LPK])
    shown_S = np.linspace(0, len(lab.train_SLE) - 1, min(_MOST_STEPS, len(lab.train_SLE))).astype(np.intp)
    ranks, train_SLE = lab.setup.ranks, lab.train_SLE[shown_S]
    break_even = break_even_tokens(shape, constants, ranks)
    assert break_even is not None  # a row takes time at every rate
    busiest = float(train_SLE.mean(axis=0).max())
    values = {"busiest": busiest, "break_even": break_even}
    fetch_pays = Premise(reason=Reason(MitigationCode.FETCH_PAYS, values), holds=busiest >= break_even)
    for copies in (0, 1):
        choice_LE = choose_experts(train_SLE, home_LE, shape, constants, ranks=ranks, copies=copies)
        kept_LE = choice_LE == Choice.KEEP
        if copies and not kept_LE.any():
            return
        if not choice_LE.any():
            yield not_applicable(Mitigation.ROUTE_OR_FETCH, MitigationCode.ALL_ROUTED, **values)
            continue
        verdict = lab.judge(
            Mitigation.ROUTE_OR_FETCH,
            _change(lab, choice_LE, home_LE, lab.move_rate),
            setting=_setting(choice_LE),
            premise=_kept_take_more(lab, kept_LE) if copies else fetch_pays,
        )
        yield replace(verdict, experts=_experts(lab, choice_LE))


def _kept_take_more(lab: Lab, kept_LE: NDArray[np.bool_]) -> Premise:
    """Whether experts that are kept everywhere have clearly more than their part of the judged load."""
    share = float(lab.test_SLE[:, kept_LE].sum() / max(lab.test_SLE.sum(), 1e-300))
    even = float(kept_LE.mean())
    return Premise(
        reason=Reason(MitigationCode.KEPT_TAKE_MORE, {"share": share, "even_share": even}),
        holds=share > _MORE * even,
    )


def _setting(choice_LE: Int64) -> str:
    counts = {name: int((choice_LE == choice).sum()) for choice, name in _NAMES.items()}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


_NAMES = {Choice.FETCH: "fetched", Choice.KEEP: "kept"}


def _experts(lab: Lab, choice_LE: Int64) -> tuple[ExpertChoice, ...]:
    return tuple(
        ExpertChoice(
            layer=lab.trace.loads.layers[layer],
            expert=expert,
            choice="keep" if choice_LE[layer, expert] == Choice.KEEP else "fetch",
        )
        for layer, expert in np.argwhere(choice_LE != Choice.ROUTE).tolist()
    )


def _change(lab: Lab, choice_LE: Int64, home_LE: Int64, move_rate: float) -> Change:
    """Experts that are not routed are computed where their tokens are."""
    expert_bytes = lab.models.experts.shape.expert_bytes
    fetched_LE, kept_LE = choice_LE == Choice.FETCH, choice_LE == Choice.KEEP
    kept_bytes = int(kept_LE.sum()) * expert_bytes
    moved_SL = _fetched(lab, fetched_LE, home_LE)
    trips_us_SL = 2 * lab.least_exchange_us() * (moved_SL > 0)
    return Change(
        work=_work(lab, ~(fetched_LE | kept_LE), home_LE),
        moved_bytes=kept_bytes if kept_bytes else None,
        memory_bytes=kept_bytes + int(fetched_LE.sum(axis=1).max()) * expert_bytes,
        extra_us_S=(trips_us_SL + 1e6 * moved_SL * expert_bytes / move_rate).sum(axis=1),
        assumed=True,
        of_phase=True,
    )


def _work(lab: Lab, routed_LE: NDArray[np.bool_], home_LE: Int64) -> LayerWork:
    """Rows to the homes of routed experts, and of the others rows that stay."""
    ranks = lab.setup.ranks
    rows_SLRP = np.zeros((len(lab.judged_S), lab.layers, ranks, ranks))
    activated_SLP = np.zeros((len(lab.judged_S), lab.layers, ranks))
    diagonal = np.arange(ranks)
    for layer, routed_E in enumerate(routed_LE):
        home_EP = ((home_LE[layer][:, None] == diagonal) & routed_E[:, None]).astype(np.float64)
        source_SPE = lab.sources_SLPE[:, layer]
        rows_SLRP[:, layer] = source_SPE @ home_EP
        rows_SLRP[:, layer, diagonal, diagonal] += source_SPE[..., ~routed_E].sum(axis=2)
        activated_SLP[:, layer] = (lab.test_SLE[:, layer] > 0) @ home_EP
        activated_SLP[:, layer] += np.minimum(source_SPE[..., ~routed_E], 1.0).sum(axis=2)
    return LayerWork(rows_SLRP=rows_SLRP, activated_SLP=activated_SLP)


def _fetched(lab: Lab, fetched_LE: NDArray[np.bool_], home_LE: Int64) -> Float64:
    """Experts that the rank that sends or receives most moves, (S, L)."""
    moved_SL = np.zeros((len(lab.judged_S), lab.layers))
    for layer, fetched_E in enumerate(fetched_LE):
        home_PE = np.arange(lab.setup.ranks)[:, None] == home_LE[layer][fetched_E]
        wanted_SPE = np.minimum(lab.sources_SLPE[:, layer][..., fetched_E], 1.0) * ~home_PE
        sent_SP = wanted_SPE.sum(axis=1) @ home_PE.T.astype(np.float64)
        moved_SL[:, layer] = np.maximum(wanted_SPE.sum(axis=2), sent_SP).max(axis=1)
    return moved_SL


def _shape(lab: Lab) -> ExpertShape:
    of = lab.models.experts.shape
    return ExpertShape(
        hidden=of.hidden,
        expert_bytes=of.expert_bytes,
        element_bytes=ELEMENT_BYTES[of.dtype.removeprefix("torch.")],
    )


def _constants(lab: Lab, move_rate: float, fitted_rate: float) -> Constants:
    """What the lab's models say about a trip, a byte, a token and an activated expert, microseconds.

    Rows cost what the network model says, both ways together; weights what their stated rate says.
    """
    cost, work = lab.models.experts, lab.today_work
    rows = max(float(work.assignments_SLP.mean()), 1e-300)
    active = max(float(work.activated_SLP.mean()), 1e-300)
    near = np.array([1 - _AROUND, 1 + _AROUND])
    row_s = float(np.diff(cost.seconds(near * rows, active))[0]) / (2 * _AROUND * rows)
    each_s = float(np.diff(cost.seconds(rows, near * active))[0]) / (2 * _AROUND * active)
    back_us = 1e6 / move_rate
    transfer_F = [2 * lab.least_exchange_us(), max(0.0, 2e6 / fitted_rate - back_us), back_us]
    experts_F = [1e6 * max(each_s, 0.0), 1e6 * max(row_s, 0.0) / _shape(lab).token_operations, 0.0]
    return Constants(
        grade="fitted",
        source=cost.source,
        shape=None,
        holders=lab.setup.ranks - 1,
        stages={
            "transfer": StageCosts(us_F=np.array(transfer_F), samples_BF=np.array([transfer_F])),
            "experts": StageCosts(us_F=np.array(experts_F), samples_BF=np.array([experts_F])),
        },
    )
