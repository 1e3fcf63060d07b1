"""Plays a recorded power table as if it were a device: a run directory, or one Parquet file of such a table.

Two paces:

    "recorded"  every reading is the next row, with its own time; nothing waits
    "now"       the first reading maps the first row to this moment. A reading at t gives the last row at or
                before t, as a sensor holds its value, with t as its time. Where the recording has a hole of
                more than 3 usual periods, the readings inside it are None from 3 periods on

It never starts again. After the last row (and at the pace "now", one usual period later) every further
reading is a ``DeviceLostError``. A column that is not there, or null throughout, is unavailable.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from observatory.devices.base import FIELDS, Gap, PowerDevice, Sample
from observatory.errors import DeviceError, DeviceLostError, ObservatoryError
from observatory.run import open_run
from observatory.run.checks import check_rows
from observatory.run.files import one_line
from observatory.run.manifest import DeviceSpec, Manifest
from observatory.run.parts import Unreadable, open_part, plain_text, read_row_group

Pace = Literal["recorded", "now"]

#: A row per 50 ms for 5 days.
_MAX_ROWS = 10_000_000
_MAX_NAME = 300
_HELD_PERIODS = 3
_COLUMNS = ("time_ns", "read_ns", *FIELDS)


class ReplayDevice(PowerDevice):
    """One recorded device.

    Args:
        path: a run directory, or a Parquet file.
        uuid: which device of the recording; may be left out when it holds only one.
        pace: see the module.
        clock_ns: monotonic time, for the pace "now".

    Raises:
        DeviceError: the recording cannot be read, is damaged or too large, holds no rows, or ``uuid`` does
            not name one of its devices.
    """

    def __init__(
        self,
        path: Path | str,
        uuid: str | None = None,
        *,
        pace: Pace = "now",
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        path = Path(path)
        try:
            manifest, tables = _open(path)
            self._uuid, rows = _rows_of(tables, uuid, path)
        except ObservatoryError as error:
            raise error if isinstance(error, DeviceError) else DeviceError(str(error)) from error
        self._pace: Pace = pace
        self._clock_ns = clock_ns
        self._next = 0
        self._shift_ns: int | None = None
        order = np.argsort(_numbers(rows, "time_ns")[0], kind="stable")
        self._columns = {
            name: (values[order], is_valid[order])
            for name in _COLUMNS
            if name in rows.column_names
            for values, is_valid in [_numbers(rows, name)]
        }
        self._times_ns: NDArray[np.int64] = self._columns["time_ns"][0]
        self._check_values(path)
        gaps_ns = np.diff(self._times_ns)
        self._period_ns = int(np.median(gaps_ns)) if len(gaps_ns) else 0
        self._spec = _spec_of(manifest, self._uuid)
        reasons = _reasons_of(manifest, self._uuid)
        self._gaps = {
            name: Gap(
                kind="not supported",
                detail=f"{reasons[name]} (as recorded)"
                if name in reasons
                else f"the recording holds no {name}",
            )
            for name in FIELDS
            if name not in self._columns or not self._columns[name][1].any()
        }

    @property
    def spec(self) -> DeviceSpec:
        """The recorded device; ``kind`` is ``replay``, ``recorded_kind`` what it was."""
        return self._spec

    @property
    def gaps(self) -> Mapping[str, Gap]:
        """What the recording lacks."""
        return dict(self._gaps)

    @property
    def samples(self) -> int:
        """Rows of the recording."""
        return len(self._times_ns)

    def _read(self) -> Sample:
        """The next row, or the row that holds now."""
        return self._read_next() if self._pace == "recorded" else self._read_now()

    def _release(self) -> None:
        self._columns = {}

    def _check_values(self, path: Path) -> None:
        for name, (values, is_valid) in self._columns.items():
            lowest = -273 if name.endswith("temperature_c") else 0
            if ((values < lowest) | (values >= 1 << 62))[is_valid].any():
                raise DeviceError(
                    f"recording {path} holds values of {name} that cannot be true",
                    expected=f"at least {lowest}",
                    remedy="record it again",
                )

    def _read_next(self) -> Sample:
        if self._next == len(self._times_ns):
            raise self._ended()
        row = self._next
        self._next += 1
        return Sample(
            time_ns=int(self._times_ns[row]), read_ns=self._value("read_ns", row) or 0,
            device_uuid=self._uuid, **self._readings(row),
        )  # fmt: skip

    def _read_now(self) -> Sample:
        now_ns = self._clock_ns()
        if self._shift_ns is None:
            self._shift_ns = now_ns - int(self._times_ns[0])
        at_ns = now_ns - self._shift_ns
        if at_ns > int(self._times_ns[-1]) + self._period_ns:
            raise self._ended()
        row = max(int(np.searchsorted(self._times_ns, at_ns, side="right")) - 1, 0)
        held = at_ns - int(self._times_ns[row]) <= _HELD_PERIODS * self._period_ns
        readings = self._readings(row) if held else {}
        return Sample(
            time_ns=now_ns, read_ns=self._clock_ns() - now_ns, device_uuid=self._uuid, **readings
        )  # fmt: skip

    def _readings(self, row: int) -> dict[str, int | None]:
        return {name: self._value(name, row) for name in FIELDS}

    def _value(self, name: str, row: int) -> int | None:
        if name not in self._columns:
            return None
        values, is_valid = self._columns[name]
        return int(values[row]) if is_valid[row] else None

    def _ended(self) -> DeviceLostError:
        return DeviceLostError(
            f"the recording of {self._uuid} has ended after {len(self._times_ns)} samples",
            remedy="open it again to start over: it is played once",
        )


def _open(path: Path) -> tuple[Manifest | None, Iterator[pa.Table]]:
    if path.is_dir():
        run = open_run(path)
        if run.row_count("power") > _MAX_ROWS:
            raise DeviceError(_too_large(path))
        return run.manifest, run.iter_rows("power")
    return None, _read_file(path)


def _read_file(path: Path) -> Iterator[pa.Table]:
    """Row groups of a Parquet file, checked like those of a run."""
    where = f"recording {path}"
    if not path.is_file():
        raise DeviceError(f"{where} is neither a run directory nor a file", expected="one that is there")
    try:
        part = open_part(path, "power", 0, where)
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:
        raise DeviceError(
            f"{where} cannot be read ({one_line(error, 120)})", expected="the Parquet file of a power table"
        ) from error
    if sum(rows for rows, _ in part.groups) > _MAX_ROWS:
        raise DeviceError(_too_large(path))
    names = [name for name in ("device_uuid", *_COLUMNS) if name in part.schema.names]
    left_bytes = part.most_decoded_bytes
    for group in part.row_groups():
        rows = read_row_group(group, names)
        if isinstance(rows, Unreadable):
            raise DeviceError(f"{rows}", remedy="cut out the part that is to be played, or record it again")
        rows = plain_text(rows, most_bytes=left_bytes, where=where)
        left_bytes -= rows.nbytes
        check_rows("power", rows, rank=0, where=where)
        yield rows


def _too_large(path: Path) -> str:
    return (
        f"recording {path} is too large; expected at most {_MAX_ROWS} rows, cut out the part that is to be "
        "played"
    )


def _rows_of(tables: Iterator[pa.Table], uuid: str | None, path: Path) -> tuple[str, pa.Table]:
    """Rows of the wanted device, and its name."""
    kept: list[pa.Table] = []
    uuids: set[str] = set()
    for table in tables:
        uuids |= set(pc.unique(table.column("device_uuid")).to_pylist())
        if len(uuids) > _MAX_ROWS // 1000:
            raise DeviceError(
                f"recording {path} names over {_MAX_ROWS // 1000} devices", expected="a power table"
            )
        kept.append(table if uuid is None else table.filter(pc.equal(table.column("device_uuid"), uuid)))
    names = ", ".join(one_line(name, 80) for name in sorted(uuids)[:8])
    if any(name != one_line(name, _MAX_NAME) or not name for name in uuids):
        raise DeviceError(
            f"recording {path} holds device names that are none: {names}", remedy="record it again"
        )
    if not uuids:
        raise DeviceError(f"recording {path} holds no power samples", expected="at least one")
    if uuid is None and len(uuids) > 1:
        raise DeviceError(
            f"recording {path} holds {len(uuids)} devices", remedy=f"name one of them: replay:FILE#{names}"
        )
    if uuid is not None and uuid not in uuids:
        raise DeviceError(
            f"recording {path} holds no device {one_line(uuid, 80)}", expected=f"one of {names}"
        )
    return uuid or next(iter(uuids)), pa.concat_tables(kept, promote_options="permissive")


def _numbers(rows: pa.Table, name: str) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Values of a column, and where there are any."""
    column = rows.column(name).combine_chunks()
    is_valid: NDArray[np.bool_] = pc.is_valid(column).to_numpy(zero_copy_only=False)
    values: NDArray[np.int64] = pc.fill_null(column.cast(pa.int64()), 0).to_numpy(zero_copy_only=False)
    return values, is_valid


def _spec_of(manifest: Manifest | None, uuid: str) -> DeviceSpec:
    recorded = None if manifest is None else manifest.device_specs.get(uuid)
    if recorded is None:
        return DeviceSpec(kind="replay", uuid=uuid)
    return recorded.model_copy(update={"kind": "replay", "recorded_kind": recorded.kind})


def _reasons_of(manifest: Manifest | None, uuid: str) -> dict[str, str]:
    """Reasons that the run itself keeps, of the rank that sampled the device."""
    reasons: dict[str, str] = {}
    for status in () if manifest is None else manifest.ranks:
        if status.power is not None:
            reasons |= status.power.unavailable.get(uuid, {})
    return {name: one_line(reasons[name], 400) for name in FIELDS if name in reasons}
