"""Which points a benchmark of routes and fetches measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from observatory.run.documents.route_fetch import ELEMENT_BYTES, Point, RouteFetchPlan, Shape

#: Root of x^3 = x + 1.
_PLASTIC = 1.324717957244746
_SIZES = ("layers", "size", "rows")

_SCORE_BYTES = ELEMENT_BYTES["float32"]


def least_bytes(plan: RouteFetchPlan, ranks: int) -> int:
    """Bytes of host memory that all ranks of a plan take together at least.

    Every rank keeps queries and the cache, before and after it is moved, of all shapes; scores are those of
    the largest point, which are there once, as the holders share them.
    """
    kept, scores = 0, 0
    for shape, points in zip(plan.shapes, plan.points, strict=True):
        layers, size, rows = (max(getattr(point, name) for point in points) for name in _SIZES)
        if shape.kind == "expert":
            kept += (3 * size + rows) * shape.key * shape.element_bytes
            width = shape.element_bytes
        else:
            kept += layers * (2 * size * shape.entry_bytes + rows * shape.key * shape.element_bytes)
            width = _SCORE_BYTES
        attended = (point.rows * min(point.size, shape.selected or point.size) for point in points)
        scores = max(scores, width * max(attended))
    return ranks * kept + (scores if plan.device == "cpu" else 0)


def route_fetch_plan(
    shapes: Sequence[Shape],
    *,
    points: int = 64,
    rows: tuple[int, int],
    sizes: tuple[int, int],
    layers: Sequence[int],
    edits: int = 0,
    warmup: int,
    repeats: int,
    seed: int = 0,
    device: Literal["cpu", "cuda"] = "cpu",
) -> RouteFetchPlan:
    """Points that fill a logarithmic rectangle evenly, for each shape.

    Args:
        shapes: what to measure.
        points: of each shape.
        rows: fewest and most query rows, or tokens of an expert; rounded to whole tokens.
        sizes: fewest and most tokens of a chunk, or inner width of an expert.
        layers: numbers of layers, dealt out in turns; experts have one.
        edits: points at which caches of shapes that can prefill are edited, with spans and suffixes of
            ``sizes``.
        warmup: rounds that are not kept.
        repeats: rounds that are kept.
        seed: of points and data.
        device: torch device that computes.
    """
    offset_2 = np.random.default_rng(seed).random(2)
    # Additive recurrence with the plastic number: evenly spread in every prefix.
    index_N1 = np.arange(1, max(points, edits) + 1)[:, None]
    place_N2 = ((offset_2 + index_N1 / _PLASTIC ** np.array([1, 2])) % 1.0).tolist()

    def at(share: float, ends: tuple[int, int]) -> int:
        return round(float(ends[0] * (ends[1] / ends[0]) ** share))

    return RouteFetchPlan(
        shapes=tuple(shapes),
        points=tuple(
            tuple(
                Point(
                    rows=max(1, round(at(row, rows) / shape.heads)) * shape.heads,
                    size=at(size, sizes),
                    layers=1 if shape.kind == "expert" else layers[index % len(layers)],
                )
                for index, (row, size) in enumerate(place_N2[:points])
            )
            for shape in shapes
        ),
        edits=tuple(
            tuple(
                Point(
                    rows=0, size=at(span, sizes), suffix=at(suffix, sizes), layers=layers[index % len(layers)]
                )
                for index, (suffix, span) in enumerate(place_N2[:edits])
                if shape.can_prefill
            )
            for shape in shapes
        ),
        warmup=warmup,
        repeats=repeats,
        seed=seed,
        device=device,
    )
