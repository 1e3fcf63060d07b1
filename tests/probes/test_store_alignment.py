"""Clocks aligned through a store: ranks are threads with clocks of their own, the store is torch's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import HashStore, TCPStore

import observatory.probes.store_alignment
from observatory.probes.alignment import TimeBaseAlignment
from observatory.probes.store_alignment import StoreAlignment
from observatory.probes.words import AlignmentCode, alignment_words
from observatory.reasons import Reason

AHEAD_NS = 1_000 * 10**9
TIMEOUT_S = 0.6
NOT_SERVED = Reason(AlignmentCode.NOT_SERVED, {"rank": 0})


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observatory.probes.store_alignment, "_GRACE_S", 0.4)


def clock_of(
    rank: int, size: int, store: Any, hosts: list[int], *, timeout_s: float = 20.0
) -> StoreAlignment:
    """A rank of host ``hosts[rank]``, whose clock is that many thousand seconds ahead."""
    host = hosts[rank]
    return StoreAlignment(
        store,
        rank=rank,
        size=size,
        name="run",
        timeout_s=timeout_s,
        now_ns=lambda: time.monotonic_ns() + host * AHEAD_NS,
        identity=lambda: 100 + host,
    )


def on_threads(ranks: list[int], work: Callable[[int], Any]) -> dict[int, Any]:
    """What each rank's work returns."""
    outcomes: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda rank=rank: outcomes.update({rank: work(rank)}), daemon=True)
        for rank in ranks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert set(outcomes) == set(ranks)
    return outcomes


@pytest.mark.parametrize("kind", ["hash", "tcp"])
def test_every_host_s_offset_and_drift_are_found_and_no_key_is_left(kind: str) -> None:
    hosts = [0, 1, 0, 1, 2]
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if kind == "tcp" else None
    store = HashStore() if server is None else server
    keys = store.num_keys()

    def work(rank: int) -> tuple[TimeBaseAlignment, TimeBaseAlignment, list[Reason]]:
        alignment = clock_of(rank, len(hosts), store, hosts)
        return alignment.at_enter(), alignment.at_exit(), alignment.notes

    outcomes = on_threads(list(range(5)), work)
    assert [notes for *_, notes in outcomes.values()] == [[]] * 5
    for rank, (entered, end, _) in outcomes.items():
        assert entered.offset_ns is not None
        assert entered.uncertainty_ns is not None
        if hosts[rank] == 0:
            assert (end.method, end.offset_ns, end.drift_ppm) == ("shared clock", 0, None)
        else:
            assert end.method == "ping-pong"
            assert abs(entered.offset_ns + hosts[rank] * AHEAD_NS) <= entered.uncertainty_ns < 50_000_000
            assert end.drift_ppm is not None
    assert outcomes[1][1].offset_ns == outcomes[3][1].offset_ns
    assert store.num_keys() == keys


def test_a_rank_that_does_not_come_costs_its_own_alignment_only() -> None:
    store, hosts = HashStore(), [0, 1, 2, 1]

    def work(rank: int) -> tuple[TimeBaseAlignment, list[Reason], float]:
        start = time.monotonic()
        alignment = clock_of(rank, 4, store, hosts, timeout_s=TIMEOUT_S)
        entered = alignment.at_enter()
        return entered, alignment.notes, time.monotonic() - start

    outcomes = on_threads([0, 1, 3], work)
    assert [outcomes[rank][0].method for rank in (0, 1, 3)] == ["shared clock", "ping-pong", "ping-pong"]
    (note,) = outcomes[0][1]
    assert "clocks were not aligned at enter (rank 2 did not come within 0.6 s)" in alignment_words(note)
    assert outcomes[1][1] == outcomes[3][1] == []
    assert max(seconds for *_, seconds in outcomes.values()) < 3 * TIMEOUT_S
    late = clock_of(2, 4, store, hosts, timeout_s=20)
    start = time.monotonic()
    assert late.at_enter().method == "none"
    assert time.monotonic() - start < 5, "a rank that comes too late gets an answer"
    assert late.notes == [Reason(AlignmentCode.UNKNOWN_OFFSET, because=(NOT_SERVED,))]


def test_without_rank_0_the_others_go_on_in_time() -> None:
    store = HashStore()
    start = time.monotonic()
    alignment = clock_of(1, 2, store, [0, 1], timeout_s=TIMEOUT_S)
    entered = alignment.at_enter()
    assert time.monotonic() - start < 5
    assert (entered.method, entered.identity) == ("none", 101)
    assert entered.record().reason == "rank 0 did not come within 1 s"
    assert alignment.at_exit() == entered


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_lets_no_rank_wait_and_the_first_alignment_stands(failing: int) -> None:
    store, hosts = HashStore(), [0, 1]

    def work(rank: int) -> tuple[TimeBaseAlignment, TimeBaseAlignment, list[Reason], float]:
        alignment = clock_of(rank, 2, store, hosts)
        entered = alignment.at_enter()
        start = time.monotonic()
        return entered, alignment.at_exit(failed=rank == failing), alignment.notes, time.monotonic() - start

    outcomes = on_threads([0, 1], work)
    for entered, end, _, seconds in outcomes.values():
        assert end == entered
        assert end.drift_ppm is None
        assert seconds < 5
    if failing == 0:
        assert outcomes[1][2] == [Reason(AlignmentCode.UNKNOWN_DRIFT, because=(NOT_SERVED,))]


def test_ranks_of_one_host_do_not_wait_for_each_other_at_exit() -> None:
    store = HashStore()

    def work(rank: int) -> StoreAlignment:
        alignment = clock_of(rank, 3, store, [0, 0, 0])
        alignment.at_enter()
        return alignment

    clocks = on_threads([0, 1, 2], work)
    start = time.monotonic()
    assert clocks[0].at_exit().method == "shared clock"
    assert time.monotonic() - start < 1


def test_a_store_that_is_gone_is_a_note_and_no_error() -> None:
    server = TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=TIMEOUT_S)
    )
    client = TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=TIMEOUT_S))
    alignment = clock_of(1, 2, client, [0, 1], timeout_s=TIMEOUT_S)
    del server
    assert alignment.at_enter().method == "none"
    assert alignment.notes[0].because[0].code is AlignmentCode.NO_ANSWER
    assert alignment.at_exit().method == "none"
