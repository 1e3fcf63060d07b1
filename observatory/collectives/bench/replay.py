"""Replays captured traffic and mock traffic of equal volume in turns.

Shapes: P ranks.

For every captured matrix, both ways (the combine is the transpose of the dispatch), the same volume is also
sent evenly, as random tokens would. Both stand next to each other in every round of the protocol in
`observatory.collectives.bench.measure`, each first in every second step, of dispatches and of combines alike:
whatever it costs to be the first of a pair then falls on both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from observatory.errors import BenchmarkError
from observatory.run.documents.bench import BenchPlan, Traffic


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
    """Captured dispatches, in order, each paired with uniform traffic of the same volume.

    Raises:
        BenchmarkError: there is nothing to replay.
    """
    pairs = [
        # Counted over dispatches and roles: over the list alone, two roles would make every dispatch go
        # first and every combine second.
        (both, _uniform(both)) if (index + turn) % 2 == 0 else (_uniform(both), both)
        for index, dispatch in enumerate(captured)
        for turn, both in enumerate(_turned(dispatch, role) for role in roles)
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
        traffic=tuple(traffic for pair in pairs for traffic in pair),
        run_id=run_id,
        notes=tuple(notes),
    )


def uniform_like(rows_PP: NDArray[np.int64]) -> NDArray[np.int64]:
    """As many rows in all, equally many between every two ranks.

    The remainder goes to the pairs (i, i + 1), then (i, i + 2), ..., at last (i, i): ranks then differ by at
    most one row in what they send and in what they receive, also where there are fewer rows than pairs.
    """
    ranks = len(rows_PP)
    each, rest = divmod(int(rows_PP.sum()), rows_PP.size)
    even_PP = np.full(rows_PP.shape, each, dtype=np.int64)
    step_N, source_N = np.divmod(np.arange(rest), ranks)
    even_PP[source_N, (source_N + step_N + 1) % ranks] += 1
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
