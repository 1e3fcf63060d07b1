"""Which ranks a group of an exchange table stands for.

Shapes: P ranks of the run; N rows of the table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from observatory.analysis.exchange.words import ExchangeCode
from observatory.reasons import Reason

Int64 = npt.NDArray[np.int64]

_LABEL = re.compile(r"\d{1,7}(-\d{1,7})?(,\d{1,7}(-\d{1,7})?)*(#\d{1,7})?")
_LONGEST_LABEL, _MOST_RANKS = 65536, 65536
#: Larger groups would need gigabytes for their pairs.
_LARGEST_GROUP = 4096
#: Groups of which there are several of one name.
PARTED = ("node", "across")


def ranks_of_group(label: str) -> tuple[int, ...] | None:
    """Ranks that a group's name lists, ascending: 0, 1, 2 and 5 for ``0-2,5``. None for any other name."""
    if len(label) > _LONGEST_LABEL or not _LABEL.fullmatch(label):
        return None
    ranks: set[int] = set()
    for run in label.partition("#")[0].split(","):
        low, _, high = run.partition("-")
        first, last = int(low), int(high or low)
        if last - first > _MOST_RANKS:
            return None
        ranks.update(range(first, last + 1))
    return tuple(sorted(ranks)) or None


class GroupLayout:
    """Which ranks a group stands for."""

    def __init__(self, ranks: int, node_of_rank: Sequence[int] | None) -> None:
        self.ranks = ranks
        self.parts: dict[str, Int64] = {}
        if node_of_rank is not None and len(node_of_rank) == ranks:
            node_P = np.asarray(node_of_rank, dtype=np.int64)
            place_P = np.array([int((node_P[:rank] == node).sum()) for rank, node in enumerate(node_P)])
            self.parts = {"node": node_P, "across": place_P.astype(np.int64)}

    def part_N(self, group: pd.Series[str], rank_N: Int64) -> Int64:
        """Distinguishes the groups of one name."""
        part_N = np.zeros(len(rank_N), np.int64)
        for name, part_P in self.parts.items():
            of_group = (group == name).to_numpy(bool) & (rank_N < self.ranks)
            part_N[of_group] = part_P[rank_N[of_group]]
        return part_N

    def members(self, group: str, present: Int64, size: int) -> Int64 | Reason:
        """Ranks of the group; a reason when that is not known.

        Args:
            group: its name.
            present: ranks that left rows, ascending.
            size: length of their byte lists; of ``present`` where none was recorded.
        """
        if size > _LARGEST_GROUP:
            return Reason(ExchangeCode.GROUP_TOO_LARGE, {"ranks": size, "most": _LARGEST_GROUP})
        if group in self.parts and present[-1] < self.ranks:
            part_P = self.parts[group]
            members = np.flatnonzero(part_P == part_P[present[0]]).astype(np.int64)
            if size in (len(members), self.ranks):
                return members
        elif group in PARTED:
            return Reason(ExchangeCode.NODES_UNKNOWN, {"group": group})
        named = ranks_of_group(group)
        fits = named is not None and size == len(named) and named[-1] < self.ranks
        if named is not None and fits and set(present.tolist()) <= set(named):
            return np.array(named, dtype=np.int64)
        if size == len(present):
            return present
        if size == self.ranks and present[-1] < self.ranks:
            return np.arange(self.ranks, dtype=np.int64)
        if size < len(present):
            return Reason(ExchangeCode.TOO_MANY_ROWS, {"rows": len(present), "ranks": size})
        return Reason(
            ExchangeCode.ROWS_MISSING, {"rows": len(present), "ranks": size, "run_ranks": self.ranks}
        )
