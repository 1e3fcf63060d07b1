"""A stack that is not ours: megatron-core's MoE layer and its dispatchers, over two and four ranks."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import observatory
from observatory.analysis.exchange import run_waits
from observatory.run import Run
from tests.probes.routing.megatron_cases import CASES, EVEN, EXPERTS, HIDDEN, LAYERS, STEPS, TOP_K
from tests.probes.spawned import run_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("megatron") is None,
        reason="megatron-core is not installed: pip install --no-deps megatron-core==0.16.1",
    ),
]

ROW_BYTES = HIDDEN * 4
WORLD_OF = {name: world for world, cases in CASES.items() for name in cases}
EP_OF = {name: ep for cases in CASES.values() for name, (ep, _) in cases.items()}
#: All-to-all dispatchers that say their splits, with and without shared experts, on all ranks and on some.
SPLIT = ["run", "shared", "ep4", "ep2"]
GATHER = ["gather", "ep2_gather"]


class Trained:
    """One case: its run, and what each rank's dispatchers said."""

    def __init__(self, out: Path, name: str) -> None:
        self.run: Run = observatory.open_run(out / name)
        self.world, self.ep = WORLD_OF[name], EP_OF[name]
        self.tokens = [2 * (5 + (0 if name in EVEN else rank)) for rank in range(self.world)]
        outcome = [
            json.loads((out / f"facts-{rank}.json").read_text(encoding="utf-8")) for rank in range(self.world)
        ]
        self.facts: list[dict[str, Any]] = [of_rank[name] for of_rank in outcome]

    def splits(self, step: int, layer: int, rank: int) -> tuple[list[int], list[int]]:
        """Rows to and from each member of the rank's group, as its dispatcher says."""
        sends, receives = self.facts[rank]["splits"][step * LAYERS + layer]
        return sends, receives

    def forward(self) -> pd.DataFrame:
        frame = self.run.exchanges()
        return frame[frame.phase == "train_forward"].set_index(["step", "layer", "source_rank", "role"])


