"""Values of a frame as cells of a table."""

from __future__ import annotations

import math
from typing import Any

import pytest

from observatory.analysis.columns import Column


@pytest.mark.parametrize(
    ("column", "row", "cell"),
    [
        ({}, {"x": 40960}, "40960"),
        ({}, {"x": 4606.668}, "4607"),
        ({}, {"x": 0.0003365}, "0.000336"),
        ({}, {"x": 1e300}, "1e+300"),
        ({"digits": 1}, {"x": 1e300}, "1e+300"),
        ({"digits": 3}, {"x": 0.2564}, "0.256"),
        ({"digits": 1, "scale": 1e6}, {"x": 0.0046}, "4600.0"),
        ({"digits": 0, "scale": 100}, {"x": 0.313}, "31"),
        ({}, {"x": True}, "yes"),
        ({}, {"x": None}, "n/a"),
        ({}, {"x": math.nan}, "n/a"),
        ({"otherwise": "all"}, {"x": None}, "all"),
        ({}, {"x": [3, 64]}, "3, 64"),
        ({"of": "n"}, {"x": 54, "n": 240}, "54 of 240"),
    ],
)
def test_a_cell_shows_the_value_in_the_unit_of_its_column(
    column: dict[str, Any], row: dict[str, Any], cell: str
) -> None:
    assert Column(name="x", title="X", **column).cell(row) == cell


@pytest.mark.parametrize(
    ("low", "high", "cell"),
    [(0.1, 0.3, "0.20 (0.10-0.30)"), (-0.1, 0.3, "0.20 (-0.10 to 0.30)"), (None, 0.3, "0.20")],
)
def test_an_interval_stands_behind_its_value(low: float | None, high: float, cell: str) -> None:
    column = Column(name="x", title="X", digits=2, interval=("low", "high"))
    assert column.cell({"x": 0.2, "low": low, "high": high}) == cell


def test_the_head_names_the_unit() -> None:
    assert Column(name="x", title="wait", unit="%").head == "wait %"
    assert Column(name="x", title="layer").head == "layer"
