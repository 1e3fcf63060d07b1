"""A network with known offset, drift and unequal ways: what alignment says must hold."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from observatory.probes.alignment import TimeBaseAlignment, align, bound_offset, unaligned, with_drift
from observatory.run.time_base import clock_identity


@dataclass
class Network:
    """Ranks whose true time moves by their own calls and by messages; nothing depends on the machine's speed.

    Attributes:
        offset_ns, drift_ppm: of each rank's clock against true time.
        way_ns: delay from rank i to rank j of the n-th message on that way.
    """

    offset_ns: list[int]
    drift_ppm: list[float]
    way_ns: Callable[[int, int, int], int]
    true_ns: list[int] = field(default_factory=list)
    lines: dict[tuple[int, int], queue.Queue[tuple[int, int]]] = field(default_factory=dict)
    sent: dict[tuple[int, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        size = len(self.offset_ns)
        self.true_ns = [10**12] * size
        for pair in ((i, j) for i in range(size) for j in range(size)):
            self.lines[pair] = queue.Queue()
            self.sent[pair] = 0

    def reading_ns(self, rank: int, true_ns: int) -> int:
        return true_ns + self.offset_ns[rank] + round(self.drift_ppm[rank] * 1e-6 * true_ns)

    def run(self, identities: list[int | None] | None = None, *, rounds: int = 16) -> list[TimeBaseAlignment]:
        """Let all ranks align."""
        results: dict[int, TimeBaseAlignment] = {}

        def one(rank: int) -> None:
            results[rank] = align(
                Port(self, rank),
                rounds=rounds,
                now_ns=lambda: self._read(rank),
                identity=lambda: None if identities is None else identities[rank],
            )

        threads = [
            threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(len(self.offset_ns))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=20)
        return [results[rank] for rank in sorted(results)]

    def _read(self, rank: int) -> int:
        self.true_ns[rank] += 40  # reading a clock takes its time
        return self.reading_ns(rank, self.true_ns[rank])


@dataclass
class Port:
    network: Network
    rank: int

    @property
    def size(self) -> int:
        return len(self.network.offset_ns)

    def send(self, peer: int, value: int) -> None:
        pair = (self.rank, peer)
        way_ns = self.network.way_ns(*pair, self.network.sent[pair])
        self.network.sent[pair] += 1
        self.network.lines[pair].put((self.network.true_ns[self.rank] + way_ns, value))

    def receive(self, peer: int) -> int:
        arrives_ns, value = self.network.lines[peer, self.rank].get(timeout=20)
        self.network.true_ns[self.rank] = max(self.network.true_ns[self.rank], arrives_ns)
        return value


def test_an_offset_is_recovered_exactly_enough_over_a_symmetric_network() -> None:
    reference, other = Network([0, -7_000_000_000], [0, 0], lambda *_: 5_000).run()
    assert (reference.offset_ns, reference.uncertainty_ns) == (0, 0)
    assert other.method == "ping-pong"
    assert other.offset_ns is not None
    assert other.uncertainty_ns is not None
    assert abs(other.offset_ns - 7_000_000_000) <= 100
    assert other.uncertainty_ns < 5_300  # half a round trip, and what the burst may drift


def test_one_fast_round_trip_among_slow_ones_decides() -> None:
    def way_ns(_source: int, _to: int, number: int) -> int:
        return 2_000 if number == 5 else 900_000

    _, other = Network([0, 123_456], [0, 0], way_ns).run()
    assert other.offset_ns is not None
    assert other.uncertainty_ns is not None
    assert abs(other.offset_ns + 123_456) <= other.uncertainty_ns < 12_000


def test_unequal_ways_shift_the_offset_but_never_beyond_the_stated_uncertainty() -> None:
    _, other = Network([0, 50_000], [0, 0], lambda source, _to, _n: 1_000 if source == 0 else 30_000).run()
    assert other.offset_ns is not None
    assert other.uncertainty_ns is not None
    error = abs(other.offset_ns + 50_000)
    assert 14_000 < error <= other.uncertainty_ns


@settings(max_examples=25, deadline=None)
@given(
    offset=st.integers(-(10**15), 10**15),
    drift=st.floats(-100, 100),
    ways=st.lists(st.tuples(st.integers(1, 200_000), st.integers(1, 200_000)), min_size=4, max_size=12),
    pause_s=st.integers(1, 3_000),
    share=st.floats(0, 1),
)
def test_between_two_alignments_every_time_is_right_within_the_stated_uncertainty(
    offset: int, drift: float, ways: list[tuple[int, int]], pause_s: int, share: float
) -> None:
    network = Network([0, offset], [0.0, drift], lambda source, _to, number: ways[number % len(ways)][source])
    begin = network.run(rounds=8)[1]
    first_ns = network.true_ns[1]
    network.true_ns = [true_ns + pause_s * 10**9 for true_ns in network.true_ns]
    end = network.run(rounds=8)[1]
    whole = with_drift(begin, end)
    assert whole.uncertainty_ns is not None
    assert whole.drift_ppm == pytest.approx(
        -drift, abs=1e-6 * abs(drift) * 100 + 2e-3 * (whole.uncertainty_ns + 1) / pause_s + 0.02
    )
    moment_ns = first_ns + round(share * pause_s * 10**9)
    said_ns = whole.to_reference_ns(network.reading_ns(1, moment_ns))
    assert said_ns is not None
    assert abs(said_ns - moment_ns) <= whole.uncertainty_ns + 2


def test_only_ranks_of_equal_identity_share_a_clock() -> None:
    network = Network([0, 0, 900], [0, 0, 0], lambda *_: 1_000)
    reference, same, other = network.run([11, 11, 12])
    assert [each.method for each in (reference, same, other)] == ["shared clock", "shared clock", "ping-pong"]
    assert (same.offset_ns, same.uncertainty_ns) == (0, 0)
    assert same.record().identity == reference.record().identity == "000000000000000b"
    assert other.offset_ns == pytest.approx(-900, abs=1_100)


def test_ranks_that_share_another_clock_are_told_one_result() -> None:
    """Two of them then put one moment at one time, however uncertain that is."""
    network = Network([0, 900, 900, 77], [0, 0, 0, 0], lambda *_: 1_000)
    _, first, second, third = network.run([11, 12, 12, 13])
    assert first.method == second.method == "ping-pong"
    assert (first.offset_ns, first.uncertainty_ns, first.measured_ns) == (
        second.offset_ns,
        second.uncertainty_ns,
        second.measured_ns,
    )
    assert network.sent[1, 0] > network.sent[2, 0] == 1, "the second measures nothing"
    assert third.offset_ns == pytest.approx(-77, abs=1_100)


def test_ranks_that_do_not_know_their_clock_are_not_taken_to_share_it() -> None:
    _, other = Network([0, 0], [0, 0], lambda *_: 1_000).run([None, None])
    assert other.method == "ping-pong"


def test_round_trips_that_contradict_each_other_give_no_alignment() -> None:
    assert bound_offset([(0, 1_000, 100), (200, 900_000, 300)]) is None
    assert bound_offset([]) is None


def test_a_failed_alignment_says_so_in_the_record() -> None:
    begin = unaligned(now_ns=lambda: 5, identity=lambda: 7)
    assert begin.to_reference_ns(10) is None
    record = begin.record()
    assert (record.method, record.offset_ns, record.identity) == ("none", None, "0000000000000007")
    assert with_drift(begin, begin) is begin


def test_processes_of_one_host_name_the_same_clock() -> None:
    code = "from observatory.run.time_base import clock_identity; print(clock_identity())"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=400
    )
    assert other.stdout.strip() == str(clock_identity())
