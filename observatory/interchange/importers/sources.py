"""Files of other tools as they are read: decompressed, a piece at a time, within bounds, never trusted."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from observatory.errors import InterchangeError
from observatory.run.bounded import first_problem, open_plain, parse_json
from observatory.run.files import one_line, os_reason

#: Largest document that is parsed as a whole.
MOST_DOCUMENT_BYTES = 64 << 20
#: Longest line of a file that is read line by line.
_MOST_LINE_BYTES = 16 << 20
_BLOCK_BYTES = 1 << 20
_HEAD_BYTES = 1 << 16
#: JSON and text shrink to a tenth or a fiftieth; what grows more, once it is large, was made to fill memory.
_MOST_GROWTH, _SMALL_BYTES = 200, 16 << 20
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class Source:
    """A file to import, compressed with gzip or not.

    Attributes:
        path: where it is.
    """

    path: Path

    @property
    def name(self) -> str:
        """Its file name in one line, for messages and provenance."""
        return one_line(self.path.name, 255)

    def refused(
        self, why: str, *, expected: str | None = None, remedy: str | None = None
    ) -> InterchangeError:
        """The error that this file cannot be imported."""
        return InterchangeError(f"{self.name} {why}", expected=expected, remedy=remedy)

    def facts(self) -> dict[str, Any]:
        """Name, size and SHA-256 of the file as it lies there.

        Raises:
            InterchangeError: it cannot be read.
        """
        digest, size = hashlib.sha256(), 0
        for block in self._stored():
            digest.update(block)
            size += len(block)
        return {"name": self.name, "bytes": size, "sha256": digest.hexdigest()}

    def blocks(self) -> Iterator[bytes]:
        """Its content from the start, decompressed, in pieces of about 1 MiB.

        Raises:
            InterchangeError: it cannot be read, its compression is damaged, or it grows beyond measure.
        """
        stored = self._stored()
        first = next(stored, b"")
        if not first.startswith(_GZIP):
            yield first
            yield from stored
            return
        yield from self._decompressed(first, stored)

    def head(self) -> bytes:
        """Its first 64 KiB, decompressed; fewer where the file is shorter.

        Raises:
            InterchangeError: as for `blocks`.
        """
        content = b""
        for block in self.blocks():
            content += block
            if len(content) >= _HEAD_BYTES:
                break
        return content[:_HEAD_BYTES]

    def content(self, most: int = MOST_DOCUMENT_BYTES) -> bytes:
        """All of it.

        Raises:
            InterchangeError: as for `blocks`, or it is larger than ``most`` bytes.
        """
        pieces, size = [], 0
        for block in self.blocks():
            size += len(block)
            if size > most:
                raise self.refused(f"is over {most >> 20} MiB", remedy="import a part of it")
            pieces.append(block)
        return b"".join(pieces)

    def text(self, most: int = MOST_DOCUMENT_BYTES) -> str:
        """All of it as UTF-8.

        Raises:
            InterchangeError: as for `content`, or it is no UTF-8.
        """
        try:
            return self.content(most).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise self.refused(f"is no text: byte {error.start} is no UTF-8") from error

    def json(self, most: int = MOST_DOCUMENT_BYTES) -> Any:
        """All of it as one JSON document.

        Raises:
            InterchangeError: as for `content`, or it is no JSON (`observatory.run.bounded.parse_json`).
        """
        try:
            return parse_json(self.content(most))
        except ValueError as error:
            raise self.refused(f"is no JSON document ({first_problem(error)})") from error

    def lines(self) -> Iterator[str]:
        """Its lines as UTF-8 without their ends, one at a time.

        Raises:
            InterchangeError: as for `blocks`, it is no UTF-8, or a line is over 16 MiB.
        """
        rest, number = b"", 0
        for block in self.blocks():
            *whole, rest = (rest + block).split(b"\n")
            for line in whole:
                number += 1
                yield self._line(line, number)
            if len(rest) > _MOST_LINE_BYTES:
                raise self.refused(f"has a line, number {number + 1}, of over {_MOST_LINE_BYTES >> 20} MiB")
        if rest:
            yield self._line(rest, number + 1)

    def _line(self, line: bytes, number: int) -> str:
        try:
            return line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r")
        except UnicodeDecodeError as error:
            raise self.refused(f"is no text: line {number} is no UTF-8") from error

    def _stored(self) -> Iterator[bytes]:
        try:
            with open_plain(self.path) as handle:
                while block := handle.read(_BLOCK_BYTES):
                    yield block
        except OSError as error:
            raise self.refused(f"cannot be read: {os_reason(error)}") from error
        except ValueError as error:  # a name that no file can have
            raise self.refused("is no file name") from error

    def _decompressed(self, first: bytes, stored: Iterator[bytes]) -> Iterator[bytes]:
        taken = given = 0
        inflater = zlib.decompressobj(wbits=31)
        pending, whole = first, True
        try:
            while pending:
                taken += len(pending)
                while pending:
                    block = inflater.decompress(pending, _BLOCK_BYTES)
                    pending = inflater.unconsumed_tail
                    given += len(block)
                    if given > max(_SMALL_BYTES, _MOST_GROWTH * taken):
                        raise self.refused(
                            f"grows over {_MOST_GROWTH}-fold when it is decompressed",
                            remedy="decompress it first if it can be trusted",
                        )
                    if block:
                        yield block
                    whole = inflater.eof
                    if whole:  # further members may follow
                        pending = inflater.unused_data
                        inflater = zlib.decompressobj(wbits=31)
                pending = next(stored, b"")
            if not whole:
                raise self.refused("ends in the middle of its compression")
        except zlib.error as error:
            raise self.refused(f"is damaged: {one_line(error, 80)}") from error
