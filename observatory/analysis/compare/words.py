"""Codes of comparisons, and their words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

from observatory.reasons import Reason
from observatory.text import listing, percent_words


class CompareCode(StrEnum):
    """What a reason of a comparison states; the values of each are the names in its words."""

    NO_ROUTING = "no_routing"
    NO_TIMES = "no_times"
    NO_BATCH_SIZE = "no_batch_size"
    NO_EXCHANGES = "no_exchanges"
    WAIT_UNKNOWN = "wait_unknown"
    NO_POWER = "no_power"
    POWER_UNUSABLE = "power_unusable"
    NO_CLOCK = "no_clock"
    STEPS_FOLDED = "steps_folded"
    DEGREE = "degree"
    NOT_IN_DOCUMENT = "not_in_document"
    ONE_SIDE = "one_side"
    TOKENS_DIFFER = "tokens_differ"
    TOKENS_OF_STEP = "tokens_of_step"
    EXPERTS_DIFFER = "experts_differ"
    FEW_STEPS = "few_steps"
    FEW_INDEPENDENT_STEPS = "few_independent_steps"
    NO_INTERVAL = "no_interval"
    NO_COUNTERPART = "no_counterpart"
    FEW_POINTS = "few_points"
    NO_ROUTER_BIAS = "no_router_bias"
    CONSTANT = "constant"
    COUNT = "count"
    ONE_TOKEN = "one_token"

    LAYERS_ALIKE = "layers_alike"
    RELATIVE_DEPTH = "relative_depth"
    AS_WHOLE = "as_whole"

    SAME_RUN = "same_run"
    PAIRED = "paired"
    ONE_RUN_EACH = "one_run_each"
    SEVERAL_RUNS = "several_runs"
    ORDER = "order"
    SHORT_OF_CORES = "short_of_cores"
    SIMULATED_DEVICE = "simulated_device"
    FIRST_TOKENS = "first_tokens"
    OTHER_MODEL = "other_model"
    OTHER_DATA = "other_data"
    OTHER_SHAPE = "other_shape"
    OTHER_SEED = "other_seed"
    OTHER_RANKS = "other_ranks"
    OTHER_PLACEMENT = "other_placement"
    OTHER_DTYPE = "other_dtype"
    OTHER_MACHINE = "other_machine"
    OTHER_CPU = "other_cpu"
    OTHER_CORES = "other_cores"
    OTHER_PARTITION = "other_partition"
    OTHER_NETWORK = "other_network"
    OTHER_NUMA = "other_numa"
    OTHER_MEMORY_LIMIT = "other_memory_limit"
    OTHER_NEIGHBOURS = "other_neighbours"
    OTHER_SYSTEM = "other_system"
    OTHER_SETTINGS = "other_settings"
    OTHER_SOFTWARE = "other_software"
    OTHER_COMMIT = "other_commit"
    OTHER_DEVICE = "other_device"
    OTHER_DRIVER = "other_driver"
    OTHER_LIMIT = "other_limit"
    OTHER_SCHEMA = "other_schema"
    OTHER_STATE = "other_state"


_WORDS = {
    CompareCode.NO_ROUTING: "{side} holds no routing rows with assignments",
    CompareCode.NO_TIMES: "{side} holds no times of steps (spans of phases); capture it again",
    CompareCode.NO_BATCH_SIZE: "{side} does not state how many sequences a step has",
    CompareCode.NO_EXCHANGES: "{side} holds no exchanges; profile with several ranks",
    CompareCode.WAIT_UNKNOWN: "waiting is not known in {share} of the exchanges of {side}",
    CompareCode.NO_POWER: "{side} holds no power samples",
    CompareCode.POWER_UNUSABLE: "power samples of {side} give no value: {detail}",
    CompareCode.NO_CLOCK: "the devices of {side} report no clock",
    CompareCode.STEPS_FOLDED: "routing rows of {side} fold several steps",
    CompareCode.DEGREE: "EP {ep} does not fit {side}: {detail}",
    CompareCode.NOT_IN_DOCUMENT: "the document of {side} does not hold it",
    CompareCode.ONE_SIDE: "only {side} has it",
    CompareCode.TOKENS_DIFFER: "{base_tokens} tokens against {other_tokens}, of which it depends",
    CompareCode.TOKENS_OF_STEP: "a step has {base_tokens} tokens against {other_tokens}, of which it depends",
    CompareCode.EXPERTS_DIFFER: "the models have other numbers of experts, of which it depends",
    CompareCode.FEW_STEPS: "{needed} steps are needed for an interval, not {steps}",
    CompareCode.FEW_INDEPENDENT_STEPS: "too few independent steps: {steps} that resemble their neighbours",
    CompareCode.NO_INTERVAL: "a saved value without interval",
    CompareCode.NO_COUNTERPART: "{side} has nothing of {place}",
    CompareCode.NO_ROUTER_BIAS: "no router here has a correction bias",
    CompareCode.FEW_POINTS: "{needed} points are needed to find a change, not {points}",
    CompareCode.CONSTANT: "it is the same throughout",
    CompareCode.COUNT: "a count over other tokens, without an interval",
    CompareCode.ONE_TOKEN: "a step has one token of each sequence: see decode.ms",
    CompareCode.LAYERS_ALIKE: "layers are compared by their place in the model",
    CompareCode.RELATIVE_DEPTH: "{base_layers} against {other_layers} MoE layers: layers are compared by "
    "relative depth",
    CompareCode.AS_WHOLE: "{base_experts} against {other_experts} experts: only means over layers are "
    "compared",
    CompareCode.SAME_RUN: "both are the same run",
    CompareCode.PAIRED: "both were fed the same tokens: {count} differences are those of matching steps",
    CompareCode.ONE_RUN_EACH: "one run on each side: intervals cover the steps of these runs, not how much "
    "runs of one set-up differ",
    CompareCode.SEVERAL_RUNS: "{runs} runs of the baseline: intervals are those of a further run of it",
    CompareCode.ORDER: "order in time: {first} ran first, {later} {apart} later; what changed on the machine "
    "meanwhile is part of every difference of times",
    CompareCode.SHORT_OF_CORES: "ranks or threads of {side} had no core of their own",
    CompareCode.SIMULATED_DEVICE: "simulated device: power and clocks of {side} are a replayed recording",
    CompareCode.FIRST_TOKENS: "routing of {phase} is compared over the first {tokens} tokens of each",
    CompareCode.OTHER_MODEL: "model: {base} against {other}",
    CompareCode.OTHER_DATA: "data: {base} against {other}",
    CompareCode.OTHER_SHAPE: "batch and sequence length: {base} against {other}",
    CompareCode.OTHER_SEED: "seed: {base} against {other}",
    CompareCode.OTHER_RANKS: "ranks and EP degree: {base} against {other}",
    CompareCode.OTHER_PLACEMENT: "placement of experts",
    CompareCode.OTHER_DTYPE: "type of weights: {base} against {other}",
    CompareCode.OTHER_MACHINE: "machine: {base} against {other}",
    CompareCode.OTHER_CPU: "processor: {base} against {other}",
    CompareCode.OTHER_CORES: "usable cores: {base} against {other}",
    CompareCode.OTHER_PARTITION: "cluster and partition: {base} against {other}",
    CompareCode.OTHER_NETWORK: "network of the nodes: {base} against {other}",
    CompareCode.OTHER_NUMA: "NUMA nodes of the ranks: {base} against {other}",
    CompareCode.OTHER_MEMORY_LIMIT: "memory limit: {base} against {other}",
    CompareCode.OTHER_NEIGHBOURS: "other jobs and users on the nodes: {base} against {other}",
    CompareCode.OTHER_SYSTEM: "kernel and drivers: {changes}",
    CompareCode.OTHER_SETTINGS: "settings: {changes}",
    CompareCode.OTHER_SOFTWARE: "versions: {changes}",
    CompareCode.OTHER_COMMIT: "commit of the working directory: {base} against {other}",
    CompareCode.OTHER_DEVICE: "devices: {base} against {other}",
    CompareCode.OTHER_DRIVER: "driver: {base} against {other}",
    CompareCode.OTHER_LIMIT: "power limit in mW: {base} against {other}",
    CompareCode.OTHER_SCHEMA: "format of the run: {base} against {other}",
    CompareCode.OTHER_STATE: "state of the run: {base} against {other}",
}
_LONGEST = 60
#: Names of one sentence about what has no counterpart.
_MOST_NAMES = 3


def sentence(reason: Reason) -> str:
    """A reason in words."""
    return _WORDS[CompareCode(reason.code)].format(**_shown(reason.values))


def lonely_sentences(reasons: Iterable[Reason]) -> list[str]:
    """What has no counterpart, one sentence for each side."""
    places: dict[str, list[str]] = {}
    for reason in reasons:
        places.setdefault(str(reason.values["side"]), []).append(_text(reason.values["place"]))
    return [
        sentence(
            Reason(CompareCode.NO_COUNTERPART, {"side": side, "place": listing(names, most=_MOST_NAMES)})
        )
        for side, names in places.items()
    ]


def _shown(values: Mapping[str, Any]) -> dict[str, Any]:
    shown = {name: _text(value) for name, value in values.items()}
    if "share" in values:
        shown["share"] = percent_words(values["share"])
    if "apart_s" in values:
        shown["apart"] = _duration(values["apart_s"])
    return shown


def _text(value: Any) -> str:
    """A value of a manifest on one line, shortened."""
    if value is None or value == []:
        return "not stated"
    if isinstance(value, list | tuple):
        return listing([_text(item) for item in value])
    text = "".join(char if char.isprintable() else " " for char in str(value))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]}...{text[-_LONGEST // 3 :]}"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
