"""Sums over layers and ranks, traffic, and time per phase."""

from __future__ import annotations

import pandas as pd
import pytest

from observatory.analysis.exchange import (
    critical_path,
    exchange_traffic,
    explain_last,
    layer_waits,
    phase_times,
    problems_of,
    rank_clocks,
    rank_waits,
    wait_and_transfer,
)
from observatory.analysis.exchange.groups import ranks_of_group
from observatory.run.manifest import ClockSpec, Manifest, ModelSpec, RankStatus, Topology
from tests.analysis.exchange.tables import collective, shared, spans
from tests.analysis.exchange.test_causes import NO_POWER, NO_SPANS

SEND = [[5, 5, 5], [5, 5, 5], [5, 5, 5]]


def table() -> pd.DataFrame:
    """Two collectives: rank 2 last by 100 and 60 us; then rank 0 by 50; then one with a missing rank."""
    missing = collective([0, 0, 0], [9, 9, 9], SEND, sequence=2).drop(index=1)
    return pd.concat(
        [
            collective([0, 40, 100], [130, 130, 130], SEND),
            collective([1_050, 1_000, 1_000], [1_060, 1_060, 1_060], SEND, sequence=1),
            missing,
        ],
        ignore_index=True,
    )


def waits(rows: pd.DataFrame) -> pd.DataFrame:
    split = wait_and_transfer(rows, ranks=3, clocks=shared(3))
    return explain_last(split, rows, spans=NO_SPANS, power=NO_POWER)


def test_a_layers_row_adds_up_and_names_whom_the_others_waited_for_longest() -> None:
    row = layer_waits(waits(table())).iloc[0]
    assert (row["collectives"], row["ranks"], row["rows"], row["rows_unknown"]) == (3, 3, 8, 2)
    assert row["wait_s"] == pytest.approx((100 + 60 + 50 + 50) * 1e-6)
    assert row["transfer_s"] == pytest.approx((3 * 30 + 3 * 10) * 1e-6)
    assert row["unknown_s"] == pytest.approx(18e-6)
    assert row["duration_s"] == pytest.approx(row["wait_s"] + row["transfer_s"] + row["unknown_s"])
    assert row["wait_share"] == pytest.approx(260 / 380)
    assert row["longest_p50_s"] == pytest.approx(60e-6)
    assert row["slowest_rank"] == 2
    assert row["slowest_share"] == pytest.approx(160 / 260)
    assert row["slowest_cause"] == "unknown"


def test_waiting_is_blamed_on_whom_it_was_for() -> None:
    ranks = rank_waits(waits(table())).set_index("source_rank")
    assert (ranks["wait_s"] * 1e6).tolist() == pytest.approx([100, 110, 50])
    assert (ranks["caused_wait_s"] * 1e6).tolist() == pytest.approx([100, 0, 160])
    assert ranks["times_last"].tolist() == [1, 0, 1]
    assert ranks["rows_unknown"].tolist() == [1, 0, 1]


def test_time_in_collectives_without_traffic_is_idle_and_no_transfer() -> None:
    rows = collective([0, 10, 0], [40, 41, 7], [[0, 8, 0], [8, 0, 0], [0, 0, 0]])
    ranks = rank_waits(waits(rows)).set_index("source_rank")
    assert (ranks["idle_s"] * 1e6).tolist() == pytest.approx([0, 0, 7])
    assert (ranks["transfer_s"] * 1e6).fillna(-1).tolist() == pytest.approx([30, 31, -1])


def test_reasons_are_counted() -> None:
    assert problems_of(waits(table())).to_dict("records") == [
        {"code": "peer_without_row", "reason": "rank 1, on which it depends, left no row", "rows": 2}
    ]


def test_traffic_is_what_senders_say_and_receivers_where_the_sender_is_missing() -> None:
    send = [[1, 2], [30, 4]]
    rows = pd.concat([collective([0, 0], [9, 9], send), collective([0, 0], [9, 9], send, sequence=1)])
    full = exchange_traffic(rows, ranks=2)
    assert full["bytes"].tolist() == [2, 4, 60, 8]
    assert full["collectives"].tolist() == [2, 2, 2, 2]
    half = exchange_traffic(rows[rows["source_rank"] == 0], ranks=2).set_index(["source_rank", "peer_rank"])
    assert half["bytes"].to_dict() == {(0, 0): 2, (0, 1): 4, (1, 0): 60}


