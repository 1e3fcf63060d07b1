"""Power samples of a run, one device at a time: those of all devices may not fit into memory.

The rows of the devices of a node are interleaved in the order in which they were sampled. One pass over two
columns counts them; then devices are gathered, as many in each further pass as fit into a bounded number of
bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from observatory.errors import RunError, RunFormatError
from observatory.run.files import rank_folder
from observatory.run.reader import BATCH_BYTES, Run
from observatory.run.tables import POWER_SCHEMA

if TYPE_CHECKING:
    import pandas as pd

#: Bytes of the rows that a pass gathers. A device that takes more is gathered alone, up to the second number.
_PASS_BYTES, _MOST_BYTES = 128 << 20, 4 << 30
#: More devices that one rank sampled are no measurement.
_MOST_DEVICES = 128
#: Gathered batches of a device are joined when there are so many: each costs memory of its own.
_MOST_BATCHES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledDevice:
    """A device with samples in a run.

    Attributes:
        rank: the rank that took the samples.
        uuid: of the device.
        rows: how many samples.
        first_ns, last_ns: time of the earliest and of the latest.
    """

    rank: int
    uuid: str
    rows: int
    first_ns: int
    last_ns: int


def sampled_devices(run: Run) -> list[SampledDevice]:
    """Devices with samples in a run, by rank and UUID.

    Raises:
        RunFormatError: rows that cannot be true, or too many devices.
    """
    found: dict[tuple[int, str], tuple[int, int, int]] = {}
    devices_of: dict[int, int] = {}
    for rank, uuid, rows in _rows_by_device(run, ["time_ns"]):
        time = pc.min_max(rows.column("time_ns")).as_py()
        counted, first_ns, last_ns = found.get((rank, uuid), (0, time["min"], time["max"]))
        if not counted:
            devices_of[rank] = devices_of.get(rank, 0) + 1
            if devices_of[rank] > _MOST_DEVICES:
                raise RunFormatError(
                    f"power/{rank_folder(rank)}: column device_uuid holds over {_MOST_DEVICES} values",
                    expected=f"at most {_MOST_DEVICES}",
                )
        found[rank, uuid] = (
            counted + len(rows), min(first_ns, time["min"]), max(last_ns, time["max"])
        )  # fmt: skip
    return [
        SampledDevice(rank=rank, uuid=uuid, rows=rows, first_ns=first_ns, last_ns=last_ns)
        for (rank, uuid), (rows, first_ns, last_ns) in sorted(found.items())
    ]


def device_samples(
    run: Run, devices: Sequence[SampledDevice], columns: Collection[str]
) -> Iterator[tuple[SampledDevice, pd.DataFrame]]:
    """The samples of each device in time order.

    Args:
        run: the run.
        devices: some of its :func:`sampled_devices`.
        columns: columns of the power table to read; ``time_ns`` is always read, too.

    Raises:
        RunFormatError: rows that cannot be true.
        RunError: a device has more samples than are held.
    """
    schema = pa.schema([field for field in POWER_SCHEMA if field.name in {"time_ns", *columns}])
    row_bytes = sum(field.type.bit_width // 8 for field in schema)
    waiting = list(devices)
    while waiting:
        together = [waiting.pop(0)]
        size = together[0].rows * row_bytes
        if size > _MOST_BYTES:
            raise RunError(
                f"device {together[0].uuid} of run {run.path} has {size >> 20} MiB of samples",
                expected=f"at most {_MOST_BYTES >> 20} MiB",
            )
        while waiting and size + waiting[0].rows * row_bytes <= _PASS_BYTES:
            size += waiting[0].rows * row_bytes
            together.append(waiting.pop(0))
        gathered = _gathered(run, together, schema)
        for device in together:
            yield device, _frame(gathered.pop((device.rank, device.uuid)))


def _gathered(
    run: Run, devices: Sequence[SampledDevice], schema: pa.Schema
) -> dict[tuple[int, str], pa.Table]:
    """Rows of some devices, in the order of the files."""
    batches: dict[tuple[int, str], list[pa.Table]] = {
        (device.rank, device.uuid): [schema.empty_table()] for device in devices
    }
    for rank, uuid, rows in _rows_by_device(run, schema.names):
        if (rank, uuid) in batches:
            of_device = batches[rank, uuid]
            of_device.append(rows.select([name for name in schema.names if name in rows.column_names]))
            if len(of_device) > _MOST_BATCHES:
                of_device[:] = [_joined(of_device)]
    return {key: _joined(batches.pop(key)) for key in list(batches)}


def _joined(tables: list[pa.Table]) -> pa.Table:
    return pa.concat_tables(tables, promote_options="default").combine_chunks()


def _frame(rows: pa.Table) -> pd.DataFrame:
    """A frame of rows in time order; those of the same time stay as they are."""
    time = rows.column("time_ns").to_numpy()
    if (time[1:] < time[:-1]).any():
        rows = rows.take(pa.array(np.argsort(time, kind="stable")))
    frame: pd.DataFrame = rows.to_pandas(split_blocks=True, self_destruct=True)
    return frame


def _rows_by_device(run: Run, columns: Collection[str]) -> Iterator[tuple[int, str, pa.Table]]:
    """Rank, UUID and rows of each device in each stretch of a run's power table."""
    for rows in run.iter_rows("power", columns=[*columns, "device_uuid"], batch_bytes=BATCH_BYTES):
        rank = rows.column("source_rank")[0].as_py()
        uuids = rows.column("device_uuid").combine_chunks().dictionary_encode()
        code = uuids.indices.to_numpy()
        for number, uuid in enumerate(uuids.dictionary.to_pylist()):
            yield rank, uuid, rows.take(pa.array(np.flatnonzero(code == number)))
