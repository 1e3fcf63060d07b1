"""What the time of a layer-step lacks, as codes; and in words."""

from __future__ import annotations

from enum import StrEnum

from observatory.analysis.network import words as network_words
from observatory.reasons import Reason


class StepCode(StrEnum):
    """Codes of the reasons that this room gives; the values of each are the names in its words."""

    NO_NETWORK = "no_network"
    NOT_PREDICTED = "not_predicted"
    TOP_K_VARIES = "top_k_varies"
    NOT_TIMED = "not_timed"
    PHASE_WITHOUT_POWER = "phase_without_power"
    POWER_COVERS = "power_covers"


_WORDS = {
    StepCode.NO_NETWORK: "no network model was given; fit one with `observatory fit` and pass it",
    StepCode.NOT_PREDICTED: "{error}",
    StepCode.TOP_K_VARIES: "tokens have no fixed number of experts, which {what} needs",
    StepCode.NOT_TIMED: "the time of {part} work was not measured (`observatory bench experts MODEL`)",
    StepCode.PHASE_WITHOUT_POWER: "no power was measured in phase {phase}",
    StepCode.POWER_COVERS: "power is known for {covered:.0%} of the time of {phase} only",
}


def sentence(reason: Reason) -> str:
    """A reason of this room, or of the network model that it asks, for people."""
    if isinstance(reason.code, StepCode):
        return _WORDS[reason.code].format(**reason.values)
    return network_words.sentence(reason)
