"""Traffic matrices for nccl-tests' uneven all-to-all.

Shapes: P ranks.

Text of P lines of P whole numbers separated by blanks: number j of line i is what rank i sends to rank j, in
bytes. nccl-tests rounds every entry down to 16 bytes; so does `matrix_text`, and says how much that drops.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from observatory.errors import BenchmarkError

_UNIT_BYTES = 16
_MAX_RANKS = 4096


def matrix_text(bytes_PP: ArrayLike) -> str:
    """The matrix as nccl-tests reads it, entries rounded down to 16 bytes."""
    matrix_PP = np.asarray(bytes_PP, dtype=np.int64)
    floored_PP = matrix_PP - matrix_PP % _UNIT_BYTES
    return "".join(" ".join(map(str, row)) + "\n" for row in floored_PP.tolist())


def dropped_bytes(bytes_PP: ArrayLike) -> int:
    """Bytes that rounding down loses over all pairs."""
    return int(np.sum(np.asarray(bytes_PP, dtype=np.int64) % _UNIT_BYTES))


def parse_matrix(text: str) -> NDArray[np.int64]:
    """Read such a matrix back, (P, P) bytes.

    Raises:
        BenchmarkError: not square, not whole numbers, or a negative one.
    """
    rows = [line.split() for line in text.splitlines() if line.strip()]
    if not rows or len(rows) > _MAX_RANKS or any(len(row) != len(rows) for row in rows):
        raise BenchmarkError(
            f"a matrix of {len(rows)} lines is not square; expected as many numbers on each line as lines"
        )
    try:
        matrix_PP = np.array([[int(entry) for entry in row] for row in rows], dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise BenchmarkError(
            f"a matrix entry is no whole number of bytes ({error}); write it again"
        ) from error
    if (matrix_PP < 0).any():
        raise BenchmarkError("a matrix entry is negative; expected bytes from rank i to rank j")
    return matrix_PP
