"""Why the last rank came last, from spans and telemetry made by hand."""

from __future__ import annotations

import pandas as pd
import pytest

from observatory.analysis.exchange import explain_last, wait_and_transfer
from observatory.run.tables import POWER_SCHEMA, SPAN_SCHEMA
from tests.analysis.exchange.tables import collective, shared, spans

PAIR = [[1, 1], [1, 1]]
NO_SPANS = SPAN_SCHEMA.empty_table().to_pandas()
NO_POWER = POWER_SCHEMA.empty_table().to_pandas().assign(source_rank=pd.Series(dtype="int64"))


def explained(
    rows: pd.DataFrame, spans: pd.DataFrame = NO_SPANS, power: pd.DataFrame = NO_POWER
) -> pd.DataFrame:
    ranks = rows["source_rank"].nunique()
    waits = wait_and_transfer(rows, ranks=ranks, clocks=shared(ranks))
    return explain_last(waits, rows, spans=spans, power=power)


def layer(combine_us: list[int], *, bytes_to_1: int = 1) -> pd.DataFrame:
    """A dispatch that ends at 100 us, then a combine at which rank r arrives at ``combine_us[r]``."""
    send = [[1, bytes_to_1], [1, bytes_to_1]]
    dispatch = collective([0, 0], [100, 100], send)
    combine = collective(combine_us, [max(combine_us) + 50] * 2, PAIR, role="combine", sequence=1)
    return pd.concat([dispatch, combine], ignore_index=True)


def clocks(mhz: list[int]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "time_ns": 100_000,
            "device_uuid": [f"GPU-{rank}" for rank in range(len(mhz))],
            "sm_clock_mhz": mhz,
            "source_rank": range(len(mhz)),
        }
    )


def test_longer_experts_before_the_combine_are_compute_load() -> None:
    found = explained(
        layer([300, 900]),
        spans([(0, "experts", 110, 290), (1, "experts", 110, 880), (1, "combine", 900, 950)]),
    )
    assert found["compute_before_s"].tolist()[2:] == pytest.approx([180e-6, 770e-6])
    assert found["cause"].tolist()[2] == "compute load"
    assert found["cause"].tolist()[3] == "compute load"  # of itself, for whom others waited
    assert found["cause"].isna().tolist()[:2] == [True, True]  # nobody waited in the dispatch


def test_lateness_that_no_span_explains_is_unknown() -> None:
    found = explained(layer([300, 900]), spans([(0, "experts", 110, 290), (1, "experts", 110, 290)]))
    assert found["cause"].tolist()[2] == "unknown"


def test_a_rank_whose_exchange_before_ended_later_is_late_for_that() -> None:
    rows = layer([300, 900])
    rows.loc[1, "end_ns"] = 650_000  # 550 us after rank 0: of 600 us of lateness, computing adds 50
    assert explained(rows)["cause"].tolist()[2] == "exchange before"
    rows.loc[1, "end_ns"] = 350_000
    assert explained(rows)["cause"].tolist()[2] == "unknown"


def test_time_before_the_exchange_before_does_not_count() -> None:
    found = explained(layer([300, 900]), spans([(0, "experts", 0, 1), (1, "experts", 0, 99)]))
    assert found["compute_before_s"].tolist()[2:] == [0, 0]


def test_overlapping_spans_are_counted_once() -> None:
    rows = spans([(1, "experts", 110, 500), (1, "pack", 200, 300), (1, "unpack", 450, 600)])
    found = explained(layer([300, 900]), rows)
    assert found["compute_before_s"].iloc[3] == pytest.approx(490e-6)


def test_the_same_work_at_a_lower_clock_is_the_clock() -> None:
    rows = spans([(0, "experts", 100, 400), (1, "experts", 100, 700)])
    assert explained(layer([400, 700]), rows, clocks([1800, 900]))["cause"].tolist()[2] == "clock"
    # At 1710 MHz the same work would have taken 316 us: it was more work.
    assert explained(layer([400, 700]), rows, clocks([1800, 1700]))["cause"].tolist()[2] == "compute load"
    assert explained(layer([400, 700]), power=clocks([1800, 900]))["cause"].tolist()[2] == "clock"


def test_a_rank_that_sampled_several_devices_has_no_clock_of_its_own() -> None:
    both = clocks([1800, 900])
    both.loc[len(both)] = [100_000, "GPU-9", 900, 1]
    found = explained(layer([400, 700]), power=both)
    assert found["sm_clock_mhz"].isna().tolist() == [False, True, False, True]
    assert found["cause"].tolist()[2] == "unknown"


def test_without_spans_more_bytes_to_compute_on_explain_a_longer_gap() -> None:
    assert explained(layer([300, 900], bytes_to_1=64))["cause"].tolist()[2] == "compute load"
    assert explained(layer([300, 900], bytes_to_1=1))["cause"].tolist()[2] == "unknown"
    # 20 % more bytes do not make it four times slower, and a dispatch is not computed for.
    rows = layer([300, 900])
    rows.at[0, "send_bytes"], rows.at[0, "receive_bytes"] = [5, 6], [5, 5]
    rows.at[1, "send_bytes"], rows.at[1, "receive_bytes"] = [5, 6], [6, 6]
    assert explained(rows)["cause"].tolist()[2] == "unknown"
    twice = layer([300, 900], bytes_to_1=64).assign(role="dispatch")
    assert explained(twice)["cause"].tolist()[2] == "unknown"
