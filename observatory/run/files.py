"""Names and files of a run directory: atomic writing, bounded reading, listings that trust nothing.

A file appears under its final name only when it is whole: it is written under a temporary name, synced
and renamed, then the folder is synced. Symbolic links inside a run are never followed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from observatory.errors import RunError, RunFormatError
from observatory.run.bounded import MAX_DOCUMENT_BYTES, parse_json

MANIFEST_NAME = "run.json"
RANKS_FOLDER = "ranks"
CONTROL_FOLDER = "control"

_RANK_NAME = re.compile(r"rank-(\d{5,7})", re.ASCII)
_PART_NAME = re.compile(r"part-(\d{6,9})\.parquet", re.ASCII)
_TEMPORARY_NAME = re.compile(r"\..+\.\d{1,10}\.tmp", re.ASCII | re.DOTALL)


def rank_folder(rank: int) -> str:
    """Name of a rank's folder, and stem of its status file."""
    return f"rank-{rank:05d}"


def part_name(number: int) -> str:
    """Name of the part with this number, counted from 0 within table and rank."""
    return f"part-{number:06d}.parquet"


def rank_number(name: str) -> int | None:
    """Rank that a folder name stands for; None for names no writer makes."""
    match = _RANK_NAME.fullmatch(name)
    if match is None or rank_folder(int(match[1])) != name:
        return None
    return int(match[1])


def part_number(name: str) -> int | None:
    """Number of a part file name; None for names no writer makes."""
    match = _PART_NAME.fullmatch(name)
    if match is None or part_name(int(match[1])) != name:
        return None
    return int(match[1])


def is_temporary(name: str) -> bool:
    """Whether a file name is one that :func:`committed` writes under before the rename."""
    return _TEMPORARY_NAME.fullmatch(name) is not None


def one_line(text: object, limit: int = 300) -> str:
    """Text without control characters or line breaks, cut to ``limit`` characters."""
    pieces = str(text)[: 4 * limit]
    # "C" is Unicode's control, format, surrogate, private and unassigned; "Zl"/"Zp" break lines.
    spaced = "".join(" " if unicodedata.category(c)[0] == "C" or c in "\u2028\u2029" else c for c in pieces)
    joined = " ".join(spaced.split())
    return joined if len(joined) <= limit else joined[: limit - 3] + "..."


def os_reason(error: OSError) -> str:
    """Why an operating-system call failed, in one line and without the path."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return one_line(reason)


def is_free(folder: Path) -> bool:
    """Whether a folder can be made here: nothing is there, or an empty one."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable, where the file system can sync folders."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems sync files only.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def committed(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; on success sync it and give it the final name.

    Raises:
        OSError: the file cannot be written, which the error names; the temporary file is removed, ``path`` is
            as before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)  # a full disk does not say what did not fit
        raise


@contextlib.contextmanager
def committed_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder next to ``path``; on success it becomes ``path``, which must be absent or empty.

    Raises:
        OSError: a file cannot be written, which the error names; the new folder is removed with all in it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            inside = Path(str(error.filename or temporary))
            error.filename = str(
                path / inside.relative_to(temporary) if temporary in inside.parents else path
            )
        raise


def write_json(path: Path, text: str) -> None:
    """Write a JSON document atomically and durably."""
    with committed(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object of bounded size.

    Args:
        path: the file; a symbolic link is refused.
        what: name of the document for messages.

    Raises:
        RunError: the file cannot be read.
        RunFormatError: it is too large, cut off, too deep, or not an object.
    """
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            content = file.read(MAX_DOCUMENT_BYTES + 1)
    except OSError as error:
        raise RunError(
            f"{what} cannot be read: {os_reason(error)}", expected=f"a plain readable file at {path}"
        ) from error
    if len(content) > MAX_DOCUMENT_BYTES:
        raise RunFormatError(
            f"{what} is larger than {MAX_DOCUMENT_BYTES >> 20} MiB, which no writer makes",
            remedy=f"check {path}",
        )
    try:
        document = parse_json(content)
    except ValueError as error:
        raise RunFormatError(
            f"{what} is not whole JSON ({one_line(error, 120)})",
            remedy=f"restore {path} or capture the run again",
        ) from error
    if not isinstance(document, dict):
        raise RunFormatError(
            f"{what} holds no JSON object", remedy=f"restore {path} or capture the run again"
        )
    return document


def plain_entries(folder: Path, *, want_folders: bool) -> tuple[list[str], list[str]]:
    """Names in a folder that are plain folders (or plain files), and what was passed over.

    Returns:
        Sorted names, and sorted ``name (reason)`` texts of links and entries of another kind.

    Raises:
        RunError: the folder cannot be listed.
    """
    names: list[str] = []
    passed_over: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_symlink():
                    passed_over.append(f"{one_line(entry.name, 80)} (a symbolic link, not followed)")
                elif entry.is_dir() if want_folders else entry.is_file():
                    names.append(entry.name)
                else:
                    passed_over.append(f"{one_line(entry.name, 80)} (not a plain {_kind(want_folders)})")
    except OSError as error:
        raise RunError(
            f"{folder} cannot be listed: {os_reason(error)}", remedy="check its permissions"
        ) from error
    return sorted(names), sorted(passed_over)


def _kind(want_folders: bool) -> str:
    return "folder" if want_folders else "file"
