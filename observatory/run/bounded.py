"""Reading files that a user names, without trusting what they are: plain, bounded, strict, and valid."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from observatory.errors import ObservatoryError

if TYPE_CHECKING:
    from pydantic import BaseModel

    Record = TypeVar("Record", bound=BaseModel)

#: Largest JSON document that is read or written: a manifest of 4096 ranks takes a quarter of it.
MAX_DOCUMENT_BYTES = 16 << 20
_MOST_DIGITS = 40


def open_plain(path: Path) -> BinaryIO:
    """Open a plain file for reading. A pipe or device is refused rather than waited for.

    Raises:
        OSError: it cannot be opened, or is no plain file.
    """
    handle = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    kind = os.fstat(handle.fileno()).st_mode
    if stat.S_ISREG(kind):
        return handle
    handle.close()
    code = errno.EISDIR if stat.S_ISDIR(kind) else errno.EINVAL
    raise OSError(code, os.strerror(code) if stat.S_ISDIR(kind) else "it is no plain file", str(path))


def read_at_most(path: Path, limit: int) -> bytes | None:
    """The content of a plain file; None when it is larger than ``limit`` bytes.

    Raises:
        OSError: it cannot be read, or is no plain file.
    """
    with open_plain(path) as handle:
        content = handle.read(limit + 1)
    return None if len(content) > limit else content


def read_toml(
    path: Path,
    record: type[Record],
    *,
    most_bytes: int,
    failure: type[ObservatoryError],
    what: str,
    remedy: str,
) -> Record:
    """Read a TOML file into a record that checks it.

    Args:
        path: the file.
        record: what it must be.
        most_bytes: its size at most.
        failure: the error to raise.
        what: name of such files in messages.
        remedy: how to get a good one, for messages.

    Raises:
        ObservatoryError: of the kind ``failure``: not readable, too large, no TOML, or with a key or value
            that the record refuses; names the key.
    """
    import tomllib  # not with this module, which locks import

    try:
        content = read_at_most(path, most_bytes)
        if content is None:
            raise ValueError(f"it is over {most_bytes >> 10} KiB")
        return record.model_validate(tomllib.loads(content.decode("utf-8")))
    except OSError as error:
        problem = f"cannot be read ({first_problem(error)})"
    except tomllib.TOMLDecodeError as error:
        problem = f"is not valid TOML ({first_problem(error)})"
    except (ValueError, RecursionError, ObservatoryError) as error:
        problem = f"is not valid ({first_problem(error)})"
    raise failure(f"{what} {path} {problem}", remedy=remedy)


def first_problem(error: Exception) -> str:
    """What is wrong with a document: the first complaint of a validation with its key, else one line."""
    from pydantic import ValidationError  # some readers of plain files start without it

    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part)[:60] for part in first["loc"][:6])
        text = f"{where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}"
    else:
        text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return "".join(c if c.isprintable() else " " for c in text[:400])


def parse_json(content: bytes) -> Any:
    """Parse a JSON document.

    Raises:
        ValueError: it is no UTF-8, no JSON, nested too deeply, holds a key twice in one object, or a number
            that is not finite or has over 40 digits.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is no UTF-8") from error
    try:
        return json.loads(
            text,
            parse_constant=_refused,
            parse_float=_finite,
            parse_int=_short,
            object_pairs_hook=_each_key_once,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:_MOST_DIGITS]} is too large")
    return number


def _short(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        keys: set[str] = set()
        twice = next(key for key, _ in pairs if key in keys or keys.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:_MOST_DIGITS]!r} stands twice in one object")
    return unique
