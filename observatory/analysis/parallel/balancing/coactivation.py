"""Experts that tokens choose together go to one node, so that a token is sent to fewer nodes.

Shapes: T tokens, K experts of a token, E experts, M nodes.

A token that has several experts on a node is sent there once. Experts of two nodes are exchanged while that
lowers the nodes per token and leaves the nodes about as loaded as they were. Whether there is anything to
gain is tested first, on tokens that were not used to choose: on the layout that was found, they have to
touch fewer nodes than tokens whose experts were dealt anew, as often as they were chosen but independently
of each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from observatory.analysis.parallel.balancing.layouts import Float64, Int64, greedy_layout

#: Load of a node over the mean that exchanges may lead to.
_SLACK = 1.05
_ROUNDS, _DEALS = 400, 50
#: Of more tokens than this some are left out, evenly.
_MOST_TOKENS = 8192
#: There is structure where held-out tokens touch at least this part fewer nodes than independent ones, and
#: where the difference is this many standard errors.
_LEAST_SHARE, _STANDARD_ERRORS = 0.01, 3.0
#: Starts of the search, the first from a balanced layout.
_STARTS = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Structure:
    """What tokens say about experts that are chosen together.

    Attributes:
        node_E: node of each expert, chosen on all tokens.
        touched: nodes per held-out token, on a layout that was chosen on the others.
        independent: the same of tokens whose experts are independent of each other.
        today: of the same tokens on today's layout; None: there is none.
        is_there: whether the difference is more than chance and worth something.
    """

    node_E: Int64
    touched: float
    independent: float
    today: float | None
    is_there: bool


def structure(
    token_TK: Int64,
    step_T: Int64,
    load_E: Float64,
    nodes: int,
    *,
    today_PK: Int64 | None = None,
    seed: int = 0,
) -> Structure:
    """Choose nodes for experts and test whether tokens have a structure that pays.

    Args:
        token_TK: experts of sampled tokens, distinct in each.
        step_T: step of each token; the earlier half is chosen on, the later one judges.
        load_E: expected loads.
        nodes: M, which divides E.
        today_PK: today's layout; None: there is none.
        seed: of the search and of the independent tokens.
    """
    token_TK = token_TK[np.argsort(step_T, kind="stable")]
    token_TK = token_TK[:: -(-len(token_TK) // _MOST_TOKENS)]
    first_TK, second_TK = token_TK[: len(token_TK) // 2], token_TK[len(token_TK) // 2 :]
    generator = np.random.default_rng(seed)
    tried_E = _assigned(first_TK, load_E, nodes, generator)
    touched_T = nodes_touched(second_TK, tried_E, nodes)
    independent_T = nodes_touched(_independent(second_TK, generator), tried_E, nodes)
    less = float(independent_T.mean() - touched_T.mean())
    error = float(np.sqrt((touched_T.var() + independent_T.var()) / max(len(touched_T), 1)))
    return Structure(
        node_E=_assigned(token_TK, load_E, nodes, generator),
        touched=float(touched_T.mean()),
        independent=float(independent_T.mean()),
        today=None if today_PK is None else nodes_per_token(second_TK, today_PK, len(load_E), nodes),
        is_there=less > max(_LEAST_SHARE * float(independent_T.mean()), _STANDARD_ERRORS * error),
    )


def nodes_per_token(token_TK: Int64, slot_PK: Int64, experts: int, nodes: int) -> float:
    """Nodes that a token is sent to on a layout, mean; copies of an expert are chosen by chance."""
    return float(nodes_of_tokens(token_TK, slot_PK, experts, nodes).mean())


def nodes_of_tokens(token_TK: Int64, slot_PK: Int64, experts: int, nodes: int) -> Float64:
    """Nodes that each token is sent to on a layout, (T,): expected, where copies are chosen by chance."""
    node_N = np.repeat(np.arange(nodes), slot_PK.size // nodes)
    share_ME = np.zeros((nodes, experts))
    np.add.at(share_ME, (node_N, slot_PK.ravel()), 1.0)
    share_ME /= np.maximum(share_ME.sum(axis=0), 1)
    touched_T = np.zeros(len(token_TK))
    for share_E in share_ME:
        missed_T = np.ones(len(token_TK))
        for expert_T in token_TK.T:
            missed_T *= 1 - share_E[expert_T]
        touched_T += 1 - missed_T
    return touched_T


def exchanged(token_TK: Int64, slot_PK: Int64, load_E: Float64, nodes: int, most_moves: int) -> Int64:
    """The layout after at most so many moves that let tokens touch fewer nodes, (P, K); without replicas."""
    token_TK = token_TK[:: -(-len(token_TK) // _MOST_TOKENS)]
    place_E = np.argsort(slot_PK.ravel())
    node_E = place_E // (slot_PK.size // nodes)
    load_E = load_E * nodes / max(float(load_E.sum()), 1e-300)
    for one, two in _exchange(token_TK, node_E, load_E, nodes, most_moves // 2):
        place_E[[one, two]] = place_E[[two, one]]
    slot_N = np.empty_like(place_E)
    slot_N[place_E] = np.arange(len(place_E))
    return slot_N.reshape(slot_PK.shape)


def nodes_touched(token_TK: Int64, node_E: Int64, nodes: int) -> Int64:
    """Nodes, or other places of experts such as ranks, that each token is sent to, (T,)."""
    return np.asarray((_counts(token_TK, node_E, nodes) > 0).sum(axis=1))


def _counts(token_TK: Int64, node_E: Int64, nodes: int) -> Int64:
    """Experts of each token on each node, (T, M)."""
    flat = node_E[token_TK] + nodes * np.arange(len(token_TK))[:, None]
    return np.bincount(flat.ravel(), minlength=len(token_TK) * nodes).reshape(-1, nodes)


def _independent(token_TK: Int64, generator: np.random.Generator) -> Int64:
    """Experts dealt to tokens anew, each as often as before and none twice to a token."""
    columns = token_TK.shape[1]
    dealt_TK: Int64 = generator.permutation(token_TK.ravel()).reshape(-1, columns)
    for _ in range(_DEALS):
        order_TK: Int64 = np.argsort(dealt_TK, axis=1, kind="stable")
        sorted_TK = np.take_along_axis(dealt_TK, order_TK, axis=1)
        is_twice = sorted_TK[:, 1:] == sorted_TK[:, :-1]
        row_N = np.repeat(np.arange(len(is_twice)), is_twice.sum(axis=1))
        if not len(row_N):
            break
        column_N = order_TK[:, 1:][is_twice]
        other_N = generator.choice(dealt_TK.size, size=len(row_N), replace=False)
        flat = dealt_TK.reshape(-1)
        for one, two in zip((row_N * columns + column_N).tolist(), other_N.tolist(), strict=True):
            flat[one], flat[two] = flat[two], flat[one]
    return dealt_TK


def _assigned(token_TK: Int64, load_E: Float64, nodes: int, generator: np.random.Generator) -> Int64:
    """Node of each expert: the best of several starts."""
    best_E, best = np.zeros(len(load_E), dtype=np.int64), (True, np.inf)
    load_E = load_E * nodes / max(float(load_E.sum()), 1e-300)
    for start in range(_STARTS):
        node_E = np.empty(len(load_E), dtype=np.int64)
        node_E[greedy_layout(load_E[None], nodes, 0)[0]] = np.arange(nodes)[:, None]
        if start:
            node_E = node_E[generator.permutation(len(node_E))]
        _exchange(token_TK, node_E, load_E, nodes)
        is_uneven = np.bincount(node_E, load_E).max() > _SLACK
        touched = bool(is_uneven), float(nodes_touched(token_TK, node_E, nodes).mean())
        if touched < best:
            best_E, best = node_E, touched
    return best_E


def _exchange(
    token_TK: Int64, node_E: Int64, load_E: Float64, nodes: int, rounds: int = _ROUNDS
) -> list[tuple[int, int]]:
    """Exchange experts of two nodes while tokens touch fewer nodes, in place; the pairs, in their order."""
    pairs: list[tuple[int, int]] = []
    experts = len(node_E)
    chosen_TE = np.zeros((len(token_TK), experts), dtype=np.float32)
    chosen_TE[np.arange(len(token_TK))[:, None], token_TK] = 1.0
    load_M = np.asarray(load_E @ np.eye(nodes)[node_E])
    for _ in range(min(rounds, _ROUNDS)):
        count_TM = chosen_TE @ np.eye(nodes, dtype=np.float32)[node_E]
        alone_TE = chosen_TE * (count_TM == 1)[:, node_E]
        new_EM = chosen_TE.T @ (count_TM == 0).astype(np.float32)
        both_EE = alone_TE.T @ chosen_TE  # tokens with both, of which the first is alone on its node
        change_EE = new_EM[:, node_E] - alone_TE.sum(axis=0)[:, None] + both_EE
        change_EE = change_EE + change_EE.T
        more_EE = load_E[None, :] - load_E[:, None]
        after_EE = np.maximum(load_M[node_E][:, None] + more_EE, load_M[node_E][None, :] - more_EE)
        before_EE = np.maximum(load_M[node_E][:, None], load_M[node_E][None, :])
        refused = (node_E[:, None] == node_E[None, :]) | ((after_EE > _SLACK) & (after_EE >= before_EE))
        change_EE[refused] = np.inf
        one, two = np.unravel_index(change_EE.argmin(), change_EE.shape)
        if change_EE[one, two] >= 0:
            break
        more = float(load_E[two] - load_E[one])
        load_M[node_E[one]] += more
        load_M[node_E[two]] -= more
        node_E[one], node_E[two] = node_E[two], node_E[one]
        pairs.append((int(one), int(two)))
    return pairs
