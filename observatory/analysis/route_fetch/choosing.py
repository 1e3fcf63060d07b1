"""Which option costs least: break-even points and the map of decisions, with how sure each is.

Shapes: N grid of (sizes, rows), B bootstrap samples, O options.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.route_fetch.costs import Constants, Cost, Sizes, cost
from observatory.analysis.statistics import Interval
from observatory.run.documents.route_fetch import Option, Shape, Stage

Float64 = NDArray[np.float64]

OPTIONS: tuple[Option, ...] = ("route", "fetch", "local")
#: A choice is certain where at least this share of samples makes it.
CERTAIN = 0.90
#: Stages that both sides of route and fetch have alike where one rank holds the chunk.
_COMMON: frozenset[Stage] = frozenset({"attend", "merge", "experts"})


def compared_options(constants: Constants, shape: Shape) -> tuple[Option, ...]:
    """Options whose costs are known well enough to be compared.

    Attention and experts cost the same on either side: without their constants route and fetch can still be
    compared. A prefill has no counterpart; an expert whose weights are here costs nothing beyond the expert.
    """
    chosen: list[Option] = []
    for option in OPTIONS:
        unknown = set(cost(constants, shape, option, Sizes(rows=1.0, size=1.0)).unknown)
        if unknown <= _COMMON and not (option == "local" and shape.kind == "expert"):
            chosen.append(option)
    return tuple(chosen)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecisionMap:
    """The best option over a grid.

    Attributes:
        options: what was compared.
        rows_R, size_C: the axes.
        us_OCR: cost of each option.
        best_CR: index of the cheapest.
        certainty_CR: share of samples in which it is the cheapest.
        measured_CR: whether the point lies where was measured.
    """

    options: tuple[Option, ...]
    rows_R: Float64
    size_C: Float64
    us_OCR: Float64
    best_CR: NDArray[np.int64]
    certainty_CR: Float64
    measured_CR: NDArray[np.bool_]


def decision_map(
    constants: Constants, shape: Shape, *, rows_R: Float64, size_C: Float64, layers: int, uses: float,
    options: tuple[Option, ...],
) -> DecisionMap:  # fmt: skip
    """Cheapest option for every number of rows and every size of the chunk or expert."""
    sizes = Sizes(
        rows=rows_R[None, :], size=size_C[:, None], layers=layers, holders=constants.holders, uses=uses
    )
    costs = [cost(constants, shape, option, sizes) for option in options]
    us_OCR = np.stack([item.us for item in costs])
    samples_OBCR = np.stack(
        [np.broadcast_to(item.samples, (_draws(costs), *us_OCR.shape[1:])) for item in costs]
    )
    best_CR = us_OCR.argmin(axis=0)
    agree_BCR = samples_OBCR.argmin(axis=0) == best_CR
    return DecisionMap(
        options=options,
        rows_R=rows_R,
        size_C=size_C,
        us_OCR=us_OCR,
        best_CR=best_CR,
        certainty_CR=agree_BCR.mean(axis=0),
        measured_CR=constants.is_measured(sizes),
    )


def _draws(costs: list[Cost]) -> int:
    return max(len(item.samples) for item in costs)


def break_even_rows(
    constants: Constants, shape: Shape, *, size: float, layers: int = 1, uses: float = 1.0
) -> Interval | None:
    """Rows from which on fetching costs less than routing, with its 90 % interval.

    Returns:
        0 where fetching is cheaper for any number of rows; None where routing is. The upper end is None where
        that is so for a twentieth of the samples.
    """
    sizes = Sizes(rows=np.array([0.0, 1e6]), size=size, layers=layers, holders=constants.holders, uses=uses)
    route, fetch = (cost(constants, shape, option, sizes) for option in ("route", "fetch"))
    rows = _crossing(route.us - fetch.us)
    if not np.isfinite(rows):
        return None
    samples_B2 = route.samples - fetch.samples
    crossing_B = np.array([_crossing(pair) for pair in samples_B2])
    low, high = np.quantile(crossing_B, [0.05, 0.95], method="nearest").tolist()
    return Interval(
        value=float(rows),
        low=min(low, float(rows)),
        high=max(high, float(rows)) if np.isfinite(high) else None,
    )


def _crossing(excess_2: Float64) -> float:
    """Rows at which the excess of routing over fetching, linear in rows, is zero."""
    at_0, at_end = excess_2
    if at_0 > 0:
        return 0.0
    slope = (at_end - at_0) / 1e6
    return float(-at_0 / slope) if slope > 0 else np.inf
