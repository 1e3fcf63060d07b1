"""A run of two ranks whose traffic can be computed by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from observatory.run import RunWriter, routing_rows
from observatory.run.manifest import DataSpec, Manifest, ModelSpec, MoeLayerSpec, Topology

LOAD_SPE = np.array([[[8, 0, 0, 0], [0, 4, 1, 3]], [[1, 1, 1, 1], [5, 0, 0, 3]]])


def write_captured_run(path: Path) -> Path:
    """Two ranks, two steps of decode in layer 5; rows of 8 float32."""
    spec = MoeLayerSpec(layer=5, module="m", experts=4, top_k=1)
    manifest = Manifest(
        run_id="run-1",
        created_unix_s=0.0,
        topology=Topology(ranks=2),
        model=ModelSpec(name="made", hidden_size=8, dtype="float32", moe_layers=(spec,)),
        data=DataSpec(condition="prose"),
    )
    writers = [RunWriter.create(path, manifest), RunWriter.join(path, rank=1)]
    for rank, writer in enumerate(writers):
        rows = routing_rows(
            step_N=np.arange(2),
            phase_N="decode",
            layer_N=5,
            source_rank=rank,
            tokens_N=LOAD_SPE[:, rank].sum(axis=1),
            load_NE=LOAD_SPE[:, rank],
        )
        writer.append("routing", rows)
    for writer in reversed(writers):
        writer.close()
    return path