@pytest.fixture(scope="module")
def spawned(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    places = {}
    for world, module in ((2, "megatron_cases"), (4, "megatron_four")):
        out = places[world] = tmp_path_factory.mktemp(module)
        codes = run_ranks(f"tests.probes.routing.{module}", out, world=world, timeout_s=300)
        logs = [(out / f"rank-{rank}.log").read_text(encoding="utf-8")[-1500:] for rank in range(world)]
        assert codes == [0] * world, "\n".join(logs)
    return places


@pytest.fixture
def trained(request: pytest.FixtureRequest, spawned: dict[int, Path]) -> Trained:
    return Trained(spawned[WORLD_OF[request.param]], request.param)


@pytest.mark.parametrize("trained", SPLIT, indirect=True)
def test_exchange_rows_carry_the_bytes_of_the_dispatcher_s_splits(trained: Trained) -> None:
    forward = trained.forward()
    for step in range(STEPS):
        for layer in range(LAYERS):
            for rank in range(trained.world):
                sends, receives = (np.array(rows) for rows in trained.splits(step, layer, rank))
                (dispatch,) = forward.loc[[(step, layer, rank, "dispatch")]].itertuples()
                (combine,) = forward.loc[[(step, layer, rank, "combine")]].itertuples()
                assert list(dispatch.send_bytes) == list(sends * ROW_BYTES)
                assert list(dispatch.receive_bytes) == list(receives * ROW_BYTES)
                assert list(combine.send_bytes) == list(receives * ROW_BYTES)
                # its gate weights travel beside the rows, 4 bytes each
                beside = forward.loc[[(step, layer, rank, "other")]]
                assert list(sends * 4) in [list(row) for row in beside.send_bytes]


@pytest.mark.parametrize("trained", SPLIT, indirect=True)
def test_routing_counts_agree_with_the_dispatcher_s_splits(trained: Trained) -> None:
    load = trained.run.expert_load()
    load["to"] = load.expert // (EXPERTS // trained.ep)
    sent = load.groupby(["step", "layer", "source_rank", "to"]).load.sum().unstack(fill_value=0)
    for step in range(STEPS):
        for layer in range(LAYERS):
            for rank in range(trained.world):
                assert sent.loc[(step, layer, rank)].tolist() == trained.splits(step, layer, rank)[0]
                assert sent.loc[(step, layer, rank)].sum() == trained.tokens[rank] * TOP_K


@pytest.mark.parametrize("trained", SPLIT, indirect=True)
def test_gradients_travel_the_same_way_and_know_their_layer(trained: Trained) -> None:
    frame = trained.run.exchanges()
    for rank in range(trained.world):
        backward = frame[(frame.phase == "train_backward") & (frame.source_rank == rank)]
        for step in range(STEPS):
            mine = backward[backward.step == step].sort_values("start_ns")
            assert mine.layer.tolist() == [1, 1, 1, 0, 0, 0]
            moved = mine[mine.role != "other"]
            assert moved.role.tolist() == ["dispatch", "combine"] * 2
            first = trained.splits(step, 1, rank)[0]
            assert list(moved.send_bytes.iloc[0]) == [rows * ROW_BYTES for rows in first]


@pytest.mark.parametrize("trained", GATHER, indirect=True)
def test_the_all_gather_dispatcher_s_gathers_are_dispatches_and_its_scatters_combines(
    trained: Trained,
) -> None:
    frame = trained.run.exchanges()
    for _, own in frame.groupby(["source_rank", "step"]):
        ordered = own.sort_values("start_ns")
        # routing map and gate weights go before the hidden states
        assert ordered.role.tolist() == [
            *["other", "other", "dispatch", "combine"] * 2,
            *["dispatch", "combine", "other"] * 2,
        ]
        assert ordered.layer.tolist() == [0] * 4 + [1] * 4 + [1] * 3 + [0] * 3
        forward = ordered[ordered.phase == "train_forward"]
        assert forward.algorithm.tolist() == [*["all_gather_into_tensor"] * 3, "reduce_scatter_tensor"] * 2
        assert {tuple(row) for row in forward[forward.role != "other"].send_bytes} == {
            (trained.tokens[0] * ROW_BYTES,) * trained.ep
        }


@pytest.mark.parametrize("trained", ["capacity"], indirect=True)
def test_with_a_padded_capacity_counts_and_rows_are_what_the_router_hands_on(trained: Trained) -> None:
    capacity = trained.tokens[0] * TOP_K // EXPERTS
    moved = trained.forward().loc[pd.IndexSlice[:, :, :, ["dispatch", "combine"]], :]
    assert len(moved) == 2 * STEPS * LAYERS * trained.world
    assert {tuple(row) for row in moved.send_bytes} == {(EXPERTS // trained.ep * capacity * ROW_BYTES,) * 2}
    # megatron-core's router drops and pads itself: what it chose before cannot be seen.
    assert set(trained.run.expert_load().load) == {capacity}


@pytest.mark.parametrize("trained", list(WORLD_OF), indirect=True)
def test_all_ranks_number_the_exchanges_of_their_group_alike(trained: Trained) -> None:
    frame = trained.run.exchanges()
    assert set(frame.backend) == {"gloo"}
    assert set(frame.backend_sequence.notna()) == {True}
    for _, collective in frame.groupby(["group", "sequence"]):
        assert len(collective) == trained.ep
        assert collective[["step", "phase", "role"]].drop_duplicates().shape[0] == 1
        sent, received = (
            collective.sort_values("source_rank")[name] for name in ("send_bytes", "receive_bytes")
        )
        assert np.array_equal(np.stack(list(sent)).T, np.stack(list(received)))
    assert run_waits(trained.run).problem.isna().all()


@pytest.mark.parametrize("trained", list(WORLD_OF), indirect=True)
def test_training_is_the_same_and_nothing_is_left(trained: Trained) -> None:
    assert [fact["same"] for fact in trained.facts] == [True] * trained.world
    assert [fact["tapped"] for fact in trained.facts] == [False] * trained.world
    assert trained.run.problems == ()
    spans = trained.run.spans()
    assert (spans[spans.name == "moe_layer"].groupby(["source_rank", "layer"]).size() == STEPS).all()
