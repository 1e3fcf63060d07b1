"""Conclusions about capacity plans."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import JsonValue

from observatory.advice.conclusions.reasons import Code, Conclusion, Row, chosen
from observatory.reasons import Reason

#: A number that rests on less of its time than this on measured, fitted or published figures says so.
_GROUNDED = 0.9


def conclude_plan(document: Row) -> Conclusion:
    """Of ``observatory plan``: the set-up with the fewest devices, its times, what it rests on.

    What another assumption about routing would have cost follows the set-up.
    """
    if not document["candidates"]:
        reasons = [Reason(Code.NO_PLAN, {"set_ups": len(document["rejected"])})]
        reasons += [
            Reason(Code.NEAREST_PLAN, chosen(row, "constraint", "set_ups", "nearest"))
            for row in document["rejected_by"][:2]
        ]
        return (*reasons, *_routings(document, None), *_limits_of_inputs(document))
    best = document["candidates"][0]
    reasons = [
        Reason(Code.PLAN, chosen(best, "gpus", "gpus_low", "gpus_high", "hardware", "set_up", "sequences")),
        *_routings(document, best["gpus"]),
        Reason(
            Code.PLAN_TIMES,
            chosen(
                best,
                *("tokens_per_s", "tokens_per_s_low", "tokens_per_s_high"),
                *("ms_per_token", "ms_per_token_low", "ms_per_token_high"),
                *("ttft_ms", "ttft_ms_low", "ttft_ms_high"),
            ),
        ),
        *_may_miss(best, document["targets"]),
        *_cost_of_tokens(best, document["candidates"]),
        *_power(best),
    ]
    if 1.0 - best["grades"]["assumed"] < _GROUNDED:
        reasons.append(Reason(Code.PLAN_ASSUMED, {"share": best["grades"]["assumed"]}))
    if best["extrapolated"]:
        reasons.append(Reason(Code.PLAN_EXTRAPOLATED, chosen(best, "extrapolated")))
    return (*reasons, *_limits_of_inputs(document))


def _may_miss(best: Row, targets: Row) -> list[Reason]:
    """Limits that the likely time meets and the slow end of its interval does not."""
    missed: dict[str, JsonValue] = {
        name: [best[f"{name}_high"], targets[f"max_{name}"]]
        for name in ("ms_per_token", "ttft_ms")
        if targets[f"max_{name}"] is not None and best[f"{name}_high"] > targets[f"max_{name}"]
    }
    return [Reason(Code.PLAN_MAY_MISS, missed)] if missed else []


def _cost_of_tokens(best: Row, candidates: Sequence[Row]) -> list[Reason]:
    """What tokens cost, and the cheapest set-up where it is not the one with the fewest devices."""
    priced = [row for row in candidates if row["per_million"] is not None and row["currency"] is not None]
    reasons = []
    if best in priced:
        reasons.append(Reason(Code.PLAN_COST, chosen(best, "per_million", "currency")))
    cheapest = min(priced, key=lambda row: float(row["per_million"]), default=best)
    if cheapest["hardware"] != best["hardware"]:
        names = ("gpus", "hardware", "set_up", "sequences", "per_million", "currency")
        reasons.append(Reason(Code.PLAN_CHEAPER, chosen(cheapest, *names)))
    return reasons


def _power(best: Row) -> list[Reason]:
    """What a token takes: by measured power, else at most."""
    if best["joules_per_token"] is not None:
        names = ("joules_per_token", "joules_per_token_low", "joules_per_token_high", "joules_grade")
        code = Code.PLAN_POWER_SIMULATED if best["is_simulated"] else Code.PLAN_POWER
        return [Reason(code, chosen(best, *names))]
    if best["joules_per_token_most"] is not None:
        return [Reason(Code.PLAN_POWER_LIMIT, chosen(best, "joules_per_token_most"))]
    return []


def _routings(document: Row, planned: int | None) -> list[Reason]:
    """What other routing would have led to; ``planned`` None where nothing meets the targets."""
    others = [other for other in document["assumptions"] if other["routing"] != document["routing"]]
    if not document["sources"]["runs"]:
        return [
            Reason(
                Code.PLAN_UNCAPTURED,
                {"routing": document["routing"], "other": other["routing"], "gpus": other["gpus"]},
            )
            for other in others
            if planned is not None or other["gpus"] is not None
        ]
    if document["routing"] != "captured":
        others = [other for other in document["assumptions"] if other["routing"] == document["routing"]]
    reasons = [reason for other in others if (reason := _cost(document, other, planned)) is not None]
    same: list[JsonValue] = [other["routing"] for other in others]
    return reasons or ([Reason(Code.PLAN_ROUTING_SAME, {"routings": same})] if same and planned else [])


def _cost(document: Row, other: Row, planned: int | None) -> Reason | None:
    """What a set-up that was planned with another routing misses; None for nothing."""
    if other["gpus"] is None:
        return None if planned is None else Reason(Code.PLAN_ROUTING_NONE, chosen(other, "routing"))
    targets, needed = document["targets"], other["gpus_with_captured"]
    missed = {
        name: value
        for name, limit in (("ms_per_token", "max_ms_per_token"), ("ttft_ms", "max_ttft_ms"))
        if targets[limit] is not None and (value := other[f"{name}_with_captured"] or 0.0) > targets[limit]
    }
    if needed is None or (needed == other["gpus"] == planned and not missed):
        return None
    return Reason(
        Code.PLAN_ROUTING,
        {
            **chosen(other, "routing", "gpus"),
            "needed": needed,
            "planned": planned,
            "ms_per_token": missed.get("ms_per_token"),
            "ttft_ms": missed.get("ttft_ms"),
        },
    )


def _limits_of_inputs(document: Row) -> list[Reason]:
    """What the inputs do not cover."""
    reasons = []
    phases = document["sources"]["phases"]
    if len(phases) == 1 and document["routing"] == "captured":
        missing = "prefill" if phases == ["decode"] else "decode"
        reasons.append(Reason(Code.PLAN_PHASE, {"missing": missing, "phase": phases[0]}))
    targets, longest = document["targets"], document["model"]["longest"]
    tokens = targets["context"] + targets["output"]
    if longest is not None and tokens > longest:
        reasons.append(Reason(Code.PLAN_TOO_LONG, {"tokens": tokens, "longest": longest}))
    return reasons
