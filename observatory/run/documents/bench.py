"""What benchmarks and replays are asked to move, and what they measured.

Shapes: P ranks, R repeats.

A result keeps every raw time. ``BenchResult`` is one JSON document; it is read back from files that may have
been damaged or made up, so sizes are bounded and every matrix is checked.
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

BENCH_VERSION = "1.2"

_MAX_RANKS = 4096
_MAX_BYTES = 1 << 50
MAX_ROW_BYTES = 1 << 30

#: Note of a result whose nodes are not hosts: its links to "other nodes" may be the memory of one machine.
NODES_AS_STATED = "nodes are consecutive ranks as --ranks-per-node says, whatever hosts they are on"

_Node = Annotated[int, Field(ge=0, lt=1 << 31)]
_Bytes = Annotated[int, Field(ge=0, le=_MAX_BYTES)]
_Matrix = Annotated[tuple[tuple[_Bytes, ...], ...], Field(min_length=1, max_length=_MAX_RANKS)]
_Name = Annotated[str, Field(min_length=1, max_length=64)]
#: A nanosecond over a million exchanges, to eleven days: beyond, squares of relative errors overflow.
_Microseconds = Annotated[float, Field(ge=1e-9, le=1e12)]
_Waiting = Annotated[float, Field(ge=0.0, le=1e12)]


class Traffic(Record):
    """One traffic matrix and where it comes from.

    Attributes:
        pattern: ``uniform``, ``skewed``, ... of a benchmark; ``captured`` or ``uniform`` of a replay.
        seed: seed of a random pattern.
        send_bytes_PP: bytes from rank i (rows) to rank j (columns), own bytes on the diagonal.
        row_bytes: bytes of one row; every entry is a multiple of it.
        step, phase, layer: where in the run it was captured; None in a benchmark.
        role: ``dispatch`` or ``combine`` (the way back); None in a benchmark.
    """

    pattern: _Name
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] = 0
    send_bytes_PP: _Matrix
    row_bytes: Annotated[int, Field(ge=1, le=MAX_ROW_BYTES)] = 1
    step: Count | None = None
    phase: _Name | None = None
    layer: Count | None = None
    role: Literal["dispatch", "combine"] | None = None

    @model_validator(mode="after")
    def _square(self) -> Traffic:
        ranks = len(self.send_bytes_PP)
        if any(len(row) != ranks for row in self.send_bytes_PP):
            raise ValueError("the traffic matrix is not square")
        if any(entry % self.row_bytes for row in self.send_bytes_PP for entry in row):
            raise ValueError(f"an entry is not a multiple of row_bytes {self.row_bytes}")
        return self

    @property
    def ranks(self) -> int:
        """P."""
        return len(self.send_bytes_PP)

    @property
    def bytes_PP(self) -> NDArray[np.int64]:
        """The matrix as an array."""
        return np.array(self.send_bytes_PP, dtype=np.int64).reshape(self.ranks, self.ranks)


class BenchPlan(Record):
    """What the ranks are to do; every rank gets the same plan.

    Attributes:
        kind: ``alltoall`` (synthetic patterns) or ``replay`` (captured matrices).
        algorithms: each is run on every matrix.
        warmup: rounds over all matrices that are not kept.
        repeats: R, rounds that are kept.
        iterations: exchanges one after another within one timed interval.
        traffic: the matrices, in the order in which a round takes them.
        argv: command line that asked for it.
        run_id: the run the matrices were captured in.
        notes: what a reader of the result must know.
    """

    kind: Literal["alltoall", "replay"]
    algorithms: Annotated[tuple[_Name, ...], Field(min_length=1)]
    warmup: Annotated[int, Field(ge=0, le=10_000)]
    repeats: Annotated[int, Field(ge=1, le=100_000)]
    iterations: Annotated[int, Field(ge=1, le=100_000)]
    traffic: Annotated[tuple[Traffic, ...], Field(min_length=1)]
    argv: tuple[Text, ...] = ()
    run_id: Text | None = None
    notes: tuple[Text, ...] = ()


class BenchCase(Traffic):
    """Times of one traffic matrix under one algorithm.

    Attributes:
        algorithm: how it was exchanged.
        rank_us_RP: raw time of every repeat on every rank from its own start to its own completion,
            microseconds per exchange.
        wait_us_RP: how much of it had passed when the last rank started, on one clock, per exchange like
            ``rank_us_RP``; None where the ranks' clocks were not aligned, and in results of schema 1.0.
        correct: whether every byte of every repeat arrived where it belongs.
    """

    algorithm: _Name
    rank_us_RP: Annotated[tuple[tuple[_Microseconds, ...], ...], Field(min_length=1)]
    wait_us_RP: tuple[tuple[_Waiting, ...], ...] | None = None
    correct: bool

    @model_validator(mode="after")
    def _times_of_every_rank(self) -> BenchCase:
        if any(len(repeat) != self.ranks for repeat in self.rank_us_RP):
            raise ValueError("a repeat does not have one time per rank")
        if self.wait_us_RP is not None:
            if [len(repeat) for repeat in self.wait_us_RP] != [self.ranks] * len(self.rank_us_RP):
                raise ValueError("waiting is not given for every rank and repeat")
            if any(min(repeat) > 0 for repeat in self.wait_us_RP):
                raise ValueError("in a repeat every rank waits for the last, and none is the last")
        return self

    @property
    def exchange_us_R(self) -> NDArray[np.float64]:
        """Time of each exchange, (R,): from the last rank's start to the last rank's completion.

        Without a common clock the longest time of one rank, which counts what a rank waited as well.
        """
        rank_us_RP = np.array(self.rank_us_RP, dtype=np.float64)
        waited_us_RP = 0.0 if self.wait_us_RP is None else np.array(self.wait_us_RP)
        slowest: NDArray[np.float64] = (rank_us_RP - waited_us_RP).max(axis=1)
        return slowest

    @property
    def mean_us(self) -> float:
        """Mean over repeats without the tenth at either end (with three or more, one at least).

        Times of one matrix fall into two groups where who starts first decides what waits: the median jumps
        between them.
        """
        us_R = np.sort(self.exchange_us_R)
        cut = max(len(us_R) // 10, 1) if len(us_R) >= 3 else 0
        return float(us_R[cut : len(us_R) - cut].mean())

    @property
    def median_us(self) -> float:
        """Median over repeats of the exchange's time."""
        return float(np.median(self.exchange_us_R))

    @property
    def p10_us(self) -> float:
        """10th percentile over repeats of the exchange's time."""
        return float(np.quantile(self.exchange_us_R, 0.1))

    @property
    def p90_us(self) -> float:
        """90th percentile over repeats of the exchange's time."""
        return float(np.quantile(self.exchange_us_R, 0.9))

    @property
    def algbw_gb_per_s(self) -> float:
        """Mean bytes per rank, own bytes included, over the median time; 10^9 bytes per second."""
        return float(self.bytes_PP.sum()) / self.ranks / self.median_us / 1e3

    @property
    def busbw_gb_per_s(self) -> float:
        """``algbw`` times the share of bytes that leaves its rank.

        For equal splits the share is nccl-tests' factor (n - 1) / n; for others it is what they really send.
        """
        total = int(self.bytes_PP.sum())
        crossing = total - int(np.trace(self.bytes_PP))
        return self.algbw_gb_per_s * crossing / total if total else 0.0


