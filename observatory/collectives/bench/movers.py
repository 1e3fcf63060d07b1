"""Exchange of rows under one traffic matrix, by each algorithm.

Shapes: P ranks, N rows, B bytes of a row. ``rows_PP[i, j]`` rows go from rank i to rank j, known to all.

A mover takes this rank's rows sorted by destination and returns what it received sorted by source, so that
all algorithms can be checked against the same bytes. Between the stages of the hierarchical algorithm rows
are regrouped, which is part of its time as it is in a dispatcher. A combine goes back the way its dispatch
came, as `observatory.run.exchange_algorithms` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from observatory.errors import ExchangeError
from observatory.run.exchange_algorithms import ALGORITHMS, node_size

if TYPE_CHECKING:
    from torch import Tensor

    from observatory.collectives.transport.protocol import Transport

#: Sends this rank's rows (N, B) and returns those it received.
Mover = Callable[["Tensor"], "Tensor"]


def mover(
    transport: Transport, rows_PP: NDArray[np.int64], algorithm: str, *, role: str | None = None
) -> Mover:
    """The exchange of one matrix by one algorithm, all splits prepared.

    ``role`` ``combine`` says that the matrix is the way back of a dispatch.

    Raises:
        ExchangeError: an unknown algorithm, or nodes it cannot work on.
    """
    back = role == "combine"
    makers = {
        "flat": _flat,
        "hierarchical": _hierarchical_back if back else _hierarchical,
        "gather": _reduce_scatter if back else _gather,
    }
    if algorithm not in makers:
        raise ExchangeError(f"algorithm {algorithm!r} is unknown; expected one of {', '.join(ALGORITHMS)}")
    return makers[algorithm](transport, rows_PP)


def _flat(transport: Transport, rows_PP: NDArray[np.int64]) -> Mover:
    send_P, receive_P = rows_PP[transport.rank].tolist(), rows_PP[:, transport.rank].tolist()

    def exchange(rows_NB: Tensor) -> Tensor:
        return transport.all_to_all_v(rows_NB, send_P, receive_P)

    return exchange


def _gather(transport: Transport, rows_PP: NDArray[np.int64]) -> Mover:
    held_P = rows_PP.sum(axis=1).tolist()
    starts_PP = np.cumsum(rows_PP, axis=1) - rows_PP
    offset_P = np.cumsum(held_P) - held_P
    blocks = [
        (int(offset_P[source] + starts_PP[source, transport.rank]), int(rows_PP[source, transport.rank]))
        for source in range(transport.size)
    ]

    def exchange(rows_NB: Tensor) -> Tensor:
        everything = transport.all_gather_v(rows_NB, held_P)
        return torch.cat([everything[start : start + count] for start, count in blocks])

    return exchange


def _reduce_scatter(transport: Transport, rows_PP: NDArray[np.int64]) -> Mover:
    # Every rank fills its own rows of the others' buffers, and their sum is what all have sent.
    held_P = rows_PP.sum(axis=0).tolist()
    starts_PP = np.cumsum(rows_PP, axis=0) - rows_PP
    offset_P = np.cumsum(held_P) - held_P
    send_P: list[int] = rows_PP[transport.rank].tolist()
    offsets = [int(offset_P[peer] + starts_PP[transport.rank, peer]) for peer in range(transport.size)]

    def exchange(rows_NB: Tensor) -> Tensor:
        buffer = rows_NB.new_zeros((sum(held_P), *rows_NB.shape[1:]))
        for start, part in zip(offsets, torch.split(rows_NB, send_P), strict=True):
            buffer[start : start + len(part)] = part
        return transport.reduce_scatter_v(buffer, held_P)

    return exchange


def _hierarchical(transport: Transport, rows_PP: NDArray[np.int64]) -> Mover:
    local = node_size(transport.node_of_P)
    nodes = transport.size // local
    m, index = divmod(transport.rank, local)
    flow_nlmk = rows_PP.reshape(nodes, local, nodes, local)
    # Across: what this rank has for every node, and what the ranks of its index have for its own node.
    sent_n = flow_nlmk[m, index].sum(axis=1)
    held_nk = flow_nlmk[:, index, m, :]
    # Inside the node: what local rank l now holds for this rank, from every node n.
    handed_ln = flow_nlmk[:, :, m, index].T

    def exchange(rows_NB: Tensor) -> Tensor:
        held = transport.all_to_all_v(rows_NB, sent_n.tolist(), held_nk.sum(axis=1).tolist(), group="across")
        handed = transport.all_to_all_v(
            _regroup(held, held_nk),
            held_nk.sum(axis=0).tolist(),
            handed_ln.sum(axis=1).tolist(),
            group="node",
        )
        return _regroup(handed, handed_ln)

    return exchange


def _hierarchical_back(transport: Transport, rows_PP: NDArray[np.int64]) -> Mover:
    local = node_size(transport.node_of_P)
    nodes = transport.size // local
    m, index = divmod(transport.rank, local)
    flow_nlmk = rows_PP.reshape(nodes, local, nodes, local)
    # Inside: what this rank has for the local ranks of every node, and what the local ranks of its own node
    # hand to it for every node's rank of its index.
    own_nk = flow_nlmk[m, index]
    handed_ln = flow_nlmk[m, :, :, index]
    # Across: what comes from the local ranks of every node for this rank.
    arrived_nl = flow_nlmk[:, :, m, index]

    def exchange(rows_NB: Tensor) -> Tensor:
        handed = transport.all_to_all_v(
            _regroup(rows_NB, own_nk),
            own_nk.sum(axis=0).tolist(),
            handed_ln.sum(axis=1).tolist(),
            group="node",
        )
        return transport.all_to_all_v(
            _regroup(handed, handed_ln),
            handed_ln.sum(axis=0).tolist(),
            arrived_nl.sum(axis=1).tolist(),
            group="across",
        )

    return exchange


def _regroup(rows_NB: Tensor, counts_ab: NDArray[np.int64]) -> Tensor:
    """Rows in blocks ordered (a, b), reordered to (b, a)."""
    sizes: Sequence[int] = counts_ab.ravel().tolist()
    blocks = torch.split(rows_NB, list(sizes))
    across = counts_ab.shape[1]
    return torch.cat([block for b in range(across) for block in blocks[b::across]])
