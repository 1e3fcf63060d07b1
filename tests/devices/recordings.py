"""Recorded power tables for tests."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

UUID = "GPU-0ec04ded-0000-4000-8000-000000000000"


def recorded_rows(
    *, samples: int = 10, period_ns: int = 50_000_000, start_ns: int = 7_000_000_000, uuid: str = UUID
) -> pa.Table:
    """A GPU whose power climbs by 1 W a sample from 300 W; no memory temperature."""
    power_mw = [300_000 + 1000 * number for number in range(samples)]
    energy_mj = [2_000_000 + number * 300_000 * period_ns // 10**9 for number in range(samples)]
    return pa.table(
        {
            "time_ns": pa.array([start_ns + number * period_ns for number in range(samples)], pa.int64()),
            "device_uuid": [uuid] * samples,
            "power_mw": pa.array(power_mw, pa.int64()),
            "average_power_mw": pa.array(power_mw, pa.int64()),
            "energy_mj": pa.array(energy_mj, pa.int64()),
            "sm_clock_mhz": pa.array([1755] * samples, pa.int32()),
            "memory_clock_mhz": pa.array([2619] * samples, pa.int32()),
            "temperature_c": pa.array([50] * samples, pa.int32()),
            "event_reasons": pa.array([4] * samples, pa.int64()),
            "enforced_limit_mw": pa.array([700_000] * samples, pa.int64()),
            "read_ns": pa.array([1_200_000] * samples, pa.int64()),
        }
    )


def write_recording(path: Path, *, samples: int = 10, period_ns: int = 50_000_000) -> Path:
    pq.write_table(recorded_rows(samples=samples, period_ns=period_ns), path)
    return path
