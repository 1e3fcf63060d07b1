"""The parts of the exchange probe, and the probe in a process group of one rank."""

from __future__ import annotations

import gc
import os
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from hypothesis import given
from hypothesis import strategies as st

import observatory
from observatory.analysis.exchange import exchange_traffic
from observatory.errors import CaptureError, RunError
from observatory.host.provenance import new_manifest
from observatory.probes.exchange import attribution, tap
from observatory.probes.exchange.attribution import Attribution, LayerCall
from observatory.probes.exchange.probe import ExchangeProbe
from observatory.probes.timeline import log
from observatory.probes.timeline.groups import GroupFacts, group_label
from observatory.probes.timeline.issue import Issue, Side, per_peer_bytes, side_of, side_of_list
from observatory.probes.timeline.log import ExchangeEntry, ExchangeLog
from observatory.probes.timeline.streams import Anchors
from observatory.run import RunWriter
from observatory.run.manifest import ModelSpec, Topology
from tests.probes.tiny import ScriptedModel, ids, scripted_adapter

CPU = torch.device("cpu")


@pytest.fixture
def alone() -> Iterator[None]:
    """A gloo group of this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def watched(out: Path, **options: Any) -> Any:
    return observatory.watch(
        ScriptedModel(), out, adapters=[scripted_adapter(3)], **{"exchanges": True, **options}
    )


def send_something() -> None:
    dist.all_to_all_single(torch.empty(4), torch.arange(4.0))


@pytest.mark.parametrize(
    ("ranks", "copy", "label"),
    [
        ([0, 1, 2, 3], 0, "0-3"),
        ([4, 0, 8], 0, "0,4,8"),
        ([0, 1, 4, 5, 6], 2, "0-1,4-6#2"),
        ([7], 0, "7"),
    ],
)
def test_a_group_is_named_after_its_ranks(ranks: list[int], copy: int, label: str) -> None:
    assert group_label(ranks, copy=copy) == label


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=9),
    st.integers(0, 7),
    st.sampled_from(["int64", "bfloat16"]),
)
def test_bytes_of_all_peers_are_the_bytes_of_the_tensor(splits: list[int], columns: int, kind: str) -> None:
    tensor = torch.empty(sum(splits), columns, dtype=getattr(torch, kind))
    found = per_peer_bytes(side_of(tensor, splits), len(splits))
    assert found is not None
    assert sum(found) == tensor.nbytes
    parts = [part.nbytes for part in tensor.split(splits)]
    assert found == parts == per_peer_bytes(side_of_list(tensor.split(splits)), len(splits))


def test_splits_that_do_not_fit_the_group_have_no_bytes() -> None:
    assert per_peer_bytes(side_of(torch.empty(3, 2), [1, 2]), 3) is None
    assert per_peer_bytes(side_of(torch.empty(6, 2), []), 3) == [16, 16, 16]


def test_bytes_beyond_32_bits_stay_what_they_are_up_to_the_traffic_of_a_run(tmp_path: Path) -> None:
    rows, width = 3 << 21, 7168  # 45 G elements, 90 GB in bfloat16; nothing is allocated
    given = torch.empty(rows, width, dtype=torch.bfloat16, device="meta")
    issue = tap._READERS["alltoall_base_"]((given, given, None, [1, rows - 1], [1, rows - 1]))
    issue.start = 1
    issue.finish(5)
    manifest = new_manifest(model=ModelSpec(name="none"), topology=Topology(ranks=2))
    with RunWriter.create(tmp_path / "r", manifest) as writer:
        log = ExchangeLog(writer, Anchors(), flush_s=3600)
        log.add(
            ExchangeEntry(issue, 0, "unknown", 0, "dispatch", "flat", GroupFacts("0-1", "0", 2), 0, "gloo")
        )
        log.close()
    frame = observatory.open_run(tmp_path / "r").exchanges()
    assert [list(sent) for sent in frame.send_bytes] == [[14336, (rows - 1) * 14336]]
    traffic = exchange_traffic(frame, ranks=2)
    assert traffic[traffic.peer_rank == 1].bytes.max() == (rows - 1) * 14336 > 2**36


def exchange(
    sends: tuple[int, ...], receives: tuple[int, ...], *, width: int = 8, payload: bool = True
) -> Issue:
    return Issue(
        algorithm="all_to_all_single",
        device=CPU,
        dtype=torch.float32 if payload else torch.int32,
        send=Side((sum(sends), width), 4, sends),
        receive=Side((sum(receives), width), 4, receives),
    )


def roles(*issues: tuple[str, Issue]) -> list[str]:
    call = LayerCall(3)
    return [call.role(issue, group, routed=True) for group, issue in issues]


def test_the_way_back_mirrors_the_way_there() -> None:
    there, back = exchange((1, 2), (4, 0)), exchange((4, 0), (1, 2))
    counts = exchange((2, 2), (2, 2), width=1, payload=False)
    weights = exchange((1, 2), (4, 0), width=1)
    assert roles(("0-1", counts), ("0-1", there), ("0-1", weights), ("0-1", back)) == [
        "other",
        "dispatch",
        "other",
        "combine",
    ]


def test_equal_shares_there_and_back_are_distinguished_by_their_order() -> None:
    shares = exchange((), (), width=8)
    assert roles(*[("0-3", shares)] * 4) == ["dispatch", "combine"] * 2


def test_a_hierarchical_exchange_has_two_dispatches_and_two_combines() -> None:
    first, second = exchange((3, 1), (2, 2)), exchange((1, 3), (4, 0))
    first_back, second_back = exchange((2, 2), (3, 1)), exchange((4, 0), (1, 3))
    assert roles(("0,2", first), ("0-1", second), ("0-1", second_back), ("0,2", first_back)) == [
        "dispatch",
        "dispatch",
        "combine",
        "combine",
    ]


def gather(*shape: int, scatter: bool = False, dtype: torch.dtype = torch.float32) -> Issue:
    whole = Side(shape, dtype.itemsize, ())
    name = "reduce_scatter_tensor" if scatter else "all_gather_into_tensor"
    return Issue(algorithm=name, device=CPU, dtype=dtype, send=whole, receive=whole)


def test_a_gather_of_hidden_states_dispatches_and_the_scatter_of_as_much_combines() -> None:
    call = LayerCall(3, hidden=16, routed=True)
    seen = [
        call.role(issue, "0-1", routed=True)
        for issue in (
            gather(20, 8, dtype=torch.bool),  # the routing map
            gather(20, 4),  # gate weights
            gather(20, 16),
            gather(20, 16, scatter=True),
            gather(20, 16, scatter=True),
            gather(2, 10, 16),  # stacked
            gather(20, 16, scatter=True),
        )
    ]
    assert seen == ["other", "other", "dispatch", "combine", "other", "dispatch", "combine"]


@pytest.mark.parametrize(
    ("call", "issue"),
    [
        (LayerCall(3, hidden=16, routed=True), gather(4096)),  # flat weights of sharded data parallelism
        (LayerCall(3, hidden=16), gather(20, 16)),  # nothing was routed yet
        (LayerCall(3, routed=True), gather(20, 16)),  # how wide hidden states are is not known
        (
            LayerCall(3, hidden=16, routed=True, width=16),
            gather(20, 16),
        ),  # tensor parallelism beside all-to-alls
    ],
)
def test_other_gathers_are_no_dispatch(call: LayerCall, issue: Issue) -> None:
    assert call.role(issue, "0-1", routed=call.routed) == "other"


def test_a_mask_in_an_all_to_all_is_no_dispatch() -> None:
    side = Side((4, 8), 1, (2, 2))
    masks, packed = (
        Issue(algorithm="all_to_all_single", device=CPU, dtype=kind, send=side, receive=side)
        for kind in (torch.bool, torch.uint8)
    )
    assert roles(("0-1", masks), ("0-1", packed)) == ["other", "dispatch"]


def test_what_is_remembered_for_gradients_that_never_come_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attribution, "_MOST_RECENT", 5)
    monkeypatch.setattr(attribution, "_MOST_LINKS", 5)
    here = Attribution(mark=lambda _device: None, note_span=lambda *_told: None)
    for number in range(40):
        here.routed(0, "prefill")
        here.find(exchange((number, 2), (4, 0)), "0-1", here.here())
        torch.ones(1, requires_grad=True) * 2
    assert (len(here._links), len(here._recent), len(here._ways)) == (5, 5, 5)
    for _ in range(40):
        here.find(exchange((3, 2), (4, 0)), "0-1", here.here())
    assert sum(map(len, here._ways.values())) == len(here._recent) == 5


def test_before_the_layer_has_routed_nothing_is_dispatched() -> None:
    call = LayerCall(3)
    assert call.role(exchange((1, 2), (2, 1)), "0-1", routed=False) == "other"
    assert call.role(exchange((1, 2), (2, 1)), "0-1", routed=True) == "dispatch"


class FakeEvent:
    """An event of a device whose clock is known to the test."""

    def __init__(self, ms: float, reached: bool = True) -> None:
        self.ms, self.reached = ms, reached

    def query(self) -> bool:
        return self.reached

    def elapsed_time(self, later: FakeEvent) -> float:
        return later.ms - self.ms


def test_events_are_placed_on_the_host_s_clock_by_the_anchor_before_them() -> None:
    device, anchors = torch.device("cuda", 0), Anchors()
    kept: Any = anchors._anchors
    kept[device] = [(FakeEvent(10.0), 1_000_000), (FakeEvent(20.0), 12_000_000), (FakeEvent(90.0, False), 0)]
    outcome = [anchors.host_ns(FakeEvent(ms), device) for ms in (21.5, 20.0, 12.0, 9.0)]  # type: ignore[arg-type]
    assert outcome == [13_500_000, 12_000_000, 3_000_000, 0]
    assert anchors.host_ns(FakeEvent(5.0, reached=False), device) is None  # type: ignore[arg-type]


@pytest.mark.usefixtures("alone")
def test_one_rank_is_watched_when_asked_and_by_default_not(tmp_path: Path) -> None:
    for wanted, rows in ((True, 1), (None, 0), (False, 0)):
        out = tmp_path / str(wanted)
        with watched(out, exchanges=wanted):
            assert tap.is_tapped() is (wanted is True)
            send_something()
        assert len(observatory.open_run(out).exchanges()) == rows
        assert not tap.is_tapped()


@pytest.mark.usefixtures("alone")
def test_the_cost_of_an_exchange_is_stated_in_the_run(tmp_path: Path) -> None:
    with watched(tmp_path / "r"):
        for _ in range(20):
            send_something()
    cost = observatory.open_run(tmp_path / "r").manifest.config["probe_cost"]
    assert isinstance(cost, dict)
    assert cost["exchanges"] == 20
    stated = cost["host_us_per_exchange"]
    assert isinstance(stated, float)
    assert 0 < stated < 5000


@pytest.mark.usefixtures("alone")
def test_a_torch_that_cannot_be_listened_to_is_refused_or_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch._C._distributed_c10d.Work, "unbox")
    with pytest.raises(CaptureError, match="cannot be watched"), watched(tmp_path / "asked"):
        pass
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with (
        pytest.warns(UserWarning, match="exchanges were not watched"),
        watched(tmp_path / "auto", exchanges=None, rank=0, world=1),
    ):
        send_something()
    notes = observatory.open_run(tmp_path / "auto").manifest.notes
    assert any("exchanges were not watched: torch" in note for note in notes)


@pytest.mark.usefixtures("alone")
def test_rows_that_cannot_be_written_end_the_capture_not_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = RunWriter.append

    def full(self: RunWriter, table: str, rows: Any) -> None:
        if table == "exchange":
            raise RunError("the disk is full")
        append(self, table, rows)

    monkeypatch.setattr(RunWriter, "append", full)
    out = torch.empty(4)
    with (
        pytest.raises(CaptureError, match="exchanges could not be kept: the disk is full"),
        watched(tmp_path / "r"),
    ):
        dist.all_to_all_single(out, torch.arange(4.0))
    assert out.tolist() == [0, 1, 2, 3]
    assert observatory.open_run(tmp_path / "r").manifest.state == "failed"


@pytest.mark.usefixtures("alone")
def test_an_exchange_that_we_cannot_read_happens_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tap._READERS, "alltoall_base_", lambda _arguments: 1 // 0)
    out = torch.empty(4)
    with watched(tmp_path / "r") as watch:
        watch._model([ids([0, 1])])
        dist.all_to_all_single(out, torch.arange(4.0))
        with pytest.raises(CaptureError, match="could not be understood: ZeroDivisionError"):
            watch.step()
        dist.all_to_all_single(out, torch.arange(4.0) + 1)
    assert out.tolist() == [1, 2, 3, 4]
    assert observatory.open_run(tmp_path / "r").manifest.state == "failed"


@pytest.mark.usefixtures("alone")
def test_what_does_not_fit_the_queue_is_dropped_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "_MOST_WAITING", 5)

    def send_eight() -> None:
        with watched(tmp_path / "r"):
            for _ in range(8):
                send_something()

    with pytest.warns(UserWarning, match="3 exchanges or spans were lost"):
        send_eight()
    frame = observatory.open_run(tmp_path / "r").exchanges()
    assert frame.sequence.tolist() == [0, 1, 2, 3, 4]


def test_a_group_does_not_live_on_because_it_was_watched(tmp_path: Path, alone: None) -> None:  # noqa: ARG001
    with watched(tmp_path / "r"):
        group = dist.new_group([0])
        dist.all_to_all_single(torch.empty(4), torch.arange(4.0), group=group)
        gone = weakref.ref(group)
        dist.destroy_process_group(group)
        del group
        gc.collect()
        assert gone() is None
    assert observatory.open_run(tmp_path / "r").exchanges().group.tolist() == ["0#1"]


@pytest.mark.usefixtures("alone")
def test_an_end_is_never_put_before_the_moment_at_which_it_was_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    issued = ExchangeProbe.issued

    def interrupted(self: ExchangeProbe, *seen: Any) -> None:
        """What a busy machine does: the exchange becomes complete while this thread is not running."""
        time.sleep(0.05)
        issued(self, *seen)

    monkeypatch.setattr(ExchangeProbe, "issued", interrupted)
    with watched(tmp_path / "r"):
        send_something()
    (row,) = observatory.open_run(tmp_path / "r").exchanges().itertuples()
    assert row.end_ns - row.start_ns > 50e6
    assert row.blocking


@pytest.mark.usefixtures("alone")
def test_a_forked_child_is_not_listened_to(tmp_path: Path) -> None:
    with watched(tmp_path / "r") as watch:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # this process has threads
            child = os.fork()
        if child == 0:
            try:
                watch.__exit__(None, None, None)
                os._exit(3 if tap.is_tapped() else 0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert tap.is_tapped()
        send_something()
    assert len(observatory.open_run(tmp_path / "r").exchanges()) == 1


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore:.*have no end")  # of the other thread, when a watch ends
def test_watches_may_begin_and_end_while_another_thread_exchanges(tmp_path: Path) -> None:
    errors: list[Exception] = []
    ended = threading.Event()

    def exchange_on() -> None:
        out, given = torch.empty(64), torch.arange(64.0)
        try:
            while not ended.is_set():
                dist.all_to_all_single(out.zero_(), given)
                assert torch.equal(out, given)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=exchange_on)
    thread.start()
    try:
        for number in range(15):
            with watched(tmp_path / str(number)):
                time.sleep(0.02)
            assert tap.is_tapped()  # to take a kernel away from a thread that calls it crashes torch
    finally:
        ended.set()
        thread.join()
    assert errors == []
    with watched(tmp_path / "alone"):
        send_something()
    assert not tap.is_tapped()
    frame = observatory.open_run(tmp_path / "7").exchanges()
    assert frame.sequence.tolist() == list(range(len(frame)))


@pytest.mark.usefixtures("alone")
def test_exchanges_belong_to_the_step_and_phase_they_happen_in(tmp_path: Path) -> None:
    with watched(tmp_path / "r") as watch:
        send_something()
        watch.step()
        with watch.phase("prefill"):
            send_something()
        watch._model([ids([0, 1])])
        watch.step()
        with watch.phase("decode"):
            send_something()
            send_something()
    frame = observatory.open_run(tmp_path / "r").exchanges()
    found = list(zip(frame.step, frame.phase, frame.sequence, strict=True))
    assert found == [(0, "unknown", 0), (1, "prefill", 1), (2, "decode", 2), (2, "decode", 3)]


@pytest.mark.usefixtures("alone")
def test_compiled_code_has_nothing_of_the_probe_in_its_graph_and_its_exchange_is_seen(tmp_path: Path) -> None:
    captured: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        captured.append(graph.code)
        return graph.forward

    def exchange_rows(rows: torch.Tensor) -> torch.Tensor:
        group = dist.group.WORLD
        assert group is not None
        there = functional.all_to_all_single(rows * 2, [4], [4], group)
        return functional.wait_tensor(there) + 1  # type: ignore[no-any-return, no-untyped-call]

    plain = torch.compile(exchange_rows, backend=backend, fullgraph=True)
    assert plain(torch.ones(4)).tolist() == [3.0] * 4
    torch._dynamo.reset()
    with watched(tmp_path / "r"):
        again = torch.compile(exchange_rows, backend=backend, fullgraph=True)  # a break would raise
        assert again(torch.ones(4)).tolist() == [3.0] * 4
    assert len(captured) == 2
    assert captured[0] == captured[1]
    assert "all_to_all_single" in captured[0]
    assert len(observatory.open_run(tmp_path / "r").exchanges()) == 1


@pytest.mark.usefixtures("alone")
def test_python_programs_start_an_exchange_without_the_dispatcher_and_others_are_seen_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[str] = []
    read = tap._READERS["alltoall_base_"]
    monkeypatch.setitem(
        tap._READERS, "alltoall_base_", lambda seen: passed.append(type(seen[2]).__name__) or read(seen)
    )
    given, out = torch.arange(4.0), torch.empty(4)
    splits = [4]
    with watched(tmp_path / "r"):
        dist.all_to_all_single(out, given, splits, splits)
        splits[0] = 1  # the program's list, of which the row keeps a copy
        dist.all_to_all_single(out, given, [4], [4], async_op=True).wait()
        with torch.inference_mode():
            dist.all_to_all_single(torch.empty(4), torch.arange(4.0))
        with torch.profiler.profile() as profile:
            send_something()
        dist.all_to_all_single(out, given.clone().requires_grad_())
    assert passed == [*["ProcessGroup"] * 3, *["ScriptObject"] * 2]
    assert any("alltoall_base_" in event.key for event in profile.key_averages())
    frame = observatory.open_run(tmp_path / "r").exchanges()
    assert [list(sent) for sent in frame.send_bytes] == [[16]] * 5
    assert frame.blocking.tolist() == [True, False, True, True, True]
    assert out.tolist() == [0, 1, 2, 3]
