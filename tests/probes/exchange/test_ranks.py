"""Three gloo ranks in all kinds of exchanges, watched; see exchange_cases.py for what they do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import observatory
from observatory.analysis.exchange import recorder_agreement
from observatory.run import Run
from tests.probes.spawned import run_ranks

pytestmark = pytest.mark.slow

Rows = Callable[[str], pd.DataFrame]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exchange")
    codes = run_ranks("tests.probes.exchange.exchange_cases", out, world=3, timeout_s=300)
    said = "\n".join((out / f"rank-{rank}.log").read_text(encoding="utf-8")[-1500:] for rank in range(2))
    assert codes == [0, 0, 9], said
    return out


@pytest.fixture
def opened(ranks: Path) -> Callable[[str], Run]:
    return lambda name: observatory.open_run(ranks / name)


@pytest.fixture
def rows(opened: Callable[[str], Run]) -> Rows:
    return lambda name: opened(name).exchanges().sort_values(["source_rank", "start_ns"])


@pytest.fixture
def facts(ranks: Path) -> Callable[[str], list[Any]]:
    """What every rank that lived said about a case."""
    outcome = [json.loads((ranks / f"facts-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    return lambda name: [of_rank[name] for of_rank in outcome]


def lists(frame: pd.DataFrame, column: str) -> list[list[int]]:
    return [list(map(int, values)) for values in frame[column]]


def test_bytes_per_peer_follow_from_the_splits(rows: Rows) -> None:
    frame = rows("splits")
    send = {rank: lists(frame[frame.source_rank == rank], "send_bytes") for rank in range(3)}
    # uneven rows of 2 float32; all from rank 0 to 2, rows of 5 bfloat16; nothing; 6 rows of 2 float32 in
    # equal shares; uneven rows of 1 complex64; 3 int64 in equal shares
    assert send[0] == [[8, 16, 24], [0, 0, 70], [0, 0, 0], [16, 16, 16], [8, 16, 24], [8, 8, 8]]
    assert send[1] == [[0, 32, 8], [0, 0, 0], [0, 0, 0], [16, 16, 16], [0, 32, 8], [8, 8, 8]]
    assert send[2] == [[40, 0, 16], [0, 0, 0], [0, 0, 0], [16, 16, 16], [40, 0, 16], [8, 8, 8]]


def test_what_one_rank_sends_the_other_receives(rows: Rows) -> None:
    for _, collective in rows("splits").groupby(["group", "sequence"]):
        ordered = collective.sort_values("source_rank")
        send_PP, receive_PP = lists(ordered, "send_bytes"), lists(ordered, "receive_bytes")
        assert receive_PP == [list(column) for column in zip(*send_PP, strict=True)]
        assert len(send_PP) == 3


def test_every_way_to_start_an_exchange_is_seen_once(rows: Rows) -> None:
    frame = rows("ways")
    for _, rank in frame.groupby("source_rank"):
        assert rank.step.tolist() == list(range(9))
        assert rank.sequence.tolist() == list(range(9))
        assert rank.algorithm.tolist() == [
            *["all_to_all_single"] * 7,
            "all_gather_into_tensor",
            "reduce_scatter_tensor",
        ]
        assert lists(rank, "send_bytes") == [[16, 16, 16]] * 7 + [[48, 48, 48], [16, 16, 16]]
    assert (frame.end_ns > frame.start_ns).all()
    assert set(frame.backend) == {"gloo"}
    assert set(frame.role) == {"other"}


def test_an_asynchronous_exchange_ends_when_it_is_complete_not_when_it_is_waited_for(
    rows: Rows, facts: Callable[[str], list[Any]]
) -> None:
    frame = rows("asynchronous").set_index("source_rank")
    for rank, fact in enumerate(facts("asynchronous")):
        assert fact["same type"]
        assert fact["completed"]
        assert fact["before_ns"] <= frame.start_ns[rank] < frame.end_ns[rank]
        # The program slept 300 ms before it waited; a busy machine may take some of them for the exchange.
        assert frame.end_ns[rank] < fact["waited_ns"] - 50e6


def test_watching_changes_no_result(facts: Callable[[str], list[Any]]) -> None:
    assert facts("results") == [{"same": [True, True], "tapped": False}] * 2


FORWARD = ["other", "dispatch", "other", "combine"]


@pytest.mark.parametrize("name", ["roles", "roles_functional"])
def test_dispatch_and_combine_are_distinguished_forward_and_backward(rows: Rows, name: str) -> None:
    frame = rows(name)
    step = frame[(frame.step == 0) & (frame.source_rank == 0)]
    assert step.role.tolist() == [*FORWARD, *FORWARD, *["dispatch", "combine"] * 2]
    assert step.layer.tolist() == [0] * 4 + [1] * 4 + [1, 1, 0, 0]
    assert step.phase.tolist() == ["train_forward"] * 8 + ["train_backward"] * 4
    # tokens for experts 0 1 2 4: two stay, one goes to rank 1, one to rank 2; rows of 8 float32
    assert lists(step, "send_bytes")[:3] == [[8, 8, 8], [64, 32, 32], [8, 4, 4]]
    dispatch, combine = step[(step.phase == "train_forward") & (step.layer == 0)].iloc[[1, 3]].itertuples()
    assert list(dispatch.send_bytes) == list(combine.receive_bytes)
    gradient = step[(step.phase == "train_backward") & (step.layer == 0)].set_index("role")
    assert list(gradient.send_bytes["dispatch"]) == list(dispatch.send_bytes)


def test_dispatched_bytes_agree_with_the_routing(opened: Callable[[str], Run]) -> None:
    run = opened("roles")
    load = run.expert_load()
    load["to"] = load.expert // 2
    tokens = load.groupby(["step", "layer", "source_rank", "to"]).load.sum().unstack(fill_value=0)
    frame = run.exchanges()
    sent = frame[(frame.role == "dispatch") & (frame.phase == "train_forward")]
    assert len(sent) == 2 * 2 * 3
    for row in sent.itertuples():
        expected = tokens.loc[(row.step, int(row.layer), row.source_rank)] * 8 * 4
        assert list(row.send_bytes) == expected.tolist()


def test_a_recomputed_layer_exchanges_forward_once_more(rows: Rows) -> None:
    frame = rows("recomputed")
    backward = frame[(frame.phase == "train_backward") & (frame.source_rank == 0)]
    assert backward.role.tolist() == [*FORWARD, "dispatch", "combine"] * 2
    assert backward.layer.tolist() == [1] * 6 + [0] * 6


def test_code_compiled_before_the_watch_is_seen(rows: Rows, facts: Callable[[str], list[Any]]) -> None:
    assert facts("compiled") == [True, True]
    assert len(rows("compiled")) == 3


def test_a_compiled_model_s_exchanges_find_their_layer(rows: Rows) -> None:
    frame = rows("compiled_model")
    forward = frame[(frame.phase == "train_forward") & (frame.source_rank == 0)]
    assert forward.role.tolist() == [*FORWARD, *FORWARD]
    assert forward.layer.tolist() == [0] * 4 + [1] * 4
    backward = frame[(frame.phase == "train_backward") & (frame.source_rank == 0)]
    assert backward.role.tolist() == ["dispatch", "combine"] * 2
    assert backward.layer.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("name", ["overlapped", "overlapped_compiled"])
def test_a_layer_that_computes_while_its_halves_travel_is_understood(
    rows: Rows, facts: Callable[[str], list[Any]], name: str
) -> None:
    assert facts(name) == [[True, True]] * 2
    frame = rows(name)
    for _, own in frame.groupby("source_rank"):
        assert own.role.tolist() == ["dispatch", "dispatch", "combine", "combine"] * 4
        assert set(own.layer) == {0}
        assert own.phase.tolist() == [*["train_forward"] * 4, *["train_backward"] * 4] * 2
        assert not own.blocking.any()
    first = frame[(frame.source_rank == 0) & (frame.sequence < 2)]
    assert lists(first, "send_bytes") == [[32, 64, 96], [160, 0, 64]]


def test_what_the_program_says_is_believed(opened: Callable[[str], Run]) -> None:
    frame = opened("outcome").exchanges()
    mine = frame[frame.source_rank == 1].set_index("start_ns").sort_index()
    assert mine.phase.tolist() == ["unknown", "decode", "train_backward"]
    assert mine.role.tolist() == ["dispatch", "other", "combine"]
    assert mine.algorithm.tolist() == ["flat", "all_to_all_single", "flat"]
    assert mine.backend.tolist() == ["mpi", "gloo", "gloo"]
    spans = opened("outcome").spans()
    stated = spans[(spans.source_rank == 1) & (spans.name != "phase")]
    assert stated[["name", "layer"]].to_numpy().tolist() == [["pack", 7]]


def test_members_name_a_group_alike_and_number_its_exchanges(rows: Rows) -> None:
    frame = rows("groups")
    for rank in (0, 2):
        mine = frame[frame.source_rank == rank]
        assert mine.group.tolist() == ["0,2", "0,2#1", "0,2", "0-2"]
        assert mine.sequence.tolist() == [0, 0, 1, 0]
        assert [len(sent) for sent in mine.send_bytes] == [2, 2, 2, 3]
    assert frame[frame.source_rank == 1].group.tolist() == ["0-2"]


def test_threads_do_not_disturb_each_other(rows: Rows) -> None:
    frame = rows("threads")
    for _, one in frame.groupby(["source_rank", "group"]):
        assert one.sequence.tolist() == list(range(30))
    assert len(frame) == 3 * 2 * 30


def test_no_exchange_ends_before_those_it_got_data_from_arrived(rows: Rows) -> None:
    frame = rows("many")
    assert len(frame) == 3 * 400
    for _, own in frame.groupby("sequence"):
        assert own.start_ns.max() <= own.end_ns.min()


def test_torch_s_flight_recorder_knows_the_same_exchanges_and_their_starts(
    rows: Rows, opened: Callable[[str], Run]
) -> None:
    frame = rows("recorder")
    assert len(frame) == 3 * (5 + 4) + 2 * 5
    assert set(frame.recorder_problem) == {"no duration: gloo did not time it"}
    assert (frame.recorder_start_ns > frame.start_ns).all()
    assert (frame.recorder_start_ns < frame.end_ns).all()
    # sends between two ranks count there, so that the ranks' numbers of one collective differ
    assert frame[(frame.group == "0-2") & (frame.sequence == 0)].backend_sequence.nunique() > 1
    agreement = recorder_agreement(opened("recorder").exchanges())
    assert agreement.found.sum() == agreement.exchanges.sum() == len(frame)
    assert agreement.outside.sum() == agreement.timed.sum() == 0


def test_watches_nest(rows: Rows, facts: Callable[[str], list[Any]]) -> None:
    assert facts("nested") == [{"inside": True, "after": False}] * 2
    assert len(rows("nested_outer")) == 9
    assert len(rows("nested_inner")) == 3


def test_errors_are_the_program_s_own(rows: Rows, facts: Callable[[str], list[Any]]) -> None:
    for unwatched, watched in facts("refused"):
        assert len(unwatched) == 2
        assert watched == unwatched
    assert rows("refused").end_ns.isna().all()


def test_an_exception_leaves_nothing_patched_and_keeps_the_rows(
    opened: Callable[[str], Run], facts: Callable[[str], list[Any]]
) -> None:
    assert facts("raised") == [{"tapped": False, "hooks": 0}] * 2
    run = opened("raised")
    assert run.manifest.state == "failed"
    assert len(run.exchanges()) == 8 * 3


def test_switched_off_there_is_nothing_of_it(
    opened: Callable[[str], Run], facts: Callable[[str], list[Any]]
) -> None:
    assert facts("switched_off") == [False, False]
    assert opened("switched_off").exchanges().empty


def test_a_killed_rank_leaves_an_exchange_without_end(
    opened: Callable[[str], Run], facts: Callable[[str], list[Any]]
) -> None:
    assert facts("killed") == ["RuntimeError", "RuntimeError"]
    run = opened("killed")
    frame = run.exchanges().sort_values(["source_rank", "sequence"])
    assert frame.source_rank.tolist() == [0, 0, 1, 1, 2]
    assert frame.end_ns.isna().tolist() == [False, True, False, True, False]
    assert any("rank 2" in problem for problem in run.problems)
    assert any("no end" in note for note in run.manifest.notes)
