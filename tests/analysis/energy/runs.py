"""Runs with power whose truth is known: a load, its spans, and what a simulated sensor shows of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from observatory.analysis.energy import Timeline, make_timeline
from observatory.reasons import Reason
from observatory.run import RunWriter, routing_rows
from observatory.run.manifest import (
    ClockSpec,
    DeviceCalibration,
    Manifest,
    ModelSpec,
    MoeLayerSpec,
    RankPower,
)
from tests.devices.sensor import Load, spans_of


def timeline_of(load: Load) -> Timeline:
    """What ran when, of a load whose names are phases."""
    spans = spans_of(load)
    return make_timeline(spans["phase"].tolist(), spans["start_ns"].to_numpy(), spans["end_ns"].to_numpy())


def codes(*reasons: Reason | None) -> set[str]:
    """Codes of reasons and of all that they follow from."""
    known = [reason for reason in reasons if reason is not None]
    return {str(reason.code) for reason in known}.union(*(codes(*reason.because) for reason in known))


def write_energy_run(
    path: Path,
    *,
    power: pd.DataFrame,
    spans: Sequence[pd.DataFrame],
    tokens: Mapping[str, int] | None = None,
    clocks: Sequence[ClockSpec | None] = (None,),
    own_devices: Sequence[tuple[str, ...]] = (),
    calibration: DeviceCalibration | None = None,
    **manifest: Any,
) -> Path:
    """Write a run directory.

    Args:
        path: where.
        power: rows of a power table; ``source_rank`` says into whose folder.
        spans: spans of each rank.
        tokens: tokens that each rank routes per step, by phase; None: no routing rows.
        clocks: of each rank.
        own_devices: UUIDs of the devices that each rank says it computes on.
        calibration: of all devices.
        **manifest: further fields.
    """
    ranks = len(spans)
    about = Manifest.model_validate(
        {
            "run_id": "energy",
            "created_unix_s": 1.0,
            "model": ModelSpec(
                name="known", moe_layers=(MoeLayerSpec(layer=0, module="m.0", experts=4, top_k=2),)
            ),
            "topology": {"ranks": ranks},
            **manifest,
        }
    )
    writers = [RunWriter.create(path, about)]
    writers += [RunWriter.join(path, rank=rank) for rank in range(1, ranks)]
    for rank, writer in enumerate(writers):
        own = power[power["source_rank"] == rank].drop(columns="source_rank")
        if len(own):
            whole = {name: "Int64" for name in ("power_mw", "energy_mj") if name in own}
            writer.append("power", pa.Table.from_pandas(own.astype(whole), preserve_index=False))
        if len(spans[rank]):
            table = spans[rank].assign(source_rank=np.int32(rank))
            writer.append("spans", pa.Table.from_pandas(table, preserve_index=False))
        if tokens is not None:
            _append_routing(writer, spans[rank], tokens, rank)
        clock = clocks[rank] if rank < len(clocks) else None
        if clock is not None:
            writer.set_clock(clock)
    for rank, writer in enumerate(writers):
        own = own_devices[rank] if rank < len(own_devices) else ()
        measured = {} if calibration is None else dict.fromkeys(power["device_uuid"].unique(), calibration)
        writer.set_power(RankPower(own_devices=own, calibration=measured))
    for writer in reversed(writers):
        writer.close(steps=int(max(frame["step"].max() for frame in spans if len(frame)) + 1))
    return path


def _append_routing(writer: RunWriter, spans: pd.DataFrame, tokens: Mapping[str, int], rank: int) -> None:
    """Two layers that see the same tokens; half of the assignments of each token on two experts."""
    steps = spans[spans["name"] == "phase"].drop_duplicates(["step", "phase"])
    steps = steps[steps["phase"].isin(tokens)]
    count = steps["phase"].map(tokens).to_numpy(np.int64)
    for layer in (0, 1):
        writer.append(
            "routing",
            routing_rows(
                step_N=steps["step"].to_numpy(),
                phase_N=steps["phase"].to_numpy(),
                layer_N=np.full(len(steps), layer),
                source_rank=rank,
                tokens_N=count,
                load_NE=np.outer(count, [1, 1, 0, 0]),
            ),
        )
