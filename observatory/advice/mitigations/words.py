"""Verdicts, premises and missing inputs in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from observatory.advice.mitigations.verdict import MitigationCode
from observatory.analysis.experts.words import StepCode
from observatory.analysis.network.words import NetworkCode
from observatory.text import percent_words

#: What is needed, or why there is nothing to change.
_MISSING = {
    MitigationCode.NO_TOKENS: "too few token samples; profile with --sample-tokens 256 and more --steps",
    MitigationCode.NO_NETWORK: "no network model; fit one and give --network",
    MitigationCode.NO_ALGORITHM: "the network model was not measured for {algorithm}",
    MitigationCode.NO_MEMORY: "no memory size; state memory_bytes in the topology",
    MitigationCode.ALL_ROUTED: "no expert is worth fetching: the busiest has {busiest} tokens of a step, "
    "that takes less time from {break_even} on",
    MitigationCode.ONE_LAYER: "there is one layer only",
    MitigationCode.NO_MOVE_RATE: "no rate at which weights move; state move_bytes_per_s in the topology",
    MitigationCode.NO_ROOM: "its experts take {needed_bytes} B of the {memory_bytes} B of a rank",
    MitigationCode.FAR_OFF: "today's step is predicted to take {predicted_us} us and took {measured_us} us",
    MitigationCode.REPLICATED_TODAY: "experts have replicas today",
    MitigationCode.NO_HOST_RATE: "no rate from the host; state host_bytes_per_s in the topology",
    MitigationCode.NO_CLOCKS: "no clock model; give --clocks",
    MitigationCode.OTHER_PHASES: "the clock model has no series of {phase}",
    MitigationCode.NO_SEQUENCES: "too few sampled sequences, or their length is not known",
    MitigationCode.ONE_NODE: "all ranks are on one node",
    MitigationCode.IN_USE: "in use already",
    MitigationCode.ALL_ACTIVE: "{activated} of the experts are activated in every step",
    MitigationCode.UNEVEN: "{experts} experts do not fill {ranks} ranks evenly",
    MitigationCode.ONE_RANK: "one rank exchanges nothing",
    MitigationCode.IMBALANCED: "no rank is above the threshold; the busiest has {ratio} times the mean",
    MitigationCode.EXPERTS_DO_NOT_FIT: "all experts fit into memory",
    MitigationCode.ENERGY_FALLS: "no lower clock is advised",
    NetworkCode.RANKS_OUTSIDE: "ranks: {ranks}, the network model was measured on {measured}",
    NetworkCode.NODES_OUTSIDE: "nodes: {nodes}, the network model was measured on {measured}",
    NetworkCode.RANKS_ON_NODE_OUTSIDE: "ranks on a node: {ranks}, the network model was measured on "
    "{measured}",
    NetworkCode.RANKS_BETWEEN: "ranks: {ranks}, the network model was measured on {measured} alone",
    NetworkCode.BYTES_ABOVE: "{bytes} B on one rank, the network model was measured up to {most_bytes}",
    NetworkCode.BYTES_BELOW: "{bytes} B on one rank, the network model was measured from {least_bytes}",
    NetworkCode.EMPTY_EXCHANGE: "exchanges that carry nothing, the network model was not measured on any",
    MitigationCode.EXPERTS_BEYOND: "{times} times the most that expert times were measured on",
    StepCode.NO_NETWORK: "no network model; fit one and give --network",
    StepCode.NOT_PREDICTED: "{error}",
    StepCode.PHASE_WITHOUT_POWER: "no power was measured in it",
    StepCode.POWER_COVERS: "power is known for {covered} of its time only",
    MitigationCode.NO_POWER: "the run has no power samples",
    MitigationCode.POWER_OF_OTHERS: "power was measured on {measured} ranks, not on {ranks}",
    MitigationCode.NO_PROGRAM: "no program reaches this time",
    StepCode.TOP_K_VARIES: "tokens have no fixed number of experts",
}

_PREMISES = {
    MitigationCode.STABLE: "imbalance lasts: of a promised {promised} of the mean load {held_out} was held",
    MitigationCode.IMBALANCED: "ranks are unequal: the busiest has {ratio} times the mean",
    MitigationCode.ONE_EXPERT_DECIDES: "one expert outweighs a rank: no layout without replicas "
    "is below {bound}",
    MitigationCode.LOADS_VARY: "loads vary between steps: {held_out} on judged steps, {train} on the others",
    MitigationCode.FABRIC_DECIDES: "exchanges decide: {share} of the step",
    MitigationCode.BETWEEN_NODES: "traffic between nodes decides: {crossing} of the rows cross, "
    "exchanges are {share} of the step",
    MitigationCode.FETCH_PAYS: "fetching an expert takes less time from {break_even} tokens of a step "
    "on: the busiest has {busiest}",
    MitigationCode.KEPT_TAKE_MORE: "few experts take much: those kept take {share} of the load, {even_share} "
    "if all were alike",
    MitigationCode.COPIES_SHARE_RANKS: "experts of a token share ranks: {rows_left} of the rows are left",
    MitigationCode.WEIGHTS_DECIDE: "activated experts decide: a tenth fewer saves {saved_by_tenth} "
    "of the time",
    MitigationCode.CO_ACTIVATION: "experts are chosen together: {touched} nodes per token, {independent} "
    "if they were independent",
    MitigationCode.SEQUENCES_DIFFER: "sequences prefer ranks: {local_before} of the rows stay, "
    "{local_after} after",
    MitigationCode.EXPERTS_DO_NOT_FIT: "experts do not fit: {held_bytes} B in {memory_bytes} B",
    MitigationCode.USED_AGAIN: "experts are used again: {hit} of them were kept since the last steps, "
    "{shuffled} with steps in random order",
    MitigationCode.NEXT_PREDICTED: "a layer predicts the next: {recall} of a token's experts are among "
    "those predicted, {popular} among the most used",
    MitigationCode.ENERGY_FALLS: "energy falls with the clock",
    MitigationCode.REAL_TOKENS: "tokens are real",
}
_SHARES = frozenset(
    (
        "activated",
        "covered",
        "share",
        "even_share",
        "crossing",
        "rows_left",
        "saved_by_tenth",
        "local_before",
        "local_after",
        "hit",
        "shuffled",
        "recall",
        "popular",
    )
)


#: Numbers from here on are written without decimals.
_LONG = 1000


def reason_words(reason: Mapping[str, Any] | None) -> str:
    """Why there is no number, of a reason as a document has it; empty without one."""
    return "" if reason is None else _filled(_MISSING, reason)


def premise_words(premise: Mapping[str, Any] | None) -> str:
    """A premise with what the trace shows, of a premise as a document has it; empty without one."""
    if premise is None:
        return ""
    holds = {True: "holds", False: "does not hold", None: "not known"}[premise["holds"]]
    values = premise["reason"]
    if any(value is None for value in values.values()):
        return holds
    return f"{holds}; {_filled(_PREMISES, values)}"


def _filled(words: Mapping[Any, str], reason: Mapping[str, Any]) -> str:
    code = reason["code"]
    known = {item.value: text for item, text in words.items()}
    values = {
        name: percent_words(value)
        if name in _SHARES and isinstance(value, float)
        else f"{value:.{'0f' if abs(value) >= _LONG else '3g'}}"
        if isinstance(value, float)
        else value
        for name, value in reason.items()
    }
    return str(known.get(code, code)).format(**values)
