"""What rules out a candidate of a plan, as codes; and in words."""

from __future__ import annotations

import math
from enum import StrEnum

from observatory.reasons import Reason


class PlanCode(StrEnum):
    """Codes of constraints; the values of each are the names in its words."""

    WEIGHTS = "weights_do_not_fit"
    CACHE = "cache_does_not_fit"
    FULL = "cache_is_full"
    MS_PER_TOKEN = "ms_per_token"
    TTFT = "time_to_first_token"
    PREFILL = "prompts_do_not_keep_up"
    NO_DECODE = "nothing_to_decode"
    NO_FIGURE = "no_figure"
    GPUS = "too_many_gpus"
    POWER = "rack_power"


_WORDS = {
    PlanCode.WEIGHTS: "weights need {needed_gb:.0f} GB of a device, {usable_gb:.0f} GB are usable",
    PlanCode.CACHE: "after the weights {left_gb:.1f} GB are left, the cache of one sequence needs "
    "{needed_gb:.1f} GB",
    PlanCode.FULL: "caches of {fits} sequences fit",
    PlanCode.MS_PER_TOKEN: "{value_ms:.1f} ms per token with a batch of {sequences}, {limit_ms:g} ms wanted",
    PlanCode.TTFT: "{value_ms:.0f} ms to the first token, {limit_ms:g} ms wanted",
    PlanCode.PREFILL: "prompts take more than every step's chunk of {chunk} tokens",
    PlanCode.NO_DECODE: "the only token of a sequence follows from its prompt: nothing is left for instances "
    "that decode",
    PlanCode.NO_FIGURE: "{error}",
    PlanCode.GPUS: "{gpus} GPUs are needed, there are {most}",
    PlanCode.POWER: "{devices} devices in a rack may draw {drawn_w:.0f} W, it gets {rack_w:.0f} W: enough "
    "for {fit} of them, or for {each_w:.0f} W each",
}

#: The constraint of a code, in a few words, for a column.
SHORT = {
    PlanCode.WEIGHTS: "weights",
    PlanCode.CACHE: "cache",
    PlanCode.FULL: "cache",
    PlanCode.MS_PER_TOKEN: "ms per token",
    PlanCode.TTFT: "first token",
    PlanCode.PREFILL: "prompts",
    PlanCode.NO_DECODE: "nothing to decode",
    PlanCode.NO_FIGURE: "unknown figure",
    PlanCode.GPUS: "GPUs",
    PlanCode.POWER: "power",
}

#: Values of a constraint and of its limit.
_LIMITS = (
    ("needed_gb", "usable_gb"),
    ("needed_gb", "left_gb"),
    ("value_ms", "limit_ms"),
    ("gpus", "most"),
    ("drawn_w", "rack_w"),
)


def sentence(reason: Reason) -> str:
    """A constraint for people."""
    assert isinstance(reason.code, PlanCode)
    return _WORDS[reason.code].format(**reason.values)


def excess(reason: Reason) -> float:
    """By what factor a constraint is missed; infinite where it has no number."""
    for above, limit in _LIMITS:
        if above in reason.values and limit in reason.values:
            return float(reason.values[above]) / max(float(reason.values[limit]), 1e-9)  # type: ignore[arg-type]
    return math.inf
