"""Which option costs least: break-even points and the map of decisions, with how sure each is.

Shapes: N grid of (sizes, rows), B bootstrap samples, O options.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.route_fetch.costs import Constants, Cost, Sizes, StageCosts, cost
from observatory.analysis.statistics import Interval
from observatory.run.documents.route_fetch import Option, Shape, Stage

Float64 = NDArray[np.float64]

OPTIONS: tuple[Option, ...] = ("route", "fetch", "local")
#: A choice is certain where at least this share of samples makes it.
CERTAIN = 0.90
#: Stages that both sides of route and fetch have alike where one rank holds the chunk.
_COMMON: frozenset[Stage] = frozenset({"attend", "merge", "experts"})


def compared_options(
    constants: Constants, shape: Shape, *, is_prefill_known: bool = False
) -> tuple[Option, ...]:
    """Options whose costs are known well enough to be compared.

    Attention and experts cost the same on either side: without their constants route and fetch can still be
    compared. A prefill has no counterpart; an expert whose weights are here costs nothing beyond the expert.
    """
    chosen: list[Option] = []
    for option in OPTIONS:
        unknown = set(cost(constants, shape, option, Sizes(rows=1.0, size=1.0)).unknown)
        if is_prefill_known:
            unknown.discard("prefill")
        elif option == "local" and not shape.can_prefill:
            continue
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
    constants: Constants,
    shape: Shape,
    *,
    rows_R: Float64,
    size_C: Float64,
    layers: int,
    uses: float,
    options: tuple[Option, ...],
    prefill_us_C: Float64 | None = None,
) -> DecisionMap:
    """Cheapest option for every number of rows and every size of the chunk or expert.

    Args:
        constants: what is known.
        shape: what it is asked about.
        rows_R: query rows, or tokens.
        size_C: tokens of the chunk, or inner width.
        layers: layers of the cache.
        uses: steps that one fetch or prefill serves.
        options: what to compare.
        prefill_us_C: time of the prefill where it was measured apart from the constants; NaN where it was
            not.
    """
    sizes = Sizes(
        rows=rows_R[None, :], size=size_C[:, None], layers=layers, holders=constants.holders, uses=uses
    )
    costs = [cost(constants, shape, option, sizes) for option in options]
    if prefill_us_C is not None and "local" in options:
        stages: dict[Stage, StageCosts] = dict(constants.stages)
        stages.pop("prefill", None)
        rest = cost(replace(constants, stages=stages), shape, "local", sizes)
        costs[options.index("local")] = _with_prefill(rest, prefill_us_C[:, None])
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
        measured_CR=constants.is_measured(shape, sizes),
    )


def _with_prefill(local: Cost, prefill_us: Float64) -> Cost:
    """A cost whose prefill is known from elsewhere; infinite where it is not."""
    added_us = np.where(np.isfinite(prefill_us), prefill_us, np.inf)
    return Cost(us=local.us + added_us, samples=local.samples + added_us, unknown=())


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


def edit_costs(
    constants: Constants, shape: Shape, *, spans: Float64, suffixes: Float64, layers: int
) -> list[dict[str, float | bool]]:
    """What splicing and trimming a cache cost, and the 90 % interval of their ratio.

    Returns:
        Rows of ``span``, ``suffix``, ``splice_us``, ``trim_us``, ``ratio`` (trim over splice), ``ratio_low``,
        ``ratio_high``, and ``measured``: whether that was measured; empty where edits were not.
    """
    if not shape.can_prefill or "splice" not in constants.stages or "prefill" not in constants.stages:
        return []
    rows: list[dict[str, float | bool]] = []
    for span in spans.tolist():
        for suffix in suffixes.tolist():
            sizes = Sizes(rows=0, size=span, suffix=suffix, layers=layers)
            splice, trim = (cost(constants, shape, option, sizes) for option in ("splice", "trim"))
            low, high = np.quantile(trim.samples / np.maximum(splice.samples, 1e-9), [0.05, 0.95]).tolist()
            ratio = float(trim.us / max(float(splice.us), 1e-9))
            rows.append(
                {
                    "span": span,
                    "suffix": suffix,
                    "splice_us": float(splice.us),
                    "trim_us": float(trim.us),
                    "ratio": ratio,
                    "ratio_low": min(low, ratio),
                    "ratio_high": max(high, ratio),
                    "measured": constants.covers(shape, size=(span, suffix), layers=(layers,)),
                }
            )
    return rows


def _crossing(excess_2: Float64) -> float:
    """Rows at which the excess of routing over fetching, linear in rows, is zero."""
    at_0, at_end = excess_2
    if at_0 > 0:
        return 0.0
    slope = (at_end - at_0) / 1e6
    return float(abs(at_0) / slope) if slope > 0 else np.inf
