"""Times of one rank's experts over tokens and activated experts: one JSON document with every raw time.

Shapes: R repeats.

It is read back from files that may have been damaged or made up, so sizes are bounded and checked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from observatory.run.documents.versioned import load_document
from observatory.run.manifest import CoreSpec
from observatory.run.provenance import HostSpec
from observatory.run.records import Count, Moment, Record, Text

EXPERTS_VERSION = "1.0"

_MOST_EXPERTS = 65536
_Dimension = Annotated[int, Field(ge=1, le=1 << 31)]
_Experts = Annotated[int, Field(ge=1, le=_MOST_EXPERTS)]
#: A nanosecond to eleven days, as in `observatory.run.documents.bench`.
_Microseconds = Annotated[float, Field(ge=1e-3, le=1e12)]
_Repeats = Annotated[tuple[_Microseconds, ...], Field(min_length=1, max_length=100_000)]

#: Bytes of one element of a dtype, as torch names it.
ELEMENT_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
}


class ExpertShape(Record):
    """The experts of one MoE layer.

    Attributes:
        hidden: H, values of a token.
        intermediate: F, values inside an expert.
        experts: E, routed experts of the layer over all ranks.
        top_k: K, assignments of a token; None when it varies.
        dtype: of the weights, as torch names it.
        expert_bytes: bytes of one expert's weights.
    """

    hidden: _Dimension
    intermediate: _Dimension
    experts: _Experts
    top_k: _Experts | None = None
    dtype: Annotated[str, Field(min_length=1, max_length=64)]
    expert_bytes: Annotated[int, Field(ge=1, le=1 << 50)]

    @property
    def row_bytes(self) -> int:
        """Bytes of the hidden values of one token, in the dtype of the weights."""
        return self.hidden * ELEMENT_BYTES[self.dtype.removeprefix("torch.")]

    @property
    def flops(self) -> float:
        """Floating-point operations of one assignment: two for each weight."""
        return 2.0 * self.expert_bytes / ELEMENT_BYTES[self.dtype.removeprefix("torch.")]

    @model_validator(mode="after")
    def _has_a_known_size(self) -> ExpertShape:
        if self.dtype.removeprefix("torch.") not in ELEMENT_BYTES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(ELEMENT_BYTES)}")
        return self


class ExpertPoint(Record):
    """Times of one number of assignments on one number of experts.

    Attributes:
        assignments: rows that the experts computed, one per token and expert.
        activated: experts that had at least one of them.
        us_R: raw time of every repeat, microseconds.
    """

    assignments: Annotated[int, Field(ge=0, le=1 << 40)]
    activated: Annotated[int, Field(ge=0, le=_MOST_EXPERTS)]
    us_R: _Repeats

    @model_validator(mode="after")
    def _every_expert_has_one(self) -> ExpertPoint:
        if self.activated > self.assignments or (self.assignments > 0) != (self.activated > 0):
            raise ValueError(f"{self.assignments} assignments cannot activate {self.activated} experts")
        return self

    @property
    def median_us(self) -> float:
        """Median over repeats."""
        return float(np.median(self.us_R))


class TokensPoint(Record):
    """Times of a part of a layer that depends on nothing but the number of tokens.

    Attributes:
        tokens: rows.
        us_R: raw time of every repeat, microseconds.
    """

    tokens: Annotated[int, Field(ge=1, le=1 << 40)]
    us_R: _Repeats

    @property
    def median_us(self) -> float:
        """Median over repeats."""
        return float(np.median(self.us_R))


class ExpertBench(Record):
    """Result of ``observatory bench experts``.

    Attributes:
        schema_version: ``major.minor``; readers refuse a newer major.
        created_unix_s: wall-clock label.
        argv: command line.
        model: name of the model; None where only a shape was given, with random weights.
        layer: MoE layer whose experts were timed; None likewise.
        shape: of the layer.
        experts_here: experts of the module that was timed, as many as one rank would hold.
        device: what computed, for people.
        warmup: rounds over all points that are not kept.
        seed: of the order, the rows and their split among experts.
        points: the measurements, each round in an order of its own.
        shared_points: times of the layer's shared experts; empty where there are none under a usual name.
        local_points: times of what a rank does alone in the layer besides all experts: the router, sorting
            and packing rows, adding up outputs; empty where the layer cannot be called alone.
        git_sha, hosts, software, cores: where it was measured.
        notes: what a reader must know.
    """

    schema_version: Annotated[str, Field(pattern=r"^\d{1,6}\.\d{1,6}$")] = EXPERTS_VERSION
    created_unix_s: Moment
    argv: tuple[Text, ...] = ()
    model: Text | None = None
    layer: Count | None = None
    shape: ExpertShape
    experts_here: _Experts
    device: Text
    warmup: Count
    seed: int = 0
    points: Annotated[tuple[ExpertPoint, ...], Field(min_length=1, max_length=10_000)]
    shared_points: Annotated[tuple[TokensPoint, ...], Field(max_length=10_000)] = ()
    local_points: Annotated[tuple[TokensPoint, ...], Field(max_length=10_000)] = ()
    git_sha: Text | None = None
    hosts: tuple[HostSpec, ...] = ()
    software: dict[str, Text] = Field(default_factory=dict)
    cores: CoreSpec | None = None
    notes: tuple[Text, ...] = ()

    @model_validator(mode="after")
    def _experts_are_there(self) -> ExpertBench:
        if self.experts_here > self.shape.experts:
            raise ValueError(f"{self.experts_here} of {self.shape.experts} experts were timed")
        if any(point.activated > self.experts_here for point in self.points):
            raise ValueError("a point activates more experts than there were")
        if len({(point.assignments, point.activated) for point in self.points}) < len(self.points):
            raise ValueError("two points have the same assignments and activated experts")
        return self


def load_expert_bench(path: Path | str) -> ExpertBench:
    """Read and check a result of at most 16 MiB.

    Raises:
        BenchmarkError: not readable, too large, of a newer schema, or not what the schema says.
    """
    return load_document(
        ExpertBench,
        path,
        version=EXPERTS_VERSION,
        what="expert benchmark",
        remedy="make one with `observatory bench experts`",
    )
