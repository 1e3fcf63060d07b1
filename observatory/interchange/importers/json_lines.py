"""Files of one JSON object on each line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from observatory.interchange.importers.sources import Source
from observatory.run.bounded import first_problem, parse_json

_MOST_LINES = 1 << 22


def json_lines(source: Source) -> Iterator[dict[str, Any]]:
    """Objects of the lines that are not blank.

    Raises:
        InterchangeError: the file cannot be read, a line is no JSON object, or there are over 4 Mi lines.
    """
    for number, line in enumerate(source.lines(), 1):
        if number > _MOST_LINES:
            raise source.refused(f"has over {_MOST_LINES:,} lines", remedy="import a part of it")
        if not line.strip():
            continue
        try:
            record = parse_json(line.encode())
        except ValueError as error:
            raise source.refused(f"is cut or no JSON on line {number} ({first_problem(error)})") from error
        if not isinstance(record, dict):
            raise source.refused(f"has no JSON object on line {number}")
        yield record


def whole(source: Source, record: dict[str, Any], key: str, most: int) -> int:
    """A whole number of a record.

    Raises:
        InterchangeError: it is missing or none from 0 to ``most``.
    """
    value = record.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise source.refused(f"has a record whose {key} is none", expected=f"0 to {most}")
    return value
