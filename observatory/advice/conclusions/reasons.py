"""Reasons of conclusions: codes and values, and what all conclusions share."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

from observatory.reasons import Reason

Conclusion = tuple[Reason, ...]
Row = Mapping[str, Any]

#: A load or time this much over its reference is worth a change: step times of one program scatter as much.
WORTH = 0.05
#: Parts of an interval, and how the names of their columns end.
INTERVAL = {"value": "", "low": "_low", "high": "_high"}


class Code(StrEnum):
    """What a reason of a conclusion states."""

    NOTHING = "nothing"
    TOO_FEW_STEPS = "too_few_steps"
    SHORT_OF_CORES = "short_of_cores"
    BUSIEST_EXPERT = "busiest_expert"
    BUSIEST_RANK = "busiest_rank"
    LOAD_COST = "load_cost"
    SLOWER_LAYOUT = "slower_layout"
    LONGEST_WAIT = "longest_wait"
    WAIT_COST = "wait_cost"
    WAIT_UNKNOWN = "wait_unknown"
    MOST_ENERGY = "most_energy"
    ENERGY_COST = "energy_cost"
    ENERGY_UNKNOWN = "energy_unknown"
    HELD_BY_CAP = "held_by_cap"
    CAP_COST = "cap_cost"
    CLOCK_TOO_HIGH = "clock_too_high"
    CLOCK_COST = "clock_cost"
    COMMON_COST = "common_cost"
    NO_COMMON_CLOCK = "no_common_clock"
    CLOCK_UNKNOWN = "clock_unknown"
    LEAST_ENERGY = "least_energy"
    SETTING_COST = "setting_cost"
    ONE_SETTING = "one_setting"
    DEAREST_PREFILL = "dearest_prefill"
    REUSE_COST = "reuse_cost"
    REUSE_UNKNOWN = "reuse_unknown"
    WRONG_BYTES = "wrong_bytes"
    NOISY_CASE = "noisy_case"
    NOISE_COST = "noise_cost"
    DEAREST_REALISM = "dearest_realism"
    REALISM_COST = "realism_cost"
    EXPERTS_BELOW = "experts_below"
    EXPERTS_PER_EXPERT = "experts_per_expert"
    EXPERTS_UNSURE = "experts_unsure"
    UNRELIABLE_FIT = "unreliable_fit"
    FIT_COST = "fit_cost"
    BEST_CHANGE = "best_change"
    CHANGE_GAIN = "change_gain"
    PERFECT_BALANCE = "perfect_balance"
    CLOCK_SAVES = "clock_saves"
    EXTRAPOLATED = "extrapolated"
    OTHER_FABRIC = "other_fabric"
    FAR_OFF = "prediction_far_off"
    FIT_AGAIN = "fit_again"
    NO_MEMORY = "no_memory"
    MORE_MEMORY = "more_memory"
    PAYS_LATE = "pays_late"
    DOES_NOT_FIT = "does_not_fit"
    PLAN = "plan"
    PLAN_TIMES = "plan_times"
    PLAN_MAY_MISS = "plan_may_miss"
    PLAN_COST = "plan_cost"
    PLAN_CHEAPER = "plan_cheaper"
    PLAN_POWER = "plan_power"
    PLAN_POWER_SIMULATED = "plan_power_simulated"
    PLAN_POWER_LIMIT = "plan_power_limit"
    PLAN_ASSUMED = "plan_assumed"
    PLAN_EXTRAPOLATED = "plan_extrapolated"
    PLAN_ROUTING = "plan_routing"
    PLAN_ROUTING_NONE = "plan_routing_none"
    PLAN_ROUTING_SAME = "plan_routing_same"
    PLAN_UNCAPTURED = "plan_uncaptured"
    PLAN_PHASE = "plan_phase"
    PLAN_TOO_LONG = "plan_too_long"
    NO_PLAN = "no_plan"
    NEAREST_PLAN = "nearest_plan"
    RUN_COMMAND = "run_command"
    OPEN_REPORT = "open_report"
    MORE_REPEATS = "more_repeats"
    MORE_STEPS = "more_steps"
    MORE_CORES = "more_cores"
    LOCK_CLOCK = "lock_clock"
    CHECK_FABRIC = "check_fabric"
    CHANGED = "changed"
    MODELS_APART = "models_apart"
    ALL_SAME = "all_same"
    IDENTICAL = "identical"
    NO_DIFFERENCE_KNOWN = "no_difference_known"
    BOTH_DIFFER = "both_differ"
    REPEAT_RUNS = "repeat_runs"
    LEVEL_CHANGED = "level_changed"
    ALSO_CHANGED = "also_changed"
    NO_CHANGE = "no_change"
    TOO_FEW_POINTS = "too_few_points"


NOTHING: Conclusion = (Reason(Code.NOTHING),)
#: What to do next: the last reason of a conclusion.
NEXT_STEPS = frozenset(
    (
        Code.RUN_COMMAND,
        Code.OPEN_REPORT,
        Code.MORE_REPEATS,
        Code.MORE_STEPS,
        Code.MORE_CORES,
        Code.LOCK_CLOCK,
        Code.CHECK_FABRIC,
        Code.OTHER_FABRIC,
        Code.FIT_AGAIN,
        Code.MORE_MEMORY,
        Code.REPEAT_RUNS,
    )
)


def conclusion_document(conclusion: Conclusion) -> list[dict[str, Any]]:
    """The conclusion for a JSON document."""
    return [reason.document() for reason in conclusion]


def stake(conclusion: Conclusion) -> float:
    """How much is at stake, to compare the conclusions of one command on several runs; 0 for nothing."""
    for reason in conclusion:
        values: Mapping[str, Any] = reason.values
        match reason.code:
            case Code.LOAD_COST:
                return float(values["max_over_mean"] - values["max_over_mean_floor"])
            case Code.WAIT_COST:
                return float(values["wait_share"])
            case Code.ENERGY_COST:
                return float(values["energy_mj"])
            case Code.CLOCK_COST | Code.COMMON_COST:
                return float(values["saving_value"])
            case Code.CHANGE_GAIN:
                return float(values["gain"])
            case Code.CAP_COST:
                return float(values["power_cap_busy_share"])
    return 0.0


def worst_row(rows: Iterable[Row], excess: Callable[[Row], float | None]) -> Row | None:
    """The row with the largest excess that is worth a change."""
    rated = [(value, row) for row in rows if (value := excess(row)) is not None and value >= WORTH]
    return max(rated, key=lambda pair: pair[0])[1] if rated else None


def load_excess(name: str) -> Callable[[Row], float | None]:
    """How far a load ratio lies above its sampling floor; None where either is not known."""

    def excess(row: Row) -> float | None:
        value, floor = row[name], row[f"{name}_floor"]
        return None if value is None or floor is None else float(value - floor)

    return excess


def chosen(row: Row, *names: str) -> dict[str, Any]:
    """Some values of a row."""
    return {name: row[name] for name in names}


def command(*words: object, code: Code = Code.RUN_COMMAND) -> Reason:
    """A command to run next, quoted for a shell."""
    argv: Sequence[str] = ("observatory", *map(str, words))
    return Reason(code, {"command": shlex.join(argv)})
