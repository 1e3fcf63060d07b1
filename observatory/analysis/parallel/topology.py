"""Where expert-parallel ranks sit.

Shapes: R expert-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from observatory.errors import PlacementError

#: A model has at most that many experts (``observatory.run.manifest``), and more ranks than experts are no
#: use.
MAX_RANKS = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelTopology:
    """Ranks of one expert-parallel group on nodes, filled one after another.

    Attributes:
        ep: R, ranks of the group.
        gpus_per_node: ranks on each node; when it does not divide ``ep`` the last node holds fewer.
    """

    ep: int
    gpus_per_node: int

    def __post_init__(self) -> None:
        """Refuse sizes below one, and sizes that no machine has."""
        for name, value in (("EP degree", self.ep), ("GPUs per node", self.gpus_per_node)):
            if not 1 <= value <= MAX_RANKS:
                raise PlacementError(f"{name} is {value}; expected 1 to {MAX_RANKS}")

    @property
    def nodes(self) -> int:
        """Nodes that hold at least one rank."""
        return -(-self.ep // self.gpus_per_node)

    @property
    def node_of_rank_R(self) -> NDArray[np.int64]:
        """Node of each rank, (R,)."""
        return np.arange(self.ep, dtype=np.int64) // self.gpus_per_node
