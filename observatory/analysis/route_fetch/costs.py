"""Closed forms of what routing, fetching and having data here costs.

    route   uses x (trips, rows there, partial results back + attention at the holders + merge)
    fetch   a trip, entries of all layers here + turn to their positions + uses x (attention here + merge)
    local   prefill of the chunk + uses x (attention here + merge)
    splice  a new span's entries and the suffix, turned and moved;  trim  prefill of both behind the prefix

    of experts:
    route   uses x (a trip, tokens there and back + expert at the holder)
    fetch   a trip, weights here + uses x expert here
    local   uses x expert here

The forms are those of arXiv 2606.01502, with what both sides compute added, and are written out in
docs/route-fetch.md. A cost is a sum over stages of coefficient times quantity; a quantity (trips, bytes,
operations) follows from the shape and the sizes, and a coefficient from measurements or publications.

Shapes: N points (any shape of arrays), B bootstrap samples, F terms of a stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from observatory.run.documents.route_fetch import (
    INDEX_BYTES,
    PREFIX_TOKENS,
    STATISTICS_BYTES,
    Option,
    Shape,
    Stage,
)

Float64 = NDArray[np.float64]
Grade = Literal["fitted", "published"]

#: What the time of each stage is proportional to. A trip is a request with its answer.
TERMS: dict[Stage, tuple[str, ...]] = {
    "transfer": ("trip", "byte_out", "byte_back"),
    "gather": ("call", "byte"),
    "attend": ("call", "operation", "byte"),
    "merge": ("call", "byte"),
    "rotate": ("query_call", "query_byte", "entry_call", "entry_byte"),
    "experts": ("call", "operation", "byte"),
    "prefill": ("layer", "operation", "score"),
    "splice": ("layer", "byte"),
}
#: Matrices of a gated expert, and operations for each value of a matrix and token.
MATRICES, _OPERATIONS = 3, 2

#: Measured points do not lie on the edges of what they fill: within this factor of them counts as measured.
NEAR = 1.25

Quantities = dict[Stage, dict[str, Float64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Where costs are asked for; arrays broadcast against each other.

    Attributes:
        rows: query rows of all heads, or tokens of an expert.
        size: tokens of the chunk, or inner width of an expert.
        layers: layers with a cache of their own.
        holders: ranks that hold a part of the chunk each.
        uses: steps that one fetch or prefill serves.
        suffix: tokens behind an edited span.
    """

    rows: ArrayLike
    size: ArrayLike
    layers: ArrayLike = 1
    holders: int = 1
    uses: float = 1.0
    suffix: ArrayLike = 0


def quantities(shape: Shape, option: Option, sizes: Sizes) -> Quantities:
    """Trips, bytes, operations and calls of an option, by stage and term."""
    rows, size, layers, suffix = (
        np.asarray(value, dtype=np.float64) for value in (sizes.rows, sizes.size, sizes.layers, sizes.suffix)
    )
    if option in ("splice", "trim"):
        moved = np.ceil(size / 2) + suffix
        if option == "trim":
            return {"prefill": prefill_quantities(shape, new=moved, before=PREFIX_TOKENS, layers=layers)}
        return {"splice": {"layer": layers + 0.0 * moved, "byte": layers * moved * shape.entry_bytes}}
    if shape.kind == "expert":
        return _expert(shape, option, rows, size, sizes.uses)
    element, uses = shape.element_bytes, sizes.uses
    holders = 1 if option == "local" else sizes.holders
    entries = size if shape.selected is None else np.minimum(size, shape.selected)
    index_bytes = 0.0 if shape.selected is None else INDEX_BYTES * entries
    calls = layers * uses
    parts: Quantities = {
        "attend": {
            "call": calls * (1 if option == "route" else holders),
            "operation": calls * _OPERATIONS * rows * entries * (shape.key + shape.value),
            "byte": calls * entries * shape.entry_bytes,
        },
        "merge": {"call": calls, "byte": calls * rows * shape.value * element * (holders + 1)},
    }
    if option == "route":
        for term in ("operation", "byte"):  # the holders work at the same time
            parts["attend"][term] = parts["attend"][term] / holders
        parts["transfer"] = {
            "trip": calls,
            "byte_out": calls * (holders * rows * shape.key * element + index_bytes),
            "byte_back": calls * holders * rows * (shape.value * element + STATISTICS_BYTES),
        }
        parts["rotate"] = {"query_call": calls, "query_byte": calls * rows * shape.key * element}
    if option == "fetch":
        parts["transfer"] = {
            "trip": np.ones_like(calls),
            "byte_out": np.maximum(index_bytes, holders * INDEX_BYTES) + 0.0 * calls,
            "byte_back": layers * entries * shape.entry_bytes,
        }
        parts["rotate"] = {
            "entry_call": holders + 0.0 * calls,
            "entry_byte": layers * entries * shape.kv_heads * shape.rotary * element,
        }
    if option in ("route", "fetch") and shape.selected is not None:
        gathers = calls if option == "route" else np.ones_like(calls)
        rounds = uses if option == "route" else 1.0
        parts["gather"] = {
            "call": gathers,
            "byte": layers * rounds * entries / holders * shape.entry_bytes,
        }
    if option == "local":
        parts["prefill"] = prefill_quantities(shape, new=size, before=0.0, layers=layers)
    return parts


