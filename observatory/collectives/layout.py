"""Who sits where, and the groups of ranks that exchange with each other.

Shapes: P ranks, G ranks of a group.

Three groups, seen from one rank: ``world`` is everybody, ``node`` the ranks of its node, ``across`` the ranks
that have its place on their own nodes. A token gets from any rank to any other by one step in ``across`` and
one in ``node``.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

from observatory.errors import ExchangeError

Group = Literal["world", "node", "across"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The ranks and their nodes, from the point of view of one rank.

    Attributes:
        rank: this rank.
        node_of_P: node of each rank, counted from 0 in order of appearance, (P,).
    """

    rank: int
    node_of_P: tuple[int, ...]

    @property
    def size(self) -> int:
        """P."""
        return len(self.node_of_P)

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return max(self.node_of_P) + 1

    def ranks_of_node(self, node: int) -> tuple[int, ...]:
        """Ranks of a node, ascending."""
        return tuple(rank for rank, node_of_rank in enumerate(self.node_of_P) if node_of_rank == node)

    def members(self, group: Group) -> tuple[int, ...]:
        """Ranks of this rank's group, in the order in which splits are given.

        Raises:
            ExchangeError: ``across`` on nodes with different numbers of ranks.
        """
        if group == "world":
            return tuple(range(self.size))
        node_ranks = self.ranks_of_node(self.node_of_P[self.rank])
        if group == "node":
            return node_ranks
        return self.all_groups("across")[node_ranks.index(self.rank)]

    def all_groups(self, group: Group) -> tuple[tuple[int, ...], ...]:
        """Every group of this kind, the same list on every rank.

        Raises:
            ExchangeError: ``across`` on nodes with different numbers of ranks.
        """
        nodes = tuple(self.ranks_of_node(node) for node in range(self.nodes))
        if group == "world":
            return (tuple(range(self.size)),)
        if group == "node":
            return nodes
        if len({len(ranks) for ranks in nodes}) > 1:
            held = ", ".join(str(len(ranks)) for ranks in nodes)
            raise ExchangeError(
                f"the nodes have {held} ranks; exchanges between nodes need equally many on each; "
                "start as many ranks on every node, or use --algorithm flat"
            )
        return tuple(zip(*nodes, strict=True))


def nodes_in_order(labels_P: Sequence[Hashable]) -> tuple[int, ...]:
    """Number the nodes by their labels (host names) in order of appearance."""
    numbers: dict[Hashable, int] = {}
    return tuple(numbers.setdefault(label, len(numbers)) for label in labels_P)


def split_into_nodes(size: int, ranks_per_node: int) -> tuple[int, ...]:
    """Nodes of consecutive ranks, whatever hosts they are on: for emulating nodes on one machine.

    Raises:
        ExchangeError: ``ranks_per_node`` does not divide the number of ranks.
    """
    if ranks_per_node < 1 or size % ranks_per_node:
        raise ExchangeError(
            f"{ranks_per_node} ranks per node do not divide {size} ranks; expected a divisor of {size}"
        )
    return tuple(rank // ranks_per_node for rank in range(size))
