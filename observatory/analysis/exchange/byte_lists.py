"""A column of byte lists as one array of numbers.

Shapes: N rows of the frame; V numbers of all lists, one list after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteLists:
    """What every row of an exchange table says that it sent or got.

    Attributes:
        length_N: numbers in each row's list; -1 where none was recorded or it holds nulls.
        first_N: where each list begins in ``bytes_V``.
        bytes_V: the numbers.
    """

    length_N: Int64
    first_N: Int64
    bytes_V: Int64

    @classmethod
    def of(cls, column: pd.Series) -> ByteLists:
        """Lists of a column: of Arrow's lists (``Run.exchanges(arrow_lists=True)``), or of any sequences."""
        if isinstance(column.dtype, pd.ArrowDtype):
            chunked = pa.chunked_array(pa.array(column))
            lists = chunked.chunk(0) if chunked.num_chunks == 1 else chunked.combine_chunks()
        else:
            lists = pa.array([_whole_numbers(values) for values in column], pa.list_(pa.int64()))
        length_N = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
        length_N = length_N.astype(np.int64)
        first_N = np.cumsum(length_N) - length_N
        values = lists.flatten()
        recorded_N = lists.is_valid().to_numpy(zero_copy_only=False)
        if values.null_count:
            recorded_N &= ~_any_of_list(first_N, length_N, values.is_null().to_numpy(zero_copy_only=False))
            values = values.fill_null(0)
        return cls(length_N=np.where(recorded_N, length_N, -1), first_N=first_N, bytes_V=values.to_numpy())

    def sums_N(self) -> npt.NDArray[np.float64]:
        """Sum of each list; NaN where none was recorded."""
        sum_N = np.zeros(len(self.length_N))
        holds_N = np.diff(self.first_N, append=len(self.bytes_V)) > 0
        if holds_N.any():
            # Each list that holds anything ends where the next one of these begins.
            sum_N[holds_N] = np.add.reduceat(self.bytes_V, self.first_N[holds_N])
        sum_N[self.length_N < 0] = np.nan
        return sum_N

    def of_rows(self, rows: Int64, length: int) -> tuple[Int64, Bool]:
        """Lists of rows that are so long, or not recorded.

        Args:
            rows: any shape.
            length: L, of every list that was recorded.

        Returns:
            The numbers, shape (*rows, L), 0 where they were not recorded; and whether they were, as ``rows``.
        """
        recorded = self.length_N[rows] >= 0
        if not len(self.bytes_V):
            return np.zeros((*rows.shape, length), np.int64), recorded
        at = self.first_N[rows][..., None] + np.arange(length)
        return np.where(recorded[..., None], self.bytes_V.take(at, mode="clip"), 0), recorded


def _whole_numbers(values: object) -> Int64 | None:
    """One list; None when it was not recorded or holds nulls."""
    if values is None or isinstance(values, float):
        return None
    array = np.asarray(values)
    return array.astype(np.int64) if np.issubdtype(array.dtype, np.integer) or array.size == 0 else None


def _any_of_list(first_N: Int64, length_N: Int64, flag_V: Bool) -> Bool:
    """Whether any value of each list has a flag."""
    flags = np.concatenate([[0], np.cumsum(flag_V)])
    return np.asarray(flags[first_N + length_N] > flags[first_N])