def prefill_quantities(
    shape: Shape, *, new: ArrayLike, before: ArrayLike, layers: ArrayLike
) -> dict[str, Float64]:
    """Of prefilling new tokens behind others that are cached already.

    Every new token passes the layers' matrices. Scores are computed for all cached and new tokens, those that
    are masked among them.
    """
    new, before, layers = (np.asarray(value, dtype=np.float64) for value in (new, before, layers))
    hidden, inner = shape.hidden or 0, shape.inner or 0
    matrices = hidden * (shape.heads * (shape.key + shape.value) + shape.entry + MATRICES * inner)
    attended = new * (before + new)
    return {
        "layer": layers + 0.0 * new,
        "operation": layers * _OPERATIONS * new * matrices,
        "score": layers * shape.heads * attended,
    }


def _expert(shape: Shape, option: Option, rows: Float64, size: Float64, uses: float) -> Quantities:
    both = rows + size
    width = shape.key * shape.element_bytes
    weights_bytes = MATRICES * size * width
    parts: Quantities = {
        "experts": {
            "call": uses + 0.0 * both,
            "operation": uses * MATRICES * _OPERATIONS * rows * size * shape.key,
            "byte": uses * weights_bytes + 0.0 * both,
        }
    }
    if option == "route":
        parts["transfer"] = {
            "trip": uses + 0.0 * both,
            "byte_out": uses * rows * width + 0.0 * both,
            "byte_back": uses * rows * width + 0.0 * both,
        }
    if option == "fetch":
        parts["transfer"] = {
            "trip": 1.0 + 0.0 * both,
            "byte_out": INDEX_BYTES + 0.0 * both,
            "byte_back": weights_bytes + 0.0 * both,
        }
    return parts


