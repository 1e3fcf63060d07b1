"""Conclusions about capacity plans."""

from __future__ import annotations

from observatory.advice.conclusions.reasons import Code, Conclusion, Row, chosen
from observatory.reasons import Reason

#: A number that rests on less of its time than this on measured, fitted or published figures says so.
_GROUNDED = 0.9


def conclude_plan(document: Row) -> Conclusion:
    """Of ``observatory plan``: the set-up with the fewest devices, its times, what it rests on."""
    if not document["candidates"]:
        reasons = [Reason(Code.NO_PLAN, {"set_ups": len(document["rejected"])})]
        reasons += [
            Reason(Code.NEAREST_PLAN, chosen(row, "constraint", "set_ups", "nearest"))
            for row in document["rejected_by"][:2]
        ]
        return tuple(reasons)
    best = document["candidates"][0]
    reasons = [
        Reason(Code.PLAN, chosen(best, "gpus", "gpus_low", "gpus_high", "hardware", "set_up", "sequences")),
        Reason(
            Code.PLAN_TIMES,
            chosen(
                best,
                *("tokens_per_s", "tokens_per_s_low", "tokens_per_s_high"),
                *("ms_per_token", "ms_per_token_low", "ms_per_token_high", "ttft_ms"),
            ),
        ),
    ]
    if 1.0 - best["grades"]["assumed"] < _GROUNDED:
        reasons.append(Reason(Code.PLAN_ASSUMED, {"share": best["grades"]["assumed"]}))
    if best["extrapolated"]:
        reasons.append(Reason(Code.PLAN_EXTRAPOLATED, chosen(best, "extrapolated")))
    for other in document["assumptions"]:
        needed = other["gpus_with_captured"]
        if other["gpus"] is not None and needed is not None and needed != other["gpus"]:
            reasons.append(Reason(Code.PLAN_ROUTING, {**chosen(other, "routing", "gpus"), "needed": needed}))
    return tuple(reasons)
