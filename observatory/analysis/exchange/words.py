"""Why exchanges cannot be matched, split or compared, as codes and in words."""

from __future__ import annotations

from enum import StrEnum

from observatory.reasons import Reason


class ExchangeCode(StrEnum):
    """Codes of the reasons that this room gives; the values of each are the names in its words."""

    DUPLICATE_SEQUENCE = "duplicate_sequence"
    FIELDS_DIFFER = "fields_differ"
    ROLES_DIFFER = "roles_differ"
    BACKEND_NUMBERS_DIFFER = "backend_numbers_differ"
    IMPOSSIBLE_BYTES = "impossible_bytes"
    BYTES_OUTSIDE_GROUP = "bytes_outside_group"
    BYTES_CONTRADICT = "bytes_contradict"
    GROUP_SIZES_DIFFER = "group_sizes_differ"
    GROUP_TOO_LARGE = "group_too_large"
    NODES_UNKNOWN = "nodes_unknown"
    TOO_MANY_ROWS = "too_many_rows"
    ROWS_MISSING = "rows_missing"
    NO_ROW = "no_row"
    IMPOSSIBLE_TIMES = "impossible_times"
    NEVER_ENDED = "never_ended"
    PEER_WITHOUT_ROW = "peer_without_row"
    PEER_IMPOSSIBLE_TIMES = "peer_impossible_times"
    CLOCKS_DISAGREE = "clocks_disagree"
    CLOCKS_NOT_ALIGNED = "clocks_not_aligned"
    BYTES_NOT_RECORDED = "bytes_not_recorded"
    LAST_ARRIVAL_UNKNOWN = "last_arrival_unknown"
    CLOCK_NOT_RECORDED = "clock_not_recorded"
    CLOCK_ALIGNMENT_FAILED = "clock_alignment_failed"


_WORDS = {
    ExchangeCode.DUPLICATE_SEQUENCE: (
        "rank {rank} left several rows with this sequence number: which belong together is not known"
    ),
    ExchangeCode.FIELDS_DIFFER: (
        "ranks disagree on the {field}: rank {rank} says {value}, rank {other_rank} {other_value}"
    ),
    ExchangeCode.ROLES_DIFFER: "ranks that exchange something disagree on the role: {roles}",
    ExchangeCode.BACKEND_NUMBERS_DIFFER: (
        "the backend's own numbers differ ({number} on rank {rank}, {other_number} on rank {other_rank}): "
        "the ranks entered the watch at different points of the program"
    ),
    ExchangeCode.IMPOSSIBLE_BYTES: "rank {rank} says an impossible number of bytes",
    ExchangeCode.BYTES_OUTSIDE_GROUP: "rank {rank} says bytes for ranks outside its group",
    ExchangeCode.BYTES_CONTRADICT: (
        "rank {rank} says it sent {sent_bytes} bytes to rank {other_rank}, which says it got "
        "{received_bytes}: the rows do not belong together"
    ),
    ExchangeCode.GROUP_SIZES_DIFFER: "ranks disagree on the size of the group: {sizes}",
    ExchangeCode.GROUP_TOO_LARGE: "a group of {ranks} ranks is larger than can be analysed ({most})",
    ExchangeCode.NODES_UNKNOWN: (
        "the run does not say which ranks are on which node, so the ranks of group {group} are not known"
    ),
    ExchangeCode.TOO_MANY_ROWS: "{rows} ranks left rows of a group of {ranks}",
    ExchangeCode.ROWS_MISSING: (
        "only {rows} of the group's {ranks} ranks left a row, and the run has {run_ranks}: "
        "which rank each number of bytes belongs to is not known"
    ),
    ExchangeCode.NO_ROW: "it left no row",
    ExchangeCode.IMPOSSIBLE_TIMES: "its times are impossible, or its end lies before its start",
    ExchangeCode.NEVER_ENDED: "the collective never ended on this rank",
    ExchangeCode.PEER_WITHOUT_ROW: "rank {rank}, on which it depends, left no row",
    ExchangeCode.PEER_IMPOSSIBLE_TIMES: "rank {rank}, on which it depends, left impossible times",
    ExchangeCode.CLOCKS_DISAGREE: "rank {rank} arrived after this rank had its data: their clocks disagree",
    ExchangeCode.CLOCKS_NOT_ALIGNED: "its clock and that of rank {rank} are not aligned",
    ExchangeCode.BYTES_NOT_RECORDED: "the bytes per peer were not recorded",
    ExchangeCode.LAST_ARRIVAL_UNKNOWN: (
        "when the last rank of all arrived is not known, and the backend waits for all ranks"
    ),
    ExchangeCode.CLOCK_NOT_RECORDED: "no alignment of the clock of rank {rank} was recorded",
    ExchangeCode.CLOCK_ALIGNMENT_FAILED: "the clock of rank {rank} could not be aligned{detail}",
}


def sentence(reason: Reason) -> str:
    """A reason of this room for people."""
    return _WORDS[ExchangeCode(reason.code)].format(**reason.values)


#: Of `observatory.analysis.exchange.causes.CAUSES`.
_CAUSE_WORDS = {
    "compute load": "it computed longer",
    "clock": "its SM clock was lower",
    "exchange before": "the exchange before ended later on it",
}


def cause_words(cause: str | None) -> str:
    """Why a rank was the last to arrive, as a clause."""
    return _CAUSE_WORDS.get(cause or "", "why is not known")
