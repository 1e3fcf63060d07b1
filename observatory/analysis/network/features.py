"""What of a traffic matrix a network model looks at, and the forms a model may take.

Shapes: P ranks, S stages, N rows (ranks of all stages), F terms, X sides of a form. A row of terms belongs
    to one rank in one stage of an exchange.

An algorithm makes one or two exchanges of a matrix (`observatory.run.exchange_algorithms`). A stage lasts as
long as its slowest part, stages follow one another:

    t = sum over stages of max over ranks and sides of  sum over terms of coefficient_F * term_NF

A side is something that can be busy on its own, while the others are: what a rank sends, what it receives,
the link of its node. Link classes: ``self`` (a rank to itself: a copy), ``node`` (another rank of its node),
``other`` (another node). Terms are non-negative and so are coefficients: more traffic never makes an exchange
faster. Bytes through parts that are slower than the others count so many times more (`Factors`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from observatory.run.exchange_algorithms import stages

#: Every term, its unit, and what it counts in one stage. ``in`` and ``out`` are those of one rank.
TERMS: dict[str, str] = {
    "exchange": "1 per exchange: probe latency",
    "peers": "other ranks of the exchange: a collective meets all, bytes for them or not",
    "start": "1 per exchange that moves bytes: what passes before they flow",
    "start_peers": "other ranks of an exchange that moves bytes",
    "pairs_on_node": "ordered pairs of ranks that share the node: what its cores handle for them in turns",
    "bytes_self": "bytes a rank keeps",
    "bytes_node": "bytes with other ranks of the node, the larger of in and out (full duplex)",
    "bytes_other": "bytes with other nodes, the larger of in and out (full duplex)",
    "out_node": "bytes to other ranks of the node",
    "out_other": "bytes to other nodes",
    "in_node": "bytes from other ranks of the node",
    "in_other": "bytes from other nodes",
    "out_all": "bytes to all other ranks",
    "in_all": "bytes from all other ranks",
    "two_way": "bytes of a rank that also pass the other way between the same two ranks",
    "link_out": "bytes of the whole node to other nodes",
    "link_in": "bytes of the whole node from other nodes",
    "link_two_way": "bytes of the whole node that also pass the other way between the same two ranks",
    "shared_self": "bytes that all ranks of the node keep",
    "shared_bytes": "bytes of all ranks of the node that leave a rank, in plus out",
}

#: Terms whose coefficients are microseconds per byte.
BYTE_TERMS = frozenset(TERMS) - {"exchange", "peers", "start", "start_peers", "pairs_on_node"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One documented form of the model.

    Attributes:
        name: its name in files.
        meaning: one sentence.
        sides: terms that add up in each; of the sides of all ranks the largest counts.
        needs: a term that must occur: without it this is another form.
    """

    name: str
    meaning: str
    sides: tuple[tuple[str, ...], ...]
    needs: str = "exchange"

    @property
    def terms(self) -> tuple[str, ...]:
        """Terms of all sides."""
        return tuple(dict.fromkeys(term for side in self.sides for term in side))

    @property
    def columns(self) -> list[int]:
        """Places of its terms in ``TERMS``."""
        return [_NAMES.index(name) for name in self.terms]

    @property
    def sums_XF(self) -> NDArray[np.bool_]:
        """Which terms add up in each side."""
        return np.array([[term in side for term in self.terms] for side in self.sides])

    @property
    def separate(self) -> list[Form]:
        """The latency of its own side, and all other terms in one."""
        first, *others = self.sides
        sides = [first, tuple(dict.fromkeys(term for side in others for term in side))] if others else [first]
        return [Form(name=self.name, meaning=self.meaning, sides=(side,)) for side in sides]


#: The latency of an exchange passes while bytes do: the longer counts of this, and of bytes with their start.
LATENCY = ("exchange", "peers")
START = ("start", "start_peers")

#: Forms by name, simplest first (docs/network-model.md). A term that measurements cannot separate from those
#: before it is left out: own bytes stand last.
FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form(
            name="two-way",
            meaning="bytes over bandwidth of the busiest rank; those that pass both ways between two ranks "
            "partly wait for each other",
            sides=(LATENCY, (*START, "bytes_other", "bytes_node", "two_way", "bytes_self")),
        ),
        Form(
            name="directions",
            meaning="two-way, but what a rank sends and what it receives have costs of their own",
            sides=(
                LATENCY,
                (*START, "out_other", "out_node", "two_way", "bytes_self"),
                (*START, "in_other", "in_node", "two_way", "bytes_self"),
            ),
        ),
        Form(
            name="shared-link",
            meaning="what a node does over the link that its ranks share to the others",
            sides=(
                LATENCY,
                (*START, "link_out", "link_two_way", "bytes_self"),
                (*START, "link_in", "link_two_way", "bytes_self"),
            ),
            needs="link_out",
        ),
        Form(
            name="tiers",
            meaning="what a rank sends and receives, and what its node does over its link to the others",
            sides=(
                LATENCY,
                (*START, "out_all", "bytes_self"),
                (*START, "in_all", "bytes_self"),
                (*START, "link_out", "link_two_way", "bytes_self"),
                (*START, "link_in", "link_two_way", "bytes_self"),
            ),
            needs="link_out",
        ),
        Form(
            name="shared-node",
            meaning="the ranks of a node share its cores and memory: its sums count, and other nodes",
            sides=(("exchange", "shared_bytes", "bytes_other", "pairs_on_node", "shared_self"),),
            needs="pairs_on_node",
        ),
    )
}

