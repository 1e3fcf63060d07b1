"""Exchange tables made by hand: times in microseconds, one collective per call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from observatory.run.manifest import ClockSpec

SHARED = ClockSpec(offset_ns=0, uncertainty_ns=0, method="shared clock")


def shared(ranks: int) -> dict[int, ClockSpec | None]:
    """All ranks on one clock."""
    return dict.fromkeys(range(ranks), SHARED)


def collective(
    start_us: Sequence[int],
    end_us: Sequence[int | None],
    send: Sequence[Sequence[int]],
    **common: Any,
) -> pd.DataFrame:
    """Rows of one collective; ``send[i][j]`` bytes from rank i to rank j."""
    ranks = len(start_us)
    return pd.DataFrame(
        {
            "step": 0,
            "phase": "prefill",
            "layer": 0,
            "source_rank": range(ranks),
            "role": "dispatch",
            "group": "world",
            "sequence": 0,
            "algorithm": "flat",
            "backend": "nccl",
            "start_ns": [start * 1000 for start in start_us],
            "end_ns": pd.array([None if end is None else end * 1000 for end in end_us], "Int64"),
            "send_bytes": [list(row) for row in send],
            "receive_bytes": [[send[i][j] for i in range(ranks)] for j in range(ranks)],
            **common,
        }
    )


def spans(rows: Sequence[tuple[int, str, int, int]], *, step: int = 0, layer: int = 0) -> pd.DataFrame:
    """Spans from (rank, name, start in us, end in us)."""
    return pd.DataFrame(
        {
            "step": step,
            "phase": "prefill",
            "layer": layer,
            "source_rank": [row[0] for row in rows],
            "name": [row[1] for row in rows],
            "start_ns": [row[2] * 1000 for row in rows],
            "end_ns": [row[3] * 1000 for row in rows],
        }
    )
