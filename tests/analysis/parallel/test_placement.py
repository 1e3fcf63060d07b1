from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from observatory.analysis.parallel import ParallelTopology, linear, load_placement, round_robin
from observatory.analysis.parallel.traffic import load_by_rank
from observatory.errors import PlacementError
from observatory.run.bounded import MAX_DOCUMENT_BYTES


def write(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_rules_place_experts_in_blocks_or_in_turn() -> None:
    assert linear(6, 3).rank_of_E.tolist() == [0, 0, 1, 1, 2, 2]
    assert round_robin(6, 3).rank_of_E.tolist() == [0, 1, 2, 0, 1, 2]
    assert linear(6, 1).rank_of_E.tolist() == [0] * 6
    assert linear(6, 3).experts_per_rank_R.tolist() == [2, 2, 2]
    assert linear(6, 3).even


@pytest.mark.parametrize("rule", [linear, round_robin])
@pytest.mark.parametrize("ep", [0, -4, 5, 24])
def test_a_degree_that_does_not_divide_the_experts_is_refused_with_those_that_do(rule, ep: int) -> None:
    with pytest.raises(
        PlacementError, match=rf"EP {ep} does not divide 12 experts; degrees that fit: 1, 2, 3, 4, 6, 12"
    ):
        rule(12, ep)


@pytest.mark.parametrize(
    ("ep", "per_node", "nodes", "last"), [(8, 4, 2, 1), (6, 4, 2, 1), (3, 4, 1, 0), (1, 1, 1, 0)]
)
def test_nodes_fill_one_after_another(ep: int, per_node: int, nodes: int, last: int) -> None:
    topology = ParallelTopology(ep=ep, gpus_per_node=per_node)
    assert topology.nodes == nodes
    assert topology.node_of_rank_R[-1] == last
    assert len(topology.node_of_rank_R) == ep


@pytest.mark.parametrize(("ep", "per_node"), [(0, 4), (4, 0), (-1, 1)])
def test_a_topology_without_ranks_is_refused(ep: int, per_node: int) -> None:
    with pytest.raises(PlacementError, match="expected 1 to"):
        ParallelTopology(ep=ep, gpus_per_node=per_node)


def test_a_file_places_all_layers_alike_or_each_its_own_way(tmp_path: Path) -> None:
    one = load_placement(write(tmp_path, {"expert_to_rank": [1, 0, 0, 1]}))
    assert one.for_layer(7, experts=4, ep=2).rank_of_E.tolist() == [1, 0, 0, 1]
    assert one.name == "mine.json"
    own = load_placement(write(tmp_path, {"layers": {"0": [0, 1], "3": [1, 0]}}))
    assert own.for_layer(3, experts=2, ep=2).rank_of_E.tolist() == [1, 0]
    with pytest.raises(PlacementError, match="no layer 1"):
        own.for_layer(1, experts=2, ep=2)


def test_uneven_files_are_allowed_and_known_as_uneven(tmp_path: Path) -> None:
    file = load_placement(write(tmp_path, {"expert_to_rank": [0, 0, 0, 1], "ranks": 3}))
    placement = file.for_layer(0, experts=4, ep=3)
    assert placement.experts_per_rank_R.tolist() == [3, 1, 0]
    assert not placement.even


def test_a_file_for_other_ranks_or_experts_is_refused(tmp_path: Path) -> None:
    file = load_placement(write(tmp_path, {"expert_to_rank": [0, 1, 2, 3]}))
    with pytest.raises(PlacementError, match=r"for 4 ranks, not 8"):
        file.for_layer(0, experts=4, ep=8)
    with pytest.raises(PlacementError, match="places 4 experts, but layer 0 has 8"):
        file.for_layer(0, experts=8, ep=4)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "not valid"),
        ("[0, 1]", "not valid"),
        ({}, "give either"),
        ({"expert_to_rank": [0, 1], "layers": {"0": [0, 1]}}, "give either"),
        ({"layers": {}}, "give either"),
        ({"expert_to_rank": []}, "expert_to_rank"),
        ({"expert_to_rank": [0, -1]}, "expert_to_rank.1"),
        ({"expert_to_rank": [0, 1.5]}, "expert_to_rank.1"),
        ({"expert_to_rank": [0, True]}, "expert_to_rank.1"),
        ('{"expert_to_rank": [0, NaN]}', "not valid"),
        ({"expert_to_rank": [0, 2**40]}, "expert_to_rank.1"),
        ({"expert_to_rank": [0, 3], "ranks": 2}, "rank 3 is named, but ranks is 2"),
        ({"layers": {"one": [0]}}, "layers.one"),
        ({"expert_to_rank": [0], "extra": 1}, "extra"),
        ("[" * 100_000, "not valid"),
    ],
)
def test_a_damaged_file_is_refused_with_its_fault_and_the_right_form(
    tmp_path: Path, content, complaint: str
) -> None:
    with pytest.raises(PlacementError, match=complaint) as caught:
        load_placement(write(tmp_path, content))
    assert "\n" not in str(caught.value)
    assert "expert_to_rank" in str(caught.value)