def test_phases_are_summed_per_layer_and_rank_in_the_order_they_run() -> None:
    rows = spans([(0, "experts", 0, 100), (0, "route", 0, 10), (0, "experts", 200, 220), (1, "odd", 0, 7)])
    ended = pd.concat([rows, rows.iloc[:1].assign(end_ns=-5)])
    found = phase_times(ended)
    assert found["name"].tolist() == ["route", "experts", "odd"]
    assert (found["total_s"] * 1e6).tolist() == pytest.approx([10, 120, 7])
    assert found["spans"].tolist() == [1, 2, 1]


def test_a_span_around_the_layer_is_not_added_to_the_phases_inside() -> None:
    whole = spans([(0, "moe_layer", 0, 100)])
    assert phase_times(whole)["name"].tolist() == ["moe_layer"]
    assert phase_times(pd.concat([whole, spans([(0, "route", 0, 10)])]))["name"].tolist() == ["route"]


def test_the_critical_path_takes_the_slowest_rank_with_its_waiting_taken_off() -> None:
    step = [
        (0, "experts", 0, 100),
        (1, "experts", 0, 300),
        (0, "combine", 100, 360),
        (1, "combine", 300, 350),
    ]
    rows = pd.concat([spans(step), spans(step, step=1)])
    exchanges = collective([100, 300], [360, 350], [[1, 1], [1, 1]], role="combine")
    both = pd.concat([exchanges, exchanges.assign(step=1, sequence=1)], ignore_index=True)
    path = critical_path(rows, wait_and_transfer(both, ranks=2, clocks=shared(2))).set_index("name")
    assert path["critical_s"].to_dict() == pytest.approx({"experts": 300e-6, "combine": 60e-6})
    assert path["mean_s"].to_dict() == pytest.approx({"experts": 200e-6, "combine": 155e-6})
    assert path["wait_s"].to_dict() == pytest.approx({"experts": 0, "combine": 100e-6})
    assert path["critical_rank"].to_dict() == {"experts": 1, "combine": 0}
    assert path["critical_rank_share"].tolist() == [1, 1]
    assert path["share"].sum() == pytest.approx(1)


def test_without_waits_the_shortest_exchange_bounds_the_path_from_below() -> None:
    rows = spans([(0, "combine", 100, 360), (1, "combine", 300, 350)])
    path = critical_path(rows).iloc[0]
    assert path["critical_s"] == pytest.approx(50e-6)
    assert pd.isna(path["critical_rank"])
    assert pd.isna(path["wait_s"])


@pytest.mark.parametrize(
    ("label", "ranks"),
    [("0-3", (0, 1, 2, 3)), ("0,4,8-9#1", (0, 4, 8, 9)), ("7", (7,)), ("world", None), ("0-99999999", None),
     ("3-0", None), ("unregistered 0", None)],
)  # fmt: skip
def test_groups_named_by_their_ranks_are_understood(label: str, ranks: tuple[int, ...] | None) -> None:
    assert ranks_of_group(label) == ranks


def test_a_named_group_knows_its_missing_members() -> None:
    rows = collective([0, 40, 100], [130, 131, 129], SEND, group="1,4,6")
    rows["source_rank"] = [1, 4, 6]
    clocks = shared(8)
    assert wait_and_transfer(rows, ranks=8, clocks=clocks)["last_rank"].tolist() == [6, 6, 6]
    left = wait_and_transfer(rows.drop(index=2), ranks=8, clocks=clocks)
    assert left["problem"].iloc[0] == "rank 6, on which it depends, left no row"
    unnamed = wait_and_transfer(rows.drop(index=2).assign(group="ep"), ranks=8, clocks=clocks)
    assert "only 2 of the group's 3 ranks left a row" in unnamed["problem"].iloc[0]


def test_ranks_that_read_the_clock_of_an_aligned_rank_have_its_alignment() -> None:
    def status(rank: int, **clock: object) -> RankStatus:
        return RankStatus(rank=rank, state="complete", clock=ClockSpec.model_validate(clock))

    ranks = (
        status(0, method="none", identity="a"),
        status(1, method="none", identity="a"),
        status(2, method="ping-pong", identity="b", offset_ns=7, uncertainty_ns=2),
        status(3, method="none", identity="b"),
        status(4, method="none", identity="c"),
        RankStatus(rank=5, state="complete"),
    )
    manifest = Manifest(
        run_id="x", created_unix_s=0.0, model=ModelSpec(name="m"), topology=Topology(ranks=6), ranks=ranks
    )
    clocks = rank_clocks(manifest)
    offsets = [None if clock is None else clock.offset_ns for clock in clocks.values()]
    assert offsets == [0, 0, 7, 7, None, None]
