"""The score that uniform routing has by chance, which no placement can be expected to be below.

Shapes: S steps, L layers, E experts.
"""

from __future__ import annotations

import numpy as np

from observatory.analysis.parallel.balancing import Float64

#: A layout is as even as chance makes it within this part of the floor, which is itself known to 1 %.
AT_FLOOR = 0.01


def routing_floor(load_SLE: Float64, ranks: int, top_k: int | None) -> float | None:
    """Score of uniform routing of the same tokens of each step, on ranks of equally many experts."""
    from observatory.analysis.routing.floor import max_over_mean_floor

    experts = load_SLE.shape[2]
    if not top_k or top_k > experts:
        return None
    tokens_SL = np.rint(load_SLE.sum(axis=2) / top_k).astype(np.int64)
    ratio_SL = [
        [
            max_over_mean_floor(tokens=tokens, top_k=top_k, experts=experts, groups=ranks) or 1.0
            for tokens in row
        ]
        for row in tokens_SL.tolist()
    ]
    return float(np.average(ratio_SL, weights=np.maximum(tokens_SL, 1e-9)))
