"""Which steps of a program were captured, where some were left out on purpose: the words for it."""

from __future__ import annotations

from collections.abc import Sequence

from observatory.run.manifest import CapturedSteps
from observatory.text import listing

#: Stretches of steps that a sentence names.
_MOST_NAMED = 6


def captured_sentence(captured: Sequence[CapturedSteps]) -> str:
    """The steps that were captured, in words; steps that are not among them are no zeros."""
    if not captured:
        return "no step was captured, as was asked for"
    stretches = listing([_stretch(item) for item in captured], most=_MOST_NAMED)
    return f"captured were {stretches}, as was asked for; no other step is in this run"


def _stretch(steps: CapturedSteps) -> str:
    first, end = steps.first_step, steps.end_step
    every = "" if steps.every == 1 else f", one in {steps.every}"
    if end is None:
        return f"steps {first} to the end{every}"
    return f"step {first}" if end == first + 1 else f"steps {first} to {end - 1}{every}"
