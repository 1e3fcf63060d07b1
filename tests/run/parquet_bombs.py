"""Builds Parquet files by hand: runs of equal values of any length, and footers that say anything.

A column is one dictionary page and one data page whose values are all the first of the dictionary.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.parquet as pq

_INT32, _INT64, _DOUBLE, _TEXT = 1, 2, 5, 6
_CODECS = {"none": 0, "snappy": 1, "gzip": 2, "brotli": 4, "zstd": 6}


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of one value.

    Attributes:
        name, kind: of a schema of the tables.
        value: of every row, or of every entry of a list.
        entries: of the list of every row; None where the column holds no list.
        rows: that the pages hold; None for those of the row group.
        claims: what the footer says instead of the truth, by field: values, decompressed, stored, start.
        pages: what page headers say instead of the truth: values, size, stored, entries, encoding.
        codec: of the pages.
        times: how often the data page follows itself.
        page: content of the data page instead.
    """

    name: str
    kind: pa.DataType
    value: object = 0
    entries: int | None = None
    rows: int | None = None
    claims: dict[str, int] = field(default_factory=dict)
    pages: dict[str, int] = field(default_factory=dict)
    codec: str = "zstd"
    times: int = 1
    page: bytes | None = None


def table_columns(schema: pa.Schema, **changes: Column | dict[str, object]) -> list[Column]:
    """A column for each of a schema that must be there, and for each that is named."""
    columns = []
    for place in schema:
        change = changes.pop(place.name, None)
        if isinstance(change, Column):
            columns.append(change)
        elif change is not None or not place.nullable:
            value: object = "decode" if place.name == "phase" else "x" if place.type == pa.string() else 0
            size = place.type.list_size if pa.types.is_fixed_size_list(place.type) else None
            if place.type == pa.list_(pa.int64()) or place.type == pa.list_(pa.int32()):
                size = 1
            columns.append(
                replace(Column(name=place.name, kind=place.type, value=value, entries=size), **(change or {}))
            )
    return [*columns, *(item for item in changes.values() if isinstance(item, Column))]


def parquet_file(
    columns: list[Column],
    rows: int,
    *,
    groups: int = 1,
    claimed_rows: int | None = None,
    schema: pa.Schema | None = None,
    metadata: dict[bytes, bytes] | None = None,
) -> bytes:
    """A file of so many row groups that share the same pages, or of which each has its own.

    Args:
        columns: of the file.
        rows: of each row group.
        groups: row groups, each with its own pages.
        claimed_rows: of each row group as the footer says; the true number when None.
        schema: that the file says its Arrow columns have; those of ``columns`` when None.
        metadata: further keys and values of the footer.
    """
    out = io.BytesIO()
    out.write(b"PAR1")
    groups_text = []
    said = rows if claimed_rows is None else claimed_rows
    for _ in range(groups):
        chunks = [_chunk(out, column, rows) for column in columns]
        groups_text.append(_struct((1, _list(chunks)), (2, _int(1000)), (3, _int(said))))
    arrow = schema or pa.schema([pa.field(column.name, column.kind, False) for column in columns])
    keys = {b"ARROW:schema": _arrow_schema(arrow), **(metadata or {})}
    elements = [_struct((4, _text(b"schema")), (5, _int32(len(columns))))]
    for column in columns:
        elements += _elements(column)
    footer = _struct(
        (1, _int32(2)),
        (2, _list(elements)),
        (3, _int(said * groups)),
        (4, _list(groups_text)),
        (5, _list([_struct((1, _text(key)), (2, _text(value))) for key, value in keys.items()])),
    )
    out.write(footer + struct.pack("<I", len(footer)) + b"PAR1")
    return out.getvalue()


def _arrow_schema(schema: pa.Schema) -> bytes:
    sink = io.BytesIO()
    pq.write_table(schema.empty_table(), sink)
    return pq.ParquetFile(sink).metadata.metadata[b"ARROW:schema"]


def _physical(column: Column) -> int:
    kind = column.kind if column.entries is None else column.kind.value_type
    return {"int64": _INT64, "int32": _INT32, "double": _DOUBLE, "string": _TEXT}[str(kind)]


