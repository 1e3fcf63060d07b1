"""Runs with power whose load is known, and sweeps of devices that do not exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from observatory.run.documents.clock_sweep import ClockSweep
from observatory.run.manifest import DataSpec, DeviceSpec
from tests.analysis.energy.runs import write_energy_run
from tests.devices.sensor import Load, SimulatedSensor, join, spans_of, steps
from tests.devices.synthetic_device import DEVICES, made_sweep

UUID = "GPU-00000000-0000-4000-8000-000000000000"
DEVICE = DeviceSpec(kind="gpu", name="NVIDIA H100 80GB HBM3", uuid=UUID, enforced_limit_mw=700_000)


def a_load() -> Load:
    """Six seconds of prefill, a rest, six seconds of decode: each fills windows of its own."""
    return join(
        steps([("prefill", 150.0, 650.0)], seconds=6, jitter=0.02),
        steps([("decode", 10.0, 310.0)], seconds=6, jitter=0.02, seed=1),
        gap_ms=1500,
    )


def samples_of(load: Load, **sensor: Any) -> pd.DataFrame:
    """Samples with clocks, temperature and event reasons: 1755 MHz and a power cap while it prefills."""
    frame = SimulatedSensor(**sensor).sample(load, poll_ms=50.0)
    spans = spans_of(load)
    time_ns = frame["time_ns"].to_numpy()
    at = np.searchsorted(spans["start_ns"].to_numpy(), time_ns, side="right") - 1
    running = (at >= 0) & (time_ns < spans["end_ns"].to_numpy()[np.maximum(at, 0)])
    name = np.where(running, spans["phase"].to_numpy(dtype=object)[np.maximum(at, 0)], "")
    return frame.assign(
        device_uuid=UUID,
        sm_clock_mhz=pd.array(np.where(name == "", 345, np.where(name == "prefill", 1755, 1980)), "Int32"),
        memory_clock_mhz=pd.array(np.full(len(frame), 2619), "Int32"),
        temperature_c=pd.array(np.full(len(frame), 51), "Int32"),
        event_reasons=pd.array(np.where(name == "", 0x1, np.where(name == "prefill", 0x4, 0)), "Int64"),
        enforced_limit_mw=pd.array(np.full(len(frame), 700_000), "Int64"),
    )


def a_power_run(
    path: Path, *, power: pd.DataFrame | None = None, load: Load | None = None, **manifest: Any
) -> Path:
    """A run of `a_load` with 2048 input tokens a prefill step and 16 output tokens a decode step."""
    load = load or a_load()
    spans = spans_of(load)
    given = {"devices": (DEVICE,), "data": DataSpec(condition="prose", real=True), **manifest}
    return write_energy_run(
        path,
        power=samples_of(load) if power is None else power,
        spans=[spans.assign(step=np.arange(len(spans)))],
        tokens={"prefill": 2048, "decode": 16},
        **given,
    )


def a_sweep(*names: str, **options: Any) -> ClockSweep:
    """A sweep of the devices of these names, with caps."""
    given: dict[str, Any] = {
        "locks_mhz": (600, 780, 960, 1140, 1320, 1500, 1680, 1980), "caps_w": (200.0, 250.0, 300.0),
        "repeats": 3, "time_noise": 0.002, "energy_noise": 0.004,
    }  # fmt: skip
    return made_sweep([DEVICES[name] for name in names or ("memory-bound",)], **{**given, **options})
