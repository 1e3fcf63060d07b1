"""Zeus: power over time of its first monitor, ``Time,Power`` in mW and local time, a file for each GPU.

Tables of windows hold the energy of whole stretches, and no sample: there is nothing to divide among phases.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from observatory.interchange.importers.imported import ImportedRun, ImportOptions, Rows
from observatory.interchange.importers.sources import Source
from observatory.interchange.importers.telemetry import Telemetry, local_ns, scaled, telemetry_run
from observatory.run.manifest import RankPower
from observatory.text import counted

_MONITOR = ["Time", "Power"]
_WINDOWS = ["start_time", "window_name", "elapsed_time"]
_LIMITS = ["power_limit", "time_per_epoch", "average_power"]


def recognises(head: bytes) -> bool:
    """Whether a file begins like one of this format."""
    header = head.split(b"\n", 1)[0].decode("utf-8", "replace").strip().split(",")
    return header == _MONITOR or header[:3] == _WINDOWS or set(_LIMITS) <= set(header)


def read(sources: Sequence[Source], options: ImportOptions) -> ImportedRun:
    """Samples of devices, one in each file.

    Raises:
        InterchangeError: a file is none of these, or holds no samples.
    """
    notes: list[str] = []
    power: dict[int, RankPower] = {}
    rows = _rows(sources, options, power, notes)
    return telemetry_run(sources, options, rows, power=power, notes=notes)


def _rows(
    sources: Sequence[Source], options: ImportOptions, power: dict[int, RankPower], notes: list[str]
) -> Iterator[Rows]:
    telemetry = Telemetry(source=sources[0], kind="nvidia")
    milliwatts = scaled(1.0)
    torn = 0
    if options.utc_offset_s is None:
        notes.append("times are local, of a zone that is not stated, and taken as UTC (--utc-offset)")
    for number, source in enumerate(sources):
        telemetry.source = source
        lines = (line.split(",") for line in source.lines())
        header = next(lines, [])
        if header[:3] == _WINDOWS:
            raise source.refused("states the energy of whole windows", expected="power or energy over time")
        if header != _MONITOR:
            raise source.refused("states no power over time", expected="columns Time and Power")
        for cells in lines:
            moment = local_ns(cells[0], options.utc_offset_s or 0) if len(cells) == len(header) else None
            if moment is None:
                torn += 1
                continue
            telemetry.add(f"gpu {number}", moment, {"power_mw": milliwatts(cells[1])})
            yield from telemetry.take()
    if torn:
        notes.append(f"{counted(torn, 'line')} without a time or torn, left out")
    yield from telemetry.take(all_of_them=True)
    telemetry.finish(power, notes)
