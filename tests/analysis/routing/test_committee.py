from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from observatory.analysis.routing.committee import (
    committee_stability,
    jaccard,
    jaccard_by_chance,
    standing_committee,
)
from observatory.analysis.routing.loads import collect_layer_loads
from observatory.errors import LoadError
from tests.analysis.routing.runs import write_run


@pytest.mark.parametrize(
    ("load_E", "mass", "members"),
    [
        ([1, 5, 2, 2], 0.5, [1]),
        ([1, 4, 3, 2], 0.5, [1, 2]),
        ([2, 2, 2, 2], 0.5, [0, 1]),  # equal loads: lower id first
        ([0, 1, 0], 0.5, [1]),
        ([3, 1, 0, 0], 1.0, [0, 1]),  # idle experts are never needed
        ([7], 0.5, [0]),
    ],
)
def test_committees_of_hand_computed_tables(load_E: list[int], mass: float, members: list[int]) -> None:
    committee = standing_committee(load_E, mass)
    assert committee is not None
    assert committee.tolist() == members


@given(st.lists(st.integers(0, 10**15), min_size=1, max_size=30).filter(any), st.floats(0.01, 1.0))
def test_a_committee_holds_its_share_and_no_smaller_set_does(load_E: list[int], mass: float) -> None:
    members = standing_committee(load_E, mass)
    assert members is not None
    loads = sorted(load_E, reverse=True)
    numerator, denominator = mass.as_integer_ratio()
    needed = numerator * sum(load_E)
    assert sum(load_E[expert] for expert in members) * denominator >= needed
    assert sum(loads[: len(members) - 1]) * denominator < needed


def test_no_assignments_make_no_committee_and_impossible_mass_is_refused() -> None:
    assert standing_committee([0, 0]) is None
    for mass in (0.0, 1.5, float("nan")):
        with pytest.raises(LoadError, match="committee mass"):
            standing_committee([1, 2], mass)


def test_jaccard_by_chance_is_the_average_over_all_pairs_of_sets() -> None:
    from itertools import combinations

    sets = [(set(a), set(b)) for a in combinations(range(6), 2) for b in combinations(range(6), 3)]
    average = np.mean([jaccard(a, b) for a, b in sets])
    assert jaccard_by_chance(2, 3, 6) == pytest.approx(average)
    assert jaccard_by_chance(6, 6, 6) == pytest.approx(1.0)
    assert jaccard_by_chance(0, 0, 6) is None
    assert jaccard_by_chance(32, 32, 64) == pytest.approx(1 / 3, abs=0.01)
    with pytest.raises(LoadError, match="7 and 2 out of 6"):
        jaccard_by_chance(7, 2, 6)


def test_stability_compares_the_same_layer_between_conditions(tmp_path: Path) -> None:
    prose = write_run(tmp_path / "a", {("prefill", 0): [[[9, 9, 1, 1]]], ("prefill", 1): [[[9, 1, 1, 1]]]})
    code = write_run(tmp_path / "b", {("prefill", 0): [[[9, 1, 9, 1]]], ("prefill", 1): [[[0, 0, 0, 0]]]})
    frame = committee_stability({"prose": collect_layer_loads(prose), "code": collect_layer_loads(code)})
    assert len(frame) == 1, "layer 1 got nothing in code"
    row = frame.iloc[0]
    assert (row["condition_a"], row["condition_b"], row["layer"], row["size_a"], row["size_b"]) == (
        "prose",
        "code",
        0,
        2,
        2,
    )
    assert row["jaccard"] == pytest.approx(1 / 3)
    assert row["jaccard_chance"] == pytest.approx((1 * 1 + 4 * (1 / 3) + 1 * 0) / 6)


def test_runs_of_different_models_are_not_compared(tmp_path: Path) -> None:
    four = collect_layer_loads(write_run(tmp_path / "a", {("prefill", 0): [[[1, 1, 1, 1]]]}))
    two = collect_layer_loads(write_run(tmp_path / "b", {("prefill", 0): [[[1, 1]]]}))
    with pytest.raises(LoadError, match="4 experts in one and 2 in other"):
        committee_stability({"one": four, "other": two})
