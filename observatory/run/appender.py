"""Rows of one rank on their way into parts, for the rank's own writer and for a helper process.

Rows are buffered and written as Parquet parts. A part is written under a temporary name, synced and renamed,
so a process killed at any moment loses at most the rows that were not yet flushed.

A flush makes no new part while the last one is small: it writes that one again, with a further row group, and
renames it over the old one. A file for each flush would be a million of them in an hour of 1,024 ranks. Row
groups that were written stay where they are, byte for byte: who opened the part before goes on reading it.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from observatory.errors import RunError, RunFormatError
from observatory.run.checks import checked_rows
from observatory.run.files import committed, one_line, os_reason, part_name, rank_folder, sync_folder
from observatory.run.tables import TABLES

#: Buffered Arrow bytes at which a part is written.
PART_BYTES = 64 * 1024 * 1024

#: A part that holds as many Arrow bytes or row groups is not written again: that costs encoding and writing
#: of all its rows, half as many on average.
_GROWING_BYTES, _GROWING_GROUPS = 4 * 1024 * 1024, 64

#: A reader holds one row group of every rank at once; this keeps that near 128 MiB.
_ROW_GROUP_BYTES_OF_ALL_RANKS = 128 * 1024 * 1024
_ROW_GROUP_BYTES = (256 * 1024, 2 * 1024 * 1024)


@dataclass(frozen=True, slots=True)
class _GrowingPart:
    """The last part of a table and schema: its number, what each flush added, and Arrow bytes of all."""

    number: int
    flushed: tuple[pa.Table, ...]
    size: int


class TableAppender:
    """Appends rows to the tables of one rank of an existing run directory.

    No two appenders may write the same table of the same rank: parts are numbered from 0 by each. Every
    method may be called from any thread.

    Attributes:
        path: the run directory.
        rank: rank whose rows these are.
        dropped_rows: rows that could not be written, 0 normally.
    """

    def __init__(self, path: str | os.PathLike[str], *, rank: int, ranks: int = 1) -> None:
        """Args: run directory, the rank, and how many ranks the run has."""
        self.path = Path(path)
        self.rank = rank
        self.dropped_rows = 0
        self._lock = threading.RLock()
        self._buffers: dict[tuple[str, pa.Schema], list[pa.RecordBatch]] = {}
        self.bytes_written = 0
        self._buffered_bytes: dict[tuple[str, pa.Schema], int] = {}
        self._next_part: dict[str, int] = {}
        self._growing: dict[tuple[str, pa.Schema], _GrowingPart] = {}
        self._closed = False
        least, most = _ROW_GROUP_BYTES
        self._row_group_bytes = min(max(_ROW_GROUP_BYTES_OF_ALL_RANKS // ranks, least), most)

    def append(self, table: str, rows: pa.Table | pa.RecordBatch) -> None:
        """Buffer rows; a part is written when enough have gathered.

        Args:
            table: one of ``TABLES``.
            rows: rows of that table's schema; nullable columns may be left out, further columns are kept.

        Raises:
            RunFormatError: rows of another schema, rank or phase. Nothing is kept of them.
            LoadError: impossible loads or expert ids. Nothing is kept of them.
            RunError: a part could not be written; its rows are dropped and counted.
        """
        if table not in TABLES:
            raise RunFormatError(
                f"table {one_line(table, 40)!r} is unknown", expected=f"one of {', '.join(TABLES)}"
            )
        checked = checked_rows(table, rows, rank=self.rank)
        if checked.num_rows == 0:
            return
        key = (table, checked.schema)
        with self._lock:
            if self._closed:
                raise RunError(f"run {self.path} is closed; rows of {table} came too late")
            self._buffers.setdefault(key, []).extend(checked.to_batches())
            self._buffered_bytes[key] = self._buffered_bytes.get(key, 0) + checked.nbytes
            if self._buffered_bytes[key] >= PART_BYTES:
                self._write_part(key)

    def flush(self) -> None:
        """Write everything that is buffered.

        Raises:
            RunError: a part could not be written; its rows are dropped and counted, the others written.
        """
        with self._lock:
            first: RunError | None = None
            for key in list(self._buffers):
                try:
                    self._write_part(key)
                except RunError as error:
                    first = first or error
            if first is not None:
                raise first

    def close(self) -> None:
        """Flush and take no more rows; closing twice does nothing.

        Raises:
            RunError: rows could not be written. What was written before stays readable.
        """
        with self._lock:
            if not self._closed:
                try:
                    self.flush()
                finally:
                    self._closed = True

    def _write_part(self, key: tuple[str, pa.Schema]) -> None:
        batches = self._buffers.pop(key)
        size = self._buffered_bytes.pop(key)
        table, schema = key
        rows = pa.Table.from_batches(batches, schema)
        folder = self.path / table / rank_folder(self.rank)
        alone = _GrowingPart(self._next_part.get(table, 0), (rows,), size)
        growing = self._growing.get(key)
        try:
            if table not in self._next_part:
                folder.mkdir(parents=True, exist_ok=True)
                sync_folder(folder.parent)
                sync_folder(self.path)
            if growing is None or growing.size + size > _GROWING_BYTES:
                part = self._write(folder, alone, schema)
            else:
                more = _GrowingPart(growing.number, (*growing.flushed, rows), growing.size + size)
                try:
                    part = self._write(folder, more, schema)
                except OSError:  # where space is short, for the new rows there may be enough
                    old = pq.read_metadata(folder / part_name(growing.number))
                    if old.num_rows != sum(flushed.num_rows for flushed in growing.flushed):
                        raise  # they are there: what failed was to sync the folder
                    part = self._write(folder, alone, schema)
        except (OSError, pa.ArrowException) as error:
            self.dropped_rows += rows.num_rows
            reason = os_reason(error) if isinstance(error, OSError) else one_line(error)
            raise RunError(
                f"rank {self.rank} cannot write {folder / part_name(alone.number)}: {reason}; "
                f"{rows.num_rows} rows are lost, parts written before are intact",
                remedy="free space or choose another place",
            ) from error
        self._next_part[table] = max(alone.number, part.number + 1)
        if part.size < _GROWING_BYTES and len(part.flushed) < _GROWING_GROUPS:
            self._growing[key] = part
        else:
            self._growing.pop(key, None)

    def _write(self, folder: Path, part: _GrowingPart, schema: pa.Schema) -> _GrowingPart:
        with (
            committed(folder / part_name(part.number)) as temporary,
            pa.OSFile(str(temporary), "wb") as file,  # Arrow keeps a file of its own open when it is full
            pq.ParquetWriter(
                file,
                schema,
                compression="zstd",
                compression_level=1,
                # Loads repeat few distinct counts: dictionaries are as small as delta coding, faster
                # to read, and understood by every Parquet reader.
                use_dictionary=True,
                write_statistics=[name for name in ("step", "time_ns") if name in schema.names],
                write_page_checksum=True,
            ) as writer,
        ):
            for rows in part.flushed:
                bytes_per_row = max(1, rows.nbytes // rows.num_rows)
                writer.write_table(rows, row_group_size=max(1, self._row_group_bytes // bytes_per_row))
            writer.close()
            self.bytes_written += file.tell()
        return part
