"""ClusterCockpit: metrics of accelerators in InfluxDB's line protocol.

``<metric>,hostname=<host>,type=accelerator,type-id=<PCI id> value=<x> <time>``. Times are Unix times in
seconds to nanoseconds: the unit follows from their size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from observatory.interchange.importers.imported import ImportedRun, ImportOptions, Rows
from observatory.interchange.importers.sources import Source
from observatory.interchange.importers.telemetry import Telemetry, telemetry_run, unix_ns
from observatory.run.manifest import RankPower
from observatory.text import listing

#: Columns by the names of ClusterCockpit's collectors (older ones end in ``_report``); their unit in ours.
_METRICS = {
    "nv_power_usage": ("power_mw", 1e3),
    "acc_power": ("power_mw", 1e3),
    "rocm_avg_power": ("average_power_mw", 1e3),
    "nv_sm_clock": ("sm_clock_mhz", 1.0),
    "rocm_gfx_clock": ("sm_clock_mhz", 1.0),
    "nv_mem_clock": ("memory_clock_mhz", 1.0),
    "rocm_u_clock": ("memory_clock_mhz", 1.0),
    "nv_temp": ("temperature_c", 1.0),
    "rocm_temp_hotspot": ("temperature_c", 1.0),
    "rocm_temp_mem": ("memory_temperature_c", 1.0),
    "nv_power_max_limit": ("enforced_limit_mw", 1e3),
}
_MOST_NAMES = 64
_LINE = re.compile(r"([^,\s]+),(\S+)\s+(\S+)(?:\s+(-?\d{1,19}))?\s*")


def recognises(head: bytes) -> bool:
    """Whether a file begins like one of this format."""
    lines = head.decode("utf-8-sig", "replace").split("\n")
    return any("type=accelerator" in line and _LINE.fullmatch(line.strip()) for line in lines)


def read(sources: Sequence[Source], options: ImportOptions) -> ImportedRun:
    """Samples of accelerators.

    Raises:
        InterchangeError: a line is none of this format.
    """
    notes = ["nv_power_usage is taken as instant power; by GPU and driver it is an average"]
    power: dict[int, RankPower] = {}
    rows = _rows(sources, power, notes)
    return telemetry_run(sources, options, rows, power=power, notes=notes)


def _rows(sources: Sequence[Source], power: dict[int, RankPower], notes: list[str]) -> Iterator[Rows]:
    telemetry = Telemetry(source=sources[0], kind="accelerator")
    others: dict[str, None] = {}
    for source in sources:
        telemetry.source = source
        for line in source.lines():
            if not line.strip() or line.startswith("#"):
                continue
            found = _LINE.fullmatch(line)
            if found is None:
                raise source.refused(f"has a line that is none of the line protocol: {line[:80]!r}")
            tags = dict(item.split("=", 1) for item in found[2].split(",") if "=" in item)
            fields = dict(item.split("=", 1) for item in found[3].split(",") if "=" in item)
            metric = found[1].removesuffix("_report")
            if tags.get("type") != "accelerator" or "stype" in tags:
                continue
            if metric not in _METRICS:
                if len(others) < _MOST_NAMES:
                    others.setdefault(metric[:64])
                continue
            if found[4] is None:
                raise source.refused("has a value without a time")
            column, factor = _METRICS[metric]
            name = f"{tags.get('hostname', '')} {tags.get('type-id', '')}".strip() or "accelerator"
            moment = unix_ns(source, int(found[4]))
            telemetry.add(
                name, moment, {column: _number(fields.get("value"), factor)}, bus_id=tags.get("type-id")
            )
            yield from telemetry.take()
    if others:
        notes.append(f"metrics that are left out: {listing(sorted(others), most=8)}")
    yield from telemetry.take(all_of_them=True)
    telemetry.finish(power, notes)


def _number(text: str | None, factor: float) -> float | None:
    try:
        return float((text or "").removesuffix("i").removesuffix("u")) * factor
    except ValueError:
        return None
