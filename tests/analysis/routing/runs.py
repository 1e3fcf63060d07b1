"""Small real runs, written with the program's own writer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from observatory.run import Run, RunWriter, open_run, routing_rows
from observatory.run.manifest import Manifest, ModelSpec, MoeLayerSpec, Topology


def write_run(
    path: Path,
    loads: Mapping[tuple[str, int], ArrayLike],
    *,
    top_k: int | None = 1,
    window_steps: int = 1,
    step_max_over_mean: float | None = None,
    tokens_per_row: int | None = None,
    missing: tuple[tuple[int, int], ...] = (),
) -> Run:
    """Write (S, P, E) loads per (phase, layer) and open the run.

    Tokens are assignments over K unless ``tokens_per_row`` says otherwise; ``missing`` names (step, rank)
    rows that the rank never wrote.
    """
    arrays = {key: np.asarray(load, dtype=np.int64) for key, load in loads.items()}
    ranks = max(load.shape[1] for load in arrays.values())
    experts = {layer: load.shape[2] for (_, layer), load in arrays.items()}
    manifest = Manifest(
        run_id="test",
        created_unix_s=0.0,
        window_steps=window_steps,
        topology=Topology(ranks=ranks),
        model=ModelSpec(
            name="tiny",
            moe_layers=tuple(
                MoeLayerSpec(layer=layer, module=f"layers.{layer}", experts=count, top_k=top_k)
                for layer, count in sorted(experts.items())
            ),
        ),
    )
    writers = [
        RunWriter.create(path, manifest),
        *(RunWriter.join(path, rank=rank) for rank in range(1, ranks)),
    ]
    for (phase, layer), load in arrays.items():
        for rank, writer in enumerate(writers):
            kept = np.array([s for s in range(load.shape[0]) if (s, rank) not in missing], dtype=np.int64)
            own = load[kept, rank]
            tokens = own.sum(axis=1) // (top_k or 1) if tokens_per_row is None else tokens_per_row
            writer.append(
                "routing",
                routing_rows(
                    step_N=kept * window_steps,
                    phase_N=phase,
                    layer_N=layer,
                    source_rank=rank,
                    tokens_N=tokens,
                    load_NE=own,
                    window_steps=window_steps,
                    step_max_over_mean_N=step_max_over_mean,
                ),
            )
    for writer in reversed(writers):
        writer.close()
    return open_run(path)


def uniform_loads(*, windows: int, tokens: int, top_k: int, experts: int, seed: int = 0) -> NDArray[np.int64]:
    """Loads of windows of tokens that each pick K different experts at random, (windows, E)."""
    generator = np.random.default_rng(seed)
    loads = np.empty((windows, experts), dtype=np.int64)
    for window in range(windows):
        keys = generator.random((tokens, experts))
        chosen = np.argpartition(keys, top_k - 1, axis=1)[:, :top_k]
        loads[window] = np.bincount(chosen.ravel(), minlength=experts)
    return loads
