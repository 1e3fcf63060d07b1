"""How long the steps of a run take: one row per phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

STEP_COLUMNS = (
    "phase", "steps", "tokens", "ms", "ms_p10", "ms_p90", "tokens_per_s", "exchange_ms", "wait_ms", "run",
)  # fmt: skip
_METRICS = ("ms", "tokens_per_s", "exchange_ms", "wait_ms")


def step_summary(steps: pd.DataFrame, timed: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Times of steps by phase.

    Args:
        steps: what ``observatory.analysis.step_times.step_times`` returns.
        timed: what ``observatory.analysis.compare.collect.timing_rows`` returns, of the same run.

    Returns:
        ``phase``, ``steps`` (timed ones), ``tokens`` (mean of a step, all ranks), ``ms`` (mean without the
        fastest and the slowest tenth), ``ms_p10``, ``ms_p90``, ``tokens_per_s``, ``exchange_ms`` and
        ``wait_ms`` (of a step, mean over ranks); NaN for what the run does not hold.
    """
    values = {(row["phase"], row["metric"]): row["value"] for row in timed}
    rows = [
        {
            "phase": phase,
            "steps": len(of_phase),
            "tokens": of_phase["tokens"].mean(),
            "ms_p10": of_phase["ms"].quantile(0.1),
            "ms_p90": of_phase["ms"].quantile(0.9),
            **{metric: values.get((phase, metric), float("nan")) for metric in _METRICS},
        }
        for phase, of_phase in steps.groupby("phase", sort=False)
    ]
    return pd.DataFrame(rows, columns=list(STEP_COLUMNS[:-1]))
