"""Bytes between ranks, summed over the collectives of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from observatory.analysis.exchange.matching import Unmatched, match_collectives


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
    totals: dict[tuple[str, int | None, str, bytes], _Total] = {}
    phase_N, layer_N = (exchanges[name].to_numpy(object) for name in ("phase", "layer"))
    for matched in match_collectives(exchanges, ranks=ranks, clocks={}, node_of_rank=node_of_rank):
        if isinstance(matched, Unmatched):
            continue
        at = matched.rows[0]
        layer = None if pd.isna(layer_N[at]) else int(layer_N[at])
        key = (str(phase_N[at]), layer, matched.role, matched.rank_P.tobytes())
        if key not in totals:
            size = len(matched.rank_P)
            totals[key] = _Total(
                matched.rank_P, np.zeros((size, size), np.int64), np.zeros((size, size), np.int64)
            )
        sent_PP = np.where(matched.send_PP >= 0, matched.send_PP, matched.receive_PP.T)
        totals[key].bytes_PP += np.maximum(sent_PP, 0)
        totals[key].count_PP += sent_PP >= 0
    pairs = ["phase", "layer", "role", "source_rank", "peer_rank"]
    frames = [
        total.frame().assign(phase=phase, layer=layer, role=role)
        for (phase, layer, role, _), total in totals.items()
    ]
    columns = [*pairs, "collectives", "bytes"]
    frame = pd.concat(frames) if frames else pd.DataFrame(columns=columns)
    frame = frame[columns].astype({"layer": "Int64"})
    return frame.groupby(pairs, dropna=False, as_index=False, sort=True).sum()


@dataclass(slots=True)
class _Total:
    """Sums over the collectives of one group; [i, j] is from its i-th to its j-th rank."""

    rank_P: npt.NDArray[np.int64]
    bytes_PP: npt.NDArray[np.int64]
    count_PP: npt.NDArray[np.int64]

    def frame(self) -> pd.DataFrame:
        i, j = np.nonzero(self.count_PP)
        return pd.DataFrame(
            {
                "source_rank": self.rank_P[i],
                "peer_rank": self.rank_P[j],
                "collectives": self.count_PP[i, j],
                "bytes": self.bytes_PP[i, j],
            }
        )
