"""Conclusions and verdicts in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from observatory.advice.conclusions import Code, Conclusion
from observatory.advice.conclusions.changes import is_off
from observatory.advice.placement import PlacementCode
from observatory.advice.placement_problem import ProblemCode
from observatory.analysis.exchange.words import cause_words
from observatory.analysis.network.words import NetworkCode
from observatory.reasons import Reason
from observatory.text import listing, percent_words

#: Smaller shares of a step are no difference.
_NO_GAIN = 0.005

_SENTENCES = {
    Code.PLAN: "plan: {devices} ({gpus_low} to {gpus_high}), {hardware}: {set_up}, a batch of {sequences}",
    Code.PLAN_TIMES: "they generate {tokens_per_s:,.0f} tokens/s ({tokens_per_s_low:,.0f} to "
    "{tokens_per_s_high:,.0f}), {ms_per_token:.1f} ms per token ({ms_per_token_low:.1f} to "
    "{ms_per_token_high:.1f}), {ttft_ms:,.0f} ms ({ttft_ms_low:,.0f} to "
    "{ttft_ms_high:,.0f}) to the first token",
    Code.PLAN_MAY_MISS: "the slow end of these intervals misses a target: {missed}",
    Code.PLAN_COST: "{per_million:.3g} {currency} for a million generated tokens",
    Code.PLAN_CHEAPER: "cheapest: {devices}, {hardware}: {set_up}, a batch of {sequences}, with "
    "{per_million:.3g} {currency} for a million generated tokens",
    Code.PLAN_POWER: "{joules_per_token:.3g} J per token ({joules_per_token_low:.3g} to "
    "{joules_per_token_high:.3g}) by the power of the runs ({joules_grade})",
    Code.PLAN_POWER_SIMULATED: "{joules_per_token:.3g} J per token ({joules_per_token_low:.3g} to "
    "{joules_per_token_high:.3g}) by the power of a simulated device: nothing of it was measured",
    Code.PLAN_POWER_LIMIT: "at most {joules_per_token_most:.3g} J per token, by the power limit: no run has "
    "the power of its phases on such devices",
    Code.PLAN_ASSUMED: "{share} of that time rests on assumed rates, not on measured or published ones: "
    "measure experts and fabric there (`bench experts`, `bench alltoall`, `fit`)",
    Code.PLAN_EXTRAPOLATED: "outside of what was measured: {extrapolated}; capture larger steps, or plan "
    "smaller batches",
    Code.PLAN_ROUTING: "assuming {routing} routing one would plan {gpus}; under the captured routing that "
    "set-up {needs}{missed}",
    Code.PLAN_ROUTING_NONE: "assuming {routing} routing one would plan nothing: no set-up meets the targets",
    Code.PLAN_ROUTING_SAME: "{routings} routing would lead to as many devices as the captured one",
    Code.PLAN_UNCAPTURED: "routing is assumed ({routing}); with {other} routing: {gpus}; a captured run "
    "(`observatory profile`) replaces both, places experts by it and tries redundant ones",
    Code.PLAN_PHASE: "no {missing} was captured: the loads of {phase} stand for it",
    Code.PLAN_TOO_LONG: "a sequence has {tokens} tokens here, the model was made for {longest}",
    Code.NO_PLAN: "no set-up meets the targets; {set_ups} were tried",
    Code.NEAREST_PLAN: "{set_ups} ruled out by {constraint}; the nearest: {nearest}",
    Code.NOTHING: "nothing here is worth changing",
    Code.TOO_FEW_STEPS: "too few steps for an interval, so nothing can be called unbalanced",
    Code.SHORT_OF_CORES: "ranks shared processor cores, so these times are not those of a machine with a "
    "core for each",
    Code.BUSIEST_EXPERT: "most unbalanced: layer {layer} in {phase}, Gini {gini:.3f} ({gini_low:.3f} to "
    "{gini_high:.3f}; uniform routing shows {gini_floor:.3f})",
    Code.BUSIEST_RANK: "busiest rank: layer {layer} in {phase}, EP {ep}, placement {placement}",
    Code.LOAD_COST: "its busiest {holder} has {max_over_mean:.2f} times the mean load, uniform routing "
    "{max_over_mean_floor:.2f} times{waiting}",
    Code.SLOWER_LAYOUT: "in {phase}, EP {slower_ep} {slower_placement} is predicted to take "
    "{extra_ms} ms more in a step than EP {better_ep} {better_placement}",
    Code.LONGEST_WAIT: "longest waiting: {role}{of_layer} in {phase}, {slowest}",
    Code.WAIT_COST: "ranks wait {wait_share} of their time in exchanges, {wait_ms} ms in each "
    "{role}{of_layer} in {phase}",
    Code.WAIT_UNKNOWN: "waiting could not be separated from transfer, so no place can be called worst",
    Code.MOST_ENERGY: "most energy{of_which}: {phase} on rank {source_rank}, {share} of it{rest}",
    Code.ENERGY_COST: "that is {energy}{per_token}",
    Code.ENERGY_UNKNOWN: "the energy of no phase is known, for the reasons given",
    Code.HELD_BY_CAP: "held back: {device_uuid}{in_phase}, by its power limit",
    Code.CAP_COST: "the limit held the clock down in {power_cap_busy_share} of the busy time",
    Code.CLOCK_TOO_HIGH: "worth a lower clock: {title}, now at {reference_mhz:.0f} MHz",
    Code.CLOCK_COST: "a lock saves {saving} of the energy for {slowdown} more time",
    Code.COMMON_COST: "one lock for all series saves {saving} of the energy on average",
    Code.NO_COMMON_CLOCK: "but no single clock suits all series: leave a device that runs them all "
    "unlocked, or give {series} devices of its own",
    Code.CLOCK_UNKNOWN: "whether another clock saves energy is not known: it takes a sweep with energies",
    Code.LEAST_ENERGY: "least energy: {series}, {setting}",
    Code.SETTING_COST: "that saves {saving} of the energy of an iteration for {slowdown} more time",
    Code.ONE_SETTING: "one setting alone does not show what another would save",
    Code.DEAREST_PREFILL: "most energy: a prompt of {prompt_tokens} tokens with {cached_fraction} cached, "
    "{energy}",
    Code.REUSE_COST: "an exact hit saves {saving} of the energy of a miss",
    Code.REUSE_UNKNOWN: "what a cached prompt saves is not known beyond the scatter of the windows",
    Code.WRONG_BYTES: "wrong bytes arrived in {cases} cases, first {algorithm} {pattern} of "
    "{mean_send_bytes} B",
    Code.NOISY_CASE: "noisiest: {algorithm} {pattern} of {mean_send_bytes} B",
    Code.NOISE_COST: "its slowest tenth takes {ratio:.1f} times the median; {noisy} of {cases} cases are "
    "that noisy",
    Code.DEAREST_REALISM: "captured traffic costs most: {role} of layer {layer} in {phase}, {algorithm}",
    Code.REALISM_COST: "{extra_us} us more in each exchange than uniform traffic, {ratio:.2f} times as "
    "long ({ratio_low:.2f} to {ratio_high:.2f})",
    Code.EXPERTS_BELOW: "below {assignments} assignments on a rank with {experts_here} activated "
    "experts, fixed costs outweigh the rows: balancing assignments gains less than half of their share",
    Code.EXPERTS_PER_EXPERT: "an activated expert costs {expert_us} us, as much as {rows} rows",
    Code.EXPERTS_UNSURE: "not to be relied on: on held-out points the cost is off by {median_error} in the "
    "median, {p90_error} in the worst tenth",
    Code.UNRELIABLE_FIT: "not to be relied on: the model of {algorithm} ({verdict})",
    Code.FIT_COST: "its predictions are off by {median_error} in the median, {p90_error} in the worst tenth",
    Code.BEST_CHANGE: "worth changing: {whose}in {phase}, {change}{setting}",
    Code.CHANGE_GAIN: "{part} of a step takes {gain} less time{energy}{pays}{elsewhere}{took}",
    Code.DOES_NOT_FIT: "today's experts do not fit into the memory of {ranks} ranks: use more ranks, or an "
    "{change}{setting}",
    Code.CLOCK_SAVES: "no other layout or exchange is worth changing; a clock lock{setting} saves {saving} "
    "of the energy and takes {slowdown} more time",
    Code.PERFECT_BALANCE: "perfect balance of the ranks would take {gain} off a step of {phase}",
    Code.EXTRAPOLATED: "not certain: in {phase}, {change}{setting} is predicted to take {gain} less time, "
    "by a network model that was measured on {outside} alone",
    Code.NO_MEMORY: "held up by memory: in {phase}, {change}{setting} would take {gain} less time, but its "
    "experts take {needed} of the {memory} of a rank",
    Code.MORE_MEMORY: "next: give each rank more memory than that, or spread the experts over more than "
    "{ranks} ranks",
    Code.FAR_OFF: "not certain: in {phase}, {change}{setting} is predicted to take {gain} less time, but "
    "today's step is predicted at {predicted_ms} ms and took {measured_ms} ms",
    Code.FIT_AGAIN: "next: measure and fit the exchanges where the run was, without other load (`bench "
    "alltoall`, `fit`); or make the change, profile again, and `compare` the runs",
    Code.PAYS_LATE: "in {phase}, {change}{setting} would take {gain} less time, but pays for itself after "
    "{break_even_steps:,.0f} steps only, later than --horizon-steps {horizon_steps:,}",
    Code.OTHER_FABRIC: "next: measure and fit the exchanges of {ranks} ranks, and give --network",
    Code.RUN_COMMAND: "next: {command}",
    Code.OPEN_REPORT: "next: {command}",
    Code.MORE_REPEATS: "next: measure again with more --repeats on a quiet machine",
    Code.MORE_STEPS: "next: profile again with more --steps",
    Code.MORE_CORES: "next: measure again with fewer ranks, or a core for each",
    Code.LOCK_CLOCK: "next: lock it to {sm_clock_mhz:.0f} MHz, with the commands above",
    Code.CHECK_FABRIC: "next: check the links and nodes named above",
    Code.MODELS_APART: "of {models} models {worst} loads its experts least evenly, Gini {worst_gini:.3f} "
    "in {phase}, {best} most evenly, {best_gini:.3f}",
    Code.CHANGED: "changed beyond noise: {changed} of {tested} quantities, first {name}{of_which}: {change}",
    Code.ALL_SAME: "same within noise: all {tested} quantities that could be tested",
    Code.IDENTICAL: "identical: all {tested} quantities that could be tested",
    Code.NO_DIFFERENCE_KNOWN: "no difference could be tested, for the reasons above",
    Code.BOTH_DIFFER: "what else differs: {facts}",
    Code.LEVEL_CHANGED: "{changes} changes of level, first {name}{of_layer} from {from} on: {change}",
    Code.ALSO_CHANGED: "there also changed: {facts}",
    Code.NO_CHANGE: "no change of level in {tested} series",
    Code.TOO_FEW_POINTS: "nothing could be tested: {points} points; `observatory compare` takes single runs",
    Code.REPEAT_RUNS: "next: repeat both in turn; one run each does not show how much runs differ",
}
#: What a network model was measured on, by what of the set-up lies outside.
_MEASURED_ON = {
    NetworkCode.RANKS_OUTSIDE: ("rank", ""),
    NetworkCode.NODES_OUTSIDE: ("node", ""),
    NetworkCode.RANKS_ON_NODE_OUTSIDE: ("rank", " on a node"),
}
#: What is stated of changes that would gain.
_HELD_UP = (Code.EXTRAPOLATED, Code.FAR_OFF, Code.NO_MEMORY, Code.PAYS_LATE)
#: Values that are shares.
_SHARES = (
    "wait_share", "share", "power_cap_busy_share", "median_error", "p90_error", "saving", "slowdown",
    "cached_fraction", "gain",
)  # fmt: skip

#: Values that are amounts of a unit.
_AMOUNTS = ("extra_ms", "wait_ms", "extra_us", "expert_us")


def conclusion_sentences(conclusion: Conclusion) -> list[str]:
    """At most three lines."""
    return [
        _SENTENCES[Code(reason.code)].format_map(_shown(Code(reason.code), reason.values))
        for reason in conclusion
    ]


def _devices(count: int) -> str:
    return "1 device" if count == 1 else f"{count} devices"


def _shown_of_plan(code: Code, values: Mapping[str, Any]) -> dict[str, Any]:
    if code in (Code.PLAN, Code.PLAN_CHEAPER):
        return {"devices": _devices(values["gpus"])}
    if code is Code.PLAN_MAY_MISS:
        limits = (("ms_per_token", "ms per token", 1), ("ttft_ms", "ms to the first token", 0))
        missed = [
            f"{values[name][0]:,.{digits}f} {what}, {values[name][1]:g} wanted"
            for name, what, digits in limits
            if name in values
        ]
        return {"missed": listing(missed)}
    if code is Code.PLAN_ROUTING:
        return _routing_cost(values)
    if code is Code.PLAN_UNCAPTURED:
        gpus = values["gpus"]
        return {"gpus": "no set-up meets the targets" if gpus is None else _devices(gpus)}
    if code in (Code.PLAN_ROUTING_SAME, Code.PLAN_EXTRAPOLATED):
        return {name: listing(names) for name, names in values.items()}
    return {}


def _routing_cost(values: Mapping[str, Any]) -> dict[str, str]:
    """What a set-up that was planned with another routing costs against the plan."""
    needed, planned = values["needed"], values["planned"]
    more = 0 if planned is None else needed - planned
    if planned is None:
        against = ""
    elif more:
        against = f", {_devices(abs(more))} {'more' if more > 0 else 'fewer'} than this plan"
    else:
        against = ", as this plan"
    missed = [
        f"{values[name]:,.{digits}f} ms {what}"
        for name, digits, what in (("ms_per_token", 1, "per token"), ("ttft_ms", 0, "to the first token"))
        if values[name] is not None
    ]
    return {
        "gpus": _devices(values["gpus"]),
        "needs": f"needs {needed}{against if needed != values['gpus'] or more else ''}",
        "missed": f", and misses a target with {listing(missed)}" if missed else "",
    }


def _shown(code: Code, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as they stand in the sentence of their code."""
    shown = {
        name: percent_words(value)
        if name in _SHARES and isinstance(value, float)
        else _amount(value)
        if name in _AMOUNTS
        else value
        for name, value in values.items()
    }
    shown |= _shown_of_plan(code, values)
    if code is Code.LONGEST_WAIT:
        role = values["role"] if values["role"] in ("dispatch", "combine") else "other exchanges"
        shown |= {"role": role, "slowest": _slowest(values)}
    if code in (Code.LONGEST_WAIT, Code.WAIT_COST):
        shown["of_layer"] = _of_layer(values["layer"])
    if code is Code.LOAD_COST:
        shown["waiting"] = "; all others wait for it" if values["holder"] == "rank" else ""
    if code is Code.WAIT_COST:
        shown["role"] = values["role"] if values["role"] in ("dispatch", "combine") else "other exchange"
    if code is Code.MOST_ENERGY:
        shown |= _of_energy(values)
    if code is Code.ENERGY_COST:
        shown |= {"energy": _energy(values), "per_token": _per_token(values)}
    if code in _OF_COMPARISONS:
        shown |= _of_comparison(values)
    if code is Code.HELD_BY_CAP:
        shown["in_phase"] = f" in {values['phase']}" if values["phase"] else ""
    shown |= _of_change(code, values)
    if code is Code.DEAREST_PREFILL:
        shown["energy"] = f"{values['prefill_mj'] / 1e3:.3g} J"
    if code is Code.LEAST_ENERGY:
        clock_mhz, limit_mw = values["requested_sm_clock_mhz"], values["requested_limit_mw"]
        shown["setting"] = (
            f"limited to {limit_mw / 1e3:g} W" if clock_mhz is None else f"locked to {clock_mhz:g} MHz"
        )
    if code in (Code.CLOCK_COST, Code.COMMON_COST, Code.REUSE_COST):
        shown["saving"] = _interval(values["saving_value"], values["saving_low"], values["saving_high"])
    return shown


