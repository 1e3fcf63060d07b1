"""Ranks that state where they ran."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from observatory.run.manifest import ClockSpec, CoreSpec, RankStatus
from observatory.run.provenance import Accelerator, FabricLink, HostSpec, RankProvenance

_GIB = 1 << 30


def placed_rank(
    rank: int,
    *,
    node: int,
    versions: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    ahead_ms: float | None = 0.0,
    uncertainty_ms: float = 0.02,
    **fields: Any,
) -> RankStatus:
    """A rank on a node with two GPUs and InfiniBand.

    Args:
        rank: its number.
        node: of its node.
        versions: besides those that all ranks have.
        environment: its settings.
        ahead_ms: of its node's wall clock; None where the ranks' clocks were not aligned.
        uncertainty_ms: how well the clocks are aligned.
        fields: of `RankProvenance`.
    """
    offset_ns = None if ahead_ms is None else node * 10**12  # monotonic clocks begin when a node boots
    clock = ClockSpec(
        method="none" if offset_ns is None else "ping-pong" if node else "shared clock",
        offset_ns=offset_ns,
        uncertainty_ns=None if offset_ns is None else round(uncertainty_ms * 1e6) if node else 0,
        identity=f"{node:016x}",
        unix_minus_monotonic_ns=1_700_000_000 * 10**9 + node * 10**12 + round((ahead_ms or 0.0) * 1e6),
    )
    provenance = RankProvenance.model_validate(
        {
            "machine": HostSpec(name=f"host{node}", cpu="EPYC 9654", cpus=96, memory_bytes=512 * _GIB),
            "node": f"n{node}",
            "numa_nodes": "0",
            "memory_nodes": "0",
            "memory_limit_bytes": 64 * _GIB,
            "other_jobs": 0,
            "other_users": 0,
            "accelerators": [
                Accelerator(bus_id=f"0000:{bus}b:00.0", vendor="nvidia", numa_node=bus) for bus in range(2)
            ],
            "fabric": [FabricLink(kind="infiniband", name="mlx5_0/1", rate_gbit_s=400.0, up=True)],
            "versions": {"python": "3.11.7", "torch": "2.13.0", **(versions or {})},
            "environment": {"OMP_NUM_THREADS": "8", **(environment or {})},
            **fields,
        }
    )
    return RankStatus(
        rank=rank,
        state="complete",
        host=f"host{node}",
        clock=clock,
        cores=CoreSpec(host=f"host{node}", machine=f"m{node}", cpus="0-7"),
        provenance=provenance,
    )


def place_ranks(run: Path, *statuses: RankStatus) -> Path:
    """Let the ranks of a run state where they ran."""
    for status in statuses:
        path = run / "ranks" / f"rank-{status.rank:05d}.json"
        stated = status.model_dump(mode="json", include={"host", "clock", "cores", "provenance"})
        path.write_text(json.dumps({**json.loads(path.read_text()), **stated}))
    return run
