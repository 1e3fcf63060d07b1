"""Run directories whose ranks left given exchange rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa

from observatory.run import RunWriter
from observatory.run.manifest import ClockSpec, Manifest, ModelSpec, Topology
from observatory.run.provenance import HostSpec
from observatory.run.tables import EXCHANGE_SCHEMA
from tests.analysis.exchange.tables import SHARED


def exchange_run(
    path: Path,
    *frames: pd.DataFrame,
    ranks: int = 4,
    node_of_rank: Sequence[int] | None = (0, 0, 1, 1),
    clock: ClockSpec = SHARED,
    run_id: str = "run-1",
    name: str = "m",
    host: str = "node-a",
) -> Path:
    """Write a run of so many ranks with these rows."""
    manifest = Manifest(
        run_id=run_id,
        created_unix_s=1.0,
        model=ModelSpec(name=name),
        hosts=(HostSpec(name=host),),
        topology=Topology(ranks=ranks, node_of_rank=None if node_of_rank is None else tuple(node_of_rank)),
    )
    rows = pd.concat(frames)
    writers = [RunWriter.create(path, manifest)]
    writers += [RunWriter.join(path, rank=rank) for rank in range(1, ranks)]
    for writer in reversed(writers):
        own = rows[rows["source_rank"] == writer.rank]
        if len(own):
            outcome = pa.schema([field for field in EXCHANGE_SCHEMA if field.name in own])
            writer.append("exchange", pa.Table.from_pandas(own, schema=outcome, preserve_index=False))
        writer.set_clock(clock)
        writer.close()
    return path
