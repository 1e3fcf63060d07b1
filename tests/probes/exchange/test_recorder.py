"""The flight recorder as a second source, in a running program; torch's own recorder on gloo.

Gloo's entries have no durations. What NCCL's have is put into the real recorder's documents here, because no
NCCL was at hand.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import observatory
from observatory.errors import CaptureError
from observatory.probes.timeline import flight
from observatory.probes.timeline.flight import recorder_unsupported
from tests.probes.tiny import ScriptedModel, scripted_adapter


@pytest.fixture
def alone() -> Iterator[None]:
    """A gloo group of this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def watched(out: Path, **options: Any) -> Any:
    options = {"exchanges": True, "flight_recorder": True, **options}
    return observatory.watch(ScriptedModel(), out, adapters=[scripted_adapter(3)], **options)


def send_something(rows: int = 4) -> None:
    dist.all_to_all_single(torch.empty(rows), torch.arange(float(rows)))


def recorder_documents(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
) -> None:
    """The entries of the recorder's documents pass through ``change``."""
    (dump,) = flight._dumps()

    def changed() -> bytes:
        document = json.loads(dump())
        document["entries"] = change(document.get("entries", []))
        return json.dumps(document).encode()

    monkeypatch.setattr(flight, "_dumps", lambda: [changed])


@pytest.mark.usefixtures("alone")
def test_every_exchange_finds_its_entry_among_all_collectives(tmp_path: Path) -> None:
    def exchange_among_others() -> None:
        with watched(tmp_path / "r"):
            for rows in range(1, 7):
                dist.all_reduce(torch.zeros(2))
                send_something(rows)
                group = dist.new_group([0])
                given = torch.zeros(rows)
                dist.all_to_all_single(torch.empty(rows), given, group=group, async_op=True).wait()
                dist.barrier()

    with pytest.warns(UserWarning, match="12 of 12 exchanges: no duration: gloo did not time it"):
        exchange_among_others()
    run = observatory.open_run(tmp_path / "r")
    frame = run.exchanges()
    assert len(frame) == 12
    assert (frame.recorder_start_ns > frame.start_ns).all()
    assert (frame.recorder_start_ns < frame.end_ns).all()
    assert frame.recorder_duration_ns.isna().all()
    assert frame.backend_group.nunique() == 1 + 6
    assert run.manifest.config["watch"]["flight_recorder"] is True  # type: ignore[index, call-overload]
    cost = run.manifest.config["probe_cost"]
    assert isinstance(cost, dict)
    assert cost["recorder_reads"] >= 1  # type: ignore[operator]
    assert cost["recorder_ms_per_read"] > 0  # type: ignore[operator]


@pytest.mark.usefixtures("alone")
def test_without_being_asked_nothing_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flight, "_dumps", lambda: 1 // 0)
    with watched(tmp_path / "r", flight_recorder=False):
        send_something()
    frame = observatory.open_run(tmp_path / "r").exchanges()
    assert frame[["recorder_start_ns", "recorder_duration_ns", "recorder_problem"]].isna().all(axis=None)


@pytest.mark.usefixtures("alone")
def test_durations_stand_next_to_those_of_the_probe_once_the_backend_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []

    def completed_later(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        looks.append(len(entries))
        timed = {"retired": True, "state": "completed", "duration_ms": 0.125}
        return [{**entry, **(timed if len(looks) > 2 else {"retired": False})} for entry in entries]

    with watched(tmp_path / "before", flight_recorder=False):
        send_something()  # so that the recorder holds an entry that is not the watch's
    recorder_documents(monkeypatch, completed_later)
    with watched(tmp_path / "r", flush_s=0.05):
        send_something()
        send_something(8)
    frame = observatory.open_run(tmp_path / "r").exchanges()
    assert frame.sequence.tolist() == [0, 1]
    assert frame.recorder_duration_ns.tolist() == [125_000] * 2
    assert frame.recorder_problem.isna().all()


@pytest.mark.usefixtures("alone")
def test_an_entry_of_other_sizes_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"input_sizes": [[7]], "duration_ms": 1.0}
    recorder_documents(monkeypatch, lambda entries: [{**entry, **other} for entry in entries])
    with pytest.warns(UserWarning, match="is another: 28 bytes sent, not 16"), watched(tmp_path / "r"):
        send_something()
    frame = observatory.open_run(tmp_path / "r").exchanges()
    assert frame[["recorder_start_ns", "recorder_duration_ns"]].isna().all(axis=None)
    assert frame.end_ns.notna().all()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("said", [b"{", b"\x80\x04", b'{"version": "9.0"}', None], ids=str)
def test_a_recorder_that_fails_is_given_up_and_the_probe_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes | None
) -> None:
    def dump() -> bytes:
        if said is None:
            raise RuntimeError("invalid UTF-8 byte")
        return said

    monkeypatch.setattr(flight, "_dumps", lambda: [dump])
    with pytest.warns(UserWarning, match="the flight recorder was given up: "), watched(tmp_path / "r"):
        send_something()
    run = observatory.open_run(tmp_path / "r")
    assert run.manifest.state == "complete"
    assert len(run.exchanges()) == 1


@pytest.mark.usefixtures("alone")
def test_a_recorder_that_is_off_or_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in ("0", "-1", "100000000", "many"):
        monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", size)
        with (
            pytest.raises(CaptureError, match="TORCH_FR_BUFFER_SIZE is not from 1 to"),
            watched(tmp_path / size),
        ):
            pass
    monkeypatch.delenv("TORCH_FR_BUFFER_SIZE")
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "100")
    assert recorder_unsupported() is None
    with (
        pytest.raises(CaptureError, match="exchanges are not watched"),
        watched(tmp_path / "x", exchanges=False),
    ):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("alone")
def test_exchanges_that_left_the_ring_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder_documents(monkeypatch, lambda entries: entries[-20:])
    with pytest.warns(UserWarning, match="30 of 50 exchanges: the recorder holds no entry of it"):
        exchange_often(tmp_path / "r", 50)
    frame = observatory.open_run(tmp_path / "r").exchanges().sort_values("sequence")
    assert frame.recorder_start_ns.notna().tolist() == [False] * 30 + [True] * 20
    assert frame.recorder_problem[:30].str.contains("its ring has moved on").all()


@pytest.mark.usefixtures("alone")
def test_the_recorder_is_read_before_its_ring_has_moved_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "40")  # torch read it long ago; this is what we go by
    with pytest.warns(UserWarning, match="gloo did not time it"):
        exchange_often(tmp_path / "r", 100, pause_s=0.01)
    cost = observatory.open_run(tmp_path / "r").manifest.config["probe_cost"]
    assert isinstance(cost, dict)
    assert cost["recorder_reads"] >= 4  # type: ignore[operator]


def exchange_often(out: Path, times: int, *, pause_s: float = 0.0) -> None:
    with watched(out, flush_s=3600):
        for _ in range(times):
            send_something()
            time.sleep(pause_s)
