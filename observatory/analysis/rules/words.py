"""Codes of rules that were not judged, and the words of judged rules."""

from __future__ import annotations

from enum import StrEnum

from observatory.analysis.compare.words import CompareCode
from observatory.analysis.compare.words import sentence as compare_sentence
from observatory.reasons import Reason
from observatory.text import listing


class RuleCode(StrEnum):
    """Why a rule was not judged; the values of each are the names in its words."""

    NO_ROUTING = "no_routing"
    NO_ASSIGNMENTS = "no_assignments"
    NO_SUCH_PHASE = "no_such_phase"
    NO_SUCH_LAYER = "no_such_layer"
    FEW_STEPS = "few_steps"
    NO_VALUE = "no_value"


_WORDS = {
    RuleCode.NO_ROUTING: "the run holds no routing rows",
    RuleCode.NO_ASSIGNMENTS: "nothing was routed",
    RuleCode.NO_SUCH_PHASE: "the run holds the phases {phases}",
    RuleCode.NO_SUCH_LAYER: "the run holds no such layer",
    RuleCode.FEW_STEPS: "a window has {needed} steps, the run {steps}",
    RuleCode.NO_VALUE: "no phase of the run has a value",
}


def sentence(reason: Reason) -> str:
    """A reason in words."""
    if isinstance(reason.code, CompareCode):
        return compare_sentence(Reason(reason.code, {"side": "the run", **reason.values}))
    phases = reason.values.get("phases")
    words = listing([str(phase) for phase in phases]) if isinstance(phases, list) else ""
    return _WORDS[RuleCode(reason.code)].format(**{**reason.values, "phases": words})