def _of_change(code: Code, values: Mapping[str, Any]) -> dict[str, str]:
    """Values of sentences about changes of a set-up; empty for all others."""
    if code not in (
        Code.BEST_CHANGE,
        Code.CHANGE_GAIN,
        *_HELD_UP,
        Code.DOES_NOT_FIT,
        Code.CLOCK_SAVES,
    ):
        return {}
    shown = {}
    if code is Code.CHANGE_GAIN or code in _HELD_UP:
        shown["gain"] = _interval(values["gain"], values["gain_low"], values["gain_high"])
    if code is not Code.CHANGE_GAIN:
        return shown | _of_setting(code, values)
    return shown | {
        "part": "the MoE part" if values["has_exchanges"] else "the expert part",
        "elsewhere": "".join(map(_elsewhere, values["elsewhere"])),
        "energy": _energy_words(values["energy_saved"]),
        "took": _took(values["measured_over_predicted"]),
        "pays": _pays(values["break_even_steps"], values["cost_known"]),
    }


def _of_setting(code: Code, values: Mapping[str, Any]) -> dict[str, str]:
    shown = {"setting": f" ({values['setting']})" if values["setting"] else ""}
    if code is Code.EXTRAPOLATED:
        one, where = _MEASURED_ON[values["outside"]]
        shown["outside"] = f"{values['measured']} {one}{'' if values['measured'] == '1' else 's'}{where}"
    if code is Code.NO_MEMORY:
        for name in ("needed", "memory"):
            shown[name] = f"{_amount(values[f'{name}_bytes'] / 1e6)} MB"
    if code is Code.FAR_OFF:
        for name in ("predicted", "measured"):
            shown[f"{name}_ms"] = _amount(values[f"{name}_us"] / 1e3)
    if code is Code.BEST_CHANGE:
        shown["whose"] = f"for {values['run']}, " if values["of_several"] else ""
    if code is Code.CLOCK_SAVES:
        ends = (values[f"energy_saving{end}"] for end in ("", "_low", "_high"))
        shown |= {"saving": _interval(*ends), "slowdown": percent_words(values["slowdown"])}
    return shown


