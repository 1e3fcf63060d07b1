"""The parts of a capture: routing, exchanges, spans, power and what else is watched, behind one interface.

    attach ... attach        in order
    boundary                 in order, at the end of every step and stated phase
    pause ... pause          in reverse order, between steps; then resume in order, and a boundary
    detach ... detach        in reverse order, at the end of the watch
    boundary                 in order, the last one
    close ... close          in reverse order

A new probe is a subclass of :class:`Part` and one entry in the list of ``session.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import JsonValue

if TYPE_CHECKING:
    from observatory.probes.routing.accumulation import Snapshot
    from observatory.probes.routing.integrity import Loss


@dataclass(slots=True, kw_only=True)
class Boundary:
    """The end of a stretch between two boundaries, which goes from part to part.

    Attributes:
        step: the step that the stretch belongs to.
        phase: phase that the caller stated for it; None leaves what is known.
        ends_step: no further stretch of this step follows.
        is_last: it is the end of the watch: nothing need have been called before it.
        was_interrupted: the stretch ended in the middle of the program's work.
        losses: what parts have found missing.
        counted: what was counted in it; None before the routing part has taken it.
        is_refused: nothing that was counted may be kept.
    """

    step: int
    phase: str | None
    ends_step: bool
    is_last: bool = False
    was_interrupted: bool = False
    losses: list[Loss] = field(default_factory=list)
    counted: Snapshot | None = None
    is_refused: bool = False


class Part:
    """One thing that a capture watches; every method may be left as it is.

    Attributes:
        thread_cpu_s: processor time of the part's own thread, as that stated it last.
    """

    thread_cpu_s = 0.0

    def attach(self) -> None:
        """Start; on an error, ``detach`` and ``close`` follow."""

    def boundary(self, boundary: Boundary) -> None:
        """A stretch has ended."""

    def pause(self) -> None:
        """Capture nothing until ``resume``, at as little cost as possible."""

    def resume(self) -> None:
        """Go on; the time since ``pause`` belongs to no step."""

    def detach(self, *, failed: bool) -> None:
        """Take off what was put on the program; doing it twice does nothing.

        Args:
            failed: the program ended by an exception.
        """

    def close(self) -> None:
        """Write everything and end what was started; doing it twice does nothing."""

    def abandon(self) -> None:
        """Leave everything to the parent: in a forked child."""

    def hurry(self, timeout_s: float) -> None:
        """Write what has arrived, from any thread while the program may hang, within that time."""

    def problem(self) -> str | None:
        """One line about the first thing that went wrong; None when nothing did."""
        return None

    def notes(self, *, steps: int) -> tuple[str, ...]:
        """Stated limits of what was captured, of which the user is warned; final after ``close``.

        Args:
            steps: captured steps that the caller ended.
        """
        del steps
        return ()

    def quiet_notes(self) -> tuple[str, ...]:
        """What a reader of the run should know and no user needs to be warned of; final after ``close``."""
        return ()

    def cost(self) -> dict[str, JsonValue]:
        """What the part cost the program, measured while it ran."""
        return {}

    def config(self) -> dict[str, JsonValue]:
        """What the part adds to the manifest's configuration; final after ``close``."""
        return {}
