"""Pattern files of UCC's perftest (``.ptini``).

Shapes: P ranks, M matrices.

A ``[format]`` block with the version, then one ``[collective]`` block per matrix. Counts are elements from
rank i (rows) to rank j; they are written in bytes with datatype UINT8, so nothing is rounded. Run it with
``-d uint8``. Counts above 32 bits are refused, as perftest reads no more; so is what a rank sends or
receives in all, from which perftest makes displacements of 32 bits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from observatory.errors import BenchmarkError

_VERSION = "1.0"
_MAX_COUNT = (1 << 32) - 1
_MAX_RANKS = 4096
_ELEMENT_BYTES = {"UINT8": 1, "INT8": 1, "FLOAT16": 2, "BFLOAT16": 2, "INT32": 4, "FLOAT32": 4, "FLOAT64": 8}
#: Entries on one line; longer rows go on, indented, on the next, as the parser joins them.
_ENTRIES_PER_LINE = 8


def pattern_lines(matrices: Iterable[ArrayLike], *, description: str = "") -> list[str]:
    """Lines of a pattern file; nothing is written here.

    Raises:
        BenchmarkError: a count, or all counts of a rank together, do not fit 32 bits.
    """
    lines = ["[format]", f"version = {_VERSION}"]
    if description:
        lines.append(f"description = {_one_line(description)}")
    for bytes_PP in matrices:
        matrix_PP = np.asarray(bytes_PP, dtype=np.int64)
        busiest = int(max(matrix_PP.sum(axis=axis).max(initial=0) for axis in (0, 1)))
        if busiest > _MAX_COUNT:
            raise BenchmarkError(
                f"{busiest} bytes of one rank do not fit UCC's 32-bit counts and displacements; "
                "expected at most 4 GiB: export a larger --ep, or capture fewer tokens per step"
            )
        lines += ["", "[collective]", "type = ALLTOALLV", f"team_size = {len(matrix_PP)}"]
        lines += ["datatype = UINT8", "flags = COUNT_32BIT", "counts = {"]
        for row in matrix_PP.tolist():
            for start in range(0, len(row), _ENTRIES_PER_LINE):
                lines.append("    " + ",".join(map(str, row[start : start + _ENTRIES_PER_LINE])))
        lines.append("}")
    return lines


def parse_patterns(text: str) -> list[NDArray[np.int64]]:
    """Read a pattern file: the matrices in bytes, (P, P) each.

    Raises:
        BenchmarkError: another version, another collective, or counts that are not P x P.
    """
    blocks = re.split(r"^\s*\[(format|collective)\]\s*$", text, flags=re.MULTILINE)
    names, bodies = blocks[1::2], blocks[2::2]
    if not names or names[0] != "format":
        raise BenchmarkError("the pattern file has no [format] block; expected version = 1.0 in it")
    version = _value(bodies[0], "version")
    if version != _VERSION:
        raise BenchmarkError(f"pattern file version {version} is not known; expected {_VERSION}")
    return [_matrix(body) for name, body in zip(names[1:], bodies[1:], strict=True) if name == "collective"]


def _matrix(body: str) -> NDArray[np.int64]:
    kind, datatype = _value(body, "type"), _value(body, "datatype")
    if kind != "ALLTOALLV" or datatype not in _ELEMENT_BYTES:
        raise BenchmarkError(
            f"a {kind} of {datatype} cannot be read; expected ALLTOALLV of {', '.join(_ELEMENT_BYTES)}"
        )
    match = re.search(r"^\s*counts\s*=\s*\{([^}]*)\}", body, flags=re.MULTILINE)
    size = _value(body, "team_size")
    counts: Sequence[str] = re.split(r"[,\s]+", match.group(1).strip()) if match else []
    ranks = int(size) if re.fullmatch(r"\d{1,6}", size) else 0
    if not 1 <= ranks <= _MAX_RANKS or len(counts) != ranks * ranks:
        raise BenchmarkError(f"{len(counts)} counts for a team of {size}; expected {size} x {size}")
    if not all(re.fullmatch(r"\d{1,18}", count) for count in counts):
        raise BenchmarkError("a count is no whole number; expected elements from rank i to rank j")
    matrix_PP = np.array(counts, dtype=np.int64).reshape(ranks, ranks)
    return matrix_PP * _ELEMENT_BYTES[datatype]


def _value(body: str, key: str) -> str:
    match = re.search(rf"^\s*{key}\s*=\s*(\S+)\s*$", body, flags=re.MULTILINE)
    return match.group(1)[:40] if match else "(none)"


def _one_line(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)[:100]
