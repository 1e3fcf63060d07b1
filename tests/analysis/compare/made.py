"""Runs and series with a known truth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from observatory.run import RunWriter, routing_rows
from observatory.run.manifest import DataSpec, DeviceSpec, Manifest, ModelSpec, MoeLayerSpec
from observatory.run.provenance import HostSpec
from observatory.run.tables import ROUTER_BIAS_SCHEMA, SPAN_SCHEMA

Float64 = NDArray[np.float64]


def autoregressive(steps: int, *, seed: int, correlation: float = 0.4) -> Float64:
    """A series with mean 0, deviation 1, and neighbours that resemble each other."""
    random = np.random.default_rng(seed)
    values = np.empty(steps)
    values[0] = random.normal()
    for step in range(1, steps):
        values[step] = correlation * values[step - 1] + np.sqrt(1 - correlation**2) * random.normal()
    return values


def made_run(
    path: Path,
    *,
    seed: int = 0,
    tokens_seed: int | None = None,
    steps: int = 24,
    layers: int = 2,
    experts: int = 8,
    ms: float = 10.0,
    skew: float = 0.0,
    started: float = 1_000_000.0,
    model: str = "made",
    condition: str = "prose",
    phases: tuple[str, ...] = ("prefill", "decode"),
    tokens: int = 64,
    times: bool = True,
    window_steps: int = 1,
    host: str = "node-a",
    share: Callable[[int], Float64] | None = None,
    bias: Callable[[int], Float64] | None = None,
    config: dict[str, object] | None = None,
    batch_size: int = 4,
    device_kind: str | None = None,
) -> Path:
    """A run with routing of top-2 and times of steps.

    Args:
        path: where it is written.
        seed: of its times.
        tokens_seed: of its loads; None: those of ``seed``. Equal seeds give equal loads.
        ms: mean time of a step; its noise is 5 %.
        window_steps: steps that each row folds; it is made as one step is.
        skew: how much more the first experts get.
        share: shares of the experts in a step; None: by ``skew``.
        bias: correction bias of each router in a step; None: they have none.
        batch_size: of its data, in sequences.
        device_kind: kind of its device; None: it states none.
        config: options of the manifest, on top of the seed of the tokens.
    """
    loads_seed = seed if tokens_seed is None else tokens_seed
    manifest = Manifest(
        run_id=f"id-{path.name}",
        created_unix_s=started,
        ended_unix_s=started + 1.0,
        window_steps=window_steps,
        config={"seed": loads_seed, "steps": steps, **(config or {})},  # type: ignore[dict-item]
        hosts=(HostSpec(name=host),),
        devices=() if device_kind is None else (DeviceSpec(kind=device_kind, name="made", uuid="0"),),
        model=ModelSpec(
            name=model,
            moe_layers=tuple(
                MoeLayerSpec(layer=layer, module=f"m.{layer}", experts=experts, top_k=2)
                for layer in range(layers)
            ),
        ),
        data=DataSpec(
            condition=condition, source="made", real=True, batch_size=batch_size, sequence_length=16
        ),
    )
    random = np.random.default_rng(loads_seed)
    with RunWriter.create(path, manifest) as writer:
        spans = []
        start_ns = 1
        for number, phase in enumerate(phases):
            noise = autoregressive(steps, seed=1000 * number + seed)
            for step in range(steps):
                at = (number * steps + step) * window_steps
                shares = share(at) if share is not None else np.exp(-skew * np.arange(experts) / experts)
                chances = np.asarray(shares) / np.sum(shares)
                writer.append(
                    "routing",
                    folded_rows(
                        window_steps,
                        step_N=np.full(layers, at),
                        phase_N=phase,
                        layer_N=np.arange(layers),
                        source_rank=0,
                        tokens_N=np.full(layers, tokens),
                        load_NE=random.multinomial(2 * tokens, chances, size=layers),
                    ),
                )
                lasts_ns = int(ms * 1e6 * (1 + 0.05 * noise[step]))
                spans.append(
                    {
                        "step": at, "phase": phase, "layer": None, "source_rank": 0, "name": "phase",
                        "start_ns": start_ns, "end_ns": start_ns + lasts_ns,
                    }
                )  # fmt: skip
                start_ns += lasts_ns + 1000
        if bias is not None:
            rows = [
                {"step": step, "layer": layer, "source_rank": 0, "bias": bias(step)}
                for step in range(steps * window_steps)
                for layer in range(layers)
            ]
            writer.append("router_bias", pa.Table.from_pylist(rows, schema=ROUTER_BIAS_SCHEMA))
        if times and spans:
            writer.append("spans", pa.Table.from_pylist(spans, schema=SPAN_SCHEMA))
    return path


def folded_rows(window_steps: int, **columns: Any) -> pa.Table:
    """Routing rows that state how many steps they fold."""
    rows = routing_rows(**columns)
    place = rows.schema.get_field_index("window_steps")
    windows = pa.array(np.full(len(rows), window_steps, dtype=np.int32))
    return rows.set_column(place, rows.schema.field(place), windows)


def series_of_runs(folder: Path, *, model: str = "made", runs: int = 14) -> Path:
    """A folder of runs, the last six of which are slower, on another machine."""
    for number in range(runs):
        late = number >= runs - 6
        made_run(
            folder / f"run{number}",
            seed=number,
            steps=8,
            phases=("decode",),
            started=1e9 + number,
            ms=15.0 if late else 10.0,
            host="node-b" if late else "node-a",
            model=model,
        )
    return folder
