"""Quantities by hand: MLA of DeepSeek-V2-Lite is 512 + 64 values of two bytes, 1152 B a token and layer."""

from __future__ import annotations

import numpy as np
import pytest

from observatory.analysis.route_fetch.choosing import break_even_rows, compared_options
from observatory.analysis.route_fetch.costs import TERMS, Constants, Sizes, StageCosts, cost, quantities
from observatory.analysis.route_fetch.published import published_constants
from observatory.cli.parsing import parse_shape
from observatory.errors import BenchmarkError

MLA = parse_shape("mla:16,512,64", dtype="bfloat16")
EXPERT = parse_shape("expert:2048", dtype="bfloat16")


def plain(trip: float, byte: float) -> Constants:
    us_F = np.array([trip, byte, byte])
    costs = {"transfer": StageCosts(us_F=us_F, samples_BF=us_F[None])}
    return Constants(grade="fitted", source="", shape=None, holders=1, stages=costs)  # type: ignore[arg-type]


def test_a_cache_entry_and_a_row_of_mla_have_the_published_bytes() -> None:
    assert MLA.entry_bytes == 1152
    route = quantities(MLA, "route", Sizes(rows=1, size=100))["transfer"]
    assert float(route["byte_out"]) == 576 * 2
    assert float(route["byte_back"]) == 512 * 2 + 8
    assert 2150 <= float(route["byte_out"] + route["byte_back"]) <= 2400, "2.2 to 2.4 KB (arXiv 2606.01502)"


def test_a_fetch_is_one_trip_for_all_layers_and_a_route_one_for_each() -> None:
    sizes = Sizes(rows=32, size=100, layers=27, uses=5)
    route, fetch = (quantities(MLA, option, sizes) for option in ("route", "fetch"))  # type: ignore[arg-type]
    assert float(route["transfer"]["trip"]) == 27 * 5
    assert float(route["transfer"]["byte_out"]) == 27 * 5 * 32 * 1152
    assert float(fetch["transfer"]["trip"]) == 1
    assert float(fetch["transfer"]["byte_back"]) == 27 * 100 * 1152
    assert float(fetch["rotate"]["entry_byte"]) == 27 * 100 * 64 * 2, "the decoupled key only, once"
    assert route["attend"]["operation"] == fetch["attend"]["operation"] == 27 * 5 * 2 * 32 * 100 * (576 + 512)


def test_heads_of_keys_decide_what_a_fetch_moves() -> None:
    moved = [
        float(quantities(parse_shape(text), "fetch", Sizes(rows=1, size=10))["transfer"]["byte_back"])
        for text in ("mha:16,64", "gqa:16,4,64", "mla:16,64,32")
    ]
    assert moved == [10 * 16 * 128 * 4, 10 * 4 * 128 * 4, 10 * 96 * 4]


def test_a_selection_bounds_what_is_fetched_and_costs_its_indices() -> None:
    shape = parse_shape("sparse:16,512,64,2048", dtype="bfloat16")
    for size, entries in ((1000, 1000), (100_000, 2048)):
        fetch = quantities(shape, "fetch", Sizes(rows=1, size=size))
        assert float(fetch["transfer"]["byte_back"]) == entries * 1152
        assert float(fetch["transfer"]["byte_out"]) == entries * 8
        assert float(fetch["gather"]["byte"]) == entries * 1152


def test_holders_share_the_attention_of_a_route() -> None:
    one, four = (quantities(MLA, "route", Sizes(rows=16, size=400, holders=holders)) for holders in (1, 4))
    assert four["attend"]["operation"] == one["attend"]["operation"] / 4
    assert four["transfer"]["byte_out"] == 4 * one["transfer"]["byte_out"]


def test_an_expert_breaks_even_where_its_tokens_weigh_what_its_weights_do() -> None:
    # 2 T H b against 3 F H b: T = 1.5 F.
    rows = break_even_rows(plain(0.0, 1e-3), EXPERT, size=1408)
    assert rows is not None
    assert rows.value == pytest.approx(1.5 * 1408, rel=1e-3)


def test_fetching_never_pays_where_a_chunk_is_larger_than_any_query() -> None:
    free_rows = plain(10.0, 0.0)
    assert break_even_rows(free_rows, MLA, size=100, layers=1) is None
    many_trips = break_even_rows(free_rows, MLA, size=100, layers=27)
    assert many_trips is not None
    assert many_trips.value == 0.0, "one trip beats twenty-seven"


def test_uses_move_the_break_even_down() -> None:
    constants = published_constants("h100-ndr200")
    rows = [break_even_rows(constants, MLA, size=1000, layers=27, uses=uses) for uses in (1.0, 10.0)]
    assert rows[0] is not None
    assert rows[1] is not None
    assert rows[1].value < rows[0].value / 5


@pytest.mark.parametrize(("rows", "low", "high"), [(256, 31.0, 48.0), (1024, 100.0, 130.0)])
def test_published_constants_give_the_published_round_trips(rows: int, low: float, high: float) -> None:
    # 31 to 48 us at 256 rows on five fabrics, 116 us at 1024 rows; the merge is not in a round trip.
    constants = published_constants("h100-ndr200")
    terms = quantities(MLA, "route", Sizes(rows=rows, size=1))["transfer"]
    us_F = constants.stages["transfer"].us_F
    round_trip_us = sum(us_F[index] * float(terms[term]) for index, term in enumerate(TERMS["transfer"]))
    assert low <= round_trip_us <= high


def test_what_is_not_published_is_not_compared() -> None:
    constants = published_constants("h100-ndr200")
    assert compared_options(constants, MLA) == ("route", "fetch")
    assert "prefill" in cost(constants, MLA, "local", Sizes(rows=1, size=1)).unknown
    with pytest.raises(BenchmarkError, match="h100-ndr200"):
        published_constants("h200")
