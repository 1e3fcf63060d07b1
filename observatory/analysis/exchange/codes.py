"""Combinations of values as numbers, so that rows are grouped by one array."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pandas as pd


def joint_codes(columns: Iterable[pd.Series | npt.NDArray[np.generic]]) -> npt.NDArray[np.int64]:
    """A number for each row's combination of values, from 0 in the order in which they appear.

    Args:
        columns: one or several of one length; missing values of a column equal each other.
    """
    joint: npt.NDArray[np.int64] | None = None
    for column in columns:
        code = pd.factorize(column, use_na_sentinel=False)[0].astype(np.int64)
        if joint is not None and code.size:
            code = pd.factorize(joint * (code.max() + 1) + code)[0].astype(np.int64)
        joint = code
    assert joint is not None
    return joint
