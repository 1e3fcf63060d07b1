"""Four gloo ranks that try to mislead the exchange probe; see adverse_cases.py for what they do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import observatory
from observatory.analysis.exchange import exchange_traffic, run_waits
from observatory.run import Run
from tests.probes.exchange.adverse_cases import WORLD
from tests.probes.spawned import run_ranks

pytestmark = pytest.mark.slow

Rows = Callable[[str], pd.DataFrame]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adverse")
    codes = run_ranks("tests.probes.exchange.adverse_cases", out, world=WORLD, timeout_s=300)
    said = "\n".join((out / f"rank-{rank}.log").read_text(encoding="utf-8")[-1500:] for rank in range(WORLD))
    assert codes == [0] * WORLD, said
    return out


@pytest.fixture
def opened(ranks: Path) -> Callable[[str], Run]:
    return lambda name: observatory.open_run(ranks / name)


@pytest.fixture
def rows(opened: Callable[[str], Run]) -> Rows:
    return lambda name: opened(name).exchanges().sort_values(["source_rank", "start_ns"])


@pytest.fixture
def facts(ranks: Path) -> Callable[[str], list[Any]]:
    """What every rank said about a case."""
    outcome = [
        json.loads((ranks / f"facts-{rank}.json").read_text(encoding="utf-8")) for rank in range(WORLD)
    ]
    return lambda name: [of_rank[name] for of_rank in outcome]


FORWARD = ["other", "dispatch", "other", "combine"]


def test_expert_parallel_groups_inside_a_larger_world_keep_to_themselves(
    rows: Rows, opened: Callable[[str], Run]
) -> None:
    frame = rows("subgroups")
    groups = {rank: set(own.group) for rank, own in frame.groupby("source_rank")}
    assert groups == {0: {"0-1", "0,2"}, 1: {"0-1", "1,3"}, 2: {"2-3", "0,2"}, 3: {"2-3", "1,3"}}
    expert = frame[frame.group.isin(["0-1", "2-3"])]
    for _, own in expert.groupby(["source_rank", "step"]):
        assert own.role.tolist() == [*FORWARD * 2, *["dispatch", "combine"] * 2]
        assert own.layer.tolist() == [0] * 4 + [1] * 4 + [1, 1, 0, 0]
    averages = frame[frame.group.isin(["0,2", "1,3"])]
    assert averages.layer.isna().all()
    assert set(averages.role) == {"other"}
    waits = run_waits(opened("subgroups"))
    assert waits.problem.isna().all()
    traffic = exchange_traffic(opened("subgroups").exchanges(), ranks=WORLD)
    moved = traffic[(traffic.role == "dispatch") & (traffic.bytes > 0)]
    assert (moved.source_rank // 2 == moved.peer_rank // 2).all()


def test_groups_in_flight_at_once_are_numbered_apart(rows: Rows, opened: Callable[[str], Run]) -> None:
    frame = rows("interleaved")
    assert frame.group.nunique() == 2
    for _, own in frame.groupby(["source_rank", "group"]):
        assert own.sequence.tolist() == list(range(6))
    for _, collective in frame.groupby(["group", "sequence"]):
        assert sorted(collective.source_rank) == list(range(WORLD))
        assert collective.backend_sequence.nunique() == 1
    assert not frame.blocking.any()
    assert run_waits(opened("interleaved")).problem.isna().all()


def test_a_group_that_was_taken_down_does_not_lend_its_name_to_the_next(
    rows: Rows, opened: Callable[[str], Run]
) -> None:
    frame = rows("taken_down")
    for _, own in frame.groupby("source_rank"):
        assert own.group.nunique() == 3
        assert own.sequence.tolist() == [0, 1] * 3
    assert run_waits(opened("taken_down")).problem.isna().all()


def test_an_error_between_dispatch_and_combine_does_not_shift_the_roles_that_follow(
    rows: Rows, facts: Callable[[str], list[Any]]
) -> None:
    assert facts("torn") == [True] * WORLD
    for _, own in rows("torn").groupby("source_rank"):
        assert own.role.tolist() == [*FORWARD[:2], *FORWARD * 2]
        assert own.layer.tolist() == [0] * 6 + [1] * 4
        assert own.step.tolist() == [0] * 2 + [1] * 8


def test_leaving_the_watch_does_not_wait_for_an_exchange_and_its_row_has_no_end(
    rows: Rows, opened: Callable[[str], Run], facts: Callable[[str], list[Any]]
) -> None:
    found = facts("in_flight")
    for rank, fact in enumerate(found):
        assert fact["result"] == [
            100 * peer + 4 * rank + 2 * row for peer in range(WORLD) for row in range(2)
        ]
        assert not fact["tapped"]
    # The last rank began 700 ms late, and nobody waited for it.
    assert all(fact["left in ms"] < 500 for fact in found[: WORLD - 1])
    frame = rows("in_flight").set_index("source_rank")
    assert frame.end_ns[: WORLD - 2].isna().all()
    assert any("no end" in note for note in opened("in_flight").manifest.notes)


def test_a_rank_without_traffic_does_not_tear_a_collective_apart(
    rows: Rows, opened: Callable[[str], Run]
) -> None:
    frame = rows("nothing_to_do")
    assert frame[frame.source_rank == 0].role.tolist() == ["dispatch", "dispatch", "combine", "combine"]
    # Nothing goes to rank 1, nor from it: its second dispatch looks to it like the first one's way back.
    assert frame[frame.source_rank == 1].role.tolist() == ["dispatch", "combine"] * 2
    waits = run_waits(opened("nothing_to_do"))
    assert waits.problem.isna().all()
    for _, own in waits.sort_values("sequence").groupby("source_rank"):
        assert own.role.tolist() == ["dispatch", "dispatch", "combine", "combine"]
    assert (waits[waits.source_rank == 1].peers == 0).all()
    traffic = exchange_traffic(opened("nothing_to_do").exchanges(), ranks=WORLD)
    assert set(traffic.role) == {"dispatch", "combine"}
    assert traffic[traffic.role == "dispatch"].collectives.tolist() == [2] * WORLD**2


def test_a_rank_without_tokens_takes_part_like_any_other(rows: Rows, opened: Callable[[str], Run]) -> None:
    frame = rows("no_tokens")
    for _, own in frame.groupby("source_rank"):
        assert own.role.tolist() == [*FORWARD * 2, *["dispatch", "combine"] * 2]
        assert own.layer.tolist() == [0] * 4 + [1] * 4 + [1, 1, 0, 0]
    sent = frame[(frame.source_rank == 2) & (frame.role == "dispatch")]
    assert [sum(values) for values in sent.send_bytes] == [0] * 4
    assert run_waits(opened("no_tokens")).problem.isna().all()


def test_ranks_may_make_different_numbers_of_exchanges(rows: Rows, opened: Callable[[str], Run]) -> None:
    frame = rows("different_numbers")
    assert frame.groupby("source_rank").size().tolist() == [6, 6, 3, 3]
    last = frame.groupby("source_rank").tail(1)
    assert last.sequence.tolist() == [0] * WORLD
    assert run_waits(opened("different_numbers")).problem.isna().all()


def test_layers_recomputed_without_a_graph_of_their_first_pass_are_distinguished(rows: Rows) -> None:
    for _, own in rows("reentrant").groupby("source_rank"):
        forward, backward = own[own.phase == "train_forward"], own[own.phase == "train_backward"]
        assert forward.role.tolist() == FORWARD * 2
        assert backward.role.tolist() == [*FORWARD, "dispatch", "combine"] * 2
        assert backward.layer.tolist() == [1] * 6 + [0] * 6


def test_gradients_that_travel_inside_another_layer_s_forward_pass_keep_their_own_layer(rows: Rows) -> None:
    for rank, own in rows("backward_inside").groupby("source_rank"):
        backward = own[own.phase == "train_backward"]
        assert backward.layer.tolist() == [1, 1, 0, 0]
        assert backward.role.tolist() == ["dispatch", "combine"] * 2
        outer = own[(own.layer == 2) & (rank != 1)]
        assert outer.role.tolist() == ([] if rank == 1 else ["dispatch", "dispatch", "combine", "combine"])


def test_an_exchange_without_a_gradient_does_not_take_the_layer_of_the_one_before(rows: Rows) -> None:
    for _, own in rows("counts_after_rows").groupby("source_rank"):
        backward = own[own.phase == "train_backward"]
        assert backward.layer.tolist() == [0, 0]
        assert backward.role.tolist() == ["dispatch", "combine"]
