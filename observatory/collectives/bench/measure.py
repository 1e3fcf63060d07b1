"""Times exchanges of given traffic matrices, and checks every byte that arrives.

Shapes: P ranks, N rows, B bytes of a row, R repeats.

Protocol, the same for synthetic patterns and for captured traffic:

    align the ranks' clocks
    for round in warm-up + repeats:                  # slow drift of the machine hits all cases alike
      for matrix in plan:
        for algorithm in plan:
          fill the send buffer from (source, destination, position, round)         not timed
          synchronise the device, barrier
          start = monotonic clock -----------------------------------------+
          exchange, `iterations` times, one after another                  |  timed, on every rank
          synchronise the device                                           |
          end = monotonic clock -------------------------------------------+
          compare every received byte with what its sender must have sent          not timed
          keep start and end of this rank, unless it is a warm-up
    align the clocks again: drift

**The time of an exchange** is (last end - last start) / iterations: from when everybody takes part to when
the layer can go on, which is what `observatory.analysis.exchange` calls transfer in a running program. Ranks
leave the barrier one after another; what the early ones wait is in their own times and not in the exchange's.
Over repeats the time is the median; how far repeats scatter is kept with it. Without aligned clocks it is the
longest time of one rank, which counts its waiting: more iterations make that share small.

With one iteration the exchange is alone on the fabric, as a dispatch between two computations is. With more
they follow each other and overlap at their ends: a sustained rate.

Splits are known beforehand: the count exchange of a dispatcher is not in these times. Raw times of all ranks
and repeats are kept. algbw = mean bytes per rank / time, own bytes included (the convention of nccl-tests);
busbw = algbw x share of bytes that leaves its rank, which for equal splits is the factor (n - 1) / n.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from observatory.collectives.bench.movers import Mover, mover
from observatory.collectives.bench.pairs import align_transport
from observatory.collectives.bench.patterns import PATTERNS, pattern_rows
from observatory.collectives.bench.times import RankTimes, case_times, rank_times
from observatory.errors import BenchmarkError, ExchangeError
from observatory.probes.alignment import with_drift
from observatory.run.documents.bench import BenchCase, BenchPlan, BenchResult, Traffic
from observatory.run.exchange_algorithms import ALGORITHMS
from observatory.run.manifest import CoreSpec
from observatory.run.usable_cores import find_cores

if TYPE_CHECKING:
    from torch import Tensor

    from observatory.collectives.transport.protocol import Transport

_ROW_BYTES = 16


def alltoall_plan(
    *,
    ranks: int,
    sizes_bytes: Sequence[int],
    patterns: Sequence[str],
    algorithms: Sequence[str],
    seeds: Sequence[int] = (0,),
    warmup: int = 2,
    repeats: int = 20,
    iterations: int = 1,
) -> BenchPlan:
    """Every pattern at every size under every algorithm.

    Args:
        ranks: P.
        sizes_bytes: mean bytes each rank sends, own bytes included; rounded down to rows of 16 bytes.
        patterns: names of `observatory.collectives.bench.patterns`.
        algorithms: ``flat``, ``hierarchical``, ``gather``.
        seeds: one matrix per seed of patterns that are drawn; the others appear once.
        warmup: rounds that are not kept.
        repeats: rounds that are kept.
        iterations: exchanges in one timed interval.

    Raises:
        BenchmarkError: an unknown pattern, none at all, or a size below one row.
        ExchangeError: an unknown algorithm.
    """
    for algorithm in algorithms:
        if algorithm not in ALGORITHMS:
            raise ExchangeError(
                f"algorithm {algorithm!r} is unknown; expected one of {', '.join(ALGORITHMS)}"
            )
    if not patterns:
        raise BenchmarkError(f"no pattern was named; expected some of {', '.join(PATTERNS)}, or all")
    traffic: dict[tuple[tuple[int, ...], ...], Traffic] = {}
    for size in sizes_bytes:
        if size < _ROW_BYTES:
            raise BenchmarkError(f"size {size} B is below one row of {_ROW_BYTES} B; give at least that")
        for pattern in patterns:
            for seed in seeds:
                rows_PP = pattern_rows(pattern, ranks=ranks, rows_per_rank=size // _ROW_BYTES, seed=seed)
                matrix = tuple(map(tuple, (rows_PP * _ROW_BYTES).tolist()))
                # Fixed patterns are the same for every seed, and `empty` for every size.
                traffic.setdefault(
                    matrix, Traffic(pattern=pattern, seed=seed, send_bytes_PP=matrix, row_bytes=_ROW_BYTES)
                )
    return BenchPlan(
        kind="alltoall",
        algorithms=tuple(dict.fromkeys(algorithms)),
        warmup=warmup,
        repeats=repeats,
        iterations=iterations,
        traffic=tuple(traffic.values()),
        notes=tuple(
            f"{pattern} is the same traffic as another pattern on {ranks} ranks and was not measured again"
            for pattern in dict.fromkeys(patterns)
            if pattern not in {item.pattern for item in traffic.values()}
        ),
    )


def run_plan(
    transport: Transport,
    plan: BenchPlan,
    *,
    clock_ns: Callable[[], int] = time.monotonic_ns,
    barrier_timeout_s: float = 60.0,
) -> BenchResult | None:
    """Run a plan on all ranks together.

    Args:
        transport: the joined ranks; the plan's matrices must be of their number.
        plan: the same on every rank.
        clock_ns: monotonic clock.
        barrier_timeout_s: how long ranks wait for each other.

    Returns:
        The result on rank 0, None on the others.

    Raises:
        ExchangeError: the plan is for another number of ranks, the ranks have different plans, or an exchange
            failed.
    """
    for traffic in plan.traffic:
        if traffic.ranks != transport.size:
            raise ExchangeError(
                f"a traffic matrix of {traffic.ranks} ranks on {transport.size}; start as many as it has"
            )
    _same_plan(transport, plan)
    cases = [
        _Case(transport, traffic, algorithm) for traffic in plan.traffic for algorithm in plan.algorithms
    ]
    begin = align_transport(transport)
    for repeat in range(-plan.warmup, plan.repeats):
        for case in cases:
            case.run(repeat, plan.iterations, clock_ns, barrier_timeout_s)
    clock = with_drift(begin, align_transport(transport))
    own_times = rank_times([case.interval_ns_R2 for case in cases], clock)
    everyone = transport.gather_json(
        [
            own_times.model_dump(),
            [case.correct for case in cases],
            find_cores().model_dump(exclude={"threads"}),
        ]
    )
    if everyone is None:
        return None
    return _result(transport, plan, cases, everyone)


def _same_plan(transport: Transport, plan: BenchPlan) -> None:
    """Refuse to start when ranks would wait for exchanges that the others never make."""
    text = plan.model_dump_json(exclude={"argv"})
    digests = transport.all_gather_json(hashlib.sha256(text.encode()).hexdigest())
    different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if different:
        raise ExchangeError(
            f"rank {different[0]} was given other traffic than rank 0; start all ranks with the same options "
            "and, for a replay, the same run directory"
        )


class _Case:
    """One matrix under one algorithm on this rank."""

    def __init__(self, transport: Transport, traffic: Traffic, algorithm: str) -> None:
        self.traffic, self.algorithm = traffic, algorithm
        self.interval_ns_R2: list[tuple[int, int]] = []
        self.correct = True
        self._transport = transport
        rows_PP = traffic.bytes_PP // traffic.row_bytes
        self._move: Mover = mover(transport, rows_PP, algorithm, role=traffic.role)
        self._send_P = traffic.bytes_PP[transport.rank].tolist()
        self._receive_P = traffic.bytes_PP[:, transport.rank].tolist()

    def run(self, repeat: int, iterations: int, clock_ns: Callable[[], int], timeout_s: float) -> None:
        """One timed interval; ``repeat`` below 0 is a warm-up."""
        rank, peers = self._transport.rank, range(self._transport.size)
        cuda = self._transport.backend == "nccl"
        rows_NB = _payload([(rank, peer) for peer in peers], self._send_P, repeat, self.traffic.row_bytes)
        expected_NB = _payload(
            [(peer, rank) for peer in peers], self._receive_P, repeat, self.traffic.row_bytes
        )
        if cuda:
            rows_NB, expected_NB = rows_NB.cuda(), expected_NB.cuda()
            torch.cuda.synchronize()
        received_NB = rows_NB
        self._transport.barrier(timeout_s)
        start_ns = clock_ns()
        for _ in range(iterations):
            received_NB = self._move(rows_NB)
        if cuda:
            torch.cuda.synchronize()
        end_ns = clock_ns()
        self.correct &= bool(torch.equal(received_NB, expected_NB))
        if repeat >= 0:
            self.interval_ns_R2.append((start_ns, end_ns))


def _payload(pairs: Sequence[tuple[int, int]], bytes_P: Sequence[int], repeat: int, row_bytes: int) -> Tensor:
    """Bytes from each source to each destination; each pair, position and repeat has its own: (N, B).

    Positions are mixed so that neither swapped rows nor rows moved by a power of two look right.
    """
    longest = max(bytes_P, default=0)
    position = torch.arange(longest, dtype=torch.int64)
    pattern = (position * 7 + (position >> 8) * 5 + (position >> 16) * 3 & 0xFF).to(torch.uint8)
    parts = [
        pattern[:count] + (source * 31 + destination * 17 + repeat * 13 & 0xFF)
        for (source, destination), count in zip(pairs, bytes_P, strict=True)
    ]
    return torch.cat(parts).view(-1, row_bytes)


def _result(
    transport: Transport,
    plan: BenchPlan,
    cases: Sequence[_Case],
    everyone: list[tuple[dict[str, Any], list[bool], dict[str, Any]]],
) -> BenchResult:
    from observatory.host.provenance import collect_provenance

    origin = collect_provenance()
    times_P = [RankTimes.model_validate(times) for times, _, _ in everyone]
    uncertainties = [rank.uncertainty_ns for rank in times_P if rank.uncertainty_ns is not None]
    times = [case_times(times_P, index, plan.iterations) for index in range(len(cases))]
    return BenchResult(
        kind=plan.kind,
        created_unix_s=time.time(),
        argv=plan.argv,
        backend=transport.backend,
        node_of_P=transport.node_of_P,
        warmup=plan.warmup,
        repeats=plan.repeats,
        iterations=plan.iterations,
        clock_uncertainty_us=max(uncertainties) / 1e3 if len(uncertainties) == len(times_P) else None,
        cases=tuple(
            BenchCase(
                **case.traffic.model_dump(),
                algorithm=case.algorithm,
                rank_us_RP=times[index].rank_us_RP,
                wait_us_RP=times[index].wait_us_RP,
                correct=all(correct[index] for _, correct, _ in everyone),
            )
            for index, case in enumerate(cases)
        ),
        run_id=plan.run_id,
        git_sha=origin["git_sha"],
        hosts=origin["hosts"],
        software=origin["software"],
        cores_P=tuple(CoreSpec.model_validate(cores) for _, _, cores in everyone),
        notes=plan.notes,
    )
