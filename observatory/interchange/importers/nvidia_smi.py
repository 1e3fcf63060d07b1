"""nvidia-smi: logs of ``--query-gpu=... --format=csv``, with or without units, of one or several GPUs.

Times are local and without a zone. ``power.draw`` is, by GPU and driver, an average or instant power; where
``power.draw.instant`` is known, it is taken. Lines before the header, as job scripts print them, are skipped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from observatory.interchange.importers.imported import ImportedRun, ImportOptions, Rows
from observatory.interchange.importers.sources import Source
from observatory.interchange.importers.telemetry import Telemetry, local_ns, scaled, telemetry_run
from observatory.run.manifest import RankPower
from observatory.text import counted

_WATTS, _PLAIN = scaled(1e3), scaled(1.0)


def _mask(cell: str) -> float | None:
    found = re.fullmatch(r"0[xX]0*([0-9a-fA-F]{0,13})", cell)
    return None if found is None else int(found[1] or "0", 16)


#: Columns of the query by ours, of which the first with a value counts; and how a cell is read.
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
_MOST_LINES_BEFORE = 100


def recognises(head: bytes) -> bool:
    """Whether a file begins like one of this format."""
    lines = head.decode("utf-8-sig", "replace").splitlines()[:_MOST_LINES_BEFORE]
    columns = {"pid", "used_gpu_memory", *(old for olds, _ in _COLUMNS.values() for old in olds)}
    if any("timestamp" in names and columns.intersection(names) for names in map(_header, lines)):
        return True
    return bool(lines) and local_ns(_cells(lines[0])[0], 0) is not None and " W" in lines[0]


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
        header = next(
            (names for names in map(_header, islice(lines, _MOST_LINES_BEFORE)) if "timestamp" in names), []
        )
        read = _readers(source, header)
        if "power.draw.instant" not in header and "power.draw" in header:
            notes.append(f"{source.name}: power.draw is instant power or an average, by GPU and driver")
        for line in lines:
            cells = _cells(line)
            row = dict(zip(header, cells, strict=True)) if len(cells) == len(header) else {}
            moment = local_ns(row.get("timestamp", ""), offset_s)
            if moment is None:
                torn += bool(line.strip())
                continue
            name = next((row[name] for name in _NAMES if name in row), "gpu")
            values = {
                column: next((value for old in olds if (value := reader(row[old])) is not None), None)
                for column, (olds, reader) in read.items()
            }
            telemetry.add(name, moment, values, name=row.get("name") or row.get("gpu_name"))
            yield from telemetry.take()
    if torn:
        which = "is torn or repeats" if torn == 1 else "are torn or repeat"
        notes.append(f"{counted(torn, 'line')} left out that {which} the header")
    if len(telemetry.devices) == 1 and "gpu" in telemetry.devices:
        notes.append("no column names the device: all rows are taken as of one")
    yield from telemetry.take(all_of_them=True)
    telemetry.finish(power, notes)


def _cells(line: str) -> list[str]:
    """Cells of a row; a comma without a blank, as in ``73,49 W``, separates nothing where others have one."""
    separator = next((part for part in (";", ", ") if part in line), ",")
    return [cell.strip() for cell in line.split(separator)]


def _header(line: str) -> list[str]:
    return [_UNIT.sub("", name.strip()) for name in re.split("[,;]", line.strip())]


def _readers(
    source: Source, header: Sequence[str]
) -> dict[str, tuple[list[str], Callable[[str], float | None]]]:
    if "timestamp" not in header:
        raise source.refused(
            "has no header with the column timestamp",
            remedy="add timestamp to --query-gpu, and leave noheader out of --format",
        )
    if "pid" in header:
        raise source.refused("lists processes, and no power or clock of a device", remedy="use --query-gpu")
    found = {
        column: ([old for old in olds if old in header], reader)
        for column, (olds, reader) in _COLUMNS.items()
        if any(old in header for old in olds)
    }
    if not found:
        raise source.refused("has no power, clock or temperature", expected="power.draw.instant, for one")
    return found
