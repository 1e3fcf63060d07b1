"""One rank of a benchmark in which the last rank leaves every barrier late: ``late_rank.py OUT``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from observatory.collectives.bench.measure import alltoall_plan, run_plan
from observatory.collectives.transport.open import open_transport

LATE_S = 0.05
RANKS = 3


def main(out: str) -> int:
    """Run it; rank 0 writes the result."""
    plan = alltoall_plan(
        ranks=RANKS, sizes_bytes=[64], patterns=["uniform"], algorithms=["flat"], repeats=7, iterations=1
    )
    with open_transport("gloo") as transport:
        enter = transport.barrier

        def barrier(timeout_s: float | None = None) -> None:
            enter(timeout_s)
            if transport.rank == RANKS - 1:
                time.sleep(LATE_S)

        transport.barrier = barrier  # type: ignore[method-assign]
        result = run_plan(transport, plan)
    if result is not None:
        Path(out).write_text(result.model_dump_json())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
