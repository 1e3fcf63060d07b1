"""What parts a run directory holds, and their row groups.

A footer is a claim of whoever wrote the file. Opening a part checks that what it claims is in proportion to
the size of the file; reading a row group first checks, by the headers of its pages, that it holds no more
than claimed. So a small file never takes much memory, whatever it says of itself.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from observatory.errors import RunFormatError
from observatory.run.bounded import open_plain
from observatory.run.checks import check_schema
from observatory.run.files import (
    is_temporary,
    one_line,
    part_number,
    plain_entries,
    rank_folder,
    rank_number,
)
from observatory.run.pages import ChunkClaim, PageError, check_pages
from observatory.run.rows import experts_of

#: A row group larger than this when decoded is refused: readers hold one of every rank at once.
MAX_ROW_GROUP_BYTES = 512 * 1024 * 1024

#: Decoded bytes of a row group, always allowed and per byte of its pages. Our writer's are below 2.1 MiB, and
#: decoded counts that are no constants are at most 16 times as large as in the file.
_ROW_GROUP_BYTES, _ROW_GROUP_RATIO = 16 << 20, 64
#: Decoded bytes of a part, the same. Constant rows of our writer reach 1,300 (routing) and 600 (others): a
#: table of constants above the first bound is no measurement.
_PART_BYTES = 128 << 20
_PART_RATIO = {"routing": 2048}
_OTHER_RATIO = 256
#: Rows of a part, the same. Times that our writer wrote take two bytes and more.
_PART_ROWS = {"routing": (1 << 20, 1.0), "tokens": (1 << 20, 1.0), "exchange": (1 << 17, 0.125)}
_OTHER_ROWS = (1 << 18, 0.5)

_MAX_FOOTER_BYTES = 16 << 20
_MAX_COLUMNS = 128
_MAX_TEXT_BYTES = 16384
#: Definition and repetition level of a value while it is decoded.
_LEVEL_BYTES = 4

_READ_ERRORS = (OSError, ValueError, OverflowError, pa.ArrowException)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One readable part.

    Attributes:
        table: table it belongs to.
        rank: rank whose folder it lies in.
        path: the file.
        name: path inside the run, for messages.
        schema: its columns.
        metadata: its footer.
        experts: E of a routing part, 0 for other tables.
        groups: rows and smallest step of each row group; the step is None when the footer does not say.
        file_bytes: size of the file.
        decoded_bytes: size of all row groups when decoded, according to the footer.
        most_decoded_bytes: what they may take at most, texts written out.
    """

    table: str
    rank: int
    path: Path
    name: str
    schema: pa.Schema
    metadata: pq.FileMetaData
    experts: int
    groups: tuple[tuple[int, int | None], ...]
    file_bytes: int
    decoded_bytes: int
    most_decoded_bytes: int

    def row_groups(self) -> list[RowGroup]:
        """Row groups that hold rows."""
        return [
            RowGroup(part=self, number=number, rows=rows, first_step=first)
            for number, (rows, first) in enumerate(self.groups)
            if rows
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowGroup:
    """One row group of a part.

    Attributes:
        part: the part.
        number: index in the part.
        rows: its rows.
        first_step: smallest step in it; None when the footer does not say.
    """

    part: Part
    number: int
    rows: int
    first_step: int | None


def list_rank_folders(root: Path, table: str) -> tuple[list[int], list[str]]:
    """Ranks that have a folder in a table, ascending, and what else is there, a sentence each."""
    folder = root / table
    if folder.is_symlink():
        return [], [f"{table}/ is a symbolic link, not followed"]
    if not folder.is_dir():
        return [], [] if not folder.exists() else [f"{table} is not a folder; passed over"]
    names, passed_over = plain_entries(folder, want_folders=True)
    problems = [f"{table}/{text} was passed over" for text in passed_over]
    ranks: list[int] = []
    for name in names:
        rank = rank_number(name)
        if rank is None:
            problems.append(f"{table}/{one_line(name, 80)} is no rank folder; passed over")
        else:
            ranks.append(rank)
    return sorted(ranks), problems


def list_rank_parts(
    root: Path, table: str, rank: int, *, newest: int | None = None
) -> tuple[list[Part], list[str], list[str]]:
    """Readable parts of a rank in a table by number, problems, and those of unreadable parts.

    Of ``newest`` parts, where that is given, the footers are read, and no problems are looked for among the
    others.
    """
    parts: list[Part] = []
    rank_name = rank_folder(rank)
    folder = root / table / rank_name
    files, passed_over = plain_entries(folder, want_folders=False)
    problems = [f"{table}/{rank_name}/{text} was passed over" for text in passed_over]
    unreadable: list[str] = []
    expected = 0
    if newest is not None:
        numbers = {number: name for name in files if (number := part_number(name)) is not None}
        kept = sorted(numbers)[-newest:]
        files, expected = [numbers[number] for number in kept], kept[0] if kept else 0
    for file_name in files:
        name = f"{table}/{rank_name}/{one_line(file_name, 80)}"
        number = part_number(file_name)
        if number is None:
            state = "was never finished" if is_temporary(file_name) else "is no part; passed over"
            problems.append(f"{name} {state}")
            continue
        if number != expected:
            gap = f"part {expected} is" if number == expected + 1 else f"parts {expected} to {number - 1} are"
            problems.append(f"{table}/{rank_name}: {gap} missing")
        expected = number + 1
        try:
            parts.append(open_part(folder / file_name, table, rank, name))
        except _READ_ERRORS as error:
            unreadable.append(f"{name} is truncated or corrupt and was left out: {one_line(error, 120)}")
    return parts, problems, unreadable


def open_part(path: Path, table: str, rank: int, name: str) -> Part:
    """Read the footer of a part.

    Args:
        path: a plain file.
        table: the table it must be of.
        rank: rank whose rows it holds.
        name: what to call it in messages.

    Raises:
        RunFormatError: columns of another table, or more of them, of rows or of bytes than are read.
        OSError, ValueError, OverflowError, pa.ArrowException: it cannot be read.
    """
    with open_plain(path) as handle:
        file_bytes = os.fstat(handle.fileno()).st_size
        handle.seek(max(0, file_bytes - 8))
        footer_bytes = int.from_bytes(handle.read(8)[:4], "little")
    if _MAX_FOOTER_BYTES < footer_bytes < file_bytes:
        raise RunFormatError(
            f"{name}: its footer is over {_MAX_FOOTER_BYTES >> 20} MiB", remedy="write smaller parts"
        )
    with pq.ParquetFile(path) as file:
        metadata, schema = file.metadata, file.schema_arrow
    if metadata.num_columns > _MAX_COLUMNS:
        raise RunFormatError(
            f"{name}: has {metadata.num_columns} columns",
            expected=f"at most {_MAX_COLUMNS}",
            remedy="leave some out",
        )
    check_schema(table, schema, where=name)
    step = _leaves(metadata, {"step"})
    groups: list[tuple[int, int | None]] = []
    total = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        decoded, stored = _claimed_bytes(schema, metadata, group)
        least = min(MAX_ROW_GROUP_BYTES, _ROW_GROUP_BYTES)
        most = min(MAX_ROW_GROUP_BYTES, max(least, _ROW_GROUP_RATIO * min(stored, file_bytes)))
        if not 0 <= decoded <= most or group.num_rows < 0:
            raise RunFormatError(
                f"{name}: row group {number} says {group.num_rows} rows of {decoded} bytes",
                expected=f"at most {most >> 20} MiB, rewrite the part with smaller row groups",
            )
        groups.append((group.num_rows, _first_step(group, step)))
        total += decoded
    rows = sum(count for count, _ in groups)
    least_rows, rows_per_byte = _PART_ROWS.get(table, _OTHER_ROWS)
    most_rows = max(least_rows, int(rows_per_byte * file_bytes))
    most_bytes = max(_PART_BYTES, _PART_RATIO.get(table, _OTHER_RATIO) * file_bytes)
    if rows > most_rows or total > most_bytes:
        raise RunFormatError(
            f"{name}: {file_bytes} bytes say that they hold {rows} rows of {total} bytes",
            expected=f"at most {most_rows} rows of {most_bytes >> 20} MiB in a file of this size",
        )
    return Part(
        table=table,
        rank=rank,
        path=path,
        name=name,
        schema=schema,
        metadata=metadata,
        experts=experts_of(schema, name) if table == "routing" else 0,
        groups=tuple(groups),
        file_bytes=file_bytes,
        decoded_bytes=total,
        most_decoded_bytes=most_bytes,
    )


def _leaves(metadata: pq.FileMetaData, names: Collection[str]) -> list[int]:
    """Indices of the Parquet columns that belong to columns of these names."""
    paths = (metadata.schema.column(i).path for i in range(metadata.num_columns))
    return [i for i, path in enumerate(paths) if path.partition(".")[0] in names]


def _claimed_bytes(schema: pa.Schema, metadata: pq.FileMetaData, group: Any) -> tuple[int, int]:
    """Size of a row group when decoded, and of its pages in the file, according to its footer."""
    kinds = {field.name: field.type for field in schema}
    decoded = stored = 0
    for i in range(metadata.num_columns):
        column, path = group.column(i), metadata.schema.column(i).path
        kind = kinds[path.partition(".")[0]]
        if min(column.num_values, column.total_uncompressed_size, column.total_compressed_size) < 0:
            raise ValueError(f"column {one_line(path, 80)} has a negative size")
        values = column.num_values
        if pa.types.is_fixed_size_list(kind):
            values = max(values, group.num_rows * kind.list_size)
            kind = kind.value_type
        elif pa.types.is_list(kind):
            kind = kind.value_type
        width = 4 if _is_text(kind) else max(1, kind.bit_width // 8)
        decoded += max(column.total_uncompressed_size, values * (width + _LEVEL_BYTES))
        stored += column.total_compressed_size
    return decoded, stored


def _first_step(group: Any, leaves: list[int]) -> int | None:
    for i in leaves:
        statistics = group.column(i).statistics
        least = statistics.min if statistics is not None and statistics.has_min_max else None
        return least if isinstance(least, int) else None
    return None


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_dictionary(kind))


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A row group whose bytes cannot be read; as text one line.

    Attributes:
        group: the row group.
        cause: what its bytes are instead; None where it is cut short.
    """

    group: RowGroup
    cause: str | None

    def __str__(self) -> str:
        name = f"{self.group.part.name}: row group {self.group.number}"
        if self.cause is None:
            return f"{name} is cut short and was left out"
        return f"{name} ({self.group.rows} rows) is corrupt and was left out: {self.cause}"


def read_row_group(group: RowGroup, columns: Collection[str] | None) -> pa.Table | Unreadable:
    """Read a row group, or state why its bytes cannot be read.

    Texts are dictionaries, see :func:`plain_text`.

    Args:
        group: the row group.
        columns: columns to read, all when None.

    Raises:
        RunFormatError: texts that are too long, or no text.
    """
    return _read((group,), columns)


def read_row_groups(
    part: Part, columns: Collection[str] | None, *, most_bytes: int
) -> Iterator[pa.Table | Unreadable]:
    """Read the row groups of a part, small ones together.

    Args:
        part: the part.
        columns: columns to read, all when None.
        most_bytes: decoded bytes of all columns of row groups that are read together.

    Raises:
        RunFormatError: texts that are too long, or no text.
    """
    most_rows = most_bytes * sum(rows for rows, _ in part.groups) // max(1, part.decoded_bytes)
    together: list[RowGroup] = []
    for group in part.row_groups():
        if together and sum(other.rows for other in together) + group.rows > most_rows:
            yield from _read_together(together, columns)
            together = []
        together.append(group)
    if together:
        yield from _read_together(together, columns)


def _read_together(
    groups: list[RowGroup], columns: Collection[str] | None
) -> Iterator[pa.Table | Unreadable]:
    """Rows of several row groups in one table; each by itself where they cannot be read together."""
    rows = _read(groups, columns)
    if len(groups) > 1 and isinstance(rows, Unreadable):
        yield from (_read((group,), columns) for group in groups)
    else:
        yield rows


def _read(groups: Sequence[RowGroup], columns: Collection[str] | None) -> pa.Table | Unreadable:
    """Rows of row groups of one part, or why those of one of them cannot be read."""
    part = groups[0].part
    wanted = [name for name in part.schema.names if columns is None or name in columns]
    texts = [name for name in wanted if _is_text(part.schema.field(name).type)]
    try:
        with open_plain(part.path) as handle:
            for group in groups:
                _check_pages(handle.fileno(), group, wanted)
        with pq.ParquetFile(
            part.path, metadata=part.metadata, page_checksum_verification=True, read_dictionary=texts
        ) as file:
            rows = file.read_row_groups([group.number for group in groups], columns=wanted, use_threads=False)
    except _READ_ERRORS as error:
        return Unreadable(groups[0], one_line(error, 120))
    if rows.num_rows != sum(group.rows for group in groups):
        return Unreadable(groups[0], None)
    for name in texts:
        _check_texts(rows.column(name), f"{part.name}: column {one_line(name, 80)}")
    return rows


def _check_pages(descriptor: int, group: RowGroup, names: list[str]) -> None:
    """Check that the pages hold what the footer claims, before a page is decoded."""
    metadata = group.part.metadata
    row_group = metadata.row_group(group.number)
    for i in _leaves(metadata, names):
        column, path = row_group.column(i), metadata.schema.column(i)
        start = column.data_page_offset
        if column.has_dictionary_page and 0 < (column.dictionary_page_offset or 0) < start:
            start = column.dictionary_page_offset
        try:
            if path.max_repetition_level == 0 and column.num_values != group.rows:
                raise PageError(f"its footer says {column.num_values} values in {group.rows} rows")
            claim = ChunkClaim(
                start, column.total_compressed_size, column.num_values, column.total_uncompressed_size
            )
            check_pages(descriptor, claim)
        except PageError as error:
            raise PageError(f"column {one_line(path.path, 80)}: {error}") from error


def _check_texts(column: pa.ChunkedArray, where: str) -> None:
    for chunk in column.chunks:
        try:
            chunk.dictionary.validate(full=True)
        except pa.ArrowInvalid as error:
            raise RunFormatError(
                f"{where} holds bytes that are no UTF-8 text", remedy="capture it again"
            ) from error
        longest = pc.max(pc.binary_length(chunk.dictionary)).as_py() or 0
        if longest > _MAX_TEXT_BYTES:
            raise RunFormatError(
                f"{where} holds a text of {longest} bytes", expected=f"at most {_MAX_TEXT_BYTES}"
            )


def plain_text(rows: pa.Table, *, most_bytes: int, where: str) -> pa.Table:
    """Rows with their texts written out.

    Args:
        rows: of :func:`read_row_group`.
        most_bytes: what the rows may take then.
        where: name of the part for messages.

    Raises:
        RunFormatError: they take more.
    """
    texts = [field.name for field in rows.schema if pa.types.is_dictionary(field.type)]
    size = rows.nbytes
    for name in texts:
        for chunk in rows.column(name).chunks:
            lengths = pc.binary_length(chunk.dictionary).to_numpy(zero_copy_only=False).astype(np.int64)
            used = pc.drop_null(chunk.indices).to_numpy(zero_copy_only=False)
            size += int(lengths[used].sum()) + 4 * len(chunk)
    if size > most_bytes:
        raise RunFormatError(
            f"{where}: its rows take over {most_bytes >> 20} MiB when texts are written out, out of "
            "proportion to the size of the file",
            remedy="shorten the texts",
        )
    for name in texts:
        at = rows.column_names.index(name)
        rows = rows.set_column(at, name, rows.column(at).cast(pa.string()))
    return rows


def first_step(group: RowGroup) -> int | None:
    """Smallest step of a row group, from the footer or else from the column; None when unreadable."""
    if group.first_step is not None:
        return group.first_step
    rows = read_row_group(group, ["step"])
    if isinstance(rows, Unreadable):
        return None
    steps = rows.column("step").to_numpy()
    return int(np.min(steps))