def _took(measured_over_predicted: float | None) -> str:
    """How long today's steps took; empty where that is about as predicted, or not known."""
    if measured_over_predicted is None or not is_off(measured_over_predicted):
        return ""
    return f"; today's step took {measured_over_predicted:.2g} times as long as predicted"


def _energy_words(saved: float | None) -> str:
    """What a change saves of the energy of a step, or costs; empty where that is not known."""
    if saved is None:
        return ""
    return f" and {percent_words(abs(saved))} {'less' if saved >= 0 else 'more'} energy"


#: Of `observatory compare` and `observatory history`.
_OF_COMPARISONS = (Code.CHANGED, Code.LEVEL_CHANGED, Code.BOTH_DIFFER, Code.ALSO_CHANGED)


def _of_comparison(values: Mapping[str, Any]) -> dict[str, str]:
    """How much changed, where, and what else differs."""
    if "facts" in values:
        return {"facts": listing([name.removeprefix("other_").replace("_", " ") for name in values["facts"]])}
    if "before" in values:
        change = _change(values["before"], values["after"], values["relative"])
        return {"change": change, "of_layer": _of_layer(values["layer"])}
    change = _change(values["base"], values["other"], values["relative"])
    low, high = values["relative_low"], values["relative_high"]
    if None not in (values["relative"], low, high):
        change = f"{change} ({100 * low:+.1f} to {100 * high:+.1f})"
    return {"change": change, "of_which": f" of {values['which']}" if values["which"] else ""}


