"""What the pages of a Parquet column hold, from their headers alone.

A Parquet library makes room for what headers say: pages are decompressed whole, and a run of equal values is
a few bytes however long it is. Each page states the number of its values and its size without compression in
a header of its own, Thrift's compact protocol (``PageHeader`` in ``parquet.thrift``), which is read here
without decoding the page.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

_SMALL_HEADER, _LARGEST_HEADER = 512, 64 * 1024
_DEEPEST = 8
_DICTIONARY = 2
#: Data pages, by the field that holds their header, and the field of its encoding.
_DATA_HEADERS = {0: (5, 2), 3: (8, 4)}
_DICTIONARY_HEADER = 7
#: Values that repeat the beginning of the value before them: one page can spell out gigabytes.
_DELTA_BYTE_ARRAY = 7


class PageError(ValueError):
    """Pages are not what the footer says of them."""


@dataclass(frozen=True, slots=True)
class ChunkClaim:
    """What the footer says of one column of a row group.

    Attributes:
        start, size: where its pages lie in the file, bytes.
        values: values of all data pages.
        decompressed_bytes: size of all pages without compression.
    """

    start: int
    size: int
    values: int
    decompressed_bytes: int


class _CutError(Exception):
    """A header goes on behind the bytes that were read."""


def check_pages(descriptor: int, claim: ChunkClaim) -> None:
    """Check that the pages of a column hold no more than the footer says.

    Args:
        descriptor: of the open file.
        claim: what the footer says.

    Raises:
        PageError: they hold more or other values, or a header cannot be read.
        OSError: the file cannot be read.
    """
    at, end = claim.start, claim.start + claim.size
    values = decompressed = 0
    while values < claim.values:
        if at >= end:
            raise PageError(f"its pages hold {values} values, its footer says {claim.values}")
        header, length = _page_header(descriptor, at, end)
        kind, size, stored = (_number(header, field) for field in (1, 2, 3))
        decompressed += size
        at += length + stored
        if size < 0 or stored < 0 or at > end or decompressed > claim.decompressed_bytes:
            raise PageError(
                f"its pages take {decompressed} bytes without compression, its footer says "
                f"{claim.decompressed_bytes}"
            )
        if kind == _DICTIONARY:
            entries = _number(_struct(header, _DICTIONARY_HEADER), 1)
            if not 0 <= entries <= size:
                raise PageError(f"a dictionary of {size} bytes says that it has {entries} entries")
        elif kind in _DATA_HEADERS:
            field, encoding = _DATA_HEADERS[kind]
            sub_header = _struct(header, field)
            count = _number(sub_header, 1)
            if count < 0 or values + count > claim.values:
                raise PageError(f"its pages hold over {claim.values} values, which its footer says")
            if _number(sub_header, encoding) == _DELTA_BYTE_ARRAY:
                raise PageError("its encoding is DELTA_BYTE_ARRAY, which is not read; write another one")
            values += count


def _page_header(descriptor: int, at: int, end: int) -> tuple[dict[int, object], int]:
    """Fields of the header at this place, and its length."""
    for most in (_SMALL_HEADER, _LARGEST_HEADER):
        content = os.pread(descriptor, min(most, end - at), at)
        try:
            reader = _CompactReader(content)
            return reader.struct(0), reader.at
        except _CutError:
            if len(content) < most:
                break
    raise PageError("a page header is cut off or too long")


def _number(fields: dict[int, object], field: int) -> int:
    value = fields.get(field)
    if not isinstance(value, int):
        raise PageError("a page header lacks a number")
    return value


def _struct(fields: dict[int, object], field: int) -> dict[int, object]:
    value = fields.get(field)
    if not isinstance(value, dict):
        raise PageError("a page header does not fit the kind of its page")
    return value


class _CompactReader:
    """Reads one struct of Thrift's compact protocol; keeps numbers and structs, passes over the rest."""

    def __init__(self, content: bytes) -> None:
        self.at = 0
        self._content = content

    def struct(self, depth: int) -> dict[int, object]:
        if depth > _DEEPEST:
            raise PageError("a page header is nested too deeply")
        fields: dict[int, object] = {}
        last = 0
        while head := self._byte():
            delta, kind = head >> 4, head & 15
            last = last + delta if delta else self._zigzag()
            fields[last] = self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> object:
        if kind in (1, 2):
            return kind == 1
        read: Callable[[], object] | None = {
            3: self._byte, 4: self._zigzag, 5: self._zigzag, 6: self._zigzag, 8: self._binary,
        }.get(kind)  # fmt: skip
        if read is not None:
            return read()
        if kind == 7:
            self._skip(8)
            return None
        if kind == 12:
            return self.struct(depth + 1)
        raise PageError("a page header holds a field that no page header has")

    def _byte(self) -> int:
        if self.at >= len(self._content):
            raise _CutError
        self.at += 1
        return self._content[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise PageError("a page header holds a number of over 64 bits")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _binary(self) -> None:
        self._skip(self._varint())

    def _skip(self, size: int) -> None:
        if self.at + size > len(self._content):
            raise _CutError
        self.at += size
