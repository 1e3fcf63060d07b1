"""What ``observatory bench route-fetch`` is asked to measure, and what it measured.

Shapes: R repeats, P ranks.

Rank 0 has query rows (or tokens of an expert), the other ranks hold what they need: a chunk of cached keys
and values, or the weights of an expert. ``route`` sends the rows there, ``fetch`` brings the data here,
``local`` makes or has the data here. Two more options edit a cache: ``splice`` replaces a span in place and
corrects the positions behind it, ``trim`` prefills the span and all behind it again.

A result keeps every raw time. It is read back from files that may have been damaged or made up, so sizes are
bounded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from observatory.run.documents.versioned import load_document
from observatory.run.manifest import CoreSpec
from observatory.run.provenance import HostSpec
from observatory.run.records import Count, Moment, Record, Text

ROUTE_FETCH_VERSION = "1.0"

Kind = Literal["mha", "gqa", "mla", "sparse", "expert"]
Option = Literal["route", "fetch", "local", "splice", "trim"]
#: Parts of a cost whose times are measured on their own; what is left of the total is ``transfer``.
Stage = Literal["transfer", "gather", "attend", "merge", "rotate", "experts", "prefill", "splice"]
Dtype = Literal["float32", "bfloat16", "float16"]

ELEMENT_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
#: Bytes of the running maximum and the normaliser that a partial result carries for each row.
STATISTICS_BYTES = 8
#: Bytes of one index of a selection, and of a request that names nothing.
INDEX_BYTES = 8
#: Tokens in front of an edited span.
PREFIX_TOKENS = 32

_Size = Annotated[int, Field(ge=1, le=1 << 24)]
#: A nanosecond to eleven days.
_Microseconds = Annotated[float, Field(ge=1e-3, le=1e12)]
_StageTime = Annotated[float, Field(ge=0.0, le=1e12)]


class Shape(Record):
    """Attention over a cached chunk, or an expert.

    Attributes:
        kind: ``mha``, ``gqa``, ``mla`` (one latent for all heads, with a decoupled rotary key), ``sparse``
            (``mla`` over selected entries), or ``expert`` (gated, three matrices).
        dtype: of activations, cache and weights.
        heads: query heads; 1 for an expert.
        kv_heads: heads of keys and values; 1 for a latent and for an expert.
        key: values of a key per head, those of a decoupled rotary key included; the hidden size of an expert.
        rotary: values of a key that carry its position, the last ones; 0 for an expert.
        value: values of one head's result; the hidden size of an expert.
        selected: entries that a query attends to at most; None for all.
        hidden, inner: hidden size and gated inner width of a decoder layer, for what prefills; None where
            nothing is prefilled.
    """

    kind: Kind
    dtype: Dtype = "float32"
    heads: _Size = 1
    kv_heads: _Size = 1
    key: _Size
    rotary: Annotated[int, Field(ge=0, le=1 << 24)] = 0
    value: _Size
    selected: _Size | None = None
    hidden: _Size | None = None
    inner: _Size | None = None

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Shape:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} heads of keys evenly")
        if self.rotary > self.key or self.rotary % 2:
            raise ValueError(f"{self.rotary} rotary values are odd, or more than the {self.key} of a key")
        if (self.hidden is None) != (self.inner is None):
            raise ValueError("a decoder layer has a hidden size and an inner width, or neither")
        if self.is_latent and (self.kv_heads != 1 or self.value + self.rotary != self.key):
            raise ValueError("a latent key is the value and the rotary part, shared by all heads")
        if (self.selected is None) == (self.kind == "sparse"):
            raise ValueError("a selection belongs to kind sparse, and only there")
        return self

    @property
    def is_latent(self) -> bool:
        """Whether values are a part of the keys."""
        return self.kind in ("mla", "sparse")

    @property
    def element_bytes(self) -> int:
        """Bytes of one value."""
        return ELEMENT_BYTES[self.dtype]

    @property
    def entry(self) -> int:
        """Values that the cache holds for one token in one layer."""
        return self.kv_heads * (self.key + (0 if self.is_latent else self.value))

    @property
    def entry_bytes(self) -> int:
        """Bytes that the cache holds for one token in one layer."""
        return self.entry * self.element_bytes

    @property
    def can_prefill(self) -> bool:
        """Whether its layers are known, and attend to all that is cached."""
        return self.hidden is not None and self.selected is None

    @property
    def name(self) -> str:
        """As it is given to ``--shape``."""
        sizes = {
            "mha": (self.heads, self.key),
            "gqa": (self.heads, self.kv_heads, self.key),
            "mla": (self.heads, self.value, self.rotary),
            "sparse": (self.heads, self.value, self.rotary, self.selected),
            "expert": (self.key,),
        }[self.kind]
        return f"{self.kind}:{','.join(map(str, sizes))}"


class Point(Record):
    """One size at which the options of a shape are compared.

    Attributes:
        rows: query rows of attention (query tokens times heads), or tokens of an expert; 0 for an edit.
        size: tokens of the cached chunk, or the inner width of an expert; of an edit, tokens of the span.
        layers: layers with a cache of their own; 1 for an expert.
        suffix: tokens behind the span of an edit; 0 elsewhere.
    """

    rows: Annotated[int, Field(ge=0, le=1 << 30)]
    size: _Size
    layers: Annotated[int, Field(ge=1, le=4096)] = 1
    suffix: Annotated[int, Field(ge=0, le=1 << 24)] = 0


def new_span(span: int) -> int:
    """Tokens that an edit puts in the place of a span: half of them, as where an output is shortened."""
    return -(-span // 2)


class RouteFetchPlan(Record):
    """What the ranks are to do; every rank gets the same plan.

    Attributes:
        kind: ``route-fetch``.
        shapes: what is measured.
        points: of each shape.
        edits: likewise, of the cache that is edited; empty where none is.
        warmup: rounds that are not kept.
        repeats: R.
        seed: of data.
        device: torch device that computes.
        argv: command line that asked for it.
        notes: what a reader of the result must know.
    """

    kind: Literal["route-fetch"] = "route-fetch"
    shapes: Annotated[tuple[Shape, ...], Field(min_length=1, max_length=16)]
    points: Annotated[tuple[tuple[Point, ...], ...], Field(min_length=1, max_length=16)]
    edits: Annotated[tuple[tuple[Point, ...], ...], Field(max_length=16)] = ()
    warmup: Annotated[int, Field(ge=0, le=10_000)] = 1
    repeats: Annotated[int, Field(ge=1, le=10_000)]
    seed: Annotated[int, Field(ge=0, lt=1 << 62)] = 0
    device: Literal["cpu", "cuda"] = "cpu"
    argv: tuple[Text, ...] = ()
    notes: tuple[Text, ...] = ()


class RouteFetchCase(Point):
    """Times of one option at one point.

    Attributes:
        shape: index among the shapes of the result.
        option: what was done.
        total_us_R: from the start on rank 0 to its result, microseconds.
        stage_us_R: parts of it that were measured on their own, the longest of any holder; the rest is
            transfer.
        correct: whether every repeat gave what full attention, or the expert, gives on one rank.
        worst_error: largest difference from it, relative to the largest value.
    """

    shape: Annotated[int, Field(ge=0, lt=16)]
    option: Option
    total_us_R: Annotated[tuple[_Microseconds, ...], Field(min_length=1, max_length=10_000)]
    stage_us_R: dict[Stage, Annotated[tuple[_StageTime, ...], Field(max_length=10_000)]]
    correct: bool
    worst_error: Annotated[float, Field(ge=0.0)]

    @model_validator(mode="after")
    def _times_of_every_repeat(self) -> RouteFetchCase:
        if any(len(times) != len(self.total_us_R) for times in self.stage_us_R.values()):
            raise ValueError("a stage does not have a time for every repeat")
        if "transfer" in self.stage_us_R:
            raise ValueError("transfer is what the other stages leave of the total")
        return self

    @property
    def total_us(self) -> float:
        """Median over repeats."""
        return float(np.median(self.total_us_R))

    def stage_us(self, stage: Stage) -> NDArray[np.float64]:
        """Times of a stage, (R,); what is left of the total is transfer."""
        if stage != "transfer":
            return np.array(self.stage_us_R[stage])
        rest_us_R = np.array(self.total_us_R, dtype=np.float64)
        for times in self.stage_us_R.values():
            rest_us_R = rest_us_R - np.array(times)
        transfer_us_R: NDArray[np.float64] = np.maximum(rest_us_R, 0.0)
        return transfer_us_R


class RouteFetchResult(Record):
    """Result of ``observatory bench route-fetch``.

    Attributes:
        schema_version: ``major.minor``; readers refuse a newer major.
        kind: ``route-fetch``.
        created_unix_s: wall-clock label.
        argv: command line of rank 0.
        backend: what moved the bytes: gloo, nccl, mpi.
        device: torch device that computed.
        node_of_P: node of each rank; rank 0 asks, the others hold.
        warmup, repeats: as in the plan.
        timing: the clock and the statistic, in words.
        shapes: what was measured.
        cases: the measurements.
        git_sha, hosts, software, cores_P: where it was measured.
        notes: what a reader must know.
    """

    schema_version: Annotated[str, Field(pattern=r"^\d{1,6}\.\d{1,6}$")] = ROUTE_FETCH_VERSION
    kind: Literal["route-fetch"] = "route-fetch"
    created_unix_s: Moment
    argv: tuple[Text, ...] = ()
    backend: Annotated[str, Field(max_length=64)]
    device: Annotated[str, Field(max_length=64)]
    node_of_P: Annotated[tuple[Count, ...], Field(min_length=2, max_length=4096)]
    warmup: Count
    repeats: Annotated[int, Field(ge=1)]
    timing: Text = "start to result on rank 0 after a barrier, monotonic clock"
    shapes: Annotated[tuple[Shape, ...], Field(min_length=1, max_length=16)]
    cases: Annotated[tuple[RouteFetchCase, ...], Field(min_length=1, max_length=100_000)]
    git_sha: Text | None = None
    hosts: tuple[HostSpec, ...] = ()
    software: dict[str, Text] = Field(default_factory=dict)
    cores_P: Annotated[tuple[CoreSpec, ...], Field(max_length=4096)] | None = None
    notes: tuple[Text, ...] = ()

    @model_validator(mode="after")
    def _shapes_exist(self) -> RouteFetchResult:
        if any(case.shape >= len(self.shapes) for case in self.cases):
            raise ValueError("a case is of a shape that is not there")
        return self

    @property
    def holders(self) -> int:
        """Ranks that hold a part of each chunk."""
        return len(self.node_of_P) - 1


def load_route_fetch(path: Path | str) -> RouteFetchResult:
    """Read and check a result of at most 16 MiB.

    Raises:
        BenchmarkError: not readable, too large, of a newer schema, or not what the schema says.
    """
    return load_document(
        RouteFetchResult,
        path,
        version=ROUTE_FETCH_VERSION,
        what="route-fetch measurement",
        remedy="make one with `observatory bench route-fetch`",
    )
