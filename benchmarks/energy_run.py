"""A run with a day of power of 8 devices as the sampler writes it: all every 50 ms, a flush every 10 s.

One rank per device, rank 0 samples all. Each rank serves batches: prefill for 3 to 9 s, decode for 8 to 30 s,
a pause of 0.2 to 3 s; spans of about a second. A device draws 620 W, 340 W and 95 W in them, give or take 5 %
per stretch. Its counter is updated every 100 ms; its power, the mean of 25 ms with 1 % noise, too. No GPU
takes part.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from observatory.host.provenance import new_manifest
from observatory.run import RunWriter, TableAppender
from observatory.run.appender import _GrowingPart
from observatory.run.manifest import DeviceSpec, ModelSpec, MoeLayerSpec, RankPower, Topology

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

POLL_NS, FLUSH_NS, UPDATE_NS, WINDOW_NS = 50_000_000, 10_000_000_000, 100_000_000, 25_000_000
#: Name, shortest and longest stretch in seconds, mean power in mW.
STRETCHES = (("prefill", 3.0, 9.0, 620e3), ("decode", 8.0, 30.0, 340e3), ("", 0.2, 3.0, 95e3))
#: Length of a span, and what lies between two of them.
SPAN_NS, BETWEEN_NS = 1_000_000_000, 1_000_000
#: Bits of event reasons, and clock, per stretch: a power cap while it prefills.
REASONS, CLOCKS_MHZ = np.array([0x4, 0, 0x1]), np.array([1755, 1980, 345])


class Device:
    """One device: what it draws, and what its sensors show of it."""

    def __init__(self, number: int, start_ns: int, end_ns: int) -> None:
        random = np.random.default_rng([11, number])
        count = 3 * int((end_ns - start_ns) / 10e9 + 3)
        self.kind_M = np.arange(count) % 3
        low, high, mean = (
            np.array(column)[self.kind_M] for column in zip(*(s[1:] for s in STRETCHES), strict=True)
        )
        edge_ns = start_ns + np.concatenate([[0], np.cumsum(random.uniform(low, high) * 1e9)])
        self.edge_ns_M: Int64 = edge_ns.astype(np.int64)
        self.power_mw_M = mean * (1 + 0.05 * random.uniform(-1, 1, count))
        spent = np.diff(self.edge_ns_M) * 1e-9 * self.power_mw_M
        self._until_mj_M = np.concatenate([[0.0], np.cumsum(spent)])
        self.uuid = f"GPU-00000000-0000-4000-8000-{number:012d}"
        self._period_ns = UPDATE_NS * (1 + 1e-4 * random.uniform(-1, 1))
        self._first_ns = start_ns + random.uniform(0, UPDATE_NS)
        self._noise_K = 1 + 0.01 * random.standard_normal(int((end_ns - start_ns) / self._period_ns) + 3)
        self._random = random

    def _energy_mj(self, time_ns: Float64) -> Float64:
        return np.interp(time_ns, self.edge_ns_M, self._until_mj_M)

    def columns(self, due_ns: Int64) -> dict[str, Int64]:
        """Columns of the power table for the instants at which it is due to be read."""
        late_ns = self._random.exponential(60e3, len(due_ns)).astype(np.int64)
        read_ns = 200_000 + self._random.exponential(50e3, len(due_ns)).astype(np.int64)
        time_ns = due_ns + late_ns
        number = np.maximum(np.floor((time_ns - self._first_ns) / self._period_ns), 0).astype(np.int64)
        update_ns = self._first_ns + number * self._period_ns
        drawn_mj = self._energy_mj(update_ns) - self._energy_mj(update_ns - WINDOW_NS)
        kind = self.kind_M[np.searchsorted(self.edge_ns_M, time_ns, side="right") - 1]
        return {
            "time_ns": time_ns,
            "power_mw": np.rint(drawn_mj / (WINDOW_NS * 1e-9) * self._noise_K[number]).astype(np.int64),
            "energy_mj": 5_000_000 + self._energy_mj(update_ns).astype(np.int64),
            "sm_clock_mhz": CLOCKS_MHZ[kind],
            "memory_clock_mhz": np.full(len(due_ns), 2619),
            "temperature_c": np.array([61, 55, 44])[kind],
            "event_reasons": REASONS[kind],
            "enforced_limit_mw": np.full(len(due_ns), 700_000),
            "read_ns": read_ns,
            "late_ns": late_ns,
        }

    def spans(self, rank: int, end_ns: int) -> pa.Table:
        """Its stretches as spans of phases, in steps of a second."""
        starts, ends, phases = [], [], []
        for kind, first, last in zip(
            self.kind_M.tolist(), self.edge_ns_M[:-1], self.edge_ns_M[1:], strict=True
        ):
            if not STRETCHES[kind][0] or last > end_ns:
                continue
            edges = np.linspace(first, last, int((last - first) // SPAN_NS) + 1).astype(np.int64)
            starts.append(edges[:-1])
            ends.append(edges[1:] - BETWEEN_NS)
            phases.append(np.full(len(edges) - 1, STRETCHES[kind][0]))
        start_ns = np.concatenate(starts)
        return pa.table(
            {
                "step": np.arange(len(start_ns)),
                "phase": np.concatenate(phases).astype(str),
                "name": pa.array(["phase"] * len(start_ns)),
                "source_rank": pa.array(np.full(len(start_ns), rank), pa.int32()),
                "start_ns": start_ns,
                "end_ns": np.concatenate(ends),
            }
        )


class PartsOnce(TableAppender):
    """Leaves the parts that a `TableAppender` leaves, but writes each once, not again at every flush."""

    _kept: tuple[Path, _GrowingPart, pa.Schema] | None = None

    def _write(self, folder: Path, part: _GrowingPart, schema: pa.Schema) -> _GrowingPart:
        if self._kept is not None and self._kept[1].number != part.number:
            super()._write(*self._kept)
        self._kept = folder, part, schema
        return part

    def close(self) -> None:
        """Write what is left."""
        super().close()
        if self._kept is not None:
            super()._write(*self._kept)


def energy_run(path: Path, scale: float) -> None:
    """Write the run."""
    start_ns, count = 1_000_000_000_000, 8
    end_ns = start_ns + int(scale * 24 * 3600e9)
    devices = [Device(number, start_ns, end_ns) for number in range(count)]
    specs = tuple(
        DeviceSpec(kind="gpu", name="NVIDIA H100 80GB HBM3", uuid=device.uuid, enforced_limit_mw=700_000)
        for device in devices
    )
    layers = (MoeLayerSpec(layer=0, module="layers.0.mlp", experts=8, top_k=2),)
    manifest = new_manifest(
        model=ModelSpec(name="generated", moe_layers=layers), topology=Topology(ranks=count, gpus_per_node=8)
    ).model_copy(update={"devices": specs})
    creator = RunWriter.create(path, manifest)
    for rank, device in enumerate(devices):
        writer = creator if rank == 0 else RunWriter.join(path, rank=rank, run_id=manifest.run_id)
        writer.append("spans", device.spans(rank, end_ns))
        writer.flush()
        sampled = () if rank else specs
        writer.set_power(
            RankPower(own_devices=(device.uuid,), sampled=sampled, period_s=None if rank else POLL_NS * 1e-9)
        )
        if rank:
            writer.close()
    appender = PartsOnce(path, rank=0, ranks=count)
    names = np.array([device.uuid for device in devices])
    for first_ns in range(start_ns, end_ns, 60 * FLUSH_NS):
        due_ns = np.arange(first_ns, min(first_ns + 60 * FLUSH_NS, end_ns), POLL_NS)
        columns = [device.columns(due_ns + 300_000 * number) for number, device in enumerate(devices)]
        joined = {name: np.stack([one[name] for one in columns], axis=1).reshape(-1) for name in columns[0]}
        uuid = pa.array(np.tile(names, len(due_ns)).astype(str))
        rows = pa.table({**joined, "device_uuid": uuid})
        size = FLUSH_NS // POLL_NS * count
        for first in range(0, len(rows), size):
            appender.append("power", rows.slice(first, size))
            appender.flush()
    appender.close()
    creator.close()
