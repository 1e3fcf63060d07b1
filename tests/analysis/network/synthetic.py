"""Benchmark results whose truth is known, because a formula made them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from observatory.collectives.bench.patterns import PATTERNS, pattern_rows
from observatory.run.documents.bench import BenchCase, BenchResult


def made_result(
    truth_us: Callable[[NDArray[np.int64], tuple[int, ...]], float],
    node_of_P: Sequence[int],
    *,
    patterns: Sequence[str] = tuple(PATTERNS),
    sizes_bytes: Sequence[int] = (1 << 10, 1 << 14, 1 << 18, 1 << 22),
    seeds: int = 2,
    noise: float = 0.0,
    repeats: int = 5,
    algorithm: str = "flat",
    correct: bool = True,
) -> BenchResult:
    """Times of patterns by a formula; ``noise`` is the relative deviation of single repeats."""
    generator = np.random.default_rng(0)
    ranks = len(node_of_P)
    cases = {}
    for pattern in patterns:
        for size in sizes_bytes:
            for seed in range(seeds):
                bytes_PP = 16 * pattern_rows(pattern, ranks=ranks, rows_per_rank=size // 16, seed=seed)
                us = truth_us(bytes_PP, tuple(node_of_P))
                us_RP = us * np.exp(noise * generator.standard_normal((repeats, 1))) * np.ones(ranks)
                matrix = tuple(map(tuple, bytes_PP.tolist()))
                cases[matrix] = BenchCase(
                    pattern=pattern,
                    seed=seed,
                    send_bytes_PP=matrix,
                    row_bytes=16,
                    algorithm=algorithm,
                    rank_us_RP=tuple(map(tuple, us_RP.tolist())),
                    correct=correct,
                )
    return BenchResult(
        kind="alltoall",
        created_unix_s=0.0,
        backend="made-up",
        node_of_P=tuple(node_of_P),
        warmup=0,
        repeats=repeats,
        iterations=1,
        cases=tuple(cases.values()),
    )
