"""Bytes between ranks, summed over the collectives of a layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from observatory.exchange.matching import Unmatched, match_collectives

__all__ = ["exchange_traffic"]


def exchange_traffic(
    exchanges: pd.DataFrame, *, ranks: int, node_of_rank: Sequence[int] | None = None
) -> pd.DataFrame:
    """Bytes that each rank sent to each other, a rank's own part included.

    What the sender says counts; where it left no row, what the receiver says. Collectives whose rows do not
    fit together, and pairs of which neither side said anything, are left out.

    Returns:
        phase, layer, role, source_rank (sender), peer_rank (receiver), collectives, bytes; pairs that met and
        exchanged nothing have 0 bytes.
    """
    sums: dict[tuple[object, ...], list[int]] = {}
    phase, layer, role = (exchanges[name].to_numpy(object) for name in ("phase", "layer", "role"))
    for matched in match_collectives(exchanges, ranks=ranks, clocks={}, node_of_rank=node_of_rank):
        if isinstance(matched, Unmatched):
            continue
        at = matched.rows[0]
        sent_PP = np.where(matched.send_PP >= 0, matched.send_PP, matched.receive_PP.T)
        own_layer = None if pd.isna(layer[at]) else int(layer[at])
        for i, j in np.argwhere(sent_PP >= 0):
            key = (phase[at], own_layer, role[at], int(matched.rank_P[i]), int(matched.rank_P[j]))
            entry = sums.setdefault(key, [0, 0])
            entry[0] += 1
            entry[1] += int(sent_PP[i, j])
    columns = ["phase", "layer", "role", "source_rank", "peer_rank", "collectives", "bytes"]
    frame = pd.DataFrame([[*key, *entry] for key, entry in sums.items()], columns=columns)
    return frame.astype({"layer": "Int64"}).sort_values(columns[:5]).reset_index(drop=True)
