"""Experts that are used again: from step to step by recency, from layer to layer by prediction.

Shapes: S steps, L layers, P ranks, K slots of each rank, T tokens, E experts.

Both decide what a cache of experts is worth where not all fit (arXiv 2505.16056 measures the first on tokens,
Fate predicts the second); the definitions here are ours. All tokens of a step are computed together, so a
cache is asked once per step for every expert that has a token.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from observatory.analysis.parallel.token_samples import LayerTokens

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

#: Tokens that the popularity of the next layer's experts counts as, next to those that chose an expert.
_PRIOR_TOKENS = 4.0


def recent_misses(load_SLE: Int64, slot_LPK: Int64, kept: int) -> NDArray[np.bool_]:
    """Slots whose expert is activated but not among those that its rank used last.

    Each rank keeps ``kept`` experts of every layer; a step is served by what was kept before it, then its
    activated experts are the latest, those with more assignments later than those with fewer.

    Args:
        load_SLE: assignments of consecutive steps.
        slot_LPK: experts that each rank serves.
        kept: experts of a layer that a rank keeps, 0 to K.

    Returns:
        Whether each slot's expert had to be fetched, (S, L, P, K). Nothing but the first slots is kept at the
        start, so that leading steps miss more.
    """
    slots = slot_LPK.shape[2]
    used_LPK = np.broadcast_to(-np.arange(1.0, slots + 1.0), slot_LPK.shape).copy()
    missed_SLPK = np.zeros((len(load_SLE), *slot_LPK.shape), dtype=bool)
    layer_L11 = np.arange(len(slot_LPK))[:, None, None]
    for step, load_LE in enumerate(load_SLE):
        load_LPK = load_LE[layer_L11, slot_LPK]
        is_kept_LPK = np.zeros(slot_LPK.shape, dtype=bool)
        if kept:
            latest_LPK = np.argsort(-used_LPK, axis=2, kind="stable")[..., :kept]
            np.put_along_axis(is_kept_LPK, latest_LPK, True, axis=2)
        missed_SLPK[step] = (load_LPK > 0) & ~is_kept_LPK
        most = max(1, int(load_LPK.max(initial=0)))
        used_LPK = np.where(load_LPK > 0, step + 1 + load_LPK / (2.0 * most), used_LPK)
    return missed_SLPK


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NextLayer:
    """How the experts of a layer predict those of the next.

    Attributes:
        follow_LEE: probability that a token with expert e in a layer has expert f in the next one, for all
            layers but the last.
        recall: share of a token's experts that are among as many predicted ones; on judged tokens.
        popular: the same of the experts that are chosen most, whatever the layer before says.
        tokens: judged tokens, the fewest of a pair of layers.
    """

    follow_LEE: Float64
    recall: float
    popular: float
    tokens: int


def next_layer(
    tokens: Sequence[LayerTokens], experts: int, first_judged_step: int, *, fewest: int
) -> NextLayer | None:
    """What sampled tokens show about the next layer, learnt on the first steps and judged on the others.

    Args:
        tokens: sampled tokens of each layer.
        experts: E.
        first_judged_step: tokens of earlier steps are learnt from, the others judged.
        fewest: tokens of a pair of layers that there have to be on either side.

    Returns:
        None where there is one layer only, or a pair of layers has too few tokens in common.
    """
    follow, recalls, populars, counts = [], [], [], []
    for before, after in itertools.pairwise(tokens):
        here_T, there_T = _shared(before, after)
        is_judged_T = before.step_T[here_T] >= first_judged_step
        if min(np.count_nonzero(is_judged_T), np.count_nonzero(~is_judged_T)) < fewest:
            return None
        from_TK, to_TK = before.experts_TK[here_T], after.experts_TK[there_T]
        follow_EE, popular_E = _learnt(from_TK[~is_judged_T], to_TK[~is_judged_T], experts)
        score_TE = _next_scores(follow_EE, from_TK[is_judged_T])
        recalls.append(_recall(score_TE, to_TK[is_judged_T]))
        populars.append(_recall(np.broadcast_to(popular_E, score_TE.shape), to_TK[is_judged_T]))
        follow.append(follow_EE)
        counts.append(int(np.count_nonzero(is_judged_T)))
    if not follow:
        return None
    return NextLayer(
        follow_LEE=np.stack(follow),
        recall=float(np.mean(recalls)),
        popular=float(np.mean(populars)),
        tokens=min(counts),
    )


def _next_scores(follow_EE: Float64, from_TK: Int64) -> Float64:
    """Expected uses of each expert of the next layer by each token, (T, E)."""
    score_TE = np.zeros((len(from_TK), len(follow_EE)))
    for from_T in from_TK.T:
        score_TE += follow_EE[from_T]
    return score_TE


def _shared(before: LayerTokens, after: LayerTokens) -> tuple[Int64, Int64]:
    """Places of the tokens that both layers have, in the same order."""
    frames = [
        pd.DataFrame({"step": layer.step_T, "source": layer.source_T, "position": layer.position_T})
        .drop_duplicates()
        .reset_index(names="place")
        for layer in (before, after)
    ]
    both = frames[0].merge(frames[1], on=["step", "source", "position"], suffixes=("_before", "_after"))
    return both["place_before"].to_numpy(dtype=np.int64), both["place_after"].to_numpy(dtype=np.int64)


def _learnt(from_TK: Int64, to_TK: Int64, experts: int) -> tuple[Float64, Float64]:
    """Probability of every next expert given one of the layer before, (E, E), and of any token, (E,)."""
    together_EE = np.zeros((experts, experts))
    for from_T in from_TK.T:
        for to_T in to_TK.T:
            np.add.at(together_EE, (from_T, to_T), 1.0)
    chose_E = np.bincount(from_TK.ravel(), minlength=experts).astype(np.float64)
    popular_E = np.bincount(to_TK.ravel(), minlength=experts) / len(to_TK)
    follow_EE = (together_EE + _PRIOR_TOKENS * popular_E) / (chose_E[:, None] + _PRIOR_TOKENS)
    return follow_EE, popular_E


def _recall(score_TE: Float64, to_TK: Int64) -> float:
    """Share of the tokens' experts that are among the as many with the highest score."""
    likely_TK = np.argsort(-score_TE, axis=1, kind="stable")[:, : to_TK.shape[1]]
    hit_TK = (likely_TK[:, :, None] == to_TK[:, None, :]).any(axis=1)
    return float(hit_TK.mean())
