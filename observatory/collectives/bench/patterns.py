"""Synthetic traffic matrices for benchmarks.

Shapes: P ranks. ``rows_PP[i, j]`` is the number of rows from rank i to rank j.

All patterns but ``empty`` move the same volume, P buffers of a given size in whole, so that their times can
be compared; they differ in who sends how much to whom:

* ``uniform``: equal splits, what mock tokens and nccl-tests do.
* ``skewed``: receivers get 1, 1/2, 1/3, ... (Zipf), in an order drawn by seed: a standing committee of
experts.
* ``routed``: what a gate makes of text: receivers by popularity (gamma, 35 % scatter), every split around it
(gamma, 25 %), both drawn by seed.
* ``hot``: one receiver, drawn by seed, gets half of everything.
* ``random``: every entry drawn on its own (exponential), all pairs different.
* ``sparse``: every rank sends to about half of the ranks, drawn by seed; the other splits are empty.
* ``one-sided``: one sender, drawn by seed, has everything; the others only receive.
* ``neighbour``: every rank sends all to the next: one message per rank.
* ``local``: every rank keeps all: what the exchange costs when nothing leaves.
* ``empty``: nothing at all: the probe latency.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from observatory.errors import BenchmarkError

Weights = NDArray[np.float64]


def pattern_rows(pattern: str, *, ranks: int, rows_per_rank: int, seed: int = 0) -> NDArray[np.int64]:
    """Rows of one pattern, (P, P), adding up to P times ``rows_per_rank`` (``empty``: nothing).

    Raises:
        BenchmarkError: no such pattern.
    """
    if pattern not in PATTERNS:
        raise BenchmarkError(f"pattern {pattern!r} is unknown; expected one of {', '.join(PATTERNS)}")
    weight_PP = PATTERNS[pattern](ranks, np.random.default_rng(seed))
    total = ranks * rows_per_rank
    if not np.any(weight_PP):
        return np.zeros((ranks, ranks), dtype=np.int64)
    share_PP = weight_PP / weight_PP.sum() * total
    rows_PP: NDArray[np.int64] = np.floor(share_PP).astype(np.int64)
    remainder = np.where(weight_PP > 0, share_PP - rows_PP, -1.0).ravel()
    rows_PP.flat[np.argsort(-remainder, kind="stable")[: total - int(rows_PP.sum())]] += 1
    return rows_PP


def _uniform(ranks: int, _: np.random.Generator) -> Weights:
    return np.ones((ranks, ranks))


def _skewed(ranks: int, generator: np.random.Generator) -> Weights:
    return np.tile(generator.permutation(1.0 / np.arange(1, ranks + 1)), (ranks, 1))


def _routed(ranks: int, generator: np.random.Generator) -> Weights:
    popularity_P = generator.gamma(8.0, size=ranks)
    return popularity_P * generator.gamma(16.0, size=(ranks, ranks))


def _hot(ranks: int, generator: np.random.Generator) -> Weights:
    weight_PP = np.ones((ranks, ranks))
    weight_PP[:, generator.integers(ranks)] = max(1, ranks - 1)
    return weight_PP


def _random(ranks: int, generator: np.random.Generator) -> Weights:
    return generator.exponential(size=(ranks, ranks))


def _sparse(ranks: int, generator: np.random.Generator) -> Weights:
    weight_PP = (generator.random((ranks, ranks)) < 0.5).astype(np.float64)
    weight_PP[np.arange(ranks), generator.integers(ranks, size=ranks)] = 1.0  # every rank sends something
    return weight_PP


def _one_sided(ranks: int, generator: np.random.Generator) -> Weights:
    weight_PP = np.zeros((ranks, ranks))
    weight_PP[generator.integers(ranks)] = 1.0
    return weight_PP


def _neighbour(ranks: int, _: np.random.Generator) -> Weights:
    return np.roll(np.eye(ranks), 1, axis=1)


def _local(ranks: int, _: np.random.Generator) -> Weights:
    return np.eye(ranks)


def _empty(ranks: int, _: np.random.Generator) -> Weights:
    return np.zeros((ranks, ranks))


#: Weights of every pattern by name.
PATTERNS: dict[str, Callable[[int, np.random.Generator], Weights]] = {
    "uniform": _uniform,
    "skewed": _skewed,
    "routed": _routed,
    "hot": _hot,
    "random": _random,
    "sparse": _sparse,
    "one-sided": _one_sided,
    "neighbour": _neighbour,
    "local": _local,
    "empty": _empty,
}
