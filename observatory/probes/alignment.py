"""Time bases of ranks, brought onto that of one of them.

Ranks of one host read the same CLOCK_MONOTONIC, which is verified by boot id and time namespace. For the
others a burst of round trips bounds the offset:

    this rank    t1 ------------.                  .-----------> t4
    reference                    '----> t ---------'

The reference read t after t1 and before t4, so offset = reference - own lies in [t - t4, t - t1]: half the
round trip around its middle (Cristian 1989). Every round trip gives such an interval however unequal the
two ways are, and the true offset lies in all of them; their intersection is at least as narrow as the
interval of the fastest round trip (the minimum-delay filter of NTP). Bursts at the start and at the end
give the drift. Of the ranks that share a clock the first one measures, and the others receive its result:
a time that two of them read is then the same time on the reference, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from observatory.probes.words import AlignmentCode, alignment_words
from observatory.reasons import Reason
from observatory.run.manifest import ClockSpec
from observatory.run.time_base import clock_identity, clock_name

#: Reads a time base: monotonic nanoseconds.
NowNs = Callable[[], int]

#: Clocks of two hosts do not drift apart faster than this while a burst lasts (quartz plus NTP's slewing).
_BURST_DRIFT_PPM = 600

#: What the reference answers: measure, same clock, take the result that follows, or no rank is served.
_APART, _SHARED, _MEASURED, _DECLINED = 0, 1, 2, -1
#: Before what follows: there is a result, or there is none.
_RESULT, _NO_RESULT = 1, 0


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
class TimeBaseAlignment:
    """How this rank's clock relates to the reference's.

    Attributes:
        reference_rank: the rank whose clock counts.
        method: ``shared clock``, ``ping-pong``, or ``none`` when alignment failed.
        offset_ns: reference minus own clock; None for ``none``.
        uncertainty_ns: half-width of the interval that holds the true offset; None for ``none``.
        drift_ppm: change of the offset per own time; None when measured once only.
        measured_ns: own time at which the offset holds.
        reason: why there is no alignment; None when there is one.
        identity: names this rank's clock, see ``observatory.run.time_base``.
    """

    reference_rank: int
    method: Literal["shared clock", "ping-pong", "none"]
    offset_ns: int | None
    uncertainty_ns: int | None
    measured_ns: int
    drift_ppm: float | None = None
    reason: Reason | None = None
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
            reason=None if self.reason is None else alignment_words(self.reason),
            reason_code=None if self.reason is None else self.reason.code.value,
        )


def align(
    link: PairLink,
    *,
    rounds: int = 64,
    reference_rank: int = 0,
    now_ns: NowNs = time.monotonic_ns,
    identity: Callable[[], int | None] = clock_identity,
) -> TimeBaseAlignment:
    """Align this rank's clock with the reference's; every rank of the link must call it.

    The reference serves one rank after the other, so that round trips do not disturb each other.

    Args:
        link: numbers between ranks.
        rounds: round trips per rank that does not share the reference's clock.
        reference_rank: the rank whose clock counts.
        now_ns: monotonic nanoseconds.
        identity: equal on two ranks that share a clock.
    """
    if link.rank != reference_rank:
        return ask(link, rounds=rounds, reference_rank=reference_rank, now_ns=now_ns, identity=identity)
    server = AlignmentServer(link, rounds=rounds, now_ns=now_ns, identity=identity)
    for peer in range(link.size):
        if peer != reference_rank:
            server.serve(peer)
    return server.alignment()


class AlignmentServer:
    """The reference's side: serves one rank after the other."""

    def __init__(
        self,
        link: PairLink,
        *,
        rounds: int = 64,
        now_ns: NowNs = time.monotonic_ns,
        identity: Callable[[], int | None] = clock_identity,
    ) -> None:
        self._link = link
        self._rounds = rounds
        self._now_ns = now_ns
        self._identity = identity() or 0
        #: What the first rank of each clock has measured.
        self._measured: dict[int, tuple[int, ...]] = {}

    def serve(self, peer: int) -> bool:
        """Serve a rank that asks; whether its clock is another one."""
        link = self._link
        theirs = link.receive(peer)
        if theirs == _DECLINED:
            return False
        if self._identity != 0 and theirs == self._identity:
            link.send(peer, _SHARED)
            return False
        if theirs in self._measured:
            link.send(peer, _MEASURED)
            for number in self._measured[theirs]:
                link.send(peer, number)
            return True
        link.send(peer, _APART)
        for _ in range(self._rounds):
            link.receive(peer)
            link.send(peer, self._now_ns())
        result: tuple[int, ...] = (link.receive(peer),)
        if result == (_RESULT,):
            result = (_RESULT, *(link.receive(peer) for _ in range(3)))
        if theirs != 0:
            self._measured[theirs] = result
        return True

    def alignment(self) -> TimeBaseAlignment:
        """The reference's own."""
        return _shared(self._link.rank, self._now_ns(), self._identity)


