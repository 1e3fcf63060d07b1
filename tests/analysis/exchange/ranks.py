"""Real ranks that exchange uneven splits over gloo, one of them late in every second exchange.

    python ranks.py FOLDER RANK RANKS DELAYED_RANK DELAY_MS ROUNDS

Writes one run per case, and what aligning over the network says to ranks that do not know they share a clock.
"""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from observatory.collectives.bench.pairs import TorchPairs
from observatory.probes.alignment import align, with_drift
from observatory.run import RunWriter
from observatory.run.manifest import Manifest, ModelSpec, Topology
from observatory.run.tables import EXCHANGE_SCHEMA, SPAN_SCHEMA

CASES = ("all to all", "pairs", "compute")
WIDTH = 64


def rows_of(case: str, ranks: int, number: int) -> NDArray[np.int64]:
    """Rows from rank i to rank j in exchange ``number``, known to every rank; no two pairs alike."""
    rows_PP = np.random.default_rng(number // 2).integers(50, 500, (ranks, ranks))
    if case == "pairs":  # 0 with 1, 2 with 3; nobody else
        place = np.arange(ranks) // 2
        rows_PP[place[:, None] != place[None, :]] = 0
    return rows_PP


class Case:
    """One run of one rank."""

    def __init__(self, name: str, rank: int, ranks: int) -> None:
        self.name, self.rank, self.ranks = name, rank, ranks
        self.group = f"0-{ranks - 1}"
        self.exchanges: list[tuple[Any, ...]] = []
        self.spans: list[tuple[Any, ...]] = []

    def exchange(self, number: int, late_s: float) -> None:
        """Wait for all, be late, exchange."""
        rows_PP = rows_of(self.name, self.ranks, number)
        own = self.rank
        sent = torch.zeros(int(rows_PP[own].sum()), WIDTH)
        received = torch.empty(int(rows_PP[:, own].sum()), WIDTH)
        dist.barrier()
        began_ns = time.monotonic_ns()
        if late_s:
            time.sleep(late_s)
        start_ns = time.monotonic_ns()
        if self.name == "compute":
            self.spans.append((number, "prefill", 0, own, "experts", began_ns, start_ns))
        dist.all_to_all_single(received, sent, rows_PP[:, own].tolist(), rows_PP[own].tolist())
        end_ns = time.monotonic_ns()
        bytes_PP = rows_PP * WIDTH * 4
        self.exchanges.append(
            (number, "prefill", 0, own, "dispatch", self.group, number, "all_to_all_single", "gloo",
             start_ns, end_ns, bytes_PP[own].tolist(), bytes_PP[:, own].tolist())
        )  # fmt: skip

    def append_to(self, writer: RunWriter) -> None:
        """Write what was gathered."""
        for table, rows, schema in (
            ("exchange", self.exchanges, EXCHANGE_SCHEMA),
            ("spans", self.spans, SPAN_SCHEMA),
        ):
            if rows:
                known = pa.schema(list(schema)[: len(rows[0])])
                columns = [
                    pa.array(values, field.type)
                    for values, field in zip(zip(*rows, strict=True), known, strict=True)
                ]
                writer.append(table, pa.Table.from_arrays(columns, schema=known))


def main() -> None:
    folder = Path(sys.argv[1])
    rank, ranks, delayed, delay_ms, rounds = map(int, sys.argv[2:7])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=40),
    )
    link = TorchPairs()
    own = align(link)
    begin = align(link, identity=lambda: None)
    for name in CASES:
        manifest = Manifest(
            run_id=name, created_unix_s=0.0, model=ModelSpec(name=name), topology=Topology(ranks=ranks)
        )
        path = folder / name
        writer = RunWriter.create(path, manifest) if rank == 0 else RunWriter.join(path, rank=rank)
        writer.set_clock(own.record())
        case = Case(name, rank, ranks)
        for number in range(rounds):
            case.exchange(number, delay_ms / 1000 if rank == delayed and number % 2 else 0.0)
        case.append_to(writer)
        dist.barrier()
        writer.close(steps=rounds)
    strangers = with_drift(begin, align(link, identity=lambda: None))
    (folder / f"clock-{rank}.json").write_text(strangers.record().model_dump_json())
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
