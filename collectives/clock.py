"""Clocks of ranks, brought onto that of one of them.

Ranks of one host read the same CLOCK_MONOTONIC, which is verified by boot id and time namespace. For the
others a burst of round trips bounds the offset:

    this rank    t1 ------------.                  .-----------> t4
    reference                    '----> t ---------'

The reference read t after t1 and before t4, so offset = reference - own lies in [t - t4, t - t1]: half the
round trip around its middle (Cristian 1989). Every round trip gives such an interval however unequal the
two ways are, and the true offset lies in all of them; their intersection is at least as narrow as the
interval of the fastest round trip (the minimum-delay filter of NTP). Bursts at the begin and at the end
give the drift.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from observatory.clock_identity import clock_identity, clock_name
from observatory.records import ClockSpec

__all__ = [
    "ClockAlignment",
    "PairLink",
    "align",
    "bound_offset",
    "unaligned",
    "with_drift",
]

Clock = Callable[[], int]

#: Clocks of two hosts do not drift apart faster than this while a burst lasts (quartz plus NTP's slewing).
_BURST_DRIFT_PPM = 600

_SHARED, _APART = 1, 0


class PairLink(Protocol):
    """Single whole numbers sent between two ranks; both calls block."""

    @property
    def rank(self) -> int:
        """This rank."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    def send(self, peer: int, value: int) -> None:
        """Send one signed 64-bit number."""

    def receive(self, peer: int) -> int:
        """Wait for the next number from ``peer``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockAlignment:
    """How this rank's clock relates to the reference's.

    Attributes:
        reference_rank: the rank whose clock counts.
        method: ``shared clock``, ``ping-pong``, or ``none`` when alignment failed.
        offset_ns: reference minus own clock; None for ``none``.
        uncertainty_ns: half-width of the interval that holds the true offset; None for ``none``.
        drift_ppm: change of the offset per own time; None when measured once only.
        measured_ns: own time at which the offset holds.
        reason: why there is no alignment; None when there is one.
        identity: names this rank's clock, see ``observatory.clock_identity``.
    """

    reference_rank: int
    method: Literal["shared clock", "ping-pong", "none"]
    offset_ns: int | None
    uncertainty_ns: int | None
    measured_ns: int
    drift_ppm: float | None = None
    reason: str | None = None
    identity: int | None = None

    def to_reference_ns(self, own_ns: int) -> int | None:
        """A time of this rank on the reference's clock; None when the clocks are not aligned."""
        if self.offset_ns is None:
            return None
        drifted = round((self.drift_ppm or 0.0) * 1e-6 * (own_ns - self.measured_ns))
        return own_ns + self.offset_ns + drifted

    def record(self) -> ClockSpec:
        """What the run keeps of it."""
        return ClockSpec(
            reference_rank=self.reference_rank,
            offset_ns=self.offset_ns,
            uncertainty_ns=self.uncertainty_ns,
            drift_ppm=self.drift_ppm,
            measured_ns=self.measured_ns,
            method=self.method,
            identity=clock_name(self.identity),
        )