_NAMES = tuple(TERMS)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageTerms:
    """Terms of all ranks in all stages of one exchange.

    Attributes:
        terms_SPF: by stage and rank, columns in the order of ``TERMS``.
    """

    terms_SPF: NDArray[np.float64]

    def has(self, term: str) -> bool:
        """Whether any rank has some of it."""
        return bool(self.terms_SPF[..., _NAMES.index(term)].any())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Factors:
    """How many times as much a byte counts: what is sent from rank i to rank j, and what is received."""

    out_PP: NDArray[np.float64]
    in_PP: NDArray[np.float64]


def stage_terms(
    bytes_PP: ArrayLike,
    node_of_P: Sequence[int],
    algorithm: str,
    *,
    role: str | None = None,
    factors: Factors | None = None,
) -> StageTerms:
    """Terms of one traffic matrix; ``role`` as in `observatory.run.exchange_algorithms`.

    Raises:
        ExchangeError: the matrix does not fit the ranks, or the algorithm does not fit the nodes.
    """
    exchanges = np.array(stages(bytes_PP, node_of_P, algorithm, role=role))
    return StageTerms(terms_SPF=terms_of(exchanges, node_of_P, factors))


def terms_of(
    bytes_PP: NDArray[np.int64], node_of_P: Sequence[int], factors: Factors | None = None
) -> NDArray[np.float64]:
    """Terms of one stage, (P, F), columns in the order of ``TERMS``; of several (..., P, P) as well."""
    node_P = np.asarray(node_of_P)
    ranks = len(node_P)
    same_PP = node_P[:, None] == node_P[None, :]
    ones = Factors(out_PP=np.ones((1, 1)), in_PP=np.ones((1, 1)))
    factors = ones if factors is None else factors
    moved_PP = bytes_PP * ~np.eye(ranks, dtype=bool)
    out_PP, in_PP = moved_PP * factors.out_PP, moved_PP * factors.in_PP
    out_node, out_other = (np.where(where, out_PP, 0.0).sum(axis=-1) for where in (same_PP, ~same_PP))
    in_node, in_other = (np.where(where, in_PP, 0.0).sum(axis=-2) for where in (same_PP, ~same_PP))
    slower_PP = np.maximum(out_PP, in_PP)
    two_way_PP = np.minimum(slower_PP, slower_PP.swapaxes(-1, -2))
    on_node_P = same_PP.sum(axis=1)
    moves = (moved_PP.sum(axis=(-1, -2), keepdims=True)[..., 0] > 0).astype(np.float64)

    def over_node(value_P: NDArray[np.float64]) -> NDArray[np.float64]:
        summed: NDArray[np.float64] = value_P @ same_PP.astype(np.float64)
        return summed

    # The link of a node that holds one rank is that rank's own.
    link_out, link_in = (over_node(value) * (on_node_P > 1) for value in (out_other, in_other))
    self_P = np.diagonal(bytes_PP, axis1=-2, axis2=-1).astype(np.float64)
    columns = {
        "exchange": np.ones(ranks),
        "peers": np.full(ranks, ranks - 1.0),
        "start": moves,
        "start_peers": moves * (ranks - 1.0),
        "pairs_on_node": on_node_P * (on_node_P - 1.0),
        "bytes_self": self_P,
        "bytes_node": np.maximum(out_node, in_node),
        "bytes_other": np.maximum(out_other, in_other),
        "out_node": out_node,
        "out_other": out_other,
        "in_node": in_node,
        "in_other": in_other,
        "out_all": out_node + out_other,
        "in_all": in_node + in_other,
        "two_way": two_way_PP.sum(axis=-1),
        "link_out": link_out,
        "link_in": link_in,
        "link_two_way": over_node(np.where(same_PP, 0.0, two_way_PP).sum(axis=-1)) * (on_node_P > 1),
        "shared_self": over_node(self_P),
        "shared_bytes": over_node(out_node + out_other + in_node + in_other),
    }
    shape = bytes_PP.shape[:-1]
    return np.stack([np.broadcast_to(columns[name], shape) for name in _NAMES], axis=-1)
