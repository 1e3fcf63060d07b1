"""Stretches of time with names."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from observatory.analysis.energy import make_timeline
from observatory.analysis.energy.timeline import MOST_NAMES
from observatory.errors import EnergyError

S = 1_000_000_000


def test_spans_that_overlap_have_a_name_of_their_own() -> None:
    timeline = make_timeline(["a", "b", "a"], np.array([0, 2, 5]) * S, np.array([3, 4, 6]) * S)
    assert timeline.seconds() == {"a": 3.0, "b": 1.0, "a+b": 1.0}
    assert [timeline.names[j] for j in timeline.name_M] == ["a", "a+b", "b", "a"]


def test_seconds_of_windows_are_exact_and_gaps_are_nobodys() -> None:
    timeline = make_timeline(["a", "b"], np.array([0, 2]) * S, np.array([1, 4]) * S)
    windows = timeline.seconds_in(np.array([-5.0, 0.5, 1.0, 3.5]) * S, np.array([9.0, 2.5, 2.0, 8.0]) * S)
    assert windows.tolist() == [[1.0, 2.0], [0.5, 0.5], [0.0, 0.0], [0.0, 0.5]]


def test_spans_without_length_are_left_out_and_nothing_else_is_an_error() -> None:
    timeline = make_timeline(["a", "b"], np.array([0, 5]) * S, np.array([1, 5]) * S)
    assert timeline.names == ("a",)
    with pytest.raises(EnergyError, match="no span has a length"):
        make_timeline(["a"], np.array([5]), np.array([5]))


def test_endless_different_names_are_refused() -> None:
    names = [f"n{k}" for k in range(MOST_NAMES + 1)]
    start = np.arange(len(names)) * S
    with pytest.raises(EnergyError, match="different names"):
        make_timeline(names, start, start + 1)


@given(
    spans=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 10_000), st.integers(1, 500)),
        min_size=1,
        max_size=40,
    ),
    cuts=st.lists(st.integers(-100, 11_000), min_size=2, max_size=8),
)
def test_times_of_neighbouring_windows_add_up_and_never_exceed_them(
    spans: list[tuple[str, int, int]], cuts: list[int]
) -> None:
    start = np.array([span[1] for span in spans])
    timeline = make_timeline([span[0] for span in spans], start, start + [span[2] for span in spans])
    edges = np.sort(np.array(cuts, dtype=float))
    parts = timeline.seconds_in(edges[:-1], edges[1:])
    whole = timeline.seconds_in(edges[:1], edges[-1:])
    assert parts.sum(axis=0) == pytest.approx(whole[0])
    assert (parts >= 0).all()
    assert (parts.sum(axis=1) * S <= np.diff(edges) + 1e-6).all()
    covered = {t for name, at, length in spans for t in range(at, at + length)}
    assert sum(timeline.seconds().values()) * S == pytest.approx(len(covered))
