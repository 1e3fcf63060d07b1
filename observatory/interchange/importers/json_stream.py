"""Large JSON documents: an object whose one long array is read item by item.

Items are parsed by the standard library, which bounds nesting; memory is that of the largest item.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any

from observatory.interchange.importers.sources import Source
from observatory.run.bounded import first_problem

#: Largest value that is parsed as a whole.
_MOST_CHARACTERS = 64 << 20
_BLANKS = " \t\r\n"
_CUT = "ends in the middle of its JSON: the program that wrote it was stopped, or the copy is not complete"


def stream_json(source: Source, array: str) -> Iterator[tuple[str, Any]]:
    """Keys of a JSON object with their values; the items of one array come one by one, each with its key.

    Args:
        source: the file.
        array: the key of the array.

    Raises:
        InterchangeError: it cannot be read, is no JSON object, or one value is over 64 Mi characters.
    """
    text = _Text(source)
    text.take("{")
    closed = text.peek() == "}"
    while not closed:
        key = text.value()
        if not isinstance(key, str):
            raise source.refused("is no JSON object: a key is no text")
        text.take(":")
        if key == array and text.peek() == "[":
            text.take("[")
            ended = text.peek() == "]"
            while not ended:
                yield key, text.value()
                ended = text.peek() == "]"
                if not ended:
                    text.take(",")
            text.take("]")
        else:
            yield key, text.value()
        closed = text.peek() == "}"
        if not closed:
            text.take(",")


class _Text:
    """The text of a file behind a position that moves forward."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._blocks = source.blocks()
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._parser = json.JSONDecoder(parse_constant=_refused)
        self._text, self._at = "", 0
        self._ended = False

    def peek(self) -> str:
        """The next character that is not blank; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _BLANKS:
                self._at += 1
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._more()

    def take(self, character: str) -> None:
        """Move behind a character that must be next."""
        found = self.peek()
        if not found:
            raise self._source.refused(_CUT)
        if found != character:
            raise self._source.refused(f"is no JSON object: {found!r} stands where {character!r} should")
        self._at += 1

    def value(self) -> Any:
        """The next value."""
        self.peek()
        while True:
            try:
                value, end = self._parser.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                problem = error
            except (ValueError, RecursionError) as error:
                raise self._no_json(error) from error
            else:
                if end < len(self._text) or self._ended:  # a number may go on in the next block
                    self._at = end
                    return value
            if self._ended:
                if problem.pos >= len(self._text) or "Unterminated" in problem.msg:
                    raise self._source.refused(_CUT) from problem
                raise self._no_json(problem) from problem
            # Each try takes twice the text, so that all tries together take twice the last one.
            wanted = 2 * (len(self._text) - self._at)
            while not self._ended and len(self._text) - self._at < wanted:
                self._more()
            if len(self._text) > _MOST_CHARACTERS:
                raise self._source.refused(f"has a value of over {_MOST_CHARACTERS >> 20} Mi characters")

    def _no_json(self, error: Exception) -> Exception:
        why = "nested too deeply" if isinstance(error, RecursionError) else first_problem(error)
        return self._source.refused(f"is no JSON document ({why})")

    def _more(self) -> None:
        block = next(self._blocks, None)
        self._ended = block is None
        try:
            text = self._decoder.decode(block or b"", final=self._ended)
        except UnicodeDecodeError as error:
            raise self._source.refused("is no text: it is no UTF-8") from error
        self._text, self._at = self._text[self._at :] + text, 0


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
