"""What parts a run directory holds, from folder names and Parquet footers; nothing else is read yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from observatory.errors import RunFormatError
from observatory.store.checks import check_schema
from observatory.store.files import (
    is_temporary,
    one_line,
    part_number,
    plain_entries,
    rank_number,
)
from observatory.store.rows import experts_of

__all__ = ["MAX_ROW_GROUP_BYTES", "Part", "RowGroup", "first_step", "list_parts", "read_row_group"]

#: A row group larger than this when decoded is refused: readers hold one of every rank at once.
MAX_ROW_GROUP_BYTES = 512 * 1024 * 1024

_READ_ERRORS = (OSError, pa.ArrowException, UnicodeDecodeError)


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
        decoded_bytes: size of all row groups when decoded, according to the footer.
    """

    table: str
    rank: int
    path: Path
    name: str
    schema: pa.Schema
    metadata: pq.FileMetaData
    experts: int
    groups: tuple[tuple[int, int | None], ...]
    decoded_bytes: int

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


def _first_step(group: Any) -> int | None:
    for i in range(group.num_columns):
        column = group.column(i)
        if column.path_in_schema == "step":
            statistics = column.statistics
            return int(statistics.min) if statistics is not None and statistics.has_min_max else None
    return None


def list_parts(root: Path, table: str) -> tuple[list[Part], list[str], int]:
    """Readable parts of a table by rank and number, stated problems, and how many parts are unreadable."""
    folder = root / table
    if folder.is_symlink():
        return [], [f"{table}/ is a symbolic link, not followed"], 0
    if not folder.is_dir():
        return [], [] if not folder.exists() else [f"{table} is not a folder; passed over"], 0
    parts: list[Part] = []
    names, passed_over = plain_entries(folder, want_folders=True)
    problems = [f"{table}/{text} was passed over" for text in passed_over]
    unreadable = 0
    for rank_name in names:
        rank = rank_number(rank_name)
        if rank is None:
            problems.append(f"{table}/{one_line(rank_name, 80)} is no rank folder; passed over")
            continue
        files, passed_over = plain_entries(folder / rank_name, want_folders=False)
        problems += [f"{table}/{rank_name}/{text} was passed over" for text in passed_over]
        expected = 0
        for file_name in files:
            name = f"{table}/{rank_name}/{one_line(file_name, 80)}"
            number = part_number(file_name)
            if number is None:
                state = "was never finished" if is_temporary(file_name) else "is no part; passed over"
                problems.append(f"{name} {state}")
                continue
            if number != expected:
                gap = (
                    f"part {expected} is"
                    if number == expected + 1
                    else f"parts {expected} to {number - 1} are"
                )
                problems.append(f"{table}/{rank_name}: {gap} missing")
            expected = number + 1
            try:
                parts.append(_open_part(folder / rank_name / file_name, table, rank, name))
            except _READ_ERRORS as error:
                unreadable += 1
                problems.append(f"{name} is truncated or corrupt and was left out: {one_line(error, 120)}")
    return parts, problems, unreadable


def _open_part(path: Path, table: str, rank: int, name: str) -> Part:
    with pq.ParquetFile(path) as file:
        metadata, schema = file.metadata, file.schema_arrow
    check_schema(table, schema, where=name)
    experts = experts_of(schema, name) if table == "routing" else 0
    groups: list[tuple[int, int | None]] = []
    total = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        decoded = max(group.total_byte_size, group.num_rows * experts * 8)
        if not 0 <= decoded <= MAX_ROW_GROUP_BYTES or group.num_rows < 0:
            raise RunFormatError(
                f"{name}: row group {number} says {group.num_rows} rows of {decoded} bytes; expected at most "
                f"{MAX_ROW_GROUP_BYTES >> 20} MiB, rewrite the part with smaller row groups"
            )
        groups.append((group.num_rows, _first_step(group)))
        total += decoded
    return Part(
        table=table,
        rank=rank,
        path=path,
        name=name,
        schema=schema,
        metadata=metadata,
        experts=experts,
        groups=tuple(groups),
        decoded_bytes=total,
    )


def read_row_group(group: RowGroup, columns: list[str] | None) -> pa.Table | str:
    """Read a row group, or say in one line why its bytes cannot be read.

    Args:
        group: the row group.
        columns: columns to read, all when None.
    """
    part = group.part
    wanted = None if columns is None else [name for name in columns if name in part.schema.names]
    dictionary = ["phase"] if "phase" in part.schema.names else []
    try:
        with pq.ParquetFile(
            part.path, metadata=part.metadata, page_checksum_verification=True, read_dictionary=dictionary
        ) as file:
            rows = file.read_row_group(group.number, columns=wanted, use_threads=False)
    except _READ_ERRORS as error:
        return (
            f"{part.name}: row group {group.number} ({group.rows} rows) is corrupt and was left out: "
            f"{one_line(error, 120)}"
        )
    if rows.num_rows != group.rows:
        return f"{part.name}: row group {group.number} is cut short and was left out"
    return rows


def first_step(group: RowGroup) -> int | None:
    """Smallest step of a row group, from the footer or else from the column; None when unreadable."""
    if group.first_step is not None:
        return group.first_step
    rows = read_row_group(group, ["step"])
    if isinstance(rows, str):
        return None
    steps = rows.column("step").to_numpy()
    return int(np.min(steps))
