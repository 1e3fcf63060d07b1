"""The time of layer-steps under any layout of experts, dispatch rule and way of exchanging.

Shapes: S steps, L layers, R source ranks (= P), E experts, P ranks, K slots of each rank.

One layer-step, every part as long as its slowest rank::

    counts -> dispatch (network) -> experts (the busiest rank) -> combine (network)
    on every rank alone: shared experts; router, sorting rows, adding up outputs (local)

    total = counts + dispatch + experts + combine + shared + local

The busiest rank is that of each single layer-step; means over calls hide it. A rank that is not the busiest
waits for it: the mean over ranks of that is ``waiting_s``, which is inside ``experts_s``. Ranks that are more
than the cores of their machine take turns: their work together then lasts as long as the cores need for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.experts.cost import ExpertCost
from observatory.analysis.experts.words import StepCode
from observatory.analysis.network.predict import outside_domain, predict_stages_us
from observatory.analysis.parallel.dispatch_rules import DispatchRule, slot_loads
from observatory.errors import BenchmarkError, ExchangeError, PlacementError
from observatory.reasons import Reason
from observatory.run.exchange_algorithms import Algorithm, relayed

if TYPE_CHECKING:
    from observatory.analysis.network.network import NetworkModel

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

#: How the copies of an expert share its assignments: a rule of `analysis.parallel.dispatch_rules`, or
#: ``nearest``: the source's own rank, else its node, else all alike, as the observatory's dispatchers do.
Dispatch = Literal[DispatchRule, "nearest"]

#: Array elements that are computed at once.
_BLOCK = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepTimes:
    """Times of layer-steps, seconds, each (S, L).

    Attributes:
        experts_s: of the busiest rank.
        waiting_s: mean over ranks of what they wait for the busiest.
        counts_s: of the exchange that announces how many rows will come; None like the others.
        dispatch_s, combine_s: of the exchanges to and from the experts; None where ``reasons`` say why.
        shared_s: of the shared experts on the busiest source rank; 0 where there are none, None where their
            time is not known, and then not in ``total_s``.
        local_s: of what a rank does alone in the layer besides experts, on the source rank with most tokens;
            None where it is not known, and then not in ``total_s``.
        total_s: sum of all parts that are known; None where an exchange is None.
        reasons: why a part is None, and by ``extrapolated`` what of the exchanges lies outside the network
            model; by the name of the part.
        beyond_SL: how many times the most that the expert cost was measured on the busiest rank has; at most
            1 inside, infinite where nothing was measured.
        assignments_SLP: expected assignments of each rank.
        activated_SLP: expected experts of each rank with at least one assignment.
        estimated: what of the exchanges is an estimate from counts: rows of tokens sent once for several
            experts.
    """

    experts_s: Float64
    waiting_s: Float64
    counts_s: Float64 | None
    dispatch_s: Float64 | None
    combine_s: Float64 | None
    shared_s: Float64 | None
    local_s: Float64 | None
    total_s: Float64 | None
    reasons: Mapping[str, tuple[Reason, ...]]
    beyond_SL: Float64
    assignments_SLP: Float64
    activated_SLP: Float64
    estimated: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerWork:
    """What each rank does in layer-steps.

    Attributes:
        rows_SLRP: assignments from source rank to rank.
        activated_SLP: expected experts of each rank with at least one of them.
    """

    rows_SLRP: Float64
    activated_SLP: Float64

    @property
    def assignments_SLP(self) -> Float64:
        """Assignments of each rank."""
        return np.asarray(self.rows_SLRP.sum(axis=2))


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
    shared_cores: float | None = None,
    row_extra_bytes: int = 0,
    count_bytes: int = 0,
    shared_experts: int | None = 0,
) -> StepTimes:
    """Predict every layer-step of a layout.

    Args:
        load_SLRE: assignments by source rank; R must be P (`observatory.analysis.parallel.fold_sources`).
        slot_LPK: expert in each slot, -1 for an empty one; see `observatory.analysis.parallel.balancing`.
        cost: time of the experts of one rank.
        network: time of exchanges; None leaves them out.
        node_of_P: node of each rank; None for one node.
        algorithm: how rows are exchanged.
        deduplicate: a token goes once to each rank that has several of its experts; estimated from counts.
        dispatch: how copies share assignments.
        share_LPK: share of its expert's assignments for each slot, where ``weighted``.
        speed_P: speed of each rank, 1 for that of the cost; None for all alike.
        shared_cores: cores that all ranks have together, on one machine; None for enough of them.
        row_extra_bytes: what is sent to the experts with each row besides its hidden values.
        count_bytes: what each rank announces to each other before it sends rows; 0 where nothing is.
        shared_experts: of the layers; None where not known.

    Raises:
        PlacementError: layout, loads, shares or nodes do not fit each other, or an expert has no rank.
    """
    nodes = tuple(node_of_P) if node_of_P is not None else (0,) * slot_LPK.shape[1]
    return work_times(
        layer_work(load_SLRE, slot_LPK, node_of_P=nodes, dispatch=dispatch, share_LPK=share_LPK),
        cost,
        network=network,
        node_of_P=nodes,
        algorithm=algorithm,
        deduplicate=deduplicate,
        speed_P=speed_P,
        shared_cores=shared_cores,
        row_extra_bytes=row_extra_bytes,
        count_bytes=count_bytes,
        shared_experts=shared_experts,
    )


def layer_work(
    load_SLRE: Int64 | Float64,
    slot_LPK: Int64,
    *,
    node_of_P: Sequence[int],
    dispatch: Dispatch = "equal",
    share_LPK: Float64 | None = None,
) -> LayerWork:
    """What each rank does under a layout and a dispatch rule; arguments as of `layer_step_times`.

    Raises:
        PlacementError: layout, loads, shares or nodes do not fit each other, or an expert has no rank.
    """
    nodes = tuple(node_of_P)
    _check(load_SLRE, slot_LPK, nodes)
    splits = [
        _split(load_SLRE[:, layer], slot_PK, dispatch, None if share_LPK is None else share_LPK[layer], nodes)
        for layer, slot_PK in enumerate(slot_LPK)
    ]
    return LayerWork(
        rows_SLRP=np.stack([rows_SRP for rows_SRP, _ in splits], axis=1),
        activated_SLP=np.stack([activated_SP for _, activated_SP in splits], axis=1),
    )


def work_times(
    work: LayerWork,
    cost: ExpertCost,
    *,
    network: NetworkModel | None,
    node_of_P: Sequence[int],
    algorithm: Algorithm = "flat",
    deduplicate: bool = False,
    once_L: Float64 | None = None,
    speed_P: Float64 | None = None,
    shared_cores: float | None = None,
    row_extra_bytes: int = 0,
    count_bytes: int = 0,
    shared_experts: int | None = 0,
) -> StepTimes:
    """Predict layer-steps from what each rank does.

    Arguments are those of `layer_step_times`; ``once_L`` holds, by layer, tokens that are sent once over
    their estimate from counts, where token samples show it.
    """
    nodes = tuple(node_of_P)
    assignments_SLP = work.assignments_SLP
    own_SLP = cost.seconds(assignments_SLP, work.activated_SLP)
    if speed_P is not None:
        own_SLP = own_SLP / speed_P
    experts_s = own_SLP.max(axis=2)
    if shared_cores is not None:
        experts_s = np.maximum(experts_s, own_SLP.sum(axis=2) / shared_cores)
    busiest_SL1 = own_SLP.argmax(axis=2)[..., None]
    beyond_SL = cost.beyond(
        np.take_along_axis(assignments_SLP, busiest_SL1, axis=2)[..., 0],
        np.take_along_axis(work.activated_SLP, busiest_SL1, axis=2)[..., 0],
    )
    reasons: dict[str, tuple[Reason, ...]] = {}
    shared_s = np.zeros(experts_s.shape) if shared_experts == 0 else _of_tokens("shared", work, cost, reasons)
    local_s = _of_tokens("local", work, cost, reasons)
    ways = _exchanges(
        work,
        cost,
        network,
        nodes,
        algorithm,
        deduplicate=deduplicate,
        once_L=once_L,
        row_extra_bytes=row_extra_bytes,
        count_bytes=count_bytes,
    )
    counts_s = dispatch_s = combine_s = total_s = None
    if isinstance(ways, Reason):
        for part in ("counts", "dispatch", "combine", "total"):
            reasons[part] = (ways,)
    else:
        counts_s, dispatch_s, combine_s = ways.counts_s, ways.dispatch_s, ways.combine_s
        alone_s = sum(part for part in (shared_s, local_s) if part is not None)
        total_s = counts_s + dispatch_s + experts_s + combine_s + alone_s
        if ways.outside:
            reasons["extrapolated"] = ways.outside
    return StepTimes(
        experts_s=experts_s,
        waiting_s=experts_s - own_SLP.mean(axis=2),
        counts_s=counts_s,
        dispatch_s=dispatch_s,
        combine_s=combine_s,
        shared_s=shared_s,
        local_s=local_s,
        total_s=total_s,
        reasons=reasons,
        beyond_SL=beyond_SL,
        assignments_SLP=assignments_SLP,
        activated_SLP=work.activated_SLP,
        estimated=total_s is not None and (algorithm == "hierarchical" or deduplicate),
    )


def _check(load_SLRE: Int64 | Float64, slot_LPK: Int64, nodes: tuple[int, ...]) -> None:
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
    for layer, slot_PK in enumerate(slot_LPK):
        missing = set(range(experts)) - set(slot_PK.ravel().tolist())
        if missing:
            raise PlacementError(
                f"expert {min(missing)} of layer {layer} is on no rank", expected="at least one copy"
            )


def _split(
    load_SRE: Int64 | Float64,
    slot_PK: Int64,
    dispatch: Dispatch,
    share_PK: Float64 | None,
    nodes: tuple[int, ...],
) -> tuple[Float64, Float64]:
    """Rows from each source to each rank (S, R, P), and activated experts of each rank (S, P), of one layer.

    A copy that gets less than one assignment on average counts as that part of an activated expert.
    """
    steps, sources, experts = load_SRE.shape
    # An empty slot holds one expert more, which has no assignments.
    load_SRE = np.concatenate([load_SRE, np.zeros((steps, sources, 1), dtype=load_SRE.dtype)], axis=2)
    is_empty_PK = slot_PK < 0
    slot_PK = np.where(is_empty_PK, experts, slot_PK)
    if share_PK is not None:
        share_PK = np.where(is_empty_PK, 1.0 / max(int(is_empty_PK.sum()), 1), share_PK)
    block = max(1, _BLOCK // (sources * slot_PK.size))
    rows, activated = [], []
    for first in range(0, steps, block):
        load_BRE = load_SRE[first : first + block].astype(np.float64)
        if dispatch == "nearest":
            part = _nearest(slot_PK, nodes)
        else:
            load_BE = load_BRE.sum(axis=1)
            share_1PK = None if share_PK is None else share_PK[None]
            got_BPK = slot_loads(load_BE[:, None], slot_PK[None], rule=dispatch, share_LPK=share_1PK)[:, 0]
            part = (got_BPK / np.maximum(load_BE[:, slot_PK], 1e-300))[:, None]
        got_BRPK = load_BRE[:, :, slot_PK] * part
        rows.append(got_BRPK.sum(axis=3))
        activated.append(np.minimum(got_BRPK.sum(axis=1), 1.0).sum(axis=2))
    return np.concatenate(rows), np.concatenate(activated)


def _nearest(slot_PK: Int64, nodes: tuple[int, ...]) -> Float64:
    """Part of a source's assignments to a slot's expert that the slot gets, (R, P, K)."""
    node_P = np.asarray(nodes)
    same_RP, own_RP = node_P[:, None] == node_P[None, :], np.eye(len(nodes), dtype=np.int64)
    # Of the copies that a source sees, those of the highest worth share alike.
    worth_RPK = np.broadcast_to((own_RP + same_RP)[:, :, None], (len(nodes), *slot_PK.shape))
    part_RPK = np.zeros(worth_RPK.shape)
    for expert in np.unique(slot_PK):
        held_PK = slot_PK == expert
        best_R11 = np.where(held_PK, worth_RPK, -1).max(axis=(1, 2), keepdims=True)
        best_RPK = held_PK & (worth_RPK == best_R11)
        part_RPK += best_RPK / best_RPK.sum(axis=(1, 2), keepdims=True)
    return part_RPK


def _of_tokens(
    part: Literal["shared", "local"],
    work: LayerWork,
    cost: ExpertCost,
    reasons: dict[str, tuple[Reason, ...]],
) -> Float64 | None:
    """Time of a part that depends on tokens alone, on the source rank with most of them, (S, L)."""
    if cost.shape.top_k is None:
        reasons[part] = (Reason(StepCode.TOP_K_VARIES, {"what": f"the time of {part} work"}),)
        return None
    tokens_SL = work.rows_SLRP.sum(axis=3).max(axis=2) / cost.shape.top_k
    seconds = cost.shared_seconds(tokens_SL) if part == "shared" else cost.local_seconds(tokens_SL)
    if seconds is None:
        reasons[part] = (Reason(StepCode.NOT_TIMED, {"part": part}),)
    return seconds


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Ways:
    """Seconds of the exchanges of layer-steps, (S, L) each, and what of them is extrapolated."""

    counts_s: Float64
    dispatch_s: Float64
    combine_s: Float64
    outside: tuple[Reason, ...]


def _exchanges(
    work: LayerWork,
    cost: ExpertCost,
    network: NetworkModel | None,
    nodes: tuple[int, ...],
    algorithm: Algorithm,
    *,
    deduplicate: bool,
    once_L: Float64 | None,
    row_extra_bytes: int,
    count_bytes: int,
) -> _Ways | Reason:
    """Times of the exchanges, or why they are not known."""
    if network is None:
        return Reason(StepCode.NO_NETWORK)
    if cost.shape.top_k is None and (deduplicate or algorithm != "flat"):
        return Reason(StepCode.TOP_K_VARIES, {"what": f"algorithm {algorithm}"})
    row_bytes = cost.shape.row_bytes
    dispatch_L, combine_L, outside = [], [], []
    counts_us = 0.0
    try:
        if count_bytes:
            announced = _announced(nodes, algorithm, count_bytes)
            counts_us = float(predict_stages_us(network, announced, nodes, algorithm=algorithm)[0])
        for layer in range(work.rows_SLRP.shape[1]):
            rows_SRP = work.rows_SLRP[:, layer]
            once = 1.0 if once_L is None else float(once_L[layer])
            rows = _stage_rows(rows_SRP, nodes, algorithm, cost.shape.top_k, deduplicate, once)
            there = [np.rint(stage * (row_bytes + row_extra_bytes)).astype(np.int64) for stage in rows]
            back = [np.rint(stage.swapaxes(1, 2) * row_bytes).astype(np.int64) for stage in reversed(rows)]
            dispatch_L.append(predict_stages_us(network, there, nodes, algorithm=algorithm))
            combine_L.append(predict_stages_us(network, back, nodes, algorithm=algorithm))
            outside += outside_domain(network.of(algorithm), np.sum(there, axis=0), nodes)
    except (BenchmarkError, ExchangeError) as error:
        return Reason(StepCode.NOT_PREDICTED, {"error": str(error)})
    distinct = tuple({str(reason): reason for reason in outside}.values())
    dispatch_s = np.stack(dispatch_L, axis=1) * 1e-6
    return _Ways(
        counts_s=np.full(dispatch_s.shape, counts_us * 1e-6),
        dispatch_s=dispatch_s,
        combine_s=np.stack(combine_L, axis=1) * 1e-6,
        outside=distinct,
    )


def _announced(nodes: tuple[int, ...], algorithm: Algorithm, count_bytes: int) -> list[Int64]:
    """Bytes of the announcements in each stage, (1, P, P): to every rank that the stage can reach."""
    all_PP = np.ones((1, len(nodes), len(nodes)), dtype=np.int64)
    ways = relayed(all_PP, nodes) if algorithm == "hierarchical" else (all_PP,)
    return [(stage > 0) * count_bytes for stage in ways]


def _stage_rows(
    rows_SRP: Float64,
    nodes: tuple[int, ...],
    algorithm: Algorithm,
    top_k: int | None,
    deduplicate: bool,
    once: float,
) -> list[Float64]:
    """Rows from rank to rank in each stage of the way to the experts, (S, P, P).

    A token that is sent once for several experts is one row: how many there are is estimated from the counts,
    as if its experts were drawn independently of each other, times ``once``.
    """
    tokens_SR = rows_SRP.sum(axis=2) / (top_k or 1)
    if algorithm == "gather":
        return [np.repeat(tokens_SR[:, :, None], rows_SRP.shape[2], axis=2)]
    flat_SPP = _once(rows_SRP, tokens_SR[:, :, None], top_k) * once if deduplicate else rows_SRP
    if algorithm == "flat":
        return [flat_SPP]
    across_SPP, inside_SPP = relayed(rows_SRP, nodes)
    across_SPP = _once(across_SPP, tokens_SR[:, :, None], top_k) * once
    if deduplicate:
        inside_SPP = _once(inside_SPP, across_SPP.sum(axis=1)[:, :, None], top_k)
    return [across_SPP, inside_SPP]


def _once(rows: Float64, tokens: Float64, top_k: int | None) -> Float64:
    """Expected tokens among rows that go one way, of so many tokens with K assignments each."""
    part = np.minimum(rows / np.maximum(tokens * (top_k or 1), 1e-300), 1.0)
    return np.asarray(tokens * (1.0 - (1.0 - part) ** (top_k or 1)))