def _elements(column: Column) -> list[bytes]:
    physical = _physical(column)
    text = ((6, _int32(0)),) if physical == _TEXT else ()
    name = column.name.encode()
    if column.entries is None:
        return [_struct((1, _int32(physical)), (3, _int32(0)), (4, _text(name)), *text)]
    return [
        _struct((3, _int32(0)), (4, _text(name)), (5, _int32(1)), (6, _int32(3))),
        _struct((3, _int32(2)), (4, _text(b"list")), (5, _int32(1))),
        _struct((1, _int32(physical)), (3, _int32(0)), (4, _text(b"element")), *text),
    ]


def _runs(*runs: tuple[int, int]) -> bytes:
    """Levels as runs of (count, value), with their length before them."""
    content = b"".join(_varint(count << 1) + bytes([value]) for count, value in runs if count)
    return struct.pack("<I", len(content)) + content


def _chunk(out: io.BytesIO, column: Column, rows: int) -> bytes:
    rows = column.rows if column.rows is not None else rows
    physical = _physical(column)
    values = rows if column.entries is None else rows * column.entries
    levels = b""
    if column.entries is not None:
        one = ((1, 0), (column.entries - 1, 1))
        levels = _runs(*(one * min(rows, 100_000))) + _runs((values, 1))
    stated = column.pages
    start = out.tell()
    dictionary = _plain(column.value, physical)
    sizes = [
        _page(out, column.codec, dictionary, {**stated, "values": stated.get("entries", 1)}, dictionary=True)
    ]
    data = levels + b"\x00" + _varint(values << 1) if column.page is None else column.page
    first = out.tell()
    sizes += [
        _page(out, column.codec, data, {"values": values, **stated}, dictionary=False)
        for _ in range(column.times)
    ]
    path = [column.name.encode()] if column.entries is None else [column.name.encode(), b"list", b"element"]
    claims = column.claims
    meta = _struct(
        (1, _int32(physical)),
        (2, _list([_zigzag(0), _zigzag(3), _zigzag(8)], kind=5)),
        (3, _list([_varint(len(part)) + part for part in path], kind=8)),
        (4, _int32(_CODECS[column.codec])),
        (5, _int(claims.get("values", values * column.times))),
        (6, _int(claims.get("decompressed", sum(sizes)))),
        (7, _int(claims.get("stored", out.tell() - start))),
        (9, _int(claims.get("start", first))),
        (11, _int(claims.get("start", start))),
    )
    return _struct((2, _int(start)), (3, (12, meta)))


def _page(out: io.BytesIO, codec: str, content: bytes, stated: dict[str, int], *, dictionary: bool) -> int:
    stored = content if codec == "none" else pa.compress(content, codec, asbytes=True)
    encoding = 0 if dictionary else stated.get("encoding", 8)
    own: list[tuple[int, tuple[int, bytes]]] = [(1, _int32(stated["values"])), (2, _int32(encoding))]
    if not dictionary:
        own += [(3, _int32(3)), (4, _int32(3))]
    header = _struct(
        (1, _int32(2 if dictionary else 0)),
        (2, _int32(stated.get("size", len(content)))),
        (3, _int32(stated.get("stored", len(stored)))),
        (7 if dictionary else 5, (12, _struct(*own))),
    )
    out.write(header + stored)
    return len(header) + len(content)


def _plain(value: object, physical: int) -> bytes:
    if physical == _TEXT:
        text = value if isinstance(value, bytes) else str(value).encode()
        return struct.pack("<I", len(text)) + text
    return struct.pack({_INT32: "<i", _INT64: "<q", _DOUBLE: "<d"}[physical], value)


def _varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def _zigzag(number: int) -> bytes:
    return _varint((number << 1 ^ number >> 63) & (1 << 64) - 1)


def _int32(number: int) -> tuple[int, bytes]:
    return 5, _zigzag(number)


def _int(number: int) -> tuple[int, bytes]:
    return 6, _zigzag(number)


def _text(text: bytes) -> tuple[int, bytes]:
    return 8, _varint(len(text)) + text


def _list(items: list[bytes], kind: int = 12) -> tuple[int, bytes]:
    head = bytes([len(items) << 4 | kind]) if len(items) < 15 else bytes([240 | kind]) + _varint(len(items))
    return 9, head + b"".join(items)


def _struct(*fields: tuple[int, tuple[int, bytes]]) -> bytes:
    out, last = b"", 0
    for number, (kind, content) in fields:
        out += bytes([number - last << 4 | kind]) + content
        last = number
    return out + b"\0"
