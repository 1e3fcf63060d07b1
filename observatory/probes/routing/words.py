"""Codes of the routing probe, and the sentences they stand for.

The probe hands codes on; people read the sentences, which are made here and nowhere taken apart.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import JsonValue

from observatory.reasons import Reason
from observatory.run.manifest import Verified

#: What confirmed counts.
Confirmation = Literal["rows", "intervention", "none"]


class Reading(StrEnum):
    """How the routing of a layer is read."""

    EXPERTS_CALL = "experts_call"
    ROUTING_MAP = "routing_map"
    CAPACITY_GATE = "capacity_gate"
    EXPERT_LOOKUP = "expert_lookup"
    DENSE_SCORES = "dense_scores"
    ROUTER_OUTPUT = "router_output"
    ADAPTER = "adapter"


class NotUnderstood(StrEnum):
    """Why the routing of some experts cannot be read."""

    NO_EXPERT_COUNT = "no_expert_count"
    NOT_ONE_ROUTER = "not_one_router"
    NO_TOP_K = "no_top_k"
    BIASED_CHOICE = "biased_choice"
    EXPERTS_NOT_RECOGNISED = "experts_not_recognised"
    SHARED_BY_BLOCKS = "shared_by_blocks"


class Witness(StrEnum):
    """Why counts are not confirmed, or what else their witnesses showed."""

    NOT_CALLED = "not_called"
    NO_TOKENS = "no_tokens"
    HOOKS_REMOVED = "hooks_removed"
    READ_BY_ADAPTER = "read_by_adapter"
    TURNED_OFF = "turned_off"
    CONTRADICTED = "contradicted"
    FAILED = "failed"
    ROWS_WITHOUT_EFFECT = "rows_without_effect"
    ZERO_WEIGHTS = "zero_weights"
    RESULTS_UNCHANGED = "results_unchanged"
    ROWS_COUNTED = "rows_counted"
    ROWS_SOMETIMES_VISIBLE = "rows_sometimes_visible"
    EXPERTS_NOT_CALLED = "experts_not_called"
    ROWS_NOT_VISIBLE = "rows_not_visible"
    COMMUNICATES = "communicates"
    NO_MODULE_CALL = "no_module_call"
    CALLED_FURTHER_OUT = "called_further_out"
    WEIGHTS_NOT_FOUND = "weights_not_found"
    RERUN_FAILED = "rerun_failed"
    RERUN_DIFFERS = "rerun_differs"
    RERUN_SHOWS_NOTHING = "rerun_shows_nothing"
    ALL_TOKENS_CHANGE = "all_tokens_change"
    FLAT_WEIGHTS = "flat_weights"


class UnknownPhase(StrEnum):
    """Why the phase of a call is not known."""

    #: Its cache keeps its length on a device.
    LENGTH_NOT_READ = "length_not_read"
    #: It was given a cache that does not state how full it is.
    FOREIGN_CACHE = "foreign_cache"
    #: It was given no cache and makes none.
    NO_CACHE = "no_cache"
    #: Likewise, and it could not take one.
    TAKES_NO_CACHE = "takes_no_cache"
    #: A watched layer was called outside of any call of the model.
    OUTSIDE = "outside"


_SENTENCES: dict[StrEnum, str] = {
    Reading.EXPERTS_CALL: "experts call ({detail})",
    Reading.ROUTING_MAP: "router output (probs, routing_map)",
    Reading.CAPACITY_GATE: "capacity gate output (dispatch mask, after dropping)",
    Reading.EXPERT_LOOKUP: "expert lookup (embedding indices)",
    Reading.DENSE_SCORES: "router output (scores, zero where not chosen)",
    Reading.ROUTER_OUTPUT: "router output (ids, dispatch mask or top-k of logits)",
    Reading.ADAPTER: "{detail}",
    NotUnderstood.NO_EXPERT_COUNT: "its number of experts is not stated",
    NotUnderstood.NOT_ONE_ROUTER: (
        "{routers} of the other modules in its block give one output for each of its {experts} experts, "
        "expected one router; the others are: {siblings} (experts picked by the caller, for example by data "
        "set, are not routed)"
    ),
    NotUnderstood.NO_TOP_K: (
        "how many experts {router} picks per token is not stated (top_k and its spellings)"
    ),
    NotUnderstood.BIASED_CHOICE: (
        "{router} returns plain logits, but a bias or group limit takes part in the choice"
    ),
    NotUnderstood.EXPERTS_NOT_RECOGNISED: "its {router} chooses among experts not recognised",
    NotUnderstood.SHARED_BY_BLOCKS: "shared by {blocks} blocks, whose calls of it cannot be distinguished",
    Witness.NOT_CALLED: "its calls are compiled, or there are none",
    Witness.NO_TOKENS: "no call with tokens ended",
    Witness.HOOKS_REMOVED: "hooks on its experts were removed",
    Witness.READ_BY_ADAPTER: "an adapter reads it",
    Witness.TURNED_OFF: "verification was turned off",
    Witness.CONTRADICTED: "{error}",
    Witness.FAILED: "{error}",
    Witness.ROWS_WITHOUT_EFFECT: "the rows that were seen differ, and change nothing",
    Witness.ZERO_WEIGHTS: (
        "assignments whose gate weight is next to zero are counted, though they change nothing"
    ),
    Witness.RESULTS_UNCHANGED: (
        "some results do not change with the weights of the experts that compute them"
    ),
    Witness.ROWS_COUNTED: "the rows differ from what was read and are counted in its place",
    Witness.ROWS_SOMETIMES_VISIBLE: "its rows were seen in some calls and not in others",
    Witness.EXPERTS_NOT_CALLED: (
        "some experts compute without being called, so that their rows are not seen"
    ),
    Witness.ROWS_NOT_VISIBLE: "the rows of its experts are not visible, and no intervention was asked for",
    Witness.COMMUNICATES: "its block exchanges data with other ranks",
    Witness.NO_MODULE_CALL: "its block is not called as a module",
    Witness.CALLED_FURTHER_OUT: "its experts are called by a module further out, which cannot be run again",
    Witness.WEIGHTS_NOT_FOUND: "the weights of its experts were not found, or are spread over ranks",
    Witness.RERUN_FAILED: "running its block again failed ({error})",
    Witness.RERUN_DIFFERS: "running its block again gives another result",
    Witness.RERUN_SHOWS_NOTHING: "running its block again does not show which experts compute a token",
    Witness.ALL_TOKENS_CHANGE: "a change of one expert changes the results of all tokens",
    Witness.FLAT_WEIGHTS: "how its flat weights are divided among experts is not known",
    UnknownPhase.LENGTH_NOT_READ: (
        "the length of the cache given as {argument} is on the device and was not read"
    ),
    UnknownPhase.FOREIGN_CACHE: "the cache given as {argument} does not report how full it is",
    UnknownPhase.NO_CACHE: "no cache was given or made",
    UnknownPhase.TAKES_NO_CACHE: "the model takes no cache",
    UnknownPhase.OUTSIDE: "made outside of any call of the model",
}


def sentence(code: StrEnum, **values: JsonValue) -> str:
    """What a code and its values say."""
    return _SENTENCES[code].format(**values)


def sentence_of(reason: Reason) -> str:
    """What a reason says."""
    return sentence(reason.code, **reason.values)


def verdict(by: Confirmation, code: Witness | None = None, **values: JsonValue) -> Verified:
    """What confirmed the counts of a layer, for the manifest."""
    return Verified(by=by) if code is None else verdict_of(by, Reason(code, values))


def verdict_of(by: Confirmation, reason: Reason) -> Verified:
    """The same with a reason: its code and its sentence."""
    return Verified(by=by, code=reason.code, reason=sentence_of(reason))
