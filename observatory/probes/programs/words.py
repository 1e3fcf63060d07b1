"""Why a model of a program was not watched: the codes, and the words for them."""

from __future__ import annotations

from enum import StrEnum

from observatory.probes.words import OVER_BUDGET
from observatory.reasons import Reason


class ProgramCode(StrEnum):
    """Why there is no run, or not all of one; behind each the names of the values that belong to it."""

    NOT_LOADED = "not_loaded"  # python, error
    NOT_WATCHED = "not_watched"  # model, error
    STOPPED = "stopped"  # model, step, error
    NOT_CALLED = "not_called"  # model
    NONE_CAPTURED = "none_captured"  # model, steps
    OVER_BUDGET = "over_budget"  # model, step, share, budget


_WORDS = {
    ProgramCode.NOT_LOADED: "nothing in {python} was watched, as it cannot load the observatory: {error}",
    ProgramCode.NOT_WATCHED: "a model ({model}) was not watched: {error}",
    ProgramCode.STOPPED: "the watch on a model ({model}) ended at step {step}: {error}",
    ProgramCode.NOT_CALLED: "a model ({model}) was built, but its forward was never called",
    ProgramCode.NONE_CAPTURED: "a model ({model}) ran {steps} steps, none of which was to be captured",
    ProgramCode.OVER_BUDGET: f"of a model ({{model}}) {OVER_BUDGET}",
}


def program_sentence(reason: Reason) -> str:
    """Why a model of a program was not watched, or not to its end."""
    return _WORDS[ProgramCode(reason.code)].format(**reason.values)
