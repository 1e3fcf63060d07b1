"""Lists of bytes as one array."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from observatory.analysis.exchange.byte_lists import ByteLists

LISTS = [[1, 2], None, [3, None], [], [4], [5, 6]]
KIND = pa.list_(pa.int64())
COLUMNS = {
    "arrow": pd.Series(pd.array(pa.chunked_array([LISTS[:2], LISTS[2:]], KIND), dtype=pd.ArrowDtype(KIND))),
    "arrays": pd.Series([None if row is None else pa.array(row).to_pandas().to_numpy() for row in LISTS]),
    "lists": pd.Series(LISTS, dtype=object),
}


@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS)
def test_a_list_that_holds_a_null_was_not_recorded_and_an_empty_one_was(column: pd.Series) -> None:
    lists = ByteLists.of(column)
    assert lists.length_N.tolist() == [2, -1, -1, 0, 1, 2]
    assert lists.sums_N().tolist() == pytest.approx([3, np.nan, np.nan, 0, 4, 11], nan_ok=True)


@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS)
def test_lists_of_rows_have_zeros_where_none_was_recorded(column: pd.Series) -> None:
    values, recorded = ByteLists.of(column).of_rows(np.array([[0, 1], [5, 2]]), 2)
    assert values.tolist() == [[[1, 2], [0, 0]], [[5, 6], [0, 0]]]
    assert recorded.tolist() == [[True, False], [True, False]]
