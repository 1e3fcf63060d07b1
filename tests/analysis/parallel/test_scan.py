from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from observatory.analysis.parallel import (
    ParallelTopology,
    cross_node_fraction,
    cross_rank_fraction,
    linear,
    traffic_matrices,
)
from observatory.analysis.parallel.scan import scan_run, traffic_matrix
from observatory.analysis.routing.floor import max_over_mean_floor
from observatory.analysis.routing.imbalance import max_over_mean, max_over_mean_rows
from observatory.errors import PlacementError
from tests.analysis.routing.runs import uniform_loads, write_run

#: 2 steps, 4 source ranks, 4 experts
LOAD_SPE = np.array(
    [
        [[8, 0, 0, 0], [0, 4, 0, 0], [1, 1, 1, 1], [0, 0, 2, 2]],
        [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 4, 0], [0, 0, 0, 0]],
    ]
)


def test_a_scan_computed_by_hand(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {("prefill", 1): LOAD_SPE})
    frame = scan_run(run, ep_degrees=[4, 2], gpus_per_node=2).set_index("ep")
    assert frame.index.tolist() == [2, 4]
    two, four = frame.loc[2], frame.loc[4]
    # Loads over the run: experts 9 5 7 3 of 24; ranks of EP 2: 14 and 10.
    assert two["expert_max_over_mean"] == four["expert_max_over_mean"] == pytest.approx(9 / 6)
    assert two["rank_max_over_mean"] == pytest.approx(14 / 12)
    assert four["rank_max_over_mean"] == pytest.approx(9 / 6)
    # Step 0: ranks 14 and 6 of 20; step 1: 0 and 4.
    assert two["rank_max_over_mean_step_max"] == pytest.approx(2.0)
    assert two["rank_max_over_mean_step_p50"] == pytest.approx((1.4 + 2.0) / 2)
    # EP 4: what stays is the diagonal, 8 + 4 + 1 + 2 in step 0 and 4 (rank 2, expert 2) in step 1.
    assert four["cross_rank_fraction"] == pytest.approx(1 - 19 / 24)
    assert four["cross_rank_fraction_step_max"] == pytest.approx(1 - 15 / 20)
    assert four["cross_rank_fraction_step_p50"] == pytest.approx((0.25 + 0.0) / 2)
    # Nodes of two ranks: blocks of 2 x 2 stay: 12 + 6 in step 0, 4 in step 1.
    assert four["cross_node_fraction"] == pytest.approx(1 - 22 / 24)
    # EP 2 folds ranks 0, 1 and 2, 3; both fit on one node.
    assert two["cross_rank_fraction"] == pytest.approx(2 / 24)
    assert two["cross_node_fraction"] == 0.0
    assert (two["nodes"], four["nodes"]) == (1, 2)
    assert (two["sources"], four["sources"]) == ("folded", "captured")
    assert (two["steps"], two["tokens"], two["assignments"]) == (2, 24, 24)
    assert (two["experts_per_rank_min"], two["experts_per_rank_max"], two["layer"], two["phase"]) == (
        2,
        2,
        1,
        "prefill",
    )


@pytest.fixture(scope="module")
def random_run(tmp_path_factory: pytest.TempPathFactory):
    load = np.random.default_rng(0).integers(0, 40, size=(7, 4, 24))
    return load, write_run(tmp_path_factory.mktemp("runs") / "run", {("decode", 0): load}, top_k=None)


@given(
    st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]), min_size=2, max_size=4, unique=True),
    st.sampled_from(["linear", "round-robin"]),
)
def test_expert_imbalance_does_not_depend_on_where_experts_are(
    random_run, degrees: list[int], placement: str
) -> None:
    load, run = random_run
    frame = scan_run(run, ep_degrees=degrees, gpus_per_node=4, placement=placement)
    assert set(frame["expert_max_over_mean"]) == {max_over_mean(load.sum(axis=(0, 1)))}
    assert (frame["rank_max_over_mean"] <= frame["expert_max_over_mean"] + 1e-12).all()
    if 24 in degrees:
        row = frame[frame["ep"] == 24].iloc[0]
        assert row["rank_max_over_mean"] == row["expert_max_over_mean"], "one expert per rank"
    if 1 in degrees:
        row = frame[frame["ep"] == 1].iloc[0]
        assert (row["rank_max_over_mean"], row["rank_max_over_mean_floor"]) == (1.0, 1.0)
        assert (row["cross_rank_fraction"], row["cross_node_fraction"]) == (0.0, 0.0)


