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


def layer_tokens(
    samples: pd.DataFrame, layers: Sequence[int], *, most: int | None = None
) -> list[LayerTokens] | None:
    """Tokens of each layer; None unless every layer has some, all with equally many experts.

    Args:
        samples: token samples of a run, of the steps and phases that are asked for.
        layers: numbers of the layers, in the order of the result.
        most: of more tokens of a layer some are left out, evenly; None keeps all.
    """
    result = []
    for layer in layers:
        rows = samples[samples["layer"] == layer]
        rows = rows.iloc[:: 1 if most is None else max(1, -(-len(rows) // most))]
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
