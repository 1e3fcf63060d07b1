"""One time base for a watched program's ranks, through the store that its process group meets at.

    enter:  every rank sends rank 0 the identity of its clock; the first rank of each other clock
            measures its offset from rank 0's
    exit:   the ranks of those other clocks measure again, which gives the drift

No collective is issued and no message of the program's own groups is sent: numbers travel through keys of the
store, on a connection of their own. Nothing here waits for ever or raises: a rank that does not come in time,
or leaves by an exception, costs its own alignment, and the reason is stated.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from observatory.errors import ExchangeError
from observatory.host.ranks import RankOf
from observatory.probes.alignment import (
    AlignmentServer,
    NowNs,
    TimeBaseAlignment,
    ask,
    decline,
    unaligned,
    with_drift,
)
from observatory.probes.part import Part
from observatory.probes.words import AlignmentCode, alignment_words
from observatory.reasons import Reason
from observatory.run import RunWriter
from observatory.run.files import one_line
from observatory.run.time_base import clock_identity

#: The reference may come that much later than the others and is still served.
_GRACE_S = 5.0
#: Some stores look only every 100 ms, and give up that much too early.
_POLL_S = 0.1
#: What a rank gets that is served after the time was up: two looks of such a store.
_LEAST_S = 0.2


def default_store() -> Any | None:
    """The store of torch's default process group; None where there is none."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    try:
        return distributed.distributed_c10d._get_default_store()
    except (AttributeError, RuntimeError, ValueError, KeyError):
        return None


class StorePairs:
    """Single numbers between ranks, as keys of a store; they are removed by :meth:`close`.

    Args:
        store: a store of ``torch.distributed`` that all ranks reach.
        rank: this rank.
        size: number of ranks.
        name: of this conversation; the same on all ranks.
        timeout_s: how long all waiting together may last.
    """

    def __init__(self, store: Any, *, rank: int, size: int, name: str, timeout_s: float) -> None:
        # A connection of our own: waiting on that of the program would lock its other threads out.
        self._has_connection = hasattr(store, "clone")
        try:
            self._store = store.clone() if self._has_connection else store
        except RuntimeError as error:
            raise self._gone(error) from error
        self.rank, self.size = rank, size
        self._name = name
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._numbers: dict[tuple[int, int], int] = {}
        self._received: list[str] = []

    def send(self, peer: int, value: int) -> None:
        """Send one number."""
        try:
            self._store.set(self._key(self.rank, peer), str(value))
        except RuntimeError as error:
            raise self._gone(error) from error

    def receive(self, peer: int) -> int:
        """Wait for a number, until the time of all waiting is up."""
        key = self._key(peer, self.rank)
        left = timedelta(seconds=max(self._deadline - time.monotonic(), _LEAST_S))
        try:
            if self._has_connection:
                self._store.set_timeout(left)
            else:
                self._store.wait([key], left)
            value = int(self._store.get(key))
        except (RuntimeError, ValueError) as error:
            if time.monotonic() >= self._deadline - _POLL_S:
                raise ExchangeError(f"rank {peer} did not come within {self._timeout_s:g} s") from error
            raise self._gone(error) from error
        self._received.append(key)
        return value

    def sent(self, peer: int) -> int:
        """How many numbers this rank has sent there."""
        return self._numbers.get((self.rank, peer), 0)

    def close(self) -> None:
        """Remove the keys that were read."""
        with contextlib.suppress(RuntimeError):  # the store may be gone, and the keys with it
            for key in self._received:
                self._store.delete_key(key)
        self._received.clear()

    def _key(self, source: int, to: int) -> str:
        number = self._numbers.get((source, to), 0)
        self._numbers[source, to] = number + 1
        return f"observatory-clock/{self._name}/{source}-{to}/{number}"

    def _gone(self, error: Exception) -> ExchangeError:
        words = one_line(error, 160) or type(error).__name__
        return ExchangeError(f"the store of the process group does not answer: {words}")


