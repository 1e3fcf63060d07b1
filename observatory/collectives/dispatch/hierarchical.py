"""Hierarchical dispatch: between nodes once per token and node, then inside the node."""

from __future__ import annotations

from typing import ClassVar

from observatory.collectives.dispatch.steps import Step, SteppedDispatcher


class HierarchicalDispatcher(SteppedDispatcher):
    """Rows cross between nodes once; see ``steps.py`` for the order and why."""

    name: ClassVar[str] = "hierarchical"

    def steps(self) -> tuple[Step, ...]:
        """Across to the rank of the same place on the destination node, then inside it."""
        return (
            Step(group="across", deduplicate=True),
            Step(group="node", deduplicate=self._deduplicate),
        )
