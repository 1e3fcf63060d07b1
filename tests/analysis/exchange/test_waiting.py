"""Waiting and transfer of collectives whose numbers can be worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from observatory.analysis.exchange import wait_and_transfer
from observatory.run.manifest import ClockSpec
from tests.analysis.exchange.tables import collective, shared

US = pytest.approx


def split(rows: pd.DataFrame, ranks: int | None = None, **options: Any) -> pd.DataFrame:
    ranks = len(rows) if ranks is None else ranks
    return wait_and_transfer(rows, ranks=ranks, clocks=options.pop("clocks", shared(ranks)), **options)


def us(frame: pd.DataFrame, name: str) -> list[float]:
    """A column in microseconds; NaN as -1."""
    return [round(value, 6) for value in (frame[name] * 1e6).fillna(-1).tolist()]


ALL_TO_ALL = [[5, 5, 5], [5, 5, 5], [5, 5, 5]]


def test_everybody_waits_for_the_last_and_the_last_for_no_rank() -> None:
    waits = split(collective([0, 40, 100], [130, 131, 129], ALL_TO_ALL))
    assert us(waits, "wait_s") == [100, 60, 0]
    assert us(waits, "transfer_s") == [30, 31, 29]
    assert waits["last_rank"].tolist() == [2, 2, 2]
    assert waits["arrived_last"].tolist() == [False, False, True]
    assert us(waits, "wait_low_s") == us(waits, "wait_high_s") == [100, 60, 0]


def test_a_rank_that_sends_and_receives_nothing_waits_for_no_rank_and_no_rank_for_it() -> None:
    waits = split(collective([0, 10, 500], [40, 41, 501], [[0, 8, 0], [8, 0, 0], [0, 0, 9]]))
    assert us(waits, "wait_s") == [10, 0, 0]
    assert us(waits, "transfer_s") == [30, 31, -1]  # its own 9 bytes do not travel
    assert waits["peers"].tolist() == [1, 1, 0]
    assert waits["last_rank"].tolist()[:2] == [1, 1]
    assert pd.isna(waits["last_rank"].iloc[2])
    assert waits["arrived_last"].tolist() == [False, True, False]
    assert waits["problem"].isna().all()


def test_one_way_traffic_makes_the_receiver_wait_but_not_the_sender_that_was_done() -> None:
    # Rank 1 put its rows into a buffer and went on, 300 us before rank 0 came to fetch them.
    early_sender = split(collective([400, 0], [430, 100], [[0, 0], [64, 0]]))
    assert us(early_sender, "wait_s") == [0, 0]
    assert us(early_sender, "transfer_s") == [30, 100]
    late_sender = split(collective([0, 300], [330, 340], [[0, 0], [64, 0]]))
    assert us(late_sender, "wait_s") == [300, 0]
    assert us(late_sender, "transfer_s") == [30, 40]


def test_pairs_that_do_not_exchange_are_apart_also_inside_one_collective() -> None:
    send = [[0, 7, 0, 0], [7, 0, 0, 0], [0, 0, 0, 7], [0, 0, 7, 0]]
    waits = split(collective([0, 20, 100, 900], [50, 50, 950, 951], send))
    assert us(waits, "wait_s") == [20, 0, 800, 0]
    assert waits["last_rank"].tolist() == [1, 1, 3, 3]


def test_where_data_is_passed_on_the_whole_group_counts() -> None:
    send = [[0, 7, 0], [7, 0, 7], [0, 7, 0]]  # 0 and 2 exchange nothing with each other
    times = ([0, 10, 100], [140, 140, 140])
    assert us(split(collective(*times, send, algorithm="flat")), "wait_s") == [10, 90, 0]
    passed_on = split(collective(*times, send, algorithm="hierarchical"))
    assert us(passed_on, "wait_s") == [100, 90, 0]
    assert passed_on["depends_on"].tolist() == ["group"] * 3


def test_the_stages_of_a_hierarchical_exchange_are_collectives_of_their_own_groups() -> None:
    # Ranks 0, 1 on one node, 2, 3 on another; byte lists of the whole world.
    send = [[0, 4, 0, 0], [4, 0, 0, 0], [0, 0, 0, 4], [0, 0, 4, 0]]
    rows = collective([0, 30, 500, 700], [50, 51, 720, 721], send, group="node", algorithm="hierarchical")
    waits = split(rows, node_of_rank=(0, 0, 1, 1))
    assert us(waits, "wait_s") == [30, 0, 200, 0]
    assert waits["arrived_last"].tolist() == [False, True, False, True]
    assert waits["depends_on"].tolist() == ["peers"] * 4
    unknown = split(rows)
    assert unknown["wait_s"].isna().all()
    assert "on which node" in unknown["problem"].iloc[0]


def test_gloo_holds_ranks_for_those_they_exchange_nothing_with_and_that_is_not_called_transfer() -> None:
    send = [[0, 7, 0], [7, 0, 0], [0, 0, 7]]
    rows = collective([0, 20, 100], [130, 131, 101], send, backend="gloo")
    waits = split(rows)
    assert us(waits, "wait_s") == [20, 0, 0]
    assert us(waits, "held_s") == [80, 80, -1]
    assert us(waits, "transfer_s") == [30, 31, -1]
    let_go = split(rows.assign(end_ns=pd.array([50_000, 51_000, 101_000], "Int64")))
    assert us(let_go, "held_s") == [0, 0, -1]
    assert us(let_go, "transfer_s") == [30, 31, -1]


def test_a_missing_rank_leaves_bounds_and_its_name() -> None:
    rows = collective([0, 40, 100], [130, 131, 129], ALL_TO_ALL).drop(index=2)
    waits = split(rows, ranks=3)
    assert waits["wait_s"].isna().all()
    assert us(waits, "wait_low_s") == [40, 0]
    assert us(waits, "wait_high_s") == [130, 91]
    assert us(waits, "transfer_low_s") == [0, 0]
    assert us(waits, "transfer_high_s") == [90, 91]
    assert waits["problem"].tolist() == ["rank 2, on which it depends, left no row"] * 2
    assert not waits["arrived_last"].any()


def test_who_does_not_depend_on_the_missing_rank_is_still_split() -> None:
    send = [[0, 7, 0], [7, 0, 0], [0, 0, 0]]
    waits = split(collective([0, 20, 100], [50, 51, 101], send).drop(index=2), ranks=3)
    assert us(waits, "wait_s") == [20, 0]


def test_a_sequence_number_used_twice_is_not_matched() -> None:
    rows = collective([0, 10], [20, 21], [[1, 1], [1, 1]])
    waits = split(pd.concat([rows, rows.iloc[:1]], ignore_index=True), ranks=2)
    assert waits["wait_s"].isna().all()
    assert waits["wait_low_s"].isna().all()
    assert "rank 0 left several rows" in waits["problem"].iloc[1]
    assert us(waits, "duration_s") == [20, 11, 20]


def test_an_end_before_its_start_is_no_time_and_others_do_not_rely_on_it() -> None:
    waits = split(collective([0, 40, 100], [130, 30, 129], ALL_TO_ALL))
    assert waits["wait_s"].isna().all()
    assert "impossible" in waits["problem"].iloc[1]
    assert waits["problem"].iloc[0] == "rank 1, on which it depends, left impossible times"
    assert us(waits, "duration_s") == [130, -1, 29]
    assert us(waits, "wait_low_s") == [100, -1, 0]


def test_a_collective_that_never_ended_still_tells_the_others_when_it_arrived() -> None:
    waits = split(collective([0, 40, 100], [130, None, 129], ALL_TO_ALL))
    assert us(waits, "wait_s") == [100, -1, 0]
    assert waits["problem"].fillna("").tolist() == ["", "the collective never ended on this rank", ""]


def test_times_no_clock_can_show_are_refused() -> None:
    rows = collective([0, 1], [20, 21], [[1, 1], [1, 1]])
    rows.loc[0, "start_ns"] = -(2**62)
    waits = split(rows)
    assert "impossible" in waits["problem"].iloc[0]
    assert waits["duration_s"].isna().tolist() == [True, False]


def test_unaligned_clocks_give_a_bound_and_the_reason() -> None:
    clocks = {0: shared(1)[0], 1: None}
    waits = split(collective([0, 10_000_000], [130, 10_000_020], [[1, 1], [1, 1]]), clocks=clocks)
    assert waits["wait_s"].isna().all()
    assert us(waits, "wait_low_s") == [0, 0]
    assert us(waits, "wait_high_s") == [130, 20]
    assert us(waits, "transfer_low_s") == [0, 0]
    assert waits["problem"].iloc[0] == "its clock and that of rank 1 are not aligned"


def test_uncertainty_of_the_clocks_becomes_an_interval_of_the_waiting() -> None:
    clocks = {
        0: ClockSpec(offset_ns=0, uncertainty_ns=0, method="shared clock"),
        1: ClockSpec(offset_ns=-1_000_000, uncertainty_ns=3_000, method="ping-pong"),
    }
    waits = split(collective([0, 1_040], [60, 1_065], [[1, 1], [1, 1]]), clocks=clocks)
    assert us(waits, "wait_s") == [40, 0]
    assert us(waits, "wait_low_s") == [37, 0]
    assert us(waits, "wait_high_s") == [43, 0]
    assert us(waits, "transfer_low_s") == [17, 25]
    assert us(waits, "transfer_high_s") == [23, 25]


def test_drift_is_taken_from_the_moment_the_offset_held() -> None:
    clocks = {
        0: ClockSpec(offset_ns=0, uncertainty_ns=0, method="shared clock"),
        1: ClockSpec(offset_ns=0, uncertainty_ns=0, drift_ppm=-50.0, measured_ns=0, method="ping-pong"),
    }
    # At 1 s of rank 1's clock, the reference's has 50 us less.
    waits = split(collective([0, 1_000_000], [999_980, 1_000_030], [[1, 1], [1, 1]]), clocks=clocks)
    assert us(waits, "wait_s") == [999_950, 0]


def test_a_drift_that_was_never_measured_widens_the_interval() -> None:
    clocks = {
        0: ClockSpec(offset_ns=0, uncertainty_ns=0, method="shared clock"),
        1: ClockSpec(offset_ns=0, uncertainty_ns=0, measured_ns=0, method="ping-pong"),
    }
    waits = split(collective([900_000, 1_000_000], [1_000_900, 1_000_900], [[1, 1], [1, 1]]), clocks=clocks)
    low, high = us(waits, "wait_low_s")[0], us(waits, "wait_high_s")[0]
    assert (low, high) == (US(99_900, abs=1), US(100_100, abs=1))


def test_data_that_came_before_its_sender_shows_that_clocks_disagree() -> None:
    waits = split(collective([0, 200], [100, 300], [[0, 0], [64, 0]]))
    assert waits["problem"].iloc[0] == "rank 1 arrived after this rank had its data: their clocks disagree"
    assert us(waits, "wait_low_s")[0] == 0
    assert us(waits, "wait_high_s")[0] == 100


def test_rows_that_contradict_each_other_are_not_one_collective() -> None:
    rows = collective([0, 10], [20, 21], [[1, 1], [1, 1]])
    rows.at[1, "receive_bytes"] = [9, 1]
    assert "sent 1 bytes to rank 1, which says it got 9" in split(rows)["problem"].iloc[0]
    rows = collective([0, 10], [20, 21], [[1, 1], [1, 1]]).assign(layer=[3, 4])
    assert split(rows)["problem"].iloc[0] == "ranks disagree on the layer: rank 0 says 3, rank 1 4"


def test_who_moves_something_says_what_a_collective_is_for() -> None:
    idle = [[0, 0, 5], [0, 0, 0], [5, 0, 0]]
    rows = collective([0, 10, 20], [30, 31, 32], idle).assign(role=["dispatch", "combine", "dispatch"])
    waits = split(rows, ranks=3)
    assert waits["role"].tolist() == ["dispatch"] * 3
    assert waits["problem"].isna().all()
    # a rank that had no tokens and so skipped its router
    skipped = collective([0, 10], [20, 21], [[1, 1], [1, 1]]).assign(role=["combine", "other"])
    assert split(skipped)["role"].tolist() == ["combine"] * 2
    nothing = [[0] * 3] * 3
    rows = collective([0, 1, 2], [3, 4, 5], nothing).assign(role=["combine", "dispatch", "combine"])
    assert split(rows, ranks=3)["role"].tolist() == ["combine"] * 3


def test_ranks_that_move_something_and_contradict_each_other_on_the_role_are_not_matched() -> None:
    rows = collective([0, 10], [20, 21], [[1, 1], [1, 1]]).assign(role=["dispatch", "combine"])
    waits = split(rows)
    assert waits["role"].tolist() == ["dispatch", "combine"]
    expected = "ranks that exchange something disagree on the role: combine and dispatch"
    assert waits["problem"].tolist() == [expected] * 2


def test_numbers_of_the_backend_show_ranks_that_entered_the_watch_at_different_points() -> None:
    rows = collective([0, 10], [20, 21], [[1, 1], [1, 1]])
    shifted = rows.assign(backend_sequence=[17, 16])
    assert "different points of the program" in split(shifted)["problem"].iloc[0]
    for fits in (
        rows.assign(backend_sequence=[17, 17]),
        rows.assign(backend_sequence=pd.array([17, None], "Int64")),
        rows.assign(backend_sequence=[17, 16], backend="gloo"),  # which counts sends between two ranks too
    ):
        assert split(fits)["problem"].isna().all()


@pytest.mark.parametrize("impossible", [-1, 2**62])
def test_impossible_bytes_are_refused(impossible: int) -> None:
    waits = split(collective([0, 10], [20, 21], [[1, impossible], [1, 1]]))
    assert waits["problem"].iloc[0] == "rank 0 says an impossible number of bytes"
    assert waits["wait_s"].isna().all()


def test_without_bytes_per_peer_there_is_a_bound_only() -> None:
    rows = collective([0, 40], [60, 61], [[1, 1], [1, 1]]).assign(send_bytes=None, receive_bytes=None)
    waits = split(rows)
    assert waits["wait_s"].isna().all()
    assert us(waits, "wait_low_s") == [0, 0]
    assert us(waits, "wait_high_s") == [60, 21]
    assert waits["problem"].iloc[0] == "the bytes per peer were not recorded"


def test_an_empty_table_splits_into_an_empty_one() -> None:
    rows = collective([0], [1], [[1]]).iloc[:0]
    waits = split(rows, ranks=1)
    assert waits.empty
    assert "wait_s" in waits


TABLE = st.integers(2, 5).flatmap(
    lambda ranks: st.tuples(
        st.lists(st.integers(0, 1_000), min_size=ranks, max_size=ranks),
        st.lists(st.integers(0, 300), min_size=ranks, max_size=ranks),
        st.lists(
            st.lists(st.sampled_from([0, 0, 1, 64]), min_size=ranks, max_size=ranks),
            min_size=ranks,
            max_size=ranks,
        ),
        st.sampled_from(["nccl", "gloo", "mpi"]),
    )
)
NUMBERS = ["wait_s", "wait_low_s", "wait_high_s", "held_s", "transfer_s", "duration_s"]


def drawn(table: tuple[list[int], list[int], list[list[int]], str]) -> pd.DataFrame:
    """A physically possible collective: data never comes before its sender."""
    starts, extra, send, backend = table
    ends = []
    for rank, start in enumerate(starts):
        senders = [starts[peer] for peer in range(len(starts)) if send[peer][rank]]
        ends.append(max([start, *senders]) + extra[rank])
    return collective(starts, ends, send, backend=backend)


@settings(max_examples=60, deadline=None)
@given(table=TABLE)
def test_waiting_holding_and_transfer_are_never_negative_and_add_up(table: Any) -> None:
    waits = split(drawn(table))
    assert waits["problem"].isna().all()
    busy = waits[waits["peers"] > 0]
    assert (waits["wait_s"] >= 0).all()
    assert (busy["transfer_s"] > -1e-15).all()
    total = busy["wait_s"] + busy["held_s"] + busy["transfer_s"]
    assert np.allclose(total, busy["duration_s"], atol=1e-12)
    assert (waits.loc[waits["peers"] == 0, "wait_s"] == 0).all()


@settings(max_examples=40, deadline=None)
@given(table=TABLE, shift=st.integers(-(10**9), 10**9))
def test_a_common_shift_of_all_clocks_changes_nothing(table: Any, shift: int) -> None:
    rows = drawn(table)
    moved = rows.assign(start_ns=rows["start_ns"] + shift, end_ns=rows["end_ns"] + shift)
    before, after = split(rows), split(moved)
    assert np.allclose(before[NUMBERS], after[NUMBERS], equal_nan=True, atol=1e-15)
    assert before["last_rank"].equals(after["last_rank"])


@settings(max_examples=40, deadline=None)
@given(table=TABLE, data=st.data())
def test_ranks_can_be_numbered_in_any_order(table: Any, data: st.DataObject) -> None:
    starts, extra, send, backend = table
    order = data.draw(st.permutations(range(len(starts))))  # new rank r was rank order[r]
    renumbered = (
        [starts[old] for old in order],
        [extra[old] for old in order],
        [[send[i][j] for j in order] for i in order],
        backend,
    )
    before, after = split(drawn(table)), split(drawn(renumbered))
    for new, old in enumerate(order):
        pair = before.loc[old, NUMBERS].to_numpy(float), after.loc[new, NUMBERS].to_numpy(float)
        assert np.allclose(*pair, equal_nan=True, atol=1e-15)
        if before.loc[old, "wait_s"] > 0:  # with equal arrivals, either is last
            arrival = starts[before.loc[old, "last_rank"]]
            assert renumbered[0][after.loc[new, "last_rank"]] == arrival
