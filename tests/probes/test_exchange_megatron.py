"""A stack that is not ours: megatron-core's MoE layer and its all-to-all dispatcher over two ranks."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import observatory
from observatory.store import Run
from tests.probes.megatron_cases import EXPERTS, HIDDEN, LAYERS, STEPS, TOP_K, WORLD
from tests.probes.spawned import run_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("megatron") is None,
        reason="megatron-core is not installed: pip install --no-deps megatron-core==0.16.1",
    ),
]

ROW_BYTES = HIDDEN * 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("megatron")
    codes = run_ranks("tests.probes.megatron_cases", out, world=WORLD, timeout_s=150)
    said = "\n".join((out / f"rank-{rank}.log").read_text(encoding="utf-8")[-1500:] for rank in range(WORLD))
    assert codes == [0, 0], said
    return out


@pytest.fixture
def run(trained: Path) -> Run:
    return observatory.open_run(trained / "run")


@pytest.fixture
def facts(trained: Path) -> list[dict[str, Any]]:
    return [json.loads((trained / f"facts-{rank}.json").read_text()) for rank in range(WORLD)]


def splits(facts: list[dict[str, Any]], step: int, layer: int, rank: int) -> tuple[list[int], list[int]]:
    """Rows to and from each rank, as its dispatcher says."""
    sends, receives = facts[rank]["splits"][step * LAYERS + layer]
    return sends, receives


def test_exchange_rows_carry_the_bytes_of_the_dispatcher_s_splits(
    run: Run, facts: list[dict[str, Any]]
) -> None:
    frame = run.exchanges()
    forward = frame[frame.phase == "train_forward"].set_index(["step", "layer", "source_rank", "role"])
    for step in range(STEPS):
        for layer in range(LAYERS):
            for rank in range(WORLD):
                sends, receives = (np.array(rows) for rows in splits(facts, step, layer, rank))
                (dispatch,) = forward.loc[[(step, layer, rank, "dispatch")]].itertuples()
                (combine,) = forward.loc[[(step, layer, rank, "combine")]].itertuples()
                assert list(dispatch.send_bytes) == list(sends * ROW_BYTES)
                assert list(dispatch.receive_bytes) == list(receives * ROW_BYTES)
                assert list(combine.send_bytes) == list(receives * ROW_BYTES)
                # its gate weights travel beside the rows, 4 bytes each
                beside = forward.loc[[(step, layer, rank, "other")]]
                assert list(sends * 4) in [list(row) for row in beside.send_bytes]


def test_routing_counts_agree_with_the_dispatcher_s_splits(run: Run, facts: list[dict[str, Any]]) -> None:
    load = run.expert_load()
    load["to"] = load.expert // (EXPERTS // WORLD)
    sent = load.groupby(["step", "layer", "source_rank", "to"]).load.sum().unstack(fill_value=0)
    for step in range(STEPS):
        for layer in range(LAYERS):
            for rank in range(WORLD):
                assert sent.loc[(step, layer, rank)].tolist() == splits(facts, step, layer, rank)[0]
                assert sent.loc[(step, layer, rank)].sum() == (5 + rank) * 2 * TOP_K


def test_gradients_travel_the_same_way_and_know_their_layer(run: Run, facts: list[dict[str, Any]]) -> None:
    frame = run.exchanges()
    backward = frame[(frame.phase == "train_backward") & (frame.source_rank == 0)].sort_values("start_ns")
    for step in range(STEPS):
        mine = backward[backward.step == step]
        moved = mine[mine.role != "other"]
        assert moved.layer.tolist() == [1, 1, 0, 0]
        assert moved.role.tolist() == ["dispatch", "combine"] * 2
        first = splits(facts, step, 1, 0)[0]
        assert list(moved.send_bytes.iloc[0]) == [rows * ROW_BYTES for rows in first]


def test_all_ranks_number_the_exchanges_of_their_group_alike(run: Run) -> None:
    frame = run.exchanges()
    assert set(frame.backend) == {"gloo"}
    for _, collective in frame.groupby(["group", "sequence"]):
        assert sorted(collective.source_rank) == [0, 1]
        assert collective[["step", "phase", "role"]].drop_duplicates().shape[0] == 1
        sent, received = (
            collective.sort_values("source_rank")[name] for name in ("send_bytes", "receive_bytes")
        )
        assert np.array_equal(np.stack(list(sent)).T, np.stack(list(received)))


def test_training_is_the_same_and_nothing_is_left(run: Run, facts: list[dict[str, Any]]) -> None:
    assert [fact["same"] for fact in facts] == [True, True]
    assert [fact["tapped"] for fact in facts] == [False, False]
    assert run.problems == ()
    spans = run.spans()
    assert (spans[spans.name == "moe_layer"].groupby(["source_rank", "layer"]).size() == STEPS).all()
