"""Builders of small runs for the store's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from observatory.run import RunWriter, routing_rows
from observatory.run.manifest import Manifest, ModelSpec, Topology

WriteRun = Callable[..., Path]


def manifest_of(ranks: int = 1, **changes: object) -> Manifest:
    return Manifest.model_validate(
        {
            "run_id": "test-run",
            "created_unix_s": 1.0,
            "model": ModelSpec(name="m"),
            "topology": Topology(ranks=ranks),
            **changes,
        }
    )


def one_step(step: int, rank: int = 0, *, layers: int = 2, experts: int = 4) -> pa.RecordBatch:
    """Loads that follow from step, layer, rank and expert, so that a reader can recompute them."""
    load_NE = expected_load(step, rank, layers=layers, experts=experts)
    return routing_rows(
        step_N=step,
        phase_N="prefill",
        layer_N=np.arange(layers),
        source_rank=rank,
        tokens_N=step + 1,
        load_NE=load_NE,
    )


def expected_load(step: int, rank: int, *, layers: int = 2, experts: int = 4) -> np.ndarray:
    return (step * 7 + rank * 3 + np.arange(layers)[:, None] * 5 + np.arange(experts)[None, :]) % 11


@pytest.fixture
def write_run(tmp_path: Path, part_per_flush: None) -> WriteRun:  # noqa: ARG001 - asked for what it sets
    """Writes a whole run of ``ranks`` ranks, one part per ``steps_per_part`` steps."""

    def write(*, steps: int = 6, ranks: int = 1, steps_per_part: int = 3, name: str = "run") -> Path:
        path = tmp_path / name
        writers = [RunWriter.create(path, manifest_of(ranks))]
        writers += [RunWriter.join(path, rank=rank) for rank in range(1, ranks)]
        for writer in reversed(writers):
            for step in range(steps):
                writer.append("routing", one_step(step, writer.rank))
                if (step + 1) % steps_per_part == 0:
                    writer.flush()
            writer.close(steps=steps)
        return path

    return write
