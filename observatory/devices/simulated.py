"""A recording of a simulated GPU, to try everything about power where no device reports it.

    python -m observatory.devices.simulated gpu.parquet
    observatory profile my-moe --power replay:gpu.parquet --out runs/p

Nothing in it was measured: power switches between 90 W and 420 W every 1.5 s under a limit of 700 W, the
energy counter is its integral, and clock and temperature follow. What is computed from it holds for this
model of a GPU alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

#: Stands in every table and figure that shows the device.
SIMULATED_UUID = "simulated device"
_IDLE_MW, _BUSY_MW, _LIMIT_MW = 90_000, 420_000, 700_000
_PERIOD_S, _HALF_WAVE_S = 0.05, 1.5


def simulated_rows(seconds: float) -> pa.Table:
    """Samples every 50 ms, as the power table of a run holds them (docs/run-format.md)."""
    time_s = np.arange(0.0, seconds, _PERIOD_S)
    is_busy = (time_s // _HALF_WAVE_S).astype(np.int64) % 2 == 1
    power_mw = np.where(is_busy, _BUSY_MW, _IDLE_MW)
    energy_mj = np.concatenate([[0.0], np.cumsum(power_mw[:-1] * _PERIOD_S)])
    columns = {
        "time_ns": (time_s * 1e9).astype(np.int64),
        "power_mw": power_mw,
        "average_power_mw": power_mw,
        "energy_mj": energy_mj.astype(np.int64),
        "sm_clock_mhz": np.where(is_busy, 1830, 345).astype(np.int32),
        "memory_clock_mhz": np.full(time_s.size, 2619, np.int32),
        "temperature_c": np.where(is_busy, 58, 41).astype(np.int32),
        "event_reasons": np.where(is_busy, 0, 1),
        "enforced_limit_mw": np.full(time_s.size, _LIMIT_MW),
        "read_ns": np.full(time_s.size, 1_000_000),
    }
    return pa.table({"device_uuid": [SIMULATED_UUID] * time_s.size, **columns})


def write_simulated(out: Path, *, seconds: float) -> None:
    """Write a recording of so many seconds."""
    pq.write_table(simulated_rows(seconds), out)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the recording."""
    parser = argparse.ArgumentParser(prog="python -m observatory.devices.simulated", description=__doc__)
    parser.add_argument("out", type=Path, help="Parquet file to write")
    parser.add_argument("--seconds", type=float, default=600.0, help="length of the recording (default: 600)")
    arguments = parser.parse_args(argv)
    write_simulated(arguments.out, seconds=arguments.seconds)
    sys.stderr.write(f"{arguments.out}: {arguments.seconds:g} s of a simulated GPU; nothing was measured\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
