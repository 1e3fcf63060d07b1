"""nvidia-smi: logs of ``--query-gpu=... --format=csv``, with or without units, of one or several GPUs.

Times are local and without a zone. ``power.draw`` is, by GPU and driver, an average or instant power; where
``power.draw.instant`` is there, it is taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from observatory.interchange.importers.imported import ImportedRun, ImportOptions, Rows
from observatory.interchange.importers.sources import Source
from observatory.interchange.importers.telemetry import Telemetry, local_ns, scaled, telemetry_run
from observatory.run.manifest import RankPower

_WATTS, _PLAIN = scaled(1e3), scaled(1.0)


def _mask(cell: str) -> float | None:
    found = re.fullmatch(r"0[xX]0*([0-9a-fA-F]{0,13})", cell)
    return None if found is None else int(found[1] or "0", 16)


#: Columns of the query by ours, the first that is there; and how a cell is read.
_COLUMNS: dict[str, tuple[tuple[str, ...], Callable[[str], float | None]]] = {
    "power_mw": (("power.draw.instant", "power.draw"), _WATTS),
    "average_power_mw": (("power.draw.average",), _WATTS),
    "sm_clock_mhz": (("clocks.sm", "clocks.current.sm"), _PLAIN),
    "memory_clock_mhz": (("clocks.mem", "clocks.current.memory"), _PLAIN),
    "temperature_c": (("temperature.gpu",), _PLAIN),
    "memory_temperature_c": (("temperature.memory",), _PLAIN),
    "enforced_limit_mw": (("enforced.power.limit", "power.limit"), _WATTS),
    "event_reasons": (("clocks_event_reasons.active", "clocks_throttle_reasons.active"), _mask),
}
_NAMES = ("uuid", "gpu_uuid", "pci.bus_id", "gpu_bus_id", "index")
_UNIT = re.compile(r"\s*\[[^\]]*\]$")


def recognises(head: bytes) -> bool:
    """Whether a file begins like one of this format."""
    first = head.lstrip(b"\xef\xbb\xbf").split(b"\n", 1)[0].decode("utf-8", "replace")
    names = _header(first)
    return "timestamp" in names and any(
        name in names for name in ("pid", *(old for olds, _ in _COLUMNS.values() for old in olds))
    )


def read(sources: Sequence[Source], options: ImportOptions) -> ImportedRun:
    """Samples of the devices of a node.

    Raises:
        InterchangeError: a file is none of these, or does not say what is needed.
    """
    notes: list[str] = []
    power: dict[int, RankPower] = {}
    if options.utc_offset_s is None:
        notes.append("times are local, of a zone that is not stated, and taken as UTC (--utc-offset)")
    rows = _rows(sources, options.utc_offset_s or 0, power, notes)
    return telemetry_run(sources, options, rows, power=power, notes=notes)


def _rows(
    sources: Sequence[Source], offset_s: int, power: dict[int, RankPower], notes: list[str]
) -> Iterator[Rows]:
    telemetry = Telemetry(source=sources[0], kind="nvidia")
    torn = 0
    for source in sources:
        telemetry.source = source
        lines = source.lines()
        header = _header(next(lines, ""))
        read = _readers(source, header)
        if "power.draw.instant" not in header and "power.draw" in header:
            notes.append(f"{source.name}: power.draw is instant power or an average, by GPU and driver")
        for line in lines:
            cells = [cell.strip() for cell in line.split(", " if ", " in line else ",")]
            moment = local_ns(cells[0], offset_s) if len(cells) == len(header) else None
            if moment is None:
                torn += bool(line.strip())
                continue
            row = dict(zip(header, cells, strict=True))
            name = next((row[name] for name in _NAMES if name in row), "gpu")
            values = {column: reader(row[old]) for column, (old, reader) in read.items()}
            telemetry.add(name, moment, values, name=row.get("name") or row.get("gpu_name"))
            yield from telemetry.take()
    if torn:
        notes.append(f"{torn} lines that are torn, or repeat the header, are left out")
    if len(telemetry.devices) == 1 and "gpu" in telemetry.devices:
        notes.append("no column names the device: all rows are taken as of one")
    yield from telemetry.take(all_of_them=True)
    telemetry.finish(power, notes)


def _header(line: str) -> list[str]:
    return [_UNIT.sub("", name.strip()) for name in line.strip().split(",")]


def _readers(source: Source, header: Sequence[str]) -> dict[str, tuple[str, Callable[[str], float | None]]]:
    if "pid" in header:
        raise source.refused("lists processes, and no power or clock of a device", remedy="use --query-gpu")
    if "timestamp" not in header or header[0] != "timestamp":
        raise source.refused("does not begin with the column timestamp", remedy="add it to --query-gpu")
    found = {
        column: (next(old for old in olds if old in header), reader)
        for column, (olds, reader) in _COLUMNS.items()
        if any(old in header for old in olds)
    }
    if not found:
        raise source.refused("has no power, clock or temperature", expected="power.draw.instant, for one")
    return found
