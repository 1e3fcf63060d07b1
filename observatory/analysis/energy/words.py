"""English for the codes of this room."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from observatory.analysis.energy.codes import EnergyCode as Code
from observatory.reasons import Reason
from observatory.text import listing

#: What follows a number that the sensor's blind time was added to.
_ALLOWED_FOR = ": its error allows for it"

#: Code -> template of its values, or function of its values and of what it follows from, in words.
_WORDS: dict[Code, str | Callable[[Mapping[str, Any], str], str]] = {
    Code.NO_SAMPLES: "no sample was taken in the window",
    Code.NOT_REPORTED: "the device reported no {quantity}",
    Code.STARTS_LATE: lambda v, _: f"{_samples(v)} start {v['late_s']:.2f} s after the window does",
    Code.ENDS_EARLY: lambda v, _: (
        f"{_samples(v)} end {v['early_s']:.2f} s before the window does"
        + (
            ": the device was lost or the sampler ended"
            if v["quantity"] is None
            else ", samples go on without"
        )
    ),
    Code.NO_READING: "no sample in the window holds a reading of the {quantity}",
    Code.NOT_READ: "{quantity} was not read for {gap_s:.2f} s inside the window",
    Code.NOT_UPDATED: "{quantity} was not updated for {gap_s:.2f} s inside the window",
    Code.TOO_FEW_UPDATES: "{updates} updates of the {quantity} in a window of {window_ms:.0f} ms, {needed} "
    "are needed; its update period is {period_ms:.0f} ms: repeat what is measured",
    Code.NEVER_CHANGED: "the {quantity} never changed in {readings} readings",
    Code.FEW_UPDATES_SEEN: "{updates} updates of the {quantity} in {readings} readings are too few",
    Code.COUNTER_WENT_BACK: "the counter went back from {before_mj:.0f} to {after_mj:.0f} mJ: it was reset "
    "or overflowed",
    Code.COUNTER_STALE: "the counter stood still for {still_s:.2f} s while the device drew power: it is "
    "stale",
    Code.COUNTER_BROKEN: lambda v, _: f"the counter implies {v['power_mw'] * 1e-6:.0f} kW: it is broken",
    Code.AVERAGING_WINDOW_UNKNOWN: "the averaging window of the device's power is not known",
    Code.NEITHER_SENSOR: lambda v, _: f"counter: {v['counter']}; power: {v['power']}",
    Code.NO_WINDOW: "no window was measured",
    Code.SENSORS_DISAGREE: lambda v, _: _disagreement(v),
    Code.SENSORS_DISAGREE_OFTEN: lambda v, cause: (
        f"{cause} (the largest of {v['flagged']} of {v['windows']} windows that differ too far)"
    ),
    Code.NEVER_ALONE: "it never fills {shortest_s:g} s alone",
    Code.NO_LEAST_SQUARES: lambda v, cause: f"least squares on the {v['source']}: {cause}",
    Code.NOT_OBSERVED: "no time of it was observed",
    Code.NO_METHOD: lambda _, cause: cause,
    Code.FEW_UPDATES_INSIDE: "{updates} updates of the {source} lie inside the phases, {needed} are needed: "
    "run longer",
    Code.CONSTANT_MIX: "the mix of phases hardly changes between updates (condition number {condition:.0f}, "
    "at most {highest:.0f}): only their sum is known; repeat one phase for 5 s, or vary the order",
    Code.RARE_PHASE: "it is in {updates} updates of the {source}, {needed} are needed",
    Code.NO_POSITIVE_ENERGY: "the device reported no energy above 0",
    Code.NO_POSITIVE_POWER: "no power above 0 explains the updates: something that is in no span draws power",
    Code.LAG_NOT_KNOWN: "the steps move in time with the sensor, so neither its lag nor the power can be "
    "determined: vary the order, or repeat the phase for 5 s",
    Code.UPDATE_TIMES_UNCERTAIN: lambda v, _: (
        f"the times of updates are known to {v['error_ms']:.1f} ms only, which changes the power by "
        f"{100 * v['change']:.0f} %: the phase is too short for that"
    ),
    Code.WIDE_INTERVAL: lambda v, _: (
        f"the updates leave {v['low_mw'] * 1e-3:.0f} to {v['high_mw'] * 1e-3:.0f} W: run longer, repeat the "
        "phase for 5 s, or vary the mix"
    ),
    Code.NO_PHASE_SPANS: "it left no spans of phases, which no imported file has; capture the run "
    "with observatory.watch",
    Code.PHASES_OVERLAP: lambda v, _: (
        f"spans/rank-{v['rank']:05d}: phases {v['other_phase']} (step {v['other_step']}) and {v['phase']} "
        f"(step {v['step']}) overlap by {v['overlap_ms']:.3g} ms"
        + (f", and {v['more']} more" if v["more"] else "")
        + ", as in threads: no energy per phase and token"
    ),
    Code.UNUSABLE_SPANS: "{spans} spans have no end, no length or impossible times",
    Code.SPANS_NOT_SEPARABLE: "spans inside {phase}: {detail}",
    Code.SHARED_BY_RANKS: lambda v, _: (
        f"ranks {_ranks(v)} compute on it, and its power cannot be divided among them"
    ),
    Code.RANK_ON_OTHER_NODE: lambda v, _: (
        f"the run assigns it to rank {_ranks(v)}, which is not known to be on its node"
    ),
    Code.PROCESSOR_PACKAGE: "a processor's package works for all ranks of its node",
    Code.NODE_NOT_KNOWN: "which ranks are on its node is not known",
    Code.NO_RANK_NAMES_IT: "no rank of the run computes on it, as far as the run states",
    Code.RANK_NOT_KNOWN: "{ranks} ranks share its node and the run does not state which of them it works for "
    "(capture with profile --rank-devices or watch(own_devices=...))",
    Code.WORKS_FOR_RANK: "it works for rank {rank}",
    Code.CLOCKS_NOT_ALIGNED: "the clocks of rank {rank} and of rank {sampler}, which sampled, were not "
    "aligned",
    Code.NO_PHASES_OF_RANK: "no phases of its rank are known",
    Code.ONE_SAMPLE: "it has one sample only",
    Code.COUNTER_OUT_OF_ORDER: "its counter goes back {times} times: the samples' clock jumped, or two "
    "devices have one name",
    Code.SAMPLED_TWICE: "{ranks} ranks sampled it; its energy counts once, by rank {rank}",
    Code.REPEATED_TIMES: "{samples} samples have the time of another; left out",
    Code.IMPOSSIBLE_READINGS: "{readings} readings are impossible; left out",
    Code.REPLAYED: "its power was played from a recording, not measured while this run ran: its energy, per "
    "phase and token too, says nothing about this model",
    Code.NO_ENERGY_GIVEN: lambda _, cause: f"{cause}; no energy of it is given",
    Code.WHOLE_RUN_ONLY: lambda _, cause: f"{cause}; its energy is given for the whole run only",
    Code.OF_DEVICE: lambda v, cause: f"device {v['device']}: {cause}",
    Code.OF_RANK: lambda v, cause: f"rank {v['rank']}: {cause}",
    Code.NO_ROUTING_ROWS: "the run has no routing rows of it, and its batch size is that of all ranks",
    Code.NO_BATCH_SIZE: "the run has no routing rows of it and names no batch size",
    Code.NO_SEQUENCE_LENGTH: "the run has no routing rows of it and names no sequence length",
    Code.TOO_MANY_TOKENS: "run.json: data.batch_size and data.sequence_length give over 2**53 tokens",
    Code.STEPS_WITHOUT_ROWS: "{missing} of {steps} steps have a span but no routing rows",
    Code.NO_TOKENS: "no token was routed in it",
    Code.NOT_SAMPLED: "{device}, on which it computes, was not sampled",
    Code.NO_DEVICE_SAMPLED: "no device of its node was sampled",
    Code.ENERGY_NOT_KNOWN: lambda v, cause: (
        f"its energy is not known: {cause}"
        if v["devices"] == 1
        else f"the energy of {v['missing']} of {v['devices']} devices is not known: {cause}"
    ),
    Code.RANKS_NOT_KNOWN: lambda v, cause: (
        f"the energy of {v['missing']} of {v['ranks']} ranks is not known, rank {v['rank']}: {cause}"
    ),
    Code.NO_IDLE_POWER: "its idle part is not known: no idle power",
    Code.STEPS_IN_TIME: lambda v, _: (
        "steps of the run move in time with the power sensor, which may be off by "
        f"{100 * v['error']:.0f} %{_ALLOWED_FOR if v['allowed_for'] else ''}"
    ),
    Code.PHASE_IN_TIME: lambda v, _: _phase_in_time(v),
    Code.ITERATIONS_IN_TIME: lambda v, _: (
        "its iterations move in time with the power sensor, which may be off by "
        f"{100 * v['error']:.0f} %{_ALLOWED_FOR if v['allowed_for'] else ''}"
    ),
    Code.IDLE_WINDOWS: "{measured_s:.1f} s of idle time in the run",
    Code.IDLE_BY_LEAST_SQUARES: "least squares over the gaps of the run",
    Code.IDLE_BY_CALIBRATION: "calibration when the sampler started",
    Code.IDLE_NOT_KNOWN: lambda _, cause: f"not known: {cause} and its sampler reported no idle power",
    Code.NO_IDLE_WINDOWS: "the run has no idle windows",
    Code.IDLE_WINDOWS_UNMEASURED: lambda _, cause: f"its idle windows have no energy ({cause})",
    Code.NO_MISS: "no miss was measured",
    Code.NO_EXACT_HIT: "no exact hit was measured",
    Code.MEASURED_ONCE: "no interval: miss or exact hit was measured once only",
}


def reason_words(reason: Reason) -> str:
    """One reason in words, with what it follows from."""
    words = _WORDS[Code(reason.code)]
    if isinstance(words, str):
        return words.format_map(reason.values)
    causes = [reason_words(cause) for cause in reason.because]
    if reason.code == Code.NEITHER_SENSOR:
        return words(dict(zip(("counter", "power"), causes, strict=True)), "")
    return words(reason.values, "; ".join(causes))


def reasons_words(reasons: Iterable[Reason]) -> str | None:
    """Several reasons in words, each once; None without any."""
    return "; ".join(dict.fromkeys(map(reason_words, reasons))) or None


def _samples(values: Mapping[str, Any]) -> str:
    return "samples" if values["quantity"] is None else f"readings of the {values['quantity']}"


def _ranks(values: Mapping[str, Any]) -> str:
    return listing([str(rank) for rank in values["ranks"]], most=5)


def _disagreement(values: Mapping[str, Any]) -> str:
    difference, allowed = values["difference"], values["allowed"]
    exceeded = [f"more than {limit}" for limit, over in (
        (f"{100 * values['limit']:.0f} %", abs(difference) > values["limit"]),
        (f"the {100 * allowed:.1f} % that their errors allow", abs(difference) > allowed),
    ) if over]  # fmt: skip
    return f"counter and integrated power differ by {100 * difference:+.1f} %, {' and '.join(exceeded)}"


def _phase_in_time(values: Mapping[str, Any]) -> str:
    text = "its steps move in time with the power sensor"
    if values["error"] is None:
        return f"{text}; its interval allows for it"
    text += f", which may be off by {100 * values['error']:.0f} %"
    return f"{text}: its interval allows for it" if values["allowed_for"] else text
