"""What the guard of a rank can do with a watch whose main thread may hang."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from observatory.probes.session import CaptureSession
from observatory.run import RunWriter

_HURRY_S = 0.5


@dataclass(eq=False, frozen=True, slots=True, kw_only=True)
class WatchedShard:
    """The shard of a watch, as :class:`observatory.hpc.rank_guard.Shard`.

    Attributes:
        writer: writes it.
        session: counts into it; None before it has begun.
        steps: steps that the watch has ended.
    """

    writer: RunWriter
    session: Callable[[], CaptureSession | None]
    steps: Callable[[], int]

    def mark(self, reason: str) -> None:
        """State first that the rank is about to end: it may be killed meanwhile."""
        self.writer.mark_ending(reason, steps=self.steps())
        self._hurry()
        self.writer.mark_ending(reason, steps=self.steps())

    def close(self, reason: str) -> None:
        """Close as failed, with what has arrived."""
        self._hurry()
        self.writer.close(state="failed", error=reason, steps=self.steps())

    def _hurry(self) -> None:
        session = self.session()
        if session is not None:
            session.hurry(_HURRY_S)
