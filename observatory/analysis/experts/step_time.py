"""The time of layer-steps under any layout of experts, dispatch rule and way of exchanging.

Shapes: S steps, L layers, R source ranks (= P), E experts, P ranks, K slots of each rank.

One layer-step, every part as long as its slowest rank::

    dispatch (network) -> experts (the busiest rank) -> combine (network)      shared experts on every rank

    total = dispatch + experts + combine + shared

The busiest rank is that of each single layer-step; means over calls hide it. A rank that is not the busiest
waits for it: the mean over ranks of that is ``waiting_s``, which is inside ``experts_s``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.experts.cost import ExpertCost
from observatory.analysis.experts.words import StepCode
from observatory.analysis.network.predict import outside_domain, predict_stages_us
from observatory.errors import BenchmarkError, ExchangeError, PlacementError
from observatory.reasons import Reason
from observatory.run.exchange_algorithms import Algorithm, relayed

if TYPE_CHECKING:
    from observatory.analysis.network.network import NetworkModel

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]

#: How the copies of an expert share its assignments: equal shares; given shares; the split of each layer-step
#: that leaves the busiest rank least; or the own rank, else the own node, else all alike, which is what the
#: observatory's own dispatchers do.
Dispatch = Literal["equal", "weighted", "per-step", "nearest"]
DISPATCHES: tuple[Dispatch, ...] = get_args(Dispatch)

#: Array elements that are computed at once, and passes over the replicated experts of a split.
_BLOCK = 1 << 24
_PASSES = 30
_SETTLED = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepTimes:
    """Times of layer-steps, seconds, each (S, L).

    Attributes:
        experts_s: of the busiest rank.
        waiting_s: mean over ranks of what they wait for the busiest.
        dispatch_s, combine_s: of the exchanges to and from the experts; None where ``reasons`` say why.
        shared_s: of the shared experts on the busiest source rank; 0 where there are none, None where their
            time is not known, and then not in ``total_s``.
        total_s: sum of dispatch, experts, combine and shared; None where an exchange is None.
        reasons: why a part is None, and by ``extrapolated`` what of the exchanges lies outside the network
            model; by the name of the part.
        inside_SL: whether the busiest rank lies within what the expert cost was measured on.
        assignments_SLP: expected assignments of each rank.
        activated_SLP: expected experts of each rank with at least one assignment.
        estimated: what of the exchanges is an estimate from counts: rows of tokens sent once for several
            experts.
    """

    experts_s: Float64
    waiting_s: Float64
    dispatch_s: Float64 | None
    combine_s: Float64 | None
    shared_s: Float64 | None
    total_s: Float64 | None
    reasons: Mapping[str, tuple[Reason, ...]]
    inside_SL: Bool
    assignments_SLP: Float64
    activated_SLP: Float64
    estimated: bool


def layer_step_times(
    load_SLRE: Int64 | Float64,
    slot_LPK: Int64,
    cost: ExpertCost,
    *,
    network: NetworkModel | None = None,
    node_of_P: Sequence[int] | None = None,
    algorithm: Algorithm = "flat",
    deduplicate: bool = False,
    dispatch: Dispatch = "equal",
    share_LPK: Float64 | None = None,
    speed_P: Float64 | None = None,
    row_extra_bytes: int = 0,
    shared_experts: int | None = 0,
) -> StepTimes:
    """Predict every layer-step.

    Args:
        load_SLRE: assignments by source rank; R must be P (`observatory.analysis.parallel.fold_sources`).
        slot_LPK: expert in each slot, -1 for an empty one; see `observatory.analysis.parallel.balancing`.
        cost: time of the experts of one rank.
        network: time of exchanges; None leaves them out.
        node_of_P: node of each rank; None for one node.
        algorithm: how rows are exchanged.
        deduplicate: a token goes once to each rank that has several of its experts; estimated from counts.
        dispatch: how copies share assignments.
        share_LPK: shares of the copies where ``weighted``; those of an expert need not add up to 1.
        speed_P: speed of each rank, 1 for that of the cost; None for all alike.
        row_extra_bytes: what is sent to the experts with each row besides its hidden values.
        shared_experts: of the layers; None where not known.

    Raises:
        PlacementError: layout, loads, shares or nodes do not fit each other, or an expert has no rank.
    """
    _, layers, _sources, experts = load_SLRE.shape
    ranks = slot_LPK.shape[1]
    nodes = tuple(node_of_P) if node_of_P is not None else (0,) * ranks
    _check(load_SLRE, slot_LPK, nodes, dispatch, share_LPK)
    share_LPE = _shares(slot_LPK, experts, share_LPK if dispatch == "weighted" else None)
    assignments, activated, per_layer = [], [], []
    for layer in range(layers):
        load_SRE = load_SLRE[:, layer].astype(np.float64)
        split = _split(load_SRE, share_LPE[layer], dispatch, nodes)
        assignments.append(split.rows_SRP.sum(axis=1))
        activated.append(split.activated_SP)
        per_layer.append(split.rows_SRP)
    assignments_SLP, activated_SLP = np.stack(assignments, axis=1), np.stack(activated, axis=1)
    own_SLP = cost.seconds(assignments_SLP, activated_SLP)
    if speed_P is not None:
        own_SLP = own_SLP / speed_P
    experts_s = own_SLP.max(axis=2)
    busiest_SL1 = own_SLP.argmax(axis=2)[..., None]
    inside_SL = cost.inside(
        np.take_along_axis(assignments_SLP, busiest_SL1, axis=2)[..., 0],
        np.take_along_axis(activated_SLP, busiest_SL1, axis=2)[..., 0],
    )
    reasons: dict[str, tuple[Reason, ...]] = {}
    shared_s = _shared(load_SLRE, cost, shared_experts, reasons)
    ways = _exchanges(
        per_layer,
        load_SLRE,
        cost,
        network,
        nodes,
        algorithm,
        deduplicate=deduplicate,
        row_extra_bytes=row_extra_bytes,
    )
    dispatch_s = combine_s = total_s = None
    if isinstance(ways, Reason):
        reasons["dispatch"] = reasons["combine"] = reasons["total"] = (ways,)
    else:
        dispatch_s, combine_s, outside = ways
        total_s = dispatch_s + experts_s + combine_s + (0.0 if shared_s is None else shared_s)
        if outside:
            reasons["extrapolated"] = outside
    return StepTimes(
        experts_s=experts_s,
        waiting_s=experts_s - own_SLP.mean(axis=2),
        dispatch_s=dispatch_s,
        combine_s=combine_s,
        shared_s=shared_s,
        total_s=total_s,
        reasons=reasons,
        inside_SL=inside_SL,
        assignments_SLP=assignments_SLP,
        activated_SLP=activated_SLP,
        estimated=total_s is not None and (algorithm == "hierarchical" or deduplicate),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Split:
    """Where the assignments of one layer go: (S, R, P) rows, and (S, P) experts with at least one."""

    rows_SRP: Float64
    activated_SP: Float64


def _check(
    load_SLRE: NDArray[np.generic],
    slot_LPK: Int64,
    nodes: tuple[int, ...],
    dispatch: str,
    share_LPK: Float64 | None,
) -> None:
    _, layers, sources, experts = load_SLRE.shape
    if slot_LPK.shape[0] != layers or slot_LPK.min() < -1 or slot_LPK.max() >= experts:
        raise PlacementError(
            f"a layout of {slot_LPK.shape[0]} layers with experts up to {int(slot_LPK.max())}",
            expected=f"{layers} layers of {experts} experts",
        )
    ranks = slot_LPK.shape[1]
    if sources != ranks or len(nodes) != ranks:
        raise PlacementError(
            f"loads of {sources} source ranks and nodes of {len(nodes)} ranks", expected=f"{ranks} of each"
        )
    if dispatch not in DISPATCHES:
        raise PlacementError(f"dispatch {dispatch!r} is unknown", expected=f"one of {', '.join(DISPATCHES)}")
    if (share_LPK is not None) != (dispatch == "weighted"):
        raise PlacementError("shares of copies belong to dispatch weighted", expected="both or neither")
    if share_LPK is not None and (share_LPK.shape != slot_LPK.shape or not (share_LPK >= 0).all()):
        raise PlacementError("shares of copies that do not fit the layout", expected="one per slot, from 0")


def _shares(slot_LPK: Int64, experts: int, share_LPK: Float64 | None) -> Float64:
    """Part of each expert's assignments that each rank takes, (L, P, E); they add up to 1 over ranks.

    Raises:
        PlacementError: an expert has no copy, or only copies without a share.
    """
    layers, ranks, _ = slot_LPK.shape
    share_LPE = np.zeros((layers, ranks, experts))
    layer_N, rank_N, slot_N = np.nonzero(slot_LPK >= 0)
    weight_N = 1.0 if share_LPK is None else share_LPK[layer_N, rank_N, slot_N]
    np.add.at(share_LPE, (layer_N, rank_N, slot_LPK[layer_N, rank_N, slot_N]), weight_N)
    total_LE = share_LPE.sum(axis=1)
    if not (total_LE > 0).all():
        layer, expert = (int(index[0]) for index in np.nonzero(total_LE <= 0))
        raise PlacementError(f"expert {expert} of layer {layer} is on no rank", expected="at least one copy")
    return np.asarray(share_LPE / total_LE[:, None, :])


def _split(load_SRE: Float64, share_PE: Float64, dispatch: Dispatch, nodes: tuple[int, ...]) -> _Split:
    """Rows and activated experts of one layer under a rule, in blocks of steps."""
    steps, sources, experts = load_SRE.shape
    ranks = len(share_PE)
    block = max(1, _BLOCK // (ranks * experts * (sources if dispatch == "nearest" else 1)))
    rows, activated = [], []
    for first in range(0, steps, block):
        load_BRE = load_SRE[first : first + block]
        if dispatch == "nearest":
            share_RPE = _nearest(share_PE, nodes)
            rows.append(np.einsum("bre,rpe->brp", load_BRE, share_RPE))
            activated.append(_activated_by_source(load_BRE, share_RPE))
        elif dispatch == "per-step":
            load_BE = load_BRE.sum(axis=1)
            share_BPE = _balanced(load_BE, share_PE > 0)
            rows.append(np.einsum("bre,bpe->brp", load_BRE, share_BPE))
            activated.append(np.minimum(share_BPE * load_BE[:, None, :], 1.0).sum(axis=2))
        else:
            rows.append(load_BRE @ share_PE.T)
            activated.append(_activated(load_BRE.sum(axis=1), share_PE))
    return _Split(rows_SRP=np.concatenate(rows), activated_SP=np.concatenate(activated))


def _activated(load_BE: Float64, share_PE: Float64) -> Float64:
    """Expected experts of each rank with an assignment, (B, P), when copies are drawn by their shares."""
    whole_E = share_PE.max(axis=0) >= 1.0
    held_PE = share_PE[:, whole_E] > 0
    once_BP = (load_BE[:, whole_E] > 0).astype(np.float64) @ held_PE.T
    idle_BPE = (1.0 - share_PE[:, ~whole_E]) ** load_BE[:, None, ~whole_E]
    return np.asarray(once_BP + (1.0 - idle_BPE).sum(axis=2))


def _activated_by_source(load_BRE: Float64, share_RPE: Float64) -> Float64:
    """The same with shares that depend on the source rank."""
    with np.errstate(divide="ignore"):
        log_idle_RPE = np.maximum(np.log1p(-share_RPE), -1e6)
    return np.asarray((1.0 - np.exp(np.einsum("bre,rpe->bpe", load_BRE, log_idle_RPE))).sum(axis=2))


def _nearest(share_PE: Float64, nodes: tuple[int, ...]) -> Float64:
    """Shares by source rank, (R, P, E): the own copy, else those of the own node, else all, alike."""
    node_P, held_PE = np.asarray(nodes), share_PE > 0
    own_RPE = np.eye(len(nodes), dtype=bool)[:, :, None] & held_PE
    near_RPE = (node_P[:, None] == node_P[None, :])[:, :, None] & held_PE
    chosen_RPE = np.where(
        own_RPE.any(axis=1, keepdims=True),
        own_RPE,
        np.where(near_RPE.any(axis=1, keepdims=True), near_RPE, held_PE[None]),
    )
    return np.asarray(chosen_RPE / chosen_RPE.sum(axis=1, keepdims=True))


def _balanced(load_BE: Float64, held_PE: Bool) -> Float64:
    """Shares of each step that leave its busiest rank least, (B, P, E).

    The replicated experts take turns: each is poured over its ranks up to one level, the loads of all others
    given. This descends on the sum of squares of rank loads, whose least value is where the maximum is least
    as well (Fujishige 1980, base polytopes).
    """
    count_E = held_PE.sum(axis=0)
    share_BPE = np.broadcast_to(held_PE / count_E, (len(load_BE), *held_PE.shape)).copy()
    load_BP = np.einsum("be,bpe->bp", load_BE, share_BPE)
    for _ in range(_PASSES):
        before_B = load_BP.max(axis=1)
        for expert in np.flatnonzero(count_E > 1):
            rank_C = np.flatnonzero(held_PE[:, expert])
            amount_B = load_BE[:, expert]
            others_BC = load_BP[:, rank_C] - share_BPE[:, rank_C, expert] * amount_B[:, None]
            poured_BC = _poured(others_BC, amount_B)
            load_BP[:, rank_C] = others_BC + poured_BC
            share_BPE[:, rank_C, expert] = poured_BC / np.maximum(amount_B, 1e-300)[:, None]
        if (before_B - load_BP.max(axis=1) <= _SETTLED * before_B).all():
            break
    return share_BPE


def _poured(level_BC: Float64, amount_B: Float64) -> Float64:
    """What each of C vessels takes of an amount that fills the lowest first, (B, C)."""
    sorted_BC = np.sort(level_BC, axis=1)
    count_C = np.arange(1, level_BC.shape[1] + 1)
    surface_BC = (np.cumsum(sorted_BC, axis=1) + amount_B[:, None]) / count_C
    filled_B = (surface_BC > sorted_BC).sum(axis=1).clip(min=1)
    surface_B = np.take_along_axis(surface_BC, filled_B[:, None] - 1, axis=1)
    return np.asarray(np.maximum(surface_B - level_BC, 0.0))


def _shared(
    load_SLRE: NDArray[np.generic],
    cost: ExpertCost,
    shared_experts: int | None,
    reasons: dict[str, tuple[Reason, ...]],
) -> Float64 | None:
    """Time of the shared experts on the source rank with most tokens, (S, L)."""
    if shared_experts == 0:
        return np.zeros(load_SLRE.shape[:2])
    if cost.shape.top_k is None:
        reasons["shared"] = (Reason(StepCode.TOP_K_VARIES, {"what": "the time of shared experts"}),)
        return None
    tokens_SL = load_SLRE.sum(axis=3).max(axis=2) / cost.shape.top_k
    shared_s = cost.shared_seconds(tokens_SL)
    if shared_s is None:
        reasons["shared"] = (Reason(StepCode.NO_SHARED_TIME),)
    return shared_s


def _exchanges(
    rows_L: Sequence[Float64],
    load_SLRE: NDArray[np.generic],
    cost: ExpertCost,
    network: NetworkModel | None,
    nodes: tuple[int, ...],
    algorithm: Algorithm,
    *,
    deduplicate: bool,
    row_extra_bytes: int,
) -> tuple[Float64, Float64, tuple[Reason, ...]] | Reason:
    """Seconds of dispatch and combine, (S, L) each, and what is extrapolated; or why they are not known."""
    if network is None:
        return Reason(StepCode.NO_NETWORK)
    if cost.shape.top_k is None and (deduplicate or algorithm != "flat"):
        return Reason(StepCode.TOP_K_VARIES, {"what": f"algorithm {algorithm}"})
    row_bytes = cost.shape.row_bytes
    dispatch_L, combine_L, outside = [], [], []
    try:
        for layer, rows_SRP in enumerate(rows_L):
            tokens_SR = load_SLRE[:, layer].sum(axis=2) / (cost.shape.top_k or 1)
            rows = _stage_rows(rows_SRP, tokens_SR, nodes, algorithm, cost.shape.top_k, deduplicate)
            there = [np.rint(stage * (row_bytes + row_extra_bytes)).astype(np.int64) for stage in rows]
            back = [np.rint(stage.swapaxes(1, 2) * row_bytes).astype(np.int64) for stage in reversed(rows)]
            dispatch_L.append(predict_stages_us(network, there, nodes, algorithm=algorithm))
            combine_L.append(predict_stages_us(network, back, nodes, algorithm=algorithm))
            outside += outside_domain(network.of(algorithm), np.sum(there, axis=0), nodes)
    except (BenchmarkError, ExchangeError) as error:
        return Reason(StepCode.NOT_PREDICTED, {"error": str(error)})
    distinct = tuple({str(reason): reason for reason in outside}.values())
    return np.stack(dispatch_L, axis=1) * 1e-6, np.stack(combine_L, axis=1) * 1e-6, distinct


def _stage_rows(
    rows_SRP: Float64,
    tokens_SR: Float64,
    nodes: tuple[int, ...],
    algorithm: Algorithm,
    top_k: int | None,
    deduplicate: bool,
) -> list[Float64]:
    """Rows from rank to rank in each stage of the way to the experts, (S, P, P).

    A token that is sent once for several experts is one row: how many there are is estimated from the counts,
    as if its experts were drawn independently of each other.
    """
    if algorithm == "gather":
        return [np.repeat(tokens_SR[:, :, None], rows_SRP.shape[2], axis=2)]
    flat_SPP = _once(rows_SRP, tokens_SR[:, :, None], top_k) if deduplicate else rows_SRP
    if algorithm == "flat":
        return [flat_SPP]
    across_SPP, inside_SPP = relayed(rows_SRP, nodes)
    across_SPP = _once(across_SPP, tokens_SR[:, :, None], top_k)
    if deduplicate:
        inside_SPP = _once(inside_SPP, across_SPP.sum(axis=1)[:, :, None], top_k)
    return [across_SPP, inside_SPP]


def _once(rows: Float64, tokens: Float64, top_k: int | None) -> Float64:
    """Expected tokens among rows that go one way, of so many tokens with K assignments each."""
    part = np.minimum(rows / np.maximum(tokens * (top_k or 1), 1e-300), 1.0)
    return np.asarray(tokens * (1.0 - (1.0 - part) ** (top_k or 1)))
