"""Runs that state the size of their experts, for commands that predict times."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from observatory.run import RunWriter, routing_rows
from observatory.run.manifest import DataSpec, Manifest, ModelSpec, MoeLayerSpec, RankPower, Topology

EXPERTS, TOP_K = 16, 2


def sized_run(
    folder: Path,
    *,
    steps: int = 32,
    skew: float = 4.0,
    phase: str = "prefill",
    tokens: int = 4096,
    watts: float | None = None,
    devices: tuple[str, ...] = ("GPU-a",),
) -> Path:
    """Two layers of 16 experts on one source rank; the first four have ``skew`` times the others' load.

    With ``watts`` a device GPU-a draws them for all of the steps, of 300 ms each, of a program on four ranks;
    ``devices`` are those that the captured rank says it computes on.
    """
    generator = np.random.default_rng(0)
    share_E = np.array([skew] * 4 + [1.0] * 12)
    layers = tuple(
        MoeLayerSpec(layer=layer, module=f"m.{layer}", experts=EXPERTS, top_k=TOP_K, shared_experts=0)
        for layer in (0, 1)
    )
    model = ModelSpec(
        name="sized", hidden_size=2048, expert_bytes=3 * 2048 * 1024 * 2, dtype="bfloat16", moe_layers=layers
    )
    manifest = Manifest(
        run_id="sized",
        created_unix_s=1.0,
        model=model,
        data=DataSpec(condition="prose", real=True),
        topology=Topology(ep=1 if watts is None else 4),
    )
    with RunWriter.create(folder, manifest) as writer:
        for layer in (0, 1):
            load_SE = generator.multinomial(TOP_K * tokens, share_E / share_E.sum(), size=steps)
            writer.append(
                "routing",
                routing_rows(
                    step_N=np.arange(steps),
                    phase_N=phase,
                    layer_N=np.full(steps, layer),
                    source_rank=0,
                    tokens_N=np.full(steps, tokens),
                    load_NE=load_SE,
                ),
            )
        if watts is not None:
            _append_power(writer, steps, phase, watts)
            writer.set_power(RankPower(own_devices=devices))
    return folder


def _append_power(writer: RunWriter, steps: int, phase: str, watts: float) -> None:
    start_ns = np.arange(steps) * 300_000_000
    spans = pd.DataFrame({"step": np.arange(steps), "phase": phase, "name": "phase", "start_ns": start_ns})
    spans = spans.assign(source_rank=np.int32(0), end_ns=start_ns + 300_000_000)
    time_ns = np.arange(-500_000_000, start_ns[-1] + 800_000_000, 20_000_000)
    power = pd.DataFrame({"time_ns": time_ns, "device_uuid": "GPU-a", "power_mw": int(1e3 * watts)})
    power["energy_mj"] = ((time_ns - time_ns[0]) * watts * 1e-6).astype(np.int64)
    writer.append("spans", pa.Table.from_pandas(spans, preserve_index=False))
    writer.append("power", pa.Table.from_pandas(power, preserve_index=False))
