"""Samples of devices on their way from other tools' files into the ``power`` table."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import pyarrow as pa

from observatory.interchange.importers.imported import UNIX_CLOCK, ImportedRun, ImportOptions, Rows
from observatory.interchange.importers.sources import Source
from observatory.run.files import one_line
from observatory.run.manifest import DeviceSpec, ModelSpec, RankPower
from observatory.run.tables import POWER_SCHEMA
from observatory.text import counted

_BATCH_ROWS = 1 << 16
_MOST_DEVICES = 1024
#: 1980 to 2040 in nanoseconds of Unix time, or a monotonic clock of as much.
_TIMES = range(-(1 << 61), 1 << 61)
#: Largest values that the table takes; what is beyond is a reading that cannot be.
_MOST = {
    "power_mw": 1 << 40,
    "average_power_mw": 1 << 40,
    "enforced_limit_mw": 1 << 40,
    "energy_mj": 1 << 61,
    "sm_clock_mhz": 1 << 20,
    "memory_clock_mhz": 1 << 20,
    "temperature_c": 1 << 20,
    "memory_temperature_c": 1 << 20,
    "event_reasons": 1 << 62,
}
_LEAST_C: Final = -273


@dataclass(slots=True)
class Telemetry:
    """Rows of the ``power`` table as they are read, and the devices that they are of.

    Values of one device and time may come one by one; a later time ends the row.

    Attributes:
        source: the file, for messages.
        kind: of its devices.
        devices: by what names them.
        left_out: rows whose time was not after that of the row before.
    """

    source: Source
    kind: str
    devices: dict[str, DeviceSpec] = field(default_factory=dict)
    left_out: int = 0
    _open: dict[str, dict[str, int]] = field(default_factory=dict)
    _done: list[dict[str, int | str]] = field(default_factory=list)

    def add(self, device: str, time_ns: int, values: dict[str, float | None], **facts: str | None) -> None:
        """Take values of one device at one time.

        Args:
            device: what names it.
            time_ns: when.
            values: by column, in its unit; None and what is not finite is not known.
            facts: of its `DeviceSpec`.

        Raises:
            InterchangeError: too many devices, or a time that cannot be stored.
        """
        name = one_line(device, 200)
        if time_ns not in _TIMES:
            raise self.source.refused("holds a time that cannot be")
        if name not in self.devices:
            if len(self.devices) == _MOST_DEVICES:
                raise self.source.refused(f"names over {_MOST_DEVICES} devices")
            known = {key: one_line(value, 200) for key, value in facts.items() if value}
            self.devices[name] = DeviceSpec.model_validate({"kind": self.kind, "uuid": name, **known})
        row = self._open.get(name)
        if row is not None and time_ns < row["time_ns"]:
            self.left_out += 1
            return
        if row is None or time_ns > row["time_ns"]:
            self._end(name)
            row = self._open[name] = {"time_ns": time_ns}
        row.update(
            {key: number for key, value in values.items() if (number := _stored(key, value)) is not None}
        )

    def take(self, *, all_of_them: bool = False) -> Iterator[Rows]:
        """Rows that are complete and enough for a batch; at the end, the rest."""
        if all_of_them:
            for name in tuple(self._open):
                self._end(name)
        if self._done and (all_of_them or len(self._done) >= _BATCH_ROWS):
            names = {"time_ns", "device_uuid"}.union(*self._done)
            schema = pa.schema([item for item in POWER_SCHEMA if item.name in names])
            yield Rows(table="power", rank=0, batch=pa.RecordBatch.from_pylist(self._done, schema=schema))
            self._done = []

    def finish(self, power: dict[int, RankPower], notes: list[str]) -> None:
        """State the devices, and what was left out."""
        power[0] = RankPower(own_devices=tuple(self.devices), sampled=tuple(self.devices.values()))
        if self.left_out:
            notes.append(
                f"{self.source.name}: {counted(self.left_out, 'reading')} left out whose time is "
                "before that of the one before"
            )

    def _end(self, name: str) -> None:
        row = self._open.pop(name, None)
        if row is not None and len(row) > 1:  # a row of a time alone says nothing
            self._done.append({"device_uuid": name, **row})


def telemetry_run(
    sources: Sequence[Source],
    options: ImportOptions,
    rows: Iterable[Rows],
    *,
    power: dict[int, RankPower],
    notes: list[str],
) -> ImportedRun:
    """A run of samples alone, whose times are Unix times; ``power`` and ``notes`` grow as rows are taken."""
    return ImportedRun(
        version=None,
        model=ModelSpec(name=options.model_name(sources)),
        ranks=1,
        rows=rows,
        power=power,
        clocks={0: UNIX_CLOCK},
        notes=notes,
    )


def _stored(column: str, value: float | None) -> int | None:
    if value is None or not math.isfinite(value):
        return None
    least = _LEAST_C if column.endswith("_c") else 0
    return round(value) if least <= value <= _MOST[column] else None


def scaled(factor: float) -> Callable[[str], float | None]:
    """A reader of numbers with or without a unit behind them; None where it is no number."""

    def read(cell: str) -> float | None:
        words = cell.split()
        if not words or len(words) > 2:
            return None
        try:
            return float(words[0].replace(",", ".")) * factor
        except ValueError:
            return None

    return read


_LOCAL = re.compile(r"(\d{4})[-/](\d\d)[-/](\d\d)[ T](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?")
_EPOCH = datetime.datetime(1970, 1, 1)


def local_ns(text: str, offset_s: int) -> int | None:
    """Nanoseconds of Unix time of a local time; None where the text is none.

    Args:
        text: date and time of day, ``2024/05/01 12:00:00.123`` or with dashes.
        offset_s: local time minus UTC, seconds.
    """
    found = _LOCAL.fullmatch(text.strip())
    if found is None:
        return None
    try:
        since = datetime.datetime(*map(int, found.groups()[:6])) - _EPOCH  # type: ignore[arg-type]
    except ValueError:
        return None
    return (since.days * 86400 + since.seconds - offset_s) * 10**9 + int((found[7] or "").ljust(9, "0"))


def unix_ns(source: Source, moment: float) -> int:
    """Nanoseconds of a Unix time whose unit follows from its size: s, ms, us or ns.

    Raises:
        InterchangeError: it is none between 2001 and 2043.
    """
    for unit_ns in (10**9, 10**6, 10**3, 1):
        if 10**18 <= moment * unit_ns < 1 << 61:
            return moment * unit_ns if isinstance(moment, int) else round(moment * unit_ns)
    raise source.refused("has a time that is none between 2001 and 2043")
