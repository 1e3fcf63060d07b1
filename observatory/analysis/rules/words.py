"""Codes of rules that were not judged, and the words of judged rules."""

from __future__ import annotations

from enum import StrEnum

from observatory.analysis.compare.words import CompareCode
from observatory.analysis.compare.words import sentence as compare_sentence
from observatory.analysis.rules.judged import Judged
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


def judged_sentence(item: Judged) -> str:
    """A judged value and where it is, in one line: ``gini > 0.6: 0.71 in prefill, layer 3``."""
    words = [f"{item.rule.text}: {item.value:.4g}" if item.value is not None else item.rule.text]
    if item.phase is not None:
        words[0] += f" in {item.phase}"
    places = {"layer": item.layer, "expert": item.expert}
    places |= {"from step": item.first_step, "after step": item.after_step}
    return ", ".join([*words, *(f"{name} {value}" for name, value in places.items() if value is not None)])


def sentence(reason: Reason) -> str:
    """A reason in words."""
    if isinstance(reason.code, CompareCode):
        return compare_sentence(Reason(reason.code, {"side": "the run", **reason.values}))
    phases = reason.values.get("phases")
    words = listing([str(phase) for phase in phases]) if isinstance(phases, list) else ""
    return _WORDS[RuleCode(reason.code)].format(**{**reason.values, "phases": words})