def ask(
    link: PairLink,
    *,
    rounds: int = 64,
    reference_rank: int = 0,
    now_ns: NowNs = time.monotonic_ns,
    identity: Callable[[], int | None] = clock_identity,
) -> TimeBaseAlignment:
    """Another rank's side: what :func:`align` does there."""
    own_identity = identity() or 0
    link.send(reference_rank, own_identity)
    answer = link.receive(reference_rank)
    if answer == _SHARED:
        return _shared(reference_rank, now_ns(), own_identity)
    if answer == _MEASURED:
        has_result = link.receive(reference_rank) == _RESULT
        result = tuple(link.receive(reference_rank) for _ in range(3)) if has_result else None
        reason = Reason(AlignmentCode.FIRST_RANK_FAILED)
    elif answer == _APART:
        result = _measure(link, rounds, reference_rank, now_ns)
        for number in (_NO_RESULT,) if result is None else (_RESULT, *result):
            link.send(reference_rank, number)
        reason = Reason(AlignmentCode.CLOCK_WAS_SET, {"rounds": rounds, "rank": reference_rank})
    else:
        result, reason = None, Reason(AlignmentCode.NOT_SERVED, {"rank": reference_rank})
    offset_ns, uncertainty_ns, measured_ns = (None, None, now_ns()) if result is None else result
    return TimeBaseAlignment(
        reference_rank=reference_rank,
        method="none" if result is None else "ping-pong",
        offset_ns=offset_ns,
        uncertainty_ns=uncertainty_ns,
        measured_ns=measured_ns,
        reason=reason if result is None else None,
        identity=own_identity or None,
    )


def decline(link: PairLink, *, reference_rank: int = 0, peers: Sequence[int] = ()) -> None:
    """Take no part, so that no rank waits for this one: the reference answers ``peers``, the others it."""
    for peer in peers if link.rank == reference_rank else (reference_rank,):
        link.send(peer, _DECLINED)


def _measure(link: PairLink, rounds: int, reference_rank: int, now_ns: NowNs) -> tuple[int, int, int] | None:
    """Offset, uncertainty, and own time at which they hold; None when no offset fits."""
    trips: list[tuple[int, int, int]] = []
    for _ in range(rounds):
        sent = now_ns()
        link.send(reference_rank, 0)
        there = link.receive(reference_rank)
        trips.append((sent, there, now_ns()))
    bound = bound_offset(trips)
    return None if bound is None else (*bound, (trips[0][0] + trips[-1][2]) // 2)


def unaligned(
    reason: Reason | None = None,
    *,
    now_ns: NowNs = time.monotonic_ns,
    identity: Callable[[], int | None] = clock_identity,
) -> TimeBaseAlignment:
    """What a rank can state of its clock without any other rank.

    Its identity is enough for readers to see which ranks of a run share a clock.
    """
    return TimeBaseAlignment(
        reference_rank=0,
        method="none",
        offset_ns=None,
        uncertainty_ns=None,
        measured_ns=now_ns(),
        identity=identity(),
        reason=reason or Reason(AlignmentCode.NOT_ALIGNED),
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


def with_drift(first: TimeBaseAlignment, last: TimeBaseAlignment) -> TimeBaseAlignment:
    """The alignment of a whole run from one at its start and one at its end.

    Between the two the offset is taken to change evenly; its uncertainty is then at most the larger of both.
    Where one of them failed, the other is kept, without a drift.
    """
    if first.offset_ns is None or first.method != last.method:
        return last if first.offset_ns is None else first
    if last.offset_ns is None or first.method == "shared clock" or last.measured_ns <= first.measured_ns:
        return first
    assert first.uncertainty_ns is not None
    assert last.uncertainty_ns is not None
    elapsed_ns = last.measured_ns - first.measured_ns
    return TimeBaseAlignment(
        reference_rank=first.reference_rank,
        method=first.method,
        offset_ns=first.offset_ns,
        uncertainty_ns=max(first.uncertainty_ns, last.uncertainty_ns) + 1,
        drift_ppm=(last.offset_ns - first.offset_ns) / elapsed_ns * 1e6,
        measured_ns=first.measured_ns,
        identity=first.identity,
    )


def _shared(reference_rank: int, now_ns: int, identity: int) -> TimeBaseAlignment:
    return TimeBaseAlignment(
        reference_rank=reference_rank,
        method="shared clock",
        offset_ns=0,
        uncertainty_ns=0,
        measured_ns=now_ns,
        identity=identity or None,
    )