def test_a_missing_or_giant_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match="No such file"):
        load_placement(tmp_path / "none.json")
    with pytest.raises(PlacementError, match="cannot be read"):
        load_placement(tmp_path)
    giant = tmp_path / "giant.json"
    with giant.open("wb") as handle:
        handle.truncate(MAX_DOCUMENT_BYTES + 1)
    with pytest.raises(PlacementError, match="over 16 MiB"):
        load_placement(giant)


def test_copies_take_the_shares_that_the_file_states(tmp_path: Path) -> None:
    file = load_placement(write(tmp_path, {"layers": {"0": [[0, 1], 1]}, "shares": {"0": [[0.25, 0.75], 1]}}))
    placement = file.for_layer(0, experts=2, ep=2)
    assert placement.shares_E == ((0.25, 0.75), (1.0,))
    load_SR = load_by_rank(np.array([[100, 10], [3, 0], [0, 7]]), placement)
    assert load_SR.tolist() == [[25, 85], [1, 2], [0, 7]]
    one = load_placement(write(tmp_path, {"expert_to_rank": [[0, 1], 1], "shares": [[0.5, 0.5], [1.0]]}))
    assert one.shares_of(5) == ((0.5, 0.5), (1.0,))
    assert load_placement(write(tmp_path, {"expert_to_rank": [0, 1]})).shares_of(0) is None


def test_no_assignment_is_lost_to_rounding(tmp_path: Path) -> None:
    shares = [1 / 3, 1 / 3, 1 / 3]
    file = load_placement(write(tmp_path, {"expert_to_rank": [[0, 1, 2]], "shares": [shares]}))
    load_SE = np.arange(1000)[:, None]
    load_SR = load_by_rank(load_SE, file.for_layer(0, experts=1, ep=3))
    assert (load_SR.sum(axis=1) == load_SE[:, 0]).all()
    assert np.abs(load_SR - load_SE / 3).max() < 1


@pytest.mark.parametrize(
    "content",
    [
        {"expert_to_rank": [[0, 1], 1], "shares": [[0.5, 0.4], 1]},
        {"expert_to_rank": [[0, 1], 1], "shares": [[1.5, -0.5], 1]},
        {"expert_to_rank": [[0, 1], 1], "shares": [0.5, 1]},
        {"expert_to_rank": [[0, 1], 1], "shares": [[0.5, 0.5]]},
        {"expert_to_rank": [[0, 1], 1], "shares": {"0": [[0.5, 0.5], 1]}},
        {"layers": {"0": [[0, 1], 1]}, "shares": {"1": [[0.5, 0.5], 1]}},
    ],
)
def test_shares_that_do_not_fit_the_ranks_are_refused(content: dict, tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match="share"):
        load_placement(write(tmp_path, content))