@pytest.mark.parametrize("ep", [1, 2, 3, 4, 6, 8, 12])
@pytest.mark.parametrize("per_node", [1, 3, 4, 100])
def test_the_streamed_scan_agrees_with_explicit_traffic_matrices(random_run, ep: int, per_node: int) -> None:
    load, run = random_run
    row = scan_run(run, ep_degrees=[ep], gpus_per_node=per_node).iloc[0]
    traffic, sources = traffic_matrices(load, linear(24, ep))
    topology = ParallelTopology(ep=ep, gpus_per_node=per_node)
    assert row["sources"] == sources
    assert row["cross_rank_fraction"] == pytest.approx(cross_rank_fraction(traffic.sum(axis=0)), abs=1e-12)
    assert row["cross_node_fraction"] == pytest.approx(
        cross_node_fraction(traffic.sum(axis=0), topology), abs=1e-12
    )
    per_step = [cross_node_fraction(matrix, topology) for matrix in traffic]
    assert row["cross_node_fraction_step_p90"] == pytest.approx(np.quantile(per_step, 0.9), abs=1e-12)
    ratios = max_over_mean_rows(load.sum(axis=1).reshape(7, ep, -1).sum(axis=2))
    assert row["rank_max_over_mean_step_p90"] == pytest.approx(np.quantile(ratios, 0.9))


def test_a_traffic_matrix_adds_up_steps_and_knows_bytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {("prefill", 1): LOAD_SPE, ("prefill", 2): LOAD_SPE * 7})
    frame = traffic_matrix(run, ep=2, layer=1, phase="prefill", bytes_per_assignment=4096)
    matrix = frame.pivot(index="source_rank", columns="expert_rank", values="assignments").to_numpy()
    assert matrix.tolist() == [[12, 0], [2, 10]]
    assert frame["bytes"].tolist() == [12 * 4096, 0, 2 * 4096, 10 * 4096]
    assert set(frame["sources"]) == {"folded"}
    assert traffic_matrix(run, ep=2, layer=1, phase="prefill")["bytes"].isna().all()


def test_a_matrix_of_a_layer_or_phase_that_is_not_there_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {("prefill", 1): LOAD_SPE})
    with pytest.raises(PlacementError, match="no loads of layer 9 in prefill"):
        traffic_matrix(run, ep=2, layer=9, phase="prefill")


def test_uniform_routing_lies_on_the_floor_of_ranks(tmp_path: Path) -> None:
    load = uniform_loads(windows=60, tokens=128, top_k=4, experts=32)[:, None]
    frame = scan_run(
        write_run(tmp_path / "run", {("prefill", 0): load}, top_k=4), ep_degrees=[4, 8, 16], gpus_per_node=4
    )
    for row in frame.to_dict("records"):
        assert row["rank_max_over_mean_step_floor"] == max_over_mean_floor(
            tokens=128, top_k=4, experts=32, groups=row["ep"]
        )
        assert row["rank_max_over_mean_step_p50"] == pytest.approx(
            row["rank_max_over_mean_step_floor"], rel=0.05
        )
        assert row["rank_max_over_mean_floor"] < row["rank_max_over_mean_step_floor"]
        assert "1 - 1/EP by construction" in row["notes"]


def test_a_file_may_place_unevenly_and_then_has_no_floor(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {("prefill", 1): LOAD_SPE})
    path = tmp_path / "uneven.json"
    path.write_text(json.dumps({"expert_to_rank": [0, 1, 1, 1]}))
    row = scan_run(run, ep_degrees=[2], gpus_per_node=2, placement=path).iloc[0]
    assert row["placement"] == "uneven.json"
    assert row["rank_max_over_mean"] == pytest.approx(15 / 12)
    assert (row["experts_per_rank_min"], row["experts_per_rank_max"]) == (1, 3)
    assert np.isnan(row["rank_max_over_mean_floor"])
    assert "different numbers of experts" in row["notes"]


