"""Results of a campaign next to each other: the repeats of each set-up taken together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from observatory.analysis.columns import Column, Table
from observatory.analysis.reduction.metrics import ReducedRow
from observatory.analysis.statistics import student_interval
from observatory.campaign.batch.campaign_file import Point

#: Values of a row that are averaged over repeats.
_METRICS = ("ms", "gini", "rank_max_over_mean", "exchange_ms", "exchange_share", "mj_per_token")

COLUMNS = (
    Column(name="model", title="model", text=True, key=True),
    Column(name="data", title="data", text=True, key=True),
    Column(name="ep", title="EP", key=True),
    Column(name="phase", title="phase", text=True, key=True),
    Column(name="clock_mhz", title="clock", unit="MHz", otherwise="", wide=True),
    Column(name="repeats", title="runs"),
    Column(name="ms", title="step", unit="ms", interval=("ms_low", "ms_high")),
    Column(name="gini", title="Gini", digits=3, legend="of experts, mean over layers"),
    Column(name="rank_max_over_mean", title="busiest rank", digits=2, legend="its load over the mean"),
    Column(name="exchange_share", title="exchanges", unit="%", legend="share of the time of a step"),
    Column(name="exchange_ms", title="exchanges", unit="ms", wide=True),
    Column(name="mj_per_token", title="mJ/token"),
)


def condition_rows(
    points: Sequence[Point], rows_of: Mapping[str, Sequence[ReducedRow]]
) -> list[dict[str, Any]]:
    """A row for each set-up and phase, in the order of the points.

    Args:
        points: points of the campaign; those without rows are left out.
        rows_of: the reduced rows of each point, by its name.

    Returns:
        Means over repeats; with three or more, ``ms_low`` and ``ms_high`` are the ends of a 90 % interval by
        Student's t, for how much repeats differ.
    """
    groups: dict[tuple[Any, ...], list[ReducedRow]] = {}
    for point in points:
        for row in rows_of.get(point.name, ()):
            if row.phase is not None:
                what: tuple[str | int | None, ...] = (point.model, point.data, point.ranks)
                if point.kind == "command":  # what it ran is what its run states
                    what = (row.model, row.data or point.about, row.ep)
                groups.setdefault((*what, row.phase, point.clock_mhz), []).append(row)
    return [
        {
            **dict(zip(("model", "data", "ep", "phase", "clock_mhz"), key, strict=True)),
            "repeats": len(rows),
            **_averages(rows),
        }
        for key, rows in groups.items()
    ]


def condition_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows of `condition_rows`; columns without a value are left to programs."""
    shown = tuple(column for column in COLUMNS if any(row[column.name] is not None for row in rows))
    return Table(name="conditions", columns=shown or COLUMNS, rows=rows)


def _averages(rows: Sequence[ReducedRow]) -> dict[str, float | None]:
    averages: dict[str, float | None] = {}
    for name in _METRICS:
        values = [value for row in rows if (value := getattr(row, name)) is not None]
        averages[name] = float(np.mean(values)) if values else None
        if name == "ms":
            freedom = len(values) - 1
            error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if freedom > 1 else None
            interval = student_interval(averages[name] or 0.0, error, freedom)
            averages |= {"ms_low": interval.low, "ms_high": interval.high}
    return averages
