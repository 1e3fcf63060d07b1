"""What each all-to-all algorithm sends between which ranks, as arithmetic.

Shapes: P ranks; ``bytes_PP[i, j]`` is what rank i has for rank j.

Known here because both those who move bytes and those who predict how long it takes must agree on it:

* ``flat``: one exchange, every pair directly.
* ``hierarchical``: between nodes first, to the rank of the same local index on the destination's node; then
  inside the node. Each byte is sent twice, but a rank sends to one peer per node only.
* ``gather``: every rank gives its whole buffer to every other, which keeps what is its own.

A combine goes back the way its dispatch came, in reverse order: inside the node and then between nodes; a
reduce-scatter where there was an all-gather, in which every rank sends to every other a buffer as long as the
other's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from observatory.errors import ExchangeError

Number = TypeVar("Number", np.int64, np.float64)

Algorithm = Literal["flat", "hierarchical", "gather"]

#: All algorithms by name.
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)


def node_size(node_of_P: Sequence[int]) -> int:
    """Ranks per node, for algorithms that need every node alike.

    Raises:
        ExchangeError: ranks are not numbered node by node, or nodes hold different numbers of ranks.
    """
    ranks, nodes = len(node_of_P), len(set(node_of_P))
    each = ranks // nodes
    if list(node_of_P) != [node for node in dict.fromkeys(node_of_P) for _ in range(each)]:
        raise ExchangeError(
            f"ranks on nodes {list(node_of_P)[:16]} do not form equal blocks; "
            "the hierarchical algorithm needs as many ranks on each node, numbered node by node"
        )
    return each


def stages(
    bytes_PP: ArrayLike, node_of_P: Sequence[int], algorithm: str, *, role: str | None = None
) -> list[NDArray[np.int64]]:
    """The exchanges an algorithm makes of one traffic matrix, each again as a (P, P) matrix of bytes.

    Of several matrices (..., P, P) as well. ``role`` ``combine`` says that the matrix is the way back of a
    dispatch; anything else, that it is not.

    Raises:
        ExchangeError: the matrix is not (P, P), an unknown algorithm, or nodes it cannot work on.
    """
    matrix_PP = np.asarray(bytes_PP, dtype=np.int64)
    ranks = len(node_of_P)
    if matrix_PP.shape[-2:] != (ranks, ranks):
        raise ExchangeError(
            f"a matrix of shape {matrix_PP.shape} with {ranks} ranks", expected="one row each"
        )
    if role == "combine":
        way = stages(matrix_PP.swapaxes(-1, -2), node_of_P, algorithm)
        return [stage_PP.swapaxes(-1, -2) for stage_PP in reversed(way)]
    if algorithm == "flat":
        return [matrix_PP]
    if algorithm == "gather":
        return [np.repeat(matrix_PP.sum(axis=-1)[..., None], ranks, axis=-1)]
    if algorithm != "hierarchical":
        raise ExchangeError(f"algorithm {algorithm!r} is unknown", expected=f"one of {', '.join(ALGORITHMS)}")
    return list(relayed(matrix_PP, node_of_P))


def relayed(matrix_PP: NDArray[Number], node_of_P: Sequence[int]) -> tuple[NDArray[Number], NDArray[Number]]:
    """The two stages of the hierarchical way, between nodes and inside them, of one matrix or of several.

    Raises:
        ExchangeError: the nodes are not alike.
    """
    local = node_size(node_of_P)
    nodes = len(node_of_P) // local
    # From (node n, local l) to (node m, local k).
    flow_nlmk = matrix_PP.reshape(*matrix_PP.shape[:-2], nodes, local, nodes, local)
    across_nlmk = flow_nlmk.sum(axis=-1)[..., None] * np.eye(local, dtype=matrix_PP.dtype)[:, None, :]
    inside_mlk = flow_nlmk.sum(axis=-4).swapaxes(-3, -2)
    inside_nlmk = inside_mlk[..., None, :] * np.eye(nodes, dtype=matrix_PP.dtype)[:, None, :, None]
    return across_nlmk.reshape(matrix_PP.shape), inside_nlmk.reshape(matrix_PP.shape)
