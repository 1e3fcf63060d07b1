"""Sampled tokens as arrays: which of a token's experts share a rank or a node under a layout.

Shapes: T tokens, K experts of a token, L layers, P ranks, N nodes, E experts.

Loads say how many assignments an expert has, not which experts a token has together. That decides how many
copies of a token are sent where each destination gets one only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

#: Tokens of a layer that are looked at; of more, some are left out evenly.
_MOST_TOKENS = 20_000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerTokens:
    """Sampled tokens of one layer.

    Attributes:
        experts_TK: experts of each token; all tokens have as many.
        step_T, source_T, position_T: where each was: step, source rank, and place in the step on that rank.
    """

    experts_TK: Int64
    step_T: Int64
    source_T: Int64
    position_T: Int64

    def of(self, kept_T: NDArray[np.bool_]) -> LayerTokens:
        """Some of the tokens."""
        return LayerTokens(
            experts_TK=self.experts_TK[kept_T],
            step_T=self.step_T[kept_T],
            source_T=self.source_T[kept_T],
            position_T=self.position_T[kept_T],
        )


def layer_tokens(samples: pd.DataFrame, *, phase: str, layers: Sequence[int]) -> list[LayerTokens] | None:
    """Tokens of each layer; None unless every layer has some, all with equally many experts.

    Args:
        samples: the table of token samples of a run.
        phase: only this phase.
        layers: numbers of the layers, in the order of the result.
    """
    result = []
    of_phase = samples[samples["phase"] == phase] if len(samples) else samples
    for layer in layers:
        rows = of_phase[of_phase["layer"] == layer] if len(of_phase) else of_phase
        rows = rows.iloc[:: max(1, -(-len(rows) // _MOST_TOKENS))]
        lengths = {len(experts) for experts in rows["expert_ids"]} if len(rows) else set()
        if len(lengths) != 1 or lengths == {0}:
            return None
        result.append(
            LayerTokens(
                experts_TK=np.array(rows["expert_ids"].tolist(), dtype=np.int64),
                step_T=rows["step"].to_numpy(dtype=np.int64),
                source_T=rows["source_rank"].to_numpy(dtype=np.int64),
                position_T=rows["position"].to_numpy(dtype=np.int64),
            )
        )
    return result


def places_touched(experts_TK: Int64, place_E: Int64) -> Float64:
    """How many different places the experts of each token are at, (T,)."""
    sorted_TK = np.sort(place_E[experts_TK], axis=1)
    return np.asarray(1.0 + (np.diff(sorted_TK, axis=1) != 0).sum(axis=1))
