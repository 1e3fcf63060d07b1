"""What of a traffic matrix a network model looks at, and the forms a model may take.

Shapes: P ranks, N rows (ranks of all stages), F terms. A row of terms belongs to one rank in one stage of an
    exchange.

An algorithm makes one or two exchanges of a matrix (`observatory.run.exchange_algorithms`). A stage lasts as
long as its slowest rank, stages follow one another:

    t = sum over stages of max over rows of  sum over terms of coefficient_F * term_NF

Link classes: ``self`` (a rank to itself: a copy), ``node`` (another rank of its node), ``other`` (another
node). Terms are non-negative and so are coefficients: more traffic never makes an exchange faster.
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
    "pairs_on_node": "ordered pairs of ranks that share the node: what its cores handle for them in turns",
    "messages_node": "non-empty messages with other ranks of the node, the larger of in and out",
    "messages_other": "non-empty messages with other nodes, the larger of in and out",
    "bytes_self": "bytes a rank keeps",
    "bytes_node": "bytes with other ranks of the node, the larger of in and out (full duplex)",
    "bytes_other": "bytes with other nodes, the larger of in and out (full duplex)",
    "both_node": "bytes with other ranks of the node, in plus out (half duplex)",
    "both_other": "bytes with other nodes, in plus out (half duplex)",
    "two_way_node": "bytes that also pass the other way between the same two ranks of the node",
    "shared_messages": "non-empty messages of all ranks of the node, in plus out",
    "shared_self": "bytes that all ranks of the node keep",
    "shared_bytes": "bytes of all ranks of the node that leave a rank, in plus out",
    "link_bytes": "bytes of the whole node with other nodes, the larger of in and out",
    "link_two_way": "bytes of the whole node that also pass the other way between the same two ranks",
    "out_node": "bytes to other ranks of the node",
    "in_node": "bytes from other ranks of the node",
    "link_out": "bytes of the whole node to other nodes",
    "link_in": "bytes of the whole node from other nodes",
}

#: Terms whose coefficients are microseconds per byte.
BYTE_TERMS = frozenset(
    name for name in TERMS if name not in ("exchange", "peers", "pairs_on_node") and "messages" not in name
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One documented form of the model.

    Attributes:
        name: its name in files.
        meaning: one sentence.
        terms: terms that add up for every rank.
        floor: those of the terms that pass while the others do, so that the larger of the two sums counts
            instead of all: short exchanges last the probe latency and long ones do not pay it on top. Empty:
            all terms add up.
        ways: terms of sending, and of receiving: they pass at once, so that the larger of the two sums
            counts, each with all other terms. Empty: no term is of one way alone.
    """

    name: str
    meaning: str
    terms: tuple[str, ...]
    floor: tuple[str, ...] = ()
    ways: tuple[tuple[str, ...], ...] = ()

    @property
    def sums(self) -> tuple[tuple[bool, ...], ...]:
        """Which terms add up in each of a rank's sums, of which the largest counts."""
        added = {term for term in self.terms if term not in self.floor}
        sides = [added - {term for way in self.ways if way is not side for term in way} for side in self.ways]
        floor = [set(self.floor)] if self.floor else []
        return tuple(tuple(term in one for term in self.terms) for one in (*(sides or [added]), *floor))


_LATENCY = ("exchange", "peers")
_MESSAGES = ("messages_node", "messages_other")
# A term that measurements cannot separate from those before it is left out: own bytes stand last.
_BYTES = ("bytes_node", "bytes_other", "bytes_self")
_TWO_WAY = ("bytes_node", "link_bytes", "two_way_node", "link_two_way", "bytes_self")
_OUT, _IN = ("out_node", "link_out"), ("in_node", "link_in")

#: Forms by name, simplest first (docs/network-model.md).
FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form(
            name="latency-bandwidth",
            meaning="fixed latency plus bytes over bandwidth of the busiest rank (Hockney, uneven)",
            terms=("exchange", *_BYTES),
        ),
        Form(
            name="messages",
            meaning="latency-bandwidth plus a cost per non-empty message",
            terms=("exchange", *_MESSAGES, *_BYTES),
        ),
        Form(
            name="peers",
            meaning="latency-bandwidth plus a cost per other rank, empty or not",
            terms=(*_LATENCY, *_BYTES),
        ),
        Form(
            name="peers-floor",
            meaning="latency per rank on one side, messages and bytes on the other: the longer counts",
            terms=(*_LATENCY, *_MESSAGES, *_BYTES),
            floor=_LATENCY,
        ),
        Form(
            name="half-duplex",
            meaning="peers, but what a rank sends and what it receives share its bandwidth",
            terms=(*_LATENCY, "both_node", "both_other", "bytes_self"),
        ),
        Form(
            name="shared-link",
            meaning="peers, but the ranks of a node share its link to the others",
            terms=(*_LATENCY, "bytes_node", "link_bytes", "bytes_self"),
        ),
        Form(
            name="two-way",
            meaning="shared-link, but bytes that pass both ways between two ranks partly wait for each other",
            terms=(*_LATENCY, *_TWO_WAY),
        ),
        Form(
            name="two-way-floor",
            meaning="two-way, but the latency of ranks passes while messages and bytes do: the longer counts",
            terms=(*_LATENCY, *_MESSAGES, *_TWO_WAY),
            floor=_LATENCY,
        ),
        Form(
            name="directions",
            meaning="two-way-floor, but what is sent and what is received have costs of their own",
            terms=(*_LATENCY, *_MESSAGES, *_OUT, *_IN, "two_way_node", "link_two_way", "bytes_self"),
            floor=_LATENCY,
            ways=(_OUT, _IN),
        ),
        Form(
            name="shared-node",
            meaning="the ranks of a node share its cores and memory: its sums count, and other nodes",
            terms=(
                "exchange", "shared_bytes", "bytes_other", "pairs_on_node", "messages_other", "shared_self",
            ),
        ),
        Form(
            name="contention",
            meaning="peers and messages plus what all ranks of the node move together",
            terms=(
                *_LATENCY, *_MESSAGES, *_BYTES,
                "shared_bytes", "pairs_on_node", "shared_messages", "shared_self",
            ),
        ),
    )
}  # fmt: skip