class StoreAlignment:
    """How this rank's time base relates to rank 0's, from enter to exit of a watch.

    Args:
        store: see :class:`StorePairs`.
        rank: this rank.
        size: number of ranks.
        name: the run's id.
        timeout_s: how long to wait for ranks, at enter and at exit.
        now_ns: monotonic nanoseconds.
        identity: equal on two ranks that share a clock.

    Attributes:
        notes: what is missing, as far as this rank knows.
    """

    def __init__(
        self,
        store: Any,
        *,
        rank: int,
        size: int,
        name: str,
        timeout_s: float,
        now_ns: NowNs = time.monotonic_ns,
        identity: Callable[[], int | None] = clock_identity,
    ) -> None:
        self._store = store
        self._rank, self._size = rank, size
        self._name = name
        self._timeout_s = timeout_s
        self._now_ns, self._identity = now_ns, identity
        self._first: TimeBaseAlignment | None = None
        self._apart: list[int] = []
        self.notes: list[Reason] = []

    def at_enter(self) -> TimeBaseAlignment:
        """Align at enter; all ranks call it at the same point of the program."""
        self._first, problem = self._align("start", list(range(1, self._size)))
        if problem is not None:
            self.notes.append(Reason(AlignmentCode.UNKNOWN_OFFSET, because=(problem,)))
        return self._first

    def at_exit(self, *, failed: bool = False) -> TimeBaseAlignment:
        """Align again at exit, where clocks differ.

        Args:
            failed: take no part, as the others may be past coming here; they get a message.

        Returns:
            That of :meth:`at_enter`, with the drift since where that could be measured.
        """
        first = self._first or self._unaligned(Reason(AlignmentCode.NOT_AT_ENTER))
        others = self._apart if self._rank == 0 else [0] if first.method != "shared clock" else []
        if not others:
            return first
        if failed or first.method == "none":
            with contextlib.suppress(ExchangeError):  # the other ranks may have ended
                decline(self._link("end"), peers=self._apart)
            return first
        last, problem = self._align("end", self._apart)
        if problem is not None:
            self.notes.append(Reason(AlignmentCode.UNKNOWN_DRIFT, because=(problem,)))
        return with_drift(first, last)

    def _align(self, part: str, peers: list[int]) -> tuple[TimeBaseAlignment, Reason | None]:
        """The alignment, and why it is not complete; None when it is."""
        try:
            with contextlib.closing(self._link(part)) as link:
                if self._rank == 0:
                    return self._serve(link, peers)
                alignment = ask(link, now_ns=self._now_ns, identity=self._identity)
                return alignment, alignment.reason
        except ExchangeError as error:
            problem = _no_answer(error)
            return self._unaligned(problem), problem

    def _serve(self, link: StorePairs, peers: list[int]) -> tuple[TimeBaseAlignment, Reason | None]:
        server = AlignmentServer(link, now_ns=self._now_ns, identity=self._identity)
        problems: dict[int, ExchangeError] = {}
        apart: list[int] = []
        for peer in peers:
            try:
                if server.serve(peer):
                    apart.append(peer)
            except ExchangeError as error:
                problems[peer] = error
        self._apart = apart
        with contextlib.suppress(ExchangeError):  # they may still come
            decline(link, peers=[peer for peer in problems if link.sent(peer) == 0])
        first = next(iter(problems.values()), None)
        return server.alignment(), None if first is None else _no_answer(first, more=len(problems) - 1)

    def _unaligned(self, reason: Reason) -> TimeBaseAlignment:
        return unaligned(reason, now_ns=self._now_ns, identity=self._identity)

    def _link(self, part: str) -> StorePairs:
        return StorePairs(
            self._store,
            rank=self._rank,
            size=self._size,
            name=f"{self._name}/{part}",
            timeout_s=self._timeout_s + (_GRACE_S if self._rank else 0.0),
        )


def _no_answer(error: ExchangeError, *, more: int = 0) -> Reason:
    return Reason(AlignmentCode.NO_ANSWER, {"error": str(error), "more": more})


class WatchedTimeBase(Part):
    """Aligns the ranks of a watch at enter and at exit, and writes the result into the run.

    Attributes:
        is_stated: the program has stated its own alignment (``watch.set_clock``), which is kept.
    """

    def __init__(self, writer: RunWriter, store: Any, where: RankOf, *, timeout_s: float) -> None:
        self.is_stated = False
        self._writer = writer
        self._alignment = StoreAlignment(
            store, rank=where.rank, size=where.world, name=writer.manifest.run_id, timeout_s=timeout_s
        )
        self._is_over = False

    def attach(self) -> None:
        """Align at enter."""
        self._writer.set_clock(self._alignment.at_enter().record())

    def detach(self, *, failed: bool) -> None:
        """Measure how the time bases have drifted."""
        if self._is_over:
            return
        self._is_over = True
        alignment = self._alignment.at_exit(failed=failed)
        if not self.is_stated:
            self._writer.set_clock(alignment.record())

    def notes(self, *, steps: int) -> tuple[str, ...]:
        """What is missing, as far as this rank knows."""
        del steps
        return tuple(map(alignment_words, self._alignment.notes))