def _of_layer(layer: int | None) -> str:
    """Which layer; empty where it is not known, or all are meant."""
    return "" if layer is None else f" of layer {layer}"


def _change(before: float, after: float, relative: float | None) -> str:
    """A change in percent, or its two values."""
    return f"{before:.3g} to {after:.3g}" if relative is None else f"{100 * relative:+.1f} %"


def _pays(steps: float | None, cost_known: bool) -> str:
    """When a change has paid for what it costs once; empty where that is at once."""
    if not cost_known:
        return ", at a cost of moving experts that is not known"
    if not steps:
        return ""
    return f" and pays for itself after {steps:.0f} {'step' if steps == 1 else 'steps'}"


def _elsewhere(other: Mapping[str, Any]) -> str:
    """What the same change does in another phase."""
    if abs(other["gain"]) < _NO_GAIN:
        return f"; in {other['phase']} it makes no difference"
    which = "less" if other["gain"] >= 0 else "more"
    return f"; in {other['phase']} {percent_words(abs(other['gain']))} {which}"


def _amount(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if abs(value) >= 1e3 else f"{value:.3g}"


def _slowest(values: Mapping[str, Any]) -> str:
    if values["slowest_rank"] is None:
        return "for no rank in particular"
    return (
        f"mostly for rank {values['slowest_rank']} ({percent_words(values['slowest_share'])} of it; "
        f"{cause_words(values['slowest_cause'])})"
    )


def _energy(values: Mapping[str, Any]) -> str:
    text = f"{_amount(values['energy_mj'] / 1e3)} J"
    if values["energy_low_mj"] is None or values["energy_high_mj"] is None:
        return text
    return f"{text} ({_amount(values['energy_low_mj'] / 1e3)} to {_amount(values['energy_high_mj'] / 1e3)})"


def _of_energy(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of which phases the energy is, and what of it has no phase."""
    rank, unattributed = values["source_rank"], values["unattributed"]
    known = "" if values["all_known"] else " of the phases whose energy is known"
    rest = ""
    if not values["all_known"] and unattributed is not None:
        rest = f"; {percent_words(unattributed)} of the energy of the devices is attributed to no phase"
    return {"source_rank": "unknown" if rank is None else rank, "of_which": known, "rest": rest}


def _per_token(values: Mapping[str, Any]) -> str:
    if values["mj_per_token"] is None:
        return ""
    low, high = values["mj_per_token_low"], values["mj_per_token_high"]
    between = "" if low is None or high is None else f" ({low:.3g} to {high:.3g})"
    return f", {values['mj_per_token']:.3g} mJ per token{between}"


def _interval(value: float, low: float | None, high: float | None) -> str:
    text = percent_words(value)
    return text if low is None or high is None else f"{text} ({percent_words(low)} to {percent_words(high)})"


_PLACEMENT = {
    PlacementCode.CHANGE: "change it: on steps that were not used to choose, the busiest ranks lose {gain} "
    "of their {counted} ({gain_low} to {gain_high})",
    PlacementCode.NO_GAIN: "leave it: on steps that were not used to choose, the gain is {gain} "
    "({gain_low} to {gain_high}), which may be none",
    PlacementCode.WORSE: "leave it: on steps that were not used to choose, the gain is {gain} "
    "({gain_low} to {gain_high}): the busiest ranks would have more",
    PlacementCode.AT_FLOOR: "at the noise floor: today's {today:.3f} times the mean is within 1 % of what "
    "uniform routing of as many tokens shows without replicas ({floor:.3f}), or below: chance, not placement",
    PlacementCode.REST_IS_CHANCE: "at the noise floor: the chosen placement's {chosen:.3f} times the mean is "
    "within 1 % of what uniform routing of as many tokens shows without replicas ({floor:.3f}), or below: "
    "the rest is chance",
    PlacementCode.MORE_REPLICAS: "with {replicas} replicas no placement is below {bound:.2f} times the mean; "
    "{ratio:.2f} times it takes at least {needed} in each layer (median)",
    PlacementCode.BALANCE: "the busiest rank's load on these steps is {chosen_load:.3f} times the mean, "
    "today {today_load:.3f}: {chosen_for} were chosen for",
    PlacementCode.LAYERS_KEPT: "{kept} of {layers} layers stay as they are: their likely gain is not above "
    "{move_cost:g} times the mean",
    PlacementCode.GROUPS_COST: "price of the groups: {with_groups:.3f} times the mean on held-out steps, "
    "without them {without:.3f}",
    PlacementCode.TIME_LESS: "in time, change it: a step is predicted to take {chosen_us:.0f} us instead of "
    "{today_us:.0f} us{parts}, {gain} less ({gain_low} to {gain_high})",
    PlacementCode.TIME_LIKE: "in time, leave it: a step is predicted to take {chosen_us:.0f} us instead of "
    "{today_us:.0f} us{parts}, {gain} less ({gain_low} to {gain_high}), which may be nothing",
    PlacementCode.TIME_MORE: "in time, leave it: a step is predicted to take {chosen_us:.0f} us instead of "
    "{today_us:.0f} us{parts}, {gain} less ({gain_low} to {gain_high})",
    PlacementCode.SLOTS_DIFFER: "every layer changes, as ranks have other numbers of slots today; {filled} "
    "of {layers} only fill new slots, as nothing else is likely to gain more than {move_cost:g}",
    PlacementCode.NODES_LESS: "in nodes, change it: a held-out token touches {chosen_nodes:.2f} instead "
    "of {today_nodes:.2f} nodes (mean over layers), {gain} less ({gain_low} to {gain_high})",
    PlacementCode.NODES_LIKE: "in nodes, leave it: a held-out token touches {chosen_nodes:.2f} instead "
    "of {today_nodes:.2f} nodes (mean over layers), {gain} less ({gain_low} to {gain_high}), which may be "
    "nothing",
    PlacementCode.NODES_MORE: "in nodes, leave it: a held-out token touches {chosen_nodes:.2f} instead "
    "of {today_nodes:.2f} nodes (mean over layers), {gain} less ({gain_low} to {gain_high})",
    PlacementCode.STRUCTURE: "tokens have structure: in the layer with most of it they touch {nodes:.2f} "
    "nodes on held-out samples, independent ones {independent_nodes:.2f}",
    PlacementCode.NO_STRUCTURE: "tokens have no structure that pays: they touch {nodes:.2f} nodes on "
    "held-out samples, independent ones {independent_nodes:.2f}; placed for even ranks instead",
}

_PROBLEM = {
    ProblemCode.PROVEN: "proven to be the best, to 0.1 %, in {proven} of {layers} layers: none can be below "
    "{bound:.3f} times the mean rank (mean over layers), as {rule}",
    ProblemCode.GROUPS_COST: "price of the groups: {with_groups:.3f} times the mean; without them it is at "
    "least {without:.3f}",
    ProblemCode.AT_FLOOR: "at the noise floor: a greedy layout's {greedy:.3f} times the mean in each step is "
    "within 1 % of what uniform routing of as many tokens shows without replicas ({floor:.3f}), or below",
    ProblemCode.MOVES: "{moves} moves in each layer take the busiest rank from {before:.3f} to {after:.3f} "
    "times the mean",
    ProblemCode.CHANGED: "change {changed} of {layers} layers: their likely gain is {gain:.3f} times the "
    "mean rank, at a cost of {move_cost:g} for each layer that is changed",
    ProblemCode.LEFT: "leave it: the likely gain is {gain:.3f} times the mean rank, at a cost of "
    "{move_cost:g} for each layer that is changed",
    ProblemCode.TOO_SHORT: "whether a change pays is not known of so few steps ({steps}); {changed} of "
    "{layers} layers are changed",
    ProblemCode.ALL_ACTIVE: "all experts are active in every step, so that no placement activates fewer; "
    "placed for the load of each step instead",
    ProblemCode.ACTIVATED: "activated experts of the rank with most of them: {after:.2f}{today}; the busiest "
    "rank's load of each step: {load_after:.3f} times the mean{load_today}",
    ProblemCode.FORCED: "every layer changes, as ranks have other numbers of slots today; {filled} of "
    "{layers} only fill new slots, as nothing else is likely to gain more than {move_cost:g}",
    ProblemCode.DROPPED: "slots that are left empty: {dropped}; today they hold second copies of an expert "
    "on one rank, which a placement holds once",
    ProblemCode.STRUCTURE: "tokens have structure: nodes chosen on the earlier half of them let the later "
    "half touch {nodes:.2f} nodes, independent ones {independent_nodes:.2f}",
    ProblemCode.TOKENS_UNUSED: "{by} decide the nodes of experts, so that tokens are not used",
    ProblemCode.NODES: "in layer 0 a sampled token touches {after:.2f} nodes{today}",
    ProblemCode.NO_STRUCTURE: "tokens have no structure that pays: on tokens that were not used to choose "
    "they touch {nodes:.2f} nodes, independent ones {independent_nodes:.2f}; placed for even ranks instead",
}
_NODES_BY = {"groups": "groups", "moves": "limited moves of replicas"}
_RULES = {
    "slots": "of the t P + 1 heaviest experts some rank holds t + 1, and at least the lightest fill it",
    "copies": "at a busiest rank of T an expert of load w needs w / T copies",
    "nodes": "the heaviest node has that much",
    "speeds": "the fastest rank has at least the heaviest copy, and all ranks share the load",
}


def evaluation_sentences(document: Mapping[str, Any]) -> list[str]:
    """What an evaluation of a placement solver comes to, in words."""
    counts = "{valid} of {trials} trials have a valid placement".format_map(document)
    if document["ratio"] is None:
        return [counts]
    return [
        counts,
        "better than greedy in {better}, worse in {worse}; its score is {ratio:.3f} times the greedy one's "
        "(geometric mean; today's where the greedy way knows no limit on moves)".format_map(document),
    ]


def problem_sentences(verdict: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is stated about the solution of a placement problem, in words."""
    return [
        _PROBLEM[ProblemCode(reason["code"])].format_map(
            {
                **reason,
                "rule": _RULES.get(reason.get("rule", "")),
                "by": _NODES_BY.get(reason.get("by", "")),
                "load_today": ""
                if reason.get("load_before") is None
                else f", today {reason['load_before']:.3f}",
                "today": "" if reason.get("before") is None else f", today {reason['before']:.2f}",
            }
        )
        for reason in verdict
    ]


def placement_sentences(verdict: Sequence[Reason]) -> list[str]:
    """A verdict in words."""
    parts = {True: "", False: " (experts alone)"}
    return [
        _PLACEMENT[PlacementCode(reason.code)].format_map(
            {
                "parts": parts[bool(reason.values.get("has_exchanges"))],
                "chosen_for": "nodes"
                if reason.values.get("objective") == "nodes"
                else "activated experts alone",
                "counted": "activated experts" if reason.values.get("objective") == "activated" else "load",
            }
            | {
                name: f"{100 * value:.1f} %" if name.startswith("gain") else value  # type: ignore[operator]
                for name, value in reason.values.items()
            }
        )
        for reason in verdict
    ]
