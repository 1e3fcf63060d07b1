"""Replays captured traffic beside mock traffic of equal volume.

Shapes: P ranks.

For every captured matrix, both ways (the combine is the transpose of the dispatch), the same volume is also
sent evenly, as random tokens would. Both stand next to each other in every round of the protocol in
`collectives.bench`, each first in half of the pairs, so that a machine that slows down slows both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from observatory.errors import BenchmarkError
from observatory.records_bench import BenchPlan, Traffic

__all__ = ["replay_plan", "uniform_like"]


def replay_plan(
    captured: Iterable[Traffic],
    *,
    algorithms: Sequence[str],
    roles: Sequence[Literal["dispatch", "combine"]] = ("dispatch", "combine"),
    warmup: int = 1,
    repeats: int = 9,
    iterations: int = 1,
    run_id: str | None = None,
    notes: Sequence[str] = (),
) -> BenchPlan:
    """Captured dispatches, in order, each beside its uniform companion.

    Raises:
        BenchmarkError: there is nothing to replay.
    """
    pairs = [
        (both, _uniform(both))
        for dispatch in captured
        for both in (_turned(dispatch, role) for role in roles)
    ]
    if not pairs:
        raise BenchmarkError(
            "the run has no routing rows of the phase and layers asked for: nothing to replay"
        )
    return BenchPlan(
        kind="replay",
        algorithms=tuple(dict.fromkeys(algorithms)),
        warmup=warmup,
        repeats=repeats,
        iterations=iterations,
        traffic=tuple(
            traffic
            for index, pair in enumerate(pairs)
            for traffic in (pair if index % 2 == 0 else reversed(pair))
        ),
        run_id=run_id,
        notes=tuple(notes),
    )


def uniform_like(rows_PP: NDArray[np.int64]) -> NDArray[np.int64]:
    """As many rows in all, equally many between every two ranks; the remainder goes to the first pairs."""
    each, rest = divmod(int(rows_PP.sum()), rows_PP.size)
    even_PP = np.full(rows_PP.shape, each, dtype=np.int64)
    even_PP.flat[:rest] += 1
    return even_PP


def _turned(dispatch: Traffic, role: Literal["dispatch", "combine"]) -> Traffic:
    if role == "dispatch":
        return dispatch.model_copy(update={"role": role})
    return dispatch.model_copy(update={"role": role, "send_bytes_PP": _matrix(dispatch.bytes_PP.T)})


def _uniform(captured: Traffic) -> Traffic:
    even_PP = uniform_like(captured.bytes_PP // captured.row_bytes) * captured.row_bytes
    return captured.model_copy(update={"pattern": "uniform", "send_bytes_PP": _matrix(even_PP)})


def _matrix(bytes_PP: NDArray[np.int64]) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, bytes_PP.tolist()))