class BenchResult(Record):
    """Result of ``observatory bench`` or ``observatory replay``.

    Attributes:
        schema_version: ``major.minor``; readers refuse a newer major.
        kind: ``alltoall`` or ``replay``.
        created_unix_s: wall-clock label.
        argv: command line of rank 0.
        backend: what moved the bytes: gloo, nccl, mpi.
        node_of_P: node of each rank.
        warmup, repeats, iterations: as in the plan.
        timing: the clock and the statistic, in words.
        clock_uncertainty_us: how far the ranks' clocks may be apart after alignment, 0 on one host; None
            where they were not aligned, so that no waiting is known.
        cases: the measurements.
        run_id: the run whose traffic was replayed.
        git_sha, hosts, software: where it was measured.
        cores_P: cores that each rank could use; None in results before schema 1.2.
        notes: what a reader must know.
    """

    schema_version: Annotated[str, Field(pattern=r"^\d{1,6}\.\d{1,6}$")] = BENCH_VERSION
    kind: Literal["alltoall", "replay"]
    created_unix_s: Moment
    argv: tuple[Text, ...] = ()
    backend: _Name
    node_of_P: Annotated[tuple[_Node, ...], Field(min_length=1, max_length=_MAX_RANKS)]
    warmup: Count
    repeats: Annotated[int, Field(ge=1)]
    iterations: Annotated[int, Field(ge=1)]
    timing: Text = "last rank's start to last rank's completion, monotonic clock, divided by iterations"
    clock_uncertainty_us: _Waiting | None = None
    cases: Annotated[tuple[BenchCase, ...], Field(min_length=1)]
    run_id: Text | None = None
    git_sha: Text | None = None
    hosts: tuple[HostSpec, ...] = ()
    software: dict[str, Text] = Field(default_factory=dict)
    cores_P: Annotated[tuple[CoreSpec, ...], Field(max_length=_MAX_RANKS)] | None = None
    notes: tuple[Text, ...] = ()

    @model_validator(mode="after")
    def _ranks_agree(self) -> BenchResult:
        if any(case.ranks != len(self.node_of_P) for case in self.cases):
            raise ValueError("a case has another number of ranks than node_of_P")
        if self.cores_P is not None and len(self.cores_P) != len(self.node_of_P):
            raise ValueError("cores are not given for every rank")
        return self

    @property
    def ranks(self) -> int:
        """P."""
        return len(self.node_of_P)


def load_bench(path: Path | str) -> BenchResult:
    """Read and check a result of at most 16 MiB.

    Raises:
        BenchmarkError: not readable, too large, of a newer schema, or not what the schema says.
    """
    return load_document(
        BenchResult,
        path,
        version=BENCH_VERSION,
        what="benchmark result",
        remedy="make one with `observatory bench alltoall`",
    )