def _unit_bytes(shape: Shape, name: str) -> int:
    """Bytes of one row, or of one token of a chunk (of an expert, in proportion); 1 for a layer."""
    if name == "rows":
        return (shape.key + shape.value) * shape.element_bytes
    return shape.entry_bytes if name == "size" else 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageCosts:
    """What a stage costs.

    Attributes:
        us_F: microseconds per unit of each term of `TERMS`.
        samples_BF: the same for each bootstrap sample, or for each draw from a published range.
    """

    us_F: Float64
    samples_BF: Float64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Constants:
    """Coefficients of one shape on one fabric.

    Attributes:
        grade: ``fitted`` to measurements on this fabric, or ``published``.
        source: the measurement's file, or the publication.
        shape: what they were measured with; None for published ones, which name no sizes.
        holders: ranks that held data.
        stages: costs of what is known.
        domain: smallest and largest of ``rows``, ``size`` and ``layers`` that were measured.
        backend: what moved the bytes; empty where it is not stated.
        hosts: names of the hosts that were measured; empty where they are not stated.
        ratios: measured over predicted time of each option at held-out points, (D,); options that were
            measured at the same points have them in the same order. Empty where nothing was held out.
    """

    grade: Grade
    source: str
    shape: Shape | None
    holders: int
    stages: Mapping[Stage, StageCosts]
    domain: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    backend: str = ""
    hosts: tuple[str, ...] = ()
    ratios: Mapping[Option, Float64] = field(default_factory=dict)

    def covers(self, shape: Shape, **values: tuple[float, ...]) -> bool:
        """Whether this shape was measured, and all values of each quantity lie there, or next to it."""
        beyond = self.beyond(shape, **values)
        return shape == self.shape and beyond is not None and beyond <= NEAR

    def beyond(self, shape: Shape, **values: tuple[float, ...]) -> float | None:
        """How many times the bytes of rows or of a chunk, or the layers, lie beyond what was measured.

        Returns:
            The largest such ratio, 1 where all lie within; None where nothing was measured.
        """
        if self.shape is None or not self.domain:
            return None
        worst = 1.0
        for name, wanted in values.items():
            unit = _unit_bytes(shape, name) / _unit_bytes(self.shape, name)
            low, high = self.domain[name]
            for value in wanted:
                asked = max(value * unit, 1e-9)
                worst = max(worst, low / asked, asked / max(high, 1e-9))
        return worst

    def is_measured(self, shape: Shape, sizes: Sizes) -> NDArray[np.bool_]:
        """Whether each point of this shape lies where was measured, or next to it."""
        rows, size, layers = np.broadcast_arrays(sizes.rows, sizes.size, sizes.layers)
        inside = np.full(rows.shape, shape == self.shape and sizes.holders == self.holders)
        for name, values in (("rows", rows), ("size", size), ("layers", layers)):
            low, high = self.domain.get(name, (np.inf, -np.inf))
            inside &= (values * NEAR >= low) & (values <= high * NEAR)
        return inside


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cost:
    """What an option costs.

    Attributes:
        us: microseconds, without the stages that are not known.
        samples: the same for each sample, (B, ...), with the errors of held-out points.
        unknown: stages that the constants say nothing about.
    """

    us: Float64
    samples: Float64
    unknown: tuple[Stage, ...]


def cost(constants: Constants, shape: Shape, option: Option, sizes: Sizes) -> Cost:
    """What an option costs at each point.

    Every sample has coefficients of its own, and the error that was made at one held-out point, the same one
    for all options: what the forms get wrong of two options alike does not count when they are compared.
    """
    priced_N = priced(constants, quantities(shape, option, sizes))
    ratio_D = constants.ratios.get(option)
    if ratio_D is None:
        return priced_N
    drawn_B = np.random.default_rng(0).integers(0, len(ratio_D), len(priced_N.samples))
    error_B = ratio_D[drawn_B].reshape(-1, *([1] * (priced_N.samples.ndim - 1)))
    return replace(priced_N, samples=priced_N.samples * error_B)


def priced(constants: Constants, parts: Quantities) -> Cost:
    """What quantities cost."""
    known = [stage for stage in parts if stage in constants.stages]
    shape_N = np.broadcast_shapes(*(np.shape(value) for terms in parts.values() for value in terms.values()))
    us, samples = np.zeros(shape_N), np.zeros((1, *shape_N))
    for stage in known:
        costs = constants.stages[stage]
        for index, term in enumerate(TERMS[stage]):
            amount = parts[stage].get(term)
            if amount is not None:
                us = us + costs.us_F[index] * amount
                ends = (len(costs.samples_BF), *([1] * len(shape_N)))
                samples = samples + costs.samples_BF[:, index].reshape(ends) * amount
    unknown = tuple(stage for stage in parts if stage not in constants.stages)
    return Cost(us=us, samples=samples, unknown=unknown)