def test_a_degree_that_does_not_fit_names_those_that_do(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {("prefill", 0): LOAD_SPE})
    with pytest.raises(PlacementError, match="EP 3 does not divide 4 experts; degrees that fit: 1, 2, 4"):
        scan_run(run, ep_degrees=[2, 3], gpus_per_node=2)
    with pytest.raises(PlacementError, match="diagonal"):
        scan_run(run, ep_degrees=[2], gpus_per_node=2, placement="diagonal")


def test_steps_in_which_nothing_was_routed_have_no_share(tmp_path: Path) -> None:
    empty = np.zeros((3, 2, 4), dtype=np.int64)
    rows = scan_run(write_run(tmp_path / "a", {("decode", 0): empty}), ep_degrees=[2], gpus_per_node=1)
    names = [
        "expert_max_over_mean",
        "rank_max_over_mean",
        "rank_max_over_mean_floor",
        "cross_rank_fraction",
        "cross_node_fraction",
    ]
    assert rows.iloc[0][names].isna().all()
    assert "nothing was assigned" in rows.iloc[0]["notes"]
    some = np.concatenate([empty, np.full((1, 2, 4), 2)])
    row = scan_run(write_run(tmp_path / "b", {("decode", 0): some}), ep_degrees=[2], gpus_per_node=1).iloc[0]
    assert (row["cross_rank_fraction"], row["cross_rank_fraction_step_max"]) == (0.5, 0.5)


def test_windows_of_steps_have_whole_run_values_only(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {("decode", 0): LOAD_SPE}, window_steps=5)
    row = scan_run(run, ep_degrees=[4], gpus_per_node=2).iloc[0]
    assert row["steps"] == 10
    assert row["cross_rank_fraction"] == pytest.approx(1 - 19 / 24)
    assert row[[name for name in row.index if "_step_" in name]].isna().all()
    assert "no per-step values" in row["notes"]


def test_a_rank_that_left_no_rows_is_not_taken_for_its_neighbour(tmp_path: Path) -> None:
    load = np.zeros((1, 2, 4), dtype=np.int64)
    load[0, 1] = [0, 0, 0, 6]
    run = write_run(tmp_path / "run", {("decode", 0): load}, missing=((0, 0),))
    row = scan_run(run, ep_degrees=[2], gpus_per_node=1).iloc[0]
    assert row["cross_rank_fraction"] == 0.0, "rank 1 sends to its own expert"
    matrix = traffic_matrix(run, ep=2, layer=0, phase="decode")
    assert matrix[matrix["assignments"] > 0][["source_rank", "expert_rank"]].to_numpy().tolist() == [[1, 1]]


@settings(max_examples=15)
@given(arrays.arrays(np.int64, (3, 2, 8), elements=st.integers(0, 10**12)))
def test_shares_stay_between_nothing_and_everything(
    tmp_path_factory: pytest.TempPathFactory, load: np.ndarray
) -> None:
    run = write_run(tmp_path_factory.mktemp("runs") / "run", {("prefill", 0): load}, tokens_per_row=1)
    frame = scan_run(run, ep_degrees=[1, 2, 8], gpus_per_node=2)
    for name in ("cross_rank_fraction", "cross_node_fraction"):
        known = frame[name].dropna()
        assert ((known >= 0) & (known <= 1)).all()
    assert (frame["cross_node_fraction"].fillna(0) <= frame["cross_rank_fraction"].fillna(0) + 1e-9).all()


def test_many_more_ranks_than_experts_stay_cheap(tmp_path: Path) -> None:
    """65,536 ranks of which one holds everything: no table of ranks by ranks (34 GB) is made."""
    run = write_run(tmp_path / "run", {("prefill", 0): np.full((2, 1, 4), 3)}, top_k=2)
    placement = tmp_path / "wide.json"
    placement.write_text('{"expert_to_rank": [0, 0, 0, 0], "ranks": 65536}')
    limit = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), limit[1]))
    try:
        (row,) = scan_run(run, ep_degrees=[65536], gpus_per_node=8, placement=placement).to_dict("records")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
    assert row["rank_max_over_mean"] == 65536
    assert row["cross_rank_fraction"] == pytest.approx(1 - 1 / 65536)
    assert row["cross_node_fraction"] == pytest.approx(1 - 8 / 65536)
