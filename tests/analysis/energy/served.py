"""A server's load on a simulated sensor."""

from __future__ import annotations

import numpy as np
import pandas as pd

from observatory.run.manifest import DeviceSpec
from tests.devices.sensor import Load, join, spans_of, steps

H100 = "NVIDIA H100 80GB HBM3"
UUID = "GPU-00000000-0000-4000-8000-000000000000"
DEVICE = DeviceSpec(kind="gpu", name=H100, uuid=UUID)
PREFILL, DECODE, WAIT = ("prefill", 150.0, 650.0), ("decode", 10.0, 310.0), ("", 200.0, 80.0)


def numbered(load: Load) -> pd.DataFrame:
    """Spans in which every phase is a step of its own."""
    spans = spans_of(load)
    return spans.assign(step=np.arange(len(spans)))


def served(seed: int = 0) -> Load:
    """A server's run, then one long decode: both methods have something to do."""
    return join(
        steps([PREFILL, *[DECODE] * 30, WAIT], seconds=15, jitter=0.05, seed=seed),
        steps([DECODE], seconds=6, jitter=0.02, seed=seed),
        gap_ms=1400,
    )
