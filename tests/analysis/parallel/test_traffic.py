from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from observatory.analysis.parallel import (
    ParallelTopology,
    cross_node_fraction,
    cross_rank_fraction,
    fold_sources,
    linear,
    load_by_rank,
    round_robin,
    source_shares,
    traffic_matrices,
)
from observatory.analysis.parallel.placement import Placement
from observatory.errors import LoadError, PlacementError

#: 1 step, 4 source ranks, 4 experts
LOAD_SPE = np.array([[[8, 0, 0, 0], [0, 4, 0, 0], [1, 1, 1, 1], [0, 0, 2, 2]]])


def test_experts_add_up_on_the_ranks_that_hold_them() -> None:
    load = np.array([[1, 2, 4, 8, 16, 32]])
    assert load_by_rank(load, linear(6, 3)).tolist() == [[3, 12, 48]]
    assert load_by_rank(load, round_robin(6, 3)).tolist() == [[9, 18, 36]]
    gaps = Placement(name="file", ep=4, rank_of_E=np.array([2, 0, 2, 2, 0, 0]))
    assert load_by_rank(load, gaps).tolist() == [[50, 0, 13, 0]], "ranks without experts get nothing"
    with pytest.raises(LoadError, match="loads of 6 experts with a placement of 4"):
        load_by_rank(load, linear(4, 2))


def test_as_many_ranks_as_captured_are_taken_as_they_are() -> None:
    traffic, sources = traffic_matrices(LOAD_SPE, linear(4, 4))
    assert sources == "captured"
    assert traffic[0].tolist() == LOAD_SPE[0].tolist()
    assert cross_rank_fraction(traffic[0]) == pytest.approx(1 - (8 + 4 + 1 + 2) / 20)
    assert cross_node_fraction(traffic[0], ParallelTopology(ep=4, gpus_per_node=2)) == pytest.approx(
        1 - (12 + 6) / 20
    )


def test_neighbouring_captured_ranks_fold_into_one_exactly() -> None:
    traffic, sources = traffic_matrices(LOAD_SPE, linear(4, 2))
    assert sources == "folded"
    assert traffic.dtype == np.int64
    assert traffic[0].tolist() == [[12, 0], [2, 6]]
    assert cross_rank_fraction(traffic[0]) == pytest.approx(2 / 20)


def test_more_ranks_than_captured_are_an_estimate_that_keeps_totals() -> None:
    traffic, sources = traffic_matrices(LOAD_SPE[:, :2], linear(4, 4))
    assert sources == "spread evenly (estimate)"
    assert traffic[0].tolist() == [[4, 0, 0, 0], [4, 0, 0, 0], [0, 2, 0, 0], [0, 2, 0, 0]]


def test_numbers_of_ranks_that_do_not_fit_are_spread_over_all() -> None:
    folded, sources = fold_sources(LOAD_SPE, 3)
    assert sources == "spread evenly (estimate)"
    np.testing.assert_allclose(folded[0], np.tile(LOAD_SPE[0].sum(axis=0) / 3, (3, 1)))


def test_one_captured_rank_crosses_by_one_minus_one_over_ep_whatever_it_routed() -> None:
    for ep in (2, 4, 8):
        load = np.random.default_rng(ep).integers(0, 99, size=(1, 1, 8))
        traffic, _ = traffic_matrices(load, linear(8, ep))
        assert cross_rank_fraction(traffic[0]) == pytest.approx(1 - 1 / ep)


def test_one_rank_sends_nothing_away_and_no_assignments_have_no_share() -> None:
    traffic, _ = traffic_matrices(LOAD_SPE, linear(4, 1))
    assert cross_rank_fraction(traffic[0]) == 0.0
    empty = np.zeros((2, 2), dtype=np.int64)
    assert cross_rank_fraction(empty) is None
    assert cross_node_fraction(empty, ParallelTopology(ep=2, gpus_per_node=1)) is None


@given(st.integers(1, 12), st.integers(1, 12))
def test_every_token_is_held_by_exactly_one_rank_in_total(captured: int, ep: int) -> None:
    share_RP, _ = source_shares(captured, ep)
    assert share_RP.shape == (ep, captured)
    assert share_RP.sum(axis=0) == pytest.approx(np.ones(captured))
    assert share_RP.sum(axis=1) == pytest.approx(np.full(ep, captured / ep)), (
        "no rank holds more than another"
    )


@given(
    arrays.arrays(np.int64, (2, 6, 12), elements=st.integers(0, 10**6)),
    st.sampled_from([1, 2, 3, 4, 6, 12]),
    st.sampled_from([linear, round_robin]),
)
def test_traffic_keeps_every_assignment_and_every_ranks_load(load_SPE, ep: int, rule) -> None:
    placement = rule(12, ep)
    traffic, _ = traffic_matrices(load_SPE, placement)
    np.testing.assert_allclose(traffic.sum(axis=1), load_by_rank(load_SPE.sum(axis=1), placement), rtol=1e-12)
    for matrix in traffic:
        share = cross_rank_fraction(matrix)
        within = cross_node_fraction(matrix, ParallelTopology(ep=ep, gpus_per_node=2))
        assert share is None or -1e-12 <= within <= share + 1e-12


def test_folding_onto_nothing_is_refused() -> None:
    with pytest.raises(PlacementError, match="onto EP 0"):
        source_shares(4, 0)


def test_a_manifest_that_names_a_billion_ranks_is_refused_and_not_allocated() -> None:
    with pytest.raises(PlacementError, match="1000000000 captured ranks"):
        source_shares(10**9, 4)