_NAMES = tuple(TERMS)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageTerms:
    """Terms of all ranks in all stages of one exchange.

    Attributes:
        terms_NF: one row per rank and stage, columns in the order of ``TERMS``.
        stage_N: stage of each row, from 0.
    """

    terms_NF: NDArray[np.float64]
    stage_N: NDArray[np.int64]

    def of(self, form: Form) -> NDArray[np.float64]:
        """The columns of a form, (N, terms of the form)."""
        return self.terms_NF[:, [_NAMES.index(name) for name in form.terms]]


def stage_terms(
    bytes_PP: ArrayLike, node_of_P: Sequence[int], algorithm: str, *, role: str | None = None
) -> StageTerms:
    """Terms of one traffic matrix; ``role`` as in `observatory.run.exchange_algorithms`.

    Raises:
        ExchangeError: the matrix does not fit the ranks, or the algorithm does not fit the nodes.
    """
    exchanges = stages(bytes_PP, node_of_P, algorithm, role=role)
    node_P = np.unique(np.asarray(node_of_P, dtype=np.int64), return_inverse=True)[1]
    return StageTerms(
        terms_NF=np.concatenate([terms_of(matrix_PP, node_P) for matrix_PP in exchanges]),
        stage_N=np.repeat(np.arange(len(exchanges)), len(node_P)),
    )


def terms_of(bytes_PP: NDArray[np.int64], node_P: NDArray[np.int64]) -> NDArray[np.float64]:
    """Terms of one stage, (P, F), columns in the order of ``TERMS``; of several (..., P, P) as well."""
    same_PP = node_P[:, None] == node_P[None, :]
    self_P = np.diagonal(bytes_PP, axis1=-2, axis2=-1)
    node_PP = np.where(same_PP & ~np.eye(len(node_P), dtype=bool), bytes_PP, 0)
    other_PP = np.where(same_PP, 0, bytes_PP)
    ranks = len(node_P)

    def larger(matrix_PP: NDArray[np.int64]) -> NDArray[np.int64]:
        largest: NDArray[np.int64] = np.maximum(matrix_PP.sum(axis=-1), matrix_PP.sum(axis=-2))
        return largest

    def both(matrix_PP: NDArray[np.int64]) -> NDArray[np.int64]:
        summed: NDArray[np.int64] = matrix_PP.sum(axis=-1) + matrix_PP.sum(axis=-2)
        return summed

    def two_way(matrix_PP: NDArray[np.int64]) -> NDArray[np.int64]:
        passing: NDArray[np.int64] = np.minimum(matrix_PP, matrix_PP.swapaxes(-1, -2)).sum(axis=-1)
        return passing

    def over_node(value_P: NDArray[np.int64]) -> NDArray[np.float64]:
        summed: NDArray[np.float64] = value_P.astype(np.float64) @ same_PP.astype(np.float64)
        return summed

    on_node_P = over_node(np.ones(ranks, dtype=np.int64))
    leaving_PP = node_PP + other_PP
    filled_PP = (leaving_PP > 0).astype(np.int64)
    columns: dict[str, NDArray[np.int64] | NDArray[np.float64]] = {
        "exchange": np.ones(ranks),
        "peers": np.full(ranks, ranks - 1),
        "pairs_on_node": on_node_P * (on_node_P - 1),
        "messages_node": larger((node_PP > 0).astype(np.int64)),
        "messages_other": larger((other_PP > 0).astype(np.int64)),
        "bytes_self": self_P,
        "bytes_node": larger(node_PP),
        "bytes_other": larger(other_PP),
        "both_node": both(node_PP),
        "both_other": both(other_PP),
        "two_way_node": two_way(node_PP),
        "shared_messages": over_node(both(filled_PP)),
        "shared_self": over_node(self_P),
        "shared_bytes": over_node(both(leaving_PP)),
        "link_bytes": np.maximum(over_node(other_PP.sum(axis=-1)), over_node(other_PP.sum(axis=-2))),
        "out_node": node_PP.sum(axis=-1),
        "in_node": node_PP.sum(axis=-2),
        "link_out": over_node(other_PP.sum(axis=-1)),
        "link_in": over_node(other_PP.sum(axis=-2)),
        "link_two_way": over_node(two_way(other_PP)),
    }
    shape = bytes_PP.shape[:-1]
    return np.stack(
        [np.broadcast_to(np.asarray(columns[name], dtype=np.float64), shape) for name in _NAMES], axis=-1
    )
