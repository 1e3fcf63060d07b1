"""Local routing consistency: do neighbouring tokens use the same experts?

Shapes: n tokens of a sample, m tokens of a segment, E experts.

After the segment measures of arXiv 2505.16056: cut a sequence into segments of m consecutive tokens; for
each, keep the c experts it uses most; the hit share is the share of assignments that those serve. It is the
best any cache of c experts can do that is refilled between segments and fixed within. With c = K it shows
how well one fixed set replaces routing (the idea of SRP); c = 2 K is the cache size usually discussed
(the idea of SCH). The definitions here are our own; values need not equal the paper's.

A skewed load gives hits without any locality. So the same tokens are cut again in random order: what the
measured value has above that is due to the order of the tokens.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from observatory.errors import LoadError

_COLUMNS = (
    "phase", "layer", "segment_tokens", "cached_experts", "segments", "tokens", "assignments",
    "hit_share", "hit_share_shuffled", "locality_gain",
)  # fmt: skip
_SHUFFLES = 8


def local_consistency(
    samples: pd.DataFrame, *, segment_tokens: int = 16, cached_experts: int | None = None, seed: int = 0
) -> pd.DataFrame:
    """Hit share of the best fixed expert set per segment, per phase and layer.

    Args:
        samples: token samples of a run: step, phase, layer, source_rank, position, expert_ids (a list).
        segment_tokens: m; segments never join tokens that are not neighbours (a jump in position, another
            step or rank), and shorter rests are left out.
        cached_experts: c; None for twice the largest number of experts any sampled token of the layer used.
        seed: of the random orders.

    Returns:
        phase, layer, segment_tokens, cached_experts, segments, tokens, assignments, hit_share,
        hit_share_shuffled (mean of 8 random orders of the same tokens), locality_gain (the difference).
        Layers without a whole segment have zero segments and NaN shares.

    Raises:
        LoadError: impossible expert ids, or sizes below one.
    """
    if segment_tokens < 1 or (cached_experts is not None and cached_experts < 1):
        raise LoadError(
            f"segments of {segment_tokens} tokens with {cached_experts} cached experts; expected 1 or more"
        )
    rows = []
    for (phase, layer), of_layer in samples.groupby(["phase", "layer"], sort=True):
        ordered = of_layer.sort_values(["source_rank", "step", "position"])
        chosen = [np.asarray(ids, dtype=np.int64) for ids in ordered["expert_ids"]]
        if any(ids.size and ids.min() < 0 for ids in chosen):
            raise LoadError(f"a token sample of layer {layer} names a negative expert; leave padding out")
        kept = _whole_segments(ordered, segment_tokens)
        cached = cached_experts or 2 * max((ids.size for ids in chosen), default=1) or 1
        tokens = [chosen[index] for index in kept]
        assignments = sum(ids.size for ids in tokens)
        row = {
            "phase": phase,
            "layer": layer,
            "segment_tokens": segment_tokens,
            "cached_experts": cached,
            "segments": len(kept) // segment_tokens,
            "tokens": len(kept),
            "assignments": assignments,
        }
        if assignments:
            generator = np.random.default_rng(seed)
            counted = _TokenCounts(tokens)
            measured = counted.hit_share(np.arange(len(tokens)), segment_tokens, cached)
            shuffled = np.mean(
                [
                    counted.hit_share(generator.permutation(len(tokens)), segment_tokens, cached)
                    for _ in range(_SHUFFLES)
                ]
            )
            row |= {
                "hit_share": measured,
                "hit_share_shuffled": float(shuffled),
                "locality_gain": measured - float(shuffled),
            }
        rows.append(row)
    frame = pd.DataFrame(rows, columns=list(_COLUMNS))
    return frame.astype(dict.fromkeys(_COLUMNS[-3:], "float64"))


def _whole_segments(ordered: pd.DataFrame, segment_tokens: int) -> NDArray[np.int64]:
    """Positions (in ``ordered``) of the tokens that make whole segments of neighbouring tokens."""
    rank, step, position = (ordered[name].to_numpy() for name in ("source_rank", "step", "position"))
    breaks = (np.diff(rank) != 0) | (np.diff(step) != 0) | (np.diff(position) != 1)
    runs = np.split(np.arange(len(ordered)), np.flatnonzero(breaks) + 1)
    whole = [run[: len(run) // segment_tokens * segment_tokens] for run in runs]
    return np.concatenate(whole).astype(np.int64)


class _TokenCounts:
    """Expert ids of tokens, flat, so that segments of any order are counted at once."""

    def __init__(self, tokens: list[NDArray[np.int64]]) -> None:
        self.token_A = np.repeat(np.arange(len(tokens)), [ids.size for ids in tokens])
        _, self.expert_A = np.unique(np.concatenate(tokens), return_inverse=True)
        self.used = int(self.expert_A.max()) + 1
        self.tokens = len(tokens)

    def hit_share(self, order: NDArray[np.int64], segment_tokens: int, cached: int) -> float:
        """Share of assignments served when the tokens come in ``order``."""
        place = np.empty(self.tokens, dtype=np.int64)
        place[order] = np.arange(self.tokens)
        key_A = place[self.token_A] // segment_tokens * self.used + self.expert_A
        key, count = np.unique(key_A, return_counts=True)
        segment = key // self.used
        by_count = np.lexsort((-count, segment))
        first = np.concatenate(([0], np.flatnonzero(np.diff(segment[by_count])) + 1))
        rank_in_segment = np.arange(key.size) - np.repeat(first, np.diff(np.append(first, key.size)))
        return float(count[by_count][rank_in_segment < cached].sum() / key_A.size)
