"""Spread over ranks, a model computes what it computes on one: outputs, gradients, any traffic."""

from __future__ import annotations

from typing import Any

import pytest

from tests.collectives.cases import FAMILIES, VARIANTS

WORLDS = (1, 2, 4, 8)
#: fp32; sums in another order differ by some 1e-6 of the largest value
TOLERANCE = 1e-5
BUNDLED = ("tiny-mla", "tiny-mha", "tiny-gqa", "tiny-mamba2", "tiny-gdn")

Ranks = dict[int, list[dict[str, Any]]]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", [*BUNDLED, *FAMILIES])
def test_the_logits_are_those_of_the_whole_model(ranks: Ranks, name: str, world: int) -> None:
    for rank in ranks[world]:
        assert rank["forward"][f"{name} flat"]["relative"] < TOLERANCE


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("algorithm", "deduplicate"), VARIANTS)
def test_every_algorithm_gives_them(ranks: Ranks, algorithm: str, deduplicate: bool, world: int) -> None:
    key = f"{algorithm}{' deduplicated' if deduplicate else ''}"
    for rank in ranks[world]:
        assert rank["forward"][f"mixtral {key}"]["relative"] < TOLERANCE
        assert rank["forward"][f"tiny-mla {key}"]["relative"] < TOLERANCE


@pytest.mark.parametrize("world", WORLDS)
def test_gradients_are_complete_for_local_experts_and_sum_over_ranks_for_the_rest(
    ranks: Ranks, world: int
) -> None:
    for rank in ranks[world]:
        assert len(rank["backward"]) == 8
        for key, difference in rank["backward"].items():
            assert difference["relative"] < TOLERANCE, key


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(
    "pattern",
    [
        "uneven",
        "all to one expert",
        "one rank sends",
        "only to the last rank",
        "nobody has tokens",
        "padding only",
        "some padding",
    ],
)
def test_any_traffic_gives_the_sums_written_out_by_hand(ranks: Ranks, pattern: str, world: int) -> None:
    for rank in ranks[world]:
        assert rank["traffic"][pattern] < TOLERANCE


@pytest.mark.parametrize("world", WORLDS)
def test_counts_beyond_32_bits_arrive_whole(ranks: Ranks, world: int) -> None:
    for rank in ranks[world]:
        assert rank["large counts"] == [(source + 1) * 2**40 for source in range(world)]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ["round robin", "all on the last rank", "expert 0 everywhere", "by shares"])
def test_experts_may_sit_anywhere_and_several_times(ranks: Ranks, name: str, world: int) -> None:
    for rank in ranks[world]:
        assert rank["placements"][name]["relative"] < TOLERANCE


def test_a_token_stays_on_its_rank_if_the_expert_is_there(ranks: Ranks) -> None:
    row = 32 * 4 + 4 + 4  # hidden state, one gate weight, one slot
    for world in WORLDS:
        for rank, value in enumerate(ranks[world]):
            expected = [0] * world
            expected[rank] = 5 * row
            assert value["placements"]["replica bytes"] == expected


def test_phases_have_spans_in_their_order(ranks: Ranks) -> None:
    phases = ["route", "count_exchange", "pack", "dispatch", "experts", "combine", "unpack"]
    for rank in ranks[4]:
        assert rank["spans"] == [[phase, layer] for layer in (0, 1) for phase in phases]


def test_what_one_rank_sends_the_other_receives(ranks: Ranks) -> None:
    """Bytes from i to j as i tells them are those that j tells."""
    for index in range(len(ranks[4][0]["bytes"])):
        sent = [rank["bytes"][index][2] for rank in ranks[4]]
        received = [rank["bytes"][index][3] for rank in ranks[4]]
        assert sent == [list(column) for column in zip(*received, strict=True)]
        assert ranks[4][0]["bytes"][index][0] == ("dispatch", "combine")[index % 2]


def test_ranks_that_disagree_are_told_so_on_every_rank(ranks: Ranks) -> None:
    for rank in ranks[2]:
        said = rank["disagreements"]
        assert "disagree on the number of MoE layers: rank 0 has 2, rank 1 has 3" in said["layers"]
        assert "disagree on algorithm" in said["options"]
        for algorithm in ("flat", "gather"):
            other, own = 1 - rank["rank"], rank["rank"]
            assert f"rank {other} is in call 1 of MoE layer {other} while rank {own}" in said[algorithm]
