"""Synthetic traffic: volumes, shapes, and the pairs of a replay."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from observatory.collectives.bench.measure import alltoall_plan
from observatory.collectives.bench.patterns import PATTERNS, pattern_rows
from observatory.collectives.bench.replay import replay_plan, uniform_like
from observatory.errors import BenchmarkError, ExchangeError
from observatory.run.documents.bench import Traffic
from observatory.run.exchange_algorithms import stages


@settings(deadline=None)
@given(
    st.sampled_from(sorted(set(PATTERNS) - {"empty"})),
    st.integers(1, 9),
    st.integers(0, 1000),
    st.integers(0, 5),
)
def test_all_patterns_move_the_same_volume(pattern: str, ranks: int, rows: int, seed: int) -> None:
    rows_PP = pattern_rows(pattern, ranks=ranks, rows_per_rank=rows, seed=seed)
    assert rows_PP.shape == (ranks, ranks)
    assert rows_PP.sum() == ranks * rows
    assert (rows_PP >= 0).all()


def test_patterns_are_what_they_are_called() -> None:
    made = {name: pattern_rows(name, ranks=4, rows_per_rank=1200, seed=1) for name in PATTERNS}
    assert (made["uniform"] == 300).all()
    assert not made["empty"].any()
    assert np.array_equal(made["local"], 1200 * np.eye(4))
    assert np.array_equal(made["neighbour"], 1200 * np.roll(np.eye(4), 1, axis=1))
    assert (made["one-sided"].sum(axis=1) > 0).sum() == 1
    assert sorted(made["skewed"].sum(axis=0)) == [576, 768, 1152, 2304]
    assert made["hot"].sum(axis=0).max() == 2400
    assert 0 < (made["sparse"] == 0).sum() < 16
    assert len(set(made["random"].ravel().tolist())) > 12
    with pytest.raises(BenchmarkError, match="one of uniform, skewed"):
        pattern_rows("zigzag", ranks=2, rows_per_rank=1)


def test_a_plan_has_each_matrix_once_and_refuses_what_it_does_not_know() -> None:
    plan = alltoall_plan(
        ranks=2, sizes_bytes=[64, 1000], patterns=["uniform", "empty"], algorithms=["flat"], seeds=range(3)
    )
    volumes = [sum(map(sum, traffic.send_bytes_PP)) for traffic in plan.traffic]
    assert volumes == [128, 0, 2 * 992], "sizes are whole rows of 16 bytes"
    assert plan.notes == ()
    twice = alltoall_plan(ranks=2, sizes_bytes=[64], patterns=["uniform", "hot"], algorithms=["flat"])
    assert [item.pattern for item in twice.traffic] == ["uniform"]
    assert twice.notes == (
        "hot is the same traffic as another pattern on 2 ranks and was not measured again",
    )
    with pytest.raises(ExchangeError, match="algorithm 'ring' is unknown"):
        alltoall_plan(ranks=2, sizes_bytes=[64], patterns=["uniform"], algorithms=["ring"])
    with pytest.raises(BenchmarkError, match="below one row"):
        alltoall_plan(ranks=2, sizes_bytes=[8], patterns=["uniform"], algorithms=["flat"])


def test_a_replay_sends_every_matrix_both_ways_next_to_its_even_twin() -> None:
    dispatch = Traffic(
        pattern="captured",
        send_bytes_PP=((0, 80), (40, 20)),
        row_bytes=20,
        step=3,
        phase="decode",
        layer=1,
        role="dispatch",
    )
    plan = replay_plan([dispatch], algorithms=["flat"], run_id="r")
    outcome = [(item.pattern, item.role, item.send_bytes_PP) for item in plan.traffic]
    assert outcome == [
        ("captured", "dispatch", ((0, 80), (40, 20))),
        ("uniform", "dispatch", ((40, 40), (40, 20))),
        ("uniform", "combine", ((40, 40), (40, 20))),
        ("captured", "combine", ((0, 40), (80, 20))),
    ]
    assert {(item.step, item.phase, item.layer) for item in plan.traffic} == {(3, "decode", 1)}
    with pytest.raises(BenchmarkError, match="nothing to replay"):
        replay_plan([], algorithms=["flat"])


@pytest.mark.parametrize("roles", [("dispatch", "combine"), ("dispatch",), ("combine", "dispatch")])
def test_captured_and_even_traffic_take_turns_in_every_role(roles: tuple[str, ...]) -> None:
    steps = [
        Traffic(pattern="captured", send_bytes_PP=((0, 8), (4, 0)), step=step, phase="decode", layer=0)
        for step in range(6)
    ]
    plan = replay_plan(steps, algorithms=["flat"], roles=roles)  # type: ignore[arg-type]
    firsts = [(item.role, item.pattern) for item in plan.traffic[::2]]
    for role in roles:
        assert [pattern for own, pattern in firsts if own == role].count("captured") == 3
    assert [item.step for item in plan.traffic[::2]] == [item.step for item in plan.traffic[1::2]]


@given(st.lists(st.integers(0, 50), min_size=16, max_size=16))
def test_the_even_twin_keeps_the_volume_and_favours_no_rank(entries: list[int]) -> None:
    rows_PP = np.array(entries).reshape(4, 4)
    even = uniform_like(rows_PP)
    assert even.sum() == rows_PP.sum()
    assert even.max() - even.min() <= 1
    assert np.ptp(even.sum(axis=1)) <= 1, "what ranks send"
    assert np.ptp(even.sum(axis=0)) <= 1, "what ranks receive"


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_stages_deliver_every_byte(nodes: int, local: int, seed: int) -> None:
    ranks = nodes * local
    bytes_PP = np.random.default_rng(seed).integers(0, 100, size=(ranks, ranks))
    node_of_P = [rank // local for rank in range(ranks)]
    across, inside = stages(bytes_PP, node_of_P, "hierarchical")
    # What a rank holds between the stages is what it got in the first and what it sends in the second.
    assert np.array_equal(across.sum(axis=0), inside.sum(axis=1))
    assert np.array_equal(across.sum(axis=1), bytes_PP.sum(axis=1))
    assert np.array_equal(inside.sum(axis=0), bytes_PP.sum(axis=0))
    node = np.array(node_of_P)
    assert not inside[node[:, None] != node[None, :]].any()
    assert not across[(np.arange(ranks)[:, None] - np.arange(ranks)[None, :]) % local != 0].any()
    (everything,) = stages(bytes_PP, node_of_P, "gather")
    assert np.array_equal(everything[:, 0], bytes_PP.sum(axis=1))


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_a_combine_goes_back_the_way_its_dispatch_came(nodes: int, local: int, seed: int) -> None:
    ranks = nodes * local
    bytes_PP = np.random.default_rng(seed).integers(0, 100, size=(ranks, ranks))
    node_of_P = [rank // local for rank in range(ranks)]
    across, inside = stages(bytes_PP.T, node_of_P, "hierarchical")
    inside_back, across_back = stages(bytes_PP, node_of_P, "hierarchical", role="combine")
    assert np.array_equal(inside_back, inside.T)
    assert np.array_equal(across_back, across.T)
    assert np.array_equal(inside_back.sum(axis=0), across_back.sum(axis=1))
    # A reduce-scatter: every rank sends to rank j as much as rank j had to begin with.
    (summed,) = stages(bytes_PP, node_of_P, "gather", role="combine")
    assert np.array_equal(summed, np.tile(bytes_PP.sum(axis=0), (ranks, 1)))
    (direct,) = stages(bytes_PP, node_of_P, "flat", role="combine")
    assert np.array_equal(direct, bytes_PP)


def test_stages_refuse_nodes_and_shapes_they_cannot_serve() -> None:
    with pytest.raises(ExchangeError, match="as many ranks on each node"):
        stages(np.ones((3, 3)), (0, 0, 1), "hierarchical")
    with pytest.raises(ExchangeError, match="expected one row each"):
        stages(np.ones((3, 3)), (0, 0), "flat")
    with pytest.raises(ExchangeError, match="algorithm 'ring' is unknown"):
        stages(np.ones((2, 2)), (0, 0), "ring")
