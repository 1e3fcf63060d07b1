"""Lists and sizes on the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from observatory.errors import BenchmarkError

_UNITS = {
    "B": 1,
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
}
_MOST_BYTES = 1 << 40


def parse_sizes(text: str) -> tuple[int, ...]:
    """Bytes from ``1KiB,64KiB,1MB``; KiB is 1024 bytes, KB 1000.

    Raises:
        BenchmarkError: not such a list.
    """
    sizes = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d{1,13})\s*([kKmMgG]?[iI]?[bB]?)", part.strip())
        if found is None or found.group(2).upper() not in _UNITS:
            raise BenchmarkError(f"size {part.strip()!r} is not a size; expected such as 1KiB,64KiB,1MiB")
        size = int(found.group(1)) * _UNITS[found.group(2).upper()]
        if not 0 < size <= _MOST_BYTES:
            raise BenchmarkError(f"size {part.strip()!r} is out of range; expected 16 B to 1024 GiB")
        sizes.append(size)
    return tuple(dict.fromkeys(sizes))


def parse_names(what: str, text: str, *, every: tuple[str, ...]) -> tuple[str, ...]:
    """Names from a list with commas; ``all`` stands for every one.

    Raises:
        BenchmarkError: an unknown one, or none.
    """
    if text.strip() == "all":
        return every
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = next((name for name in names if name not in every), None)
    if unknown is not None or not names:
        problem = f"no {what} was named" if unknown is None else f"{what} {unknown!r} is unknown"
        raise BenchmarkError(problem, expected=f"{', '.join(every)} or all")
    return names


def parse_files_of_ranks(texts: Sequence[str], *, ranks: int) -> dict[int, Path]:
    """Files by rank from ``RANK=FILE`` texts.

    Args:
        texts: as given.
        ranks: ranks of the run.

    Raises:
        BenchmarkError: not such texts, a rank that the run does not have, or one named twice.
    """
    files: dict[int, Path] = {}
    for text in texts:
        found = re.fullmatch(r"(\d{1,7})=(.+)", text)
        if found is None or not int(found.group(1)) < ranks:
            raise BenchmarkError(
                f"{text!r} does not name a rank's file; expected RANK=FILE with a rank from 0 to {ranks - 1}"
            )
        if int(found.group(1)) in files:
            raise BenchmarkError(f"rank {found.group(1)} is named twice; give one file for each rank")
        files[int(found.group(1))] = Path(found.group(2))
    return files


def parse_roles(text: str) -> tuple[str, ...]:
    """``dispatch``, ``combine`` or ``both``.

    Raises:
        BenchmarkError: anything else.
    """
    roles = {"dispatch": ("dispatch",), "combine": ("combine",), "both": ("dispatch", "combine")}
    if text not in roles:
        raise BenchmarkError(f"role {text!r} is unknown; expected dispatch, combine or both")
    return roles[text]
