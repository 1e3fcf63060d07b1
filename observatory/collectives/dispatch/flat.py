"""Flat dispatch: one all-to-all-v over all ranks."""

from __future__ import annotations

from typing import ClassVar

from observatory.collectives.dispatch.steps import Step, SteppedDispatcher


class FlatDispatcher(SteppedDispatcher):
    """Every row goes straight to the rank of its expert."""

    name: ClassVar[str] = "flat"

    def steps(self) -> tuple[Step, ...]:
        """One step over the world."""
        return (Step(group="world", deduplicate=self._deduplicate),)
