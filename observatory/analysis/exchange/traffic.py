"""Bytes between ranks, summed over the collectives of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from observatory.analysis.exchange.codes import joint_codes
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
    totals: dict[tuple[int, str, bytes], _Total] = {}
    layer_N = joint_codes([exchanges["phase"], exchanges["layer"]])
    for matched in match_collectives(exchanges, ranks=ranks, clocks={}, node_of_rank=node_of_rank):
        if isinstance(matched, Unmatched) or not len(matched.place_C):
            continue
        sent_CPP = np.where(matched.send_CPP >= 0, matched.send_CPP, matched.receive_CPP.swapaxes(1, 2))
        kind_C = joint_codes([layer_N[matched.first_row_C], matched.role_C, *matched.rank_CP.T])
        order = np.argsort(kind_C, kind="stable")
        begin_K = np.unique(kind_C[order], return_index=True)[1]
        bytes_KPP = np.add.reduceat(np.maximum(sent_CPP, 0)[order], begin_K)
        count_KPP = np.add.reduceat((sent_CPP >= 0)[order], begin_K, dtype=np.int64)
        for c, bytes_PP, count_PP in zip(order[begin_K], bytes_KPP, count_KPP, strict=True):
            row, rank_P = int(matched.first_row_C[c]), matched.rank_CP[c]
            key = (int(layer_N[row]), str(matched.role_C[c]), rank_P.tobytes())
            if key in totals:
                totals[key].bytes_PP += bytes_PP
                totals[key].count_PP += count_PP
            else:
                totals[key] = _Total(row, key[1], rank_P, bytes_PP, count_PP)
    pairs = ["phase", "layer", "role", "source_rank", "peer_rank"]
    frames = [total.frame(exchanges) for total in totals.values()]
    columns = [*pairs, "collectives", "bytes"]
    frame = pd.concat(frames) if frames else pd.DataFrame(columns=columns)
    frame = frame[columns].astype({"layer": "Int64"})
    return frame.groupby(pairs, dropna=False, as_index=False, sort=True).sum()


@dataclass(slots=True)
class _Total:
    """Sums over the collectives of one layer, role and group; [i, j] is from its i-th to its j-th rank."""

    row: int
    role: str
    rank_P: npt.NDArray[np.int64]
    bytes_PP: npt.NDArray[np.int64]
    count_PP: npt.NDArray[np.int64]

    def frame(self, exchanges: pd.DataFrame) -> pd.DataFrame:
        i, j = np.nonzero(self.count_PP)
        layer = exchanges["layer"].iloc[self.row]
        return pd.DataFrame(
            {
                "source_rank": self.rank_P[i],
                "peer_rank": self.rank_P[j],
                "collectives": self.count_PP[i, j],
                "bytes": self.bytes_PP[i, j],
                "phase": str(exchanges["phase"].iloc[self.row]),
                "layer": None if pd.isna(layer) else int(layer),
                "role": self.role,
            }
        )
