"""One judged rule of one place of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from observatory.analysis.rules.rules_file import Rule
from observatory.reasons import Reason

State = Literal["broken", "kept", "not_judged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A rule, judged in one phase and, where it is about loads, one layer.

    Attributes:
        rule: the rule.
        phase: None where the run does not hold the phase, or no phase at all.
        layer: number of the layer; None for whole phases.
        expert: of ``dead_steps``.
        value: the value, of windows the worst one; None where the rule was not judged.
        low, high: 95 % interval of a value of a whole phase over its steps; None where it is not known.
        floor: what uniform routing of as many tokens shows; None where it is not known or there is none.
        first_step: first step of the window that the value is of; None of whole phases.
        after_step: of ``dead_steps``, the step of the last token before; None where there was none.
        steps: captured steps behind the value.
        windows, broken_windows: windows that were judged, and those that break the rule.
        reason: why it was not judged.
    """

    rule: Rule
    phase: str | None
    layer: int | None = None
    expert: int | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    floor: float | None = None
    first_step: int | None = None
    after_step: int | None = None
    steps: int | None = None
    windows: int | None = None
    broken_windows: int | None = None
    reason: Reason | None = None

    @property
    def state(self) -> State:
        """Whether the value keeps the rule."""
        if self.value is None:
            return "not_judged"
        return "broken" if self.rule.is_broken_by(self.value) else "kept"
