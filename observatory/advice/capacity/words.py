"""What rules out a candidate of a plan, as codes; and in words."""

from __future__ import annotations

from enum import StrEnum

from observatory.reasons import Reason


class PlanCode(StrEnum):
    """Codes of constraints; the values of each are the names in its words."""

    WEIGHTS = "weights_do_not_fit"
    CACHE = "cache_does_not_fit"
    MS_PER_TOKEN = "ms_per_token"
    TTFT = "time_to_first_token"
    PREFILL = "prompts_do_not_keep_up"
    NO_FIGURE = "no_figure"
    GPUS = "too_many_gpus"
    RACK_POWER = "rack_power"
    CONTEXT = "context_too_long"


_WORDS = {
    PlanCode.WEIGHTS: "weights need {needed_gb:.0f} GB of a device, {usable_gb:.0f} GB are usable",
    PlanCode.CACHE: "after the weights {left_gb:.1f} GB are left, the cache of one sequence needs "
    "{needed_gb:.1f} GB",
    PlanCode.MS_PER_TOKEN: "{value_ms:.1f} ms per token with a batch of {sequences}, {limit_ms:g} ms wanted",
    PlanCode.TTFT: "{value_ms:.0f} ms to the first token, {limit_ms:g} ms wanted",
    PlanCode.PREFILL: "prompts take more than every step's chunk of {chunk} tokens",
    PlanCode.NO_FIGURE: "{error}",
    PlanCode.GPUS: "{gpus} GPUs are needed, there are {most}",
    PlanCode.RACK_POWER: "a rack would draw up to {value_w:.0f} W, {limit_w:.0f} W are there",
    PlanCode.CONTEXT: "{tokens} tokens of context and output, the model was made for {longest}",
}

#: The constraint of a code, in a few words, for a column.
SHORT = {
    PlanCode.WEIGHTS: "weights",
    PlanCode.CACHE: "cache",
    PlanCode.MS_PER_TOKEN: "ms per token",
    PlanCode.TTFT: "first token",
    PlanCode.PREFILL: "prompts",
    PlanCode.NO_FIGURE: "unknown figure",
    PlanCode.GPUS: "GPUs",
    PlanCode.RACK_POWER: "rack power",
    PlanCode.CONTEXT: "context",
}


def sentence(reason: Reason) -> str:
    """A constraint for people."""
    assert isinstance(reason.code, PlanCode)
    return _WORDS[reason.code].format(**reason.values)