def align(
    link: PairLink,
    *,
    rounds: int = 64,
    reference_rank: int = 0,
    clock: Clock = time.monotonic_ns,
    identity: Callable[[], int | None] = clock_identity,
) -> ClockAlignment:
    """Align this rank's clock with the reference's; every rank of the link must call it.

    The reference serves one rank after the other, so that round trips do not disturb each other.

    Args:
        link: numbers between ranks.
        rounds: round trips per rank that does not share the reference's clock.
        reference_rank: the rank whose clock counts.
        clock: monotonic nanoseconds.
        identity: what tells whether two ranks share a clock.
    """
    own = identity() or 0
    if link.rank == reference_rank:
        for peer in range(link.size):
            if peer != reference_rank:
                _serve(link, peer, own, rounds, clock)
        return _shared(reference_rank, clock(), own)
    link.send(reference_rank, own)
    if link.receive(reference_rank) == _SHARED:
        return _shared(reference_rank, clock(), own)
    trips: list[tuple[int, int, int]] = []
    for _ in range(rounds):
        sent = clock()
        link.send(reference_rank, 0)
        there = link.receive(reference_rank)
        trips.append((sent, there, clock()))
    bound = bound_offset(trips)
    if bound is None:
        return ClockAlignment(
            reference_rank=reference_rank,
            method="none",
            offset_ns=None,
            uncertainty_ns=None,
            measured_ns=clock(),
            identity=own or None,
            reason=f"{rounds} round trips to rank {reference_rank} contradict each other: a clock was set",
        )
    offset_ns, uncertainty_ns = bound
    return ClockAlignment(
        reference_rank=reference_rank,
        method="ping-pong",
        offset_ns=offset_ns,
        uncertainty_ns=uncertainty_ns,
        measured_ns=(trips[0][0] + trips[-1][2]) // 2,
        identity=own or None,
    )


def unaligned(
    *, clock: Clock = time.monotonic_ns, identity: Callable[[], int | None] = clock_identity
) -> ClockAlignment:
    """What a rank can say of its clock without talking to anybody.

    Its identity is enough for readers to see which ranks of a run share a clock.
    """
    return ClockAlignment(
        reference_rank=0,
        method="none",
        offset_ns=None,
        uncertainty_ns=None,
        measured_ns=clock(),
        identity=identity(),
        reason="the ranks did not align their clocks",
    )


def bound_offset(trips: Sequence[tuple[int, int, int]]) -> tuple[int, int] | None:
    """Offset of the reference's clock, and the half-width of the interval that holds it.

    Args:
        trips: (own time sent, reference's time, own time received) of one burst, in order.

    Returns:
        None when no offset fits all round trips, or there are none.
    """
    if not trips:
        return None
    low = max(there - received for _, there, received in trips)
    high = min(there - sent for sent, there, _ in trips)
    # The offset may move while the burst lasts: every bound holds for its middle within this.
    slack = (trips[-1][2] - trips[0][0]) * _BURST_DRIFT_PPM // 2_000_000 + 1
    low, high = low - slack, high + slack
    if low > high:
        return None
    return (low + high) // 2, (high - low + 1) // 2


def with_drift(begin: ClockAlignment, end: ClockAlignment) -> ClockAlignment:
    """The alignment of a whole run from one at its begin and one at its end.

    Between the two the offset is taken to change evenly; its uncertainty is then at most the larger of both.
    Where one of them failed, the other is kept, without a drift.
    """
    if begin.offset_ns is None or begin.method != end.method:
        return end if begin.offset_ns is None else begin
    if end.offset_ns is None or begin.method == "shared clock" or end.measured_ns <= begin.measured_ns:
        return begin
    assert begin.uncertainty_ns is not None
    assert end.uncertainty_ns is not None
    elapsed_ns = end.measured_ns - begin.measured_ns
    return ClockAlignment(
        reference_rank=begin.reference_rank,
        method=begin.method,
        offset_ns=begin.offset_ns,
        uncertainty_ns=max(begin.uncertainty_ns, end.uncertainty_ns) + 1,
        drift_ppm=(end.offset_ns - begin.offset_ns) / elapsed_ns * 1e6,
        measured_ns=begin.measured_ns,
        identity=begin.identity,
    )


def _serve(link: PairLink, peer: int, own: int, rounds: int, clock: Clock) -> None:
    theirs = link.receive(peer)
    shared = own != 0 and theirs == own
    link.send(peer, _SHARED if shared else _APART)
    if shared:
        return
    for _ in range(rounds):
        link.receive(peer)
        link.send(peer, clock())


def _shared(reference_rank: int, now_ns: int, identity: int) -> ClockAlignment:
    return ClockAlignment(
        reference_rank=reference_rank,
        method="shared clock",
        offset_ns=0,
        uncertainty_ns=0,
        measured_ns=now_ns,
        identity=identity or None,
    )
