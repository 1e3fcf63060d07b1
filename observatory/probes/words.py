"""Words of captures: why time bases of ranks are not aligned, why a capture was ended."""

from __future__ import annotations

from enum import StrEnum

from observatory.reasons import Reason


class AlignmentCode(StrEnum):
    """Why there is no alignment, or no drift; behind some the names of the values that belong to it."""

    NOT_ALIGNED = "not_aligned"
    NOT_AT_ENTER = "not_at_enter"
    FIRST_RANK_FAILED = "first_rank_failed"
    CLOCK_WAS_SET = "clock_was_set"  # rounds, rank
    NOT_SERVED = "not_served"  # rank
    NO_ANSWER = "no_answer"  # error, more: other ranks that did not answer
    UNKNOWN_OFFSET = "unknown_offset"  # because
    UNKNOWN_DRIFT = "unknown_drift"  # because


_WORDS = {
    AlignmentCode.NOT_ALIGNED: "the ranks did not align their clocks",
    AlignmentCode.NOT_AT_ENTER: "the ranks did not align at enter",
    AlignmentCode.FIRST_RANK_FAILED: "the first rank of this host could not align",
    AlignmentCode.CLOCK_WAS_SET: "{rounds} round trips to rank {rank} contradict each other: a clock was set",
    AlignmentCode.NOT_SERVED: "rank {rank} does not serve",
    AlignmentCode.NO_ANSWER: "{error}",
    AlignmentCode.UNKNOWN_OFFSET: "clocks were not aligned at enter ({cause}): waiting between ranks of "
    "different hosts may not be known",
    AlignmentCode.UNKNOWN_DRIFT: "clocks were not aligned at exit ({cause}): their drift is not known, which "
    "makes times less certain",
}


#: A capture that took too much of the program's time.
OVER_BUDGET = (
    "the capture ended at step {step}: watching took {share:.1%} of the time, more than the budget of "
    "{budget:.1%}"
)


def alignment_words(reason: Reason) -> str:
    """Why time bases are not aligned, with what it follows from."""
    cause = "; ".join(map(alignment_words, reason.because))
    more = f", and {reason.values['more']} more" if reason.values.get("more") else ""
    return _WORDS[AlignmentCode(reason.code)].format(**reason.values, cause=cause) + more
