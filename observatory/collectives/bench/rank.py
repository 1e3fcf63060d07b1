"""One rank of a benchmark; `observatory` starts this module with the path of a job, ``JOB.json``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from observatory.collectives.bench.measure import run_plan
from observatory.collectives.bench.route_fetch import run_route_fetch
from observatory.collectives.transport.open import open_transport
from observatory.errors import ObservatoryError
from observatory.hpc.rank_guard import end_rank, guard_rank
from observatory.run.documents.bench import BenchPlan
from observatory.run.documents.route_fetch import RouteFetchPlan
from observatory.run.records import Record


class RankJob(Record):
    """The job of every rank.

    Attributes:
        plan: what to exchange, or what to route and fetch.
        backend: gloo, nccl or auto.
        ranks_per_node: nodes to emulate; None takes the hosts as they are.
        timeout_s: how long an exchange or a barrier may take.
        out: where rank 0 writes the result.
    """

    plan: BenchPlan | RouteFetchPlan
    backend: str
    ranks_per_node: int | None
    timeout_s: float
    out: str


def main(argv: list[str]) -> int:
    """Run the job in a file; the last line on stderr says why it failed."""
    job = RankJob.model_validate_json(Path(argv[0]).read_bytes())
    try:
        with open_transport(
            job.backend,  # type: ignore[arg-type]  # checked there, naming the choices
            ranks_per_node=job.ranks_per_node,
            timeout_s=job.timeout_s,
        ) as transport:
            result = (
                run_plan(transport, job.plan, barrier_timeout_s=job.timeout_s)
                if isinstance(job.plan, BenchPlan)
                else run_route_fetch(transport, job.plan, barrier_timeout_s=job.timeout_s)
            )
        if result is not None:
            Path(job.out).write_text(result.model_dump_json(), encoding="utf-8")
    except ObservatoryError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except (MemoryError, RuntimeError) as error:  # torch's allocator raises the latter
        if os.environ.get("OBSERVATORY_DEBUG"):
            raise
        sys.stderr.write(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}\n")
        return 1
    return 0


if __name__ == "__main__":
    guard_rank()
    try:
        code = main(sys.argv[1:])
    except KeyboardInterrupt:
        code = 130
    end_rank(code)
    sys.exit(code)
