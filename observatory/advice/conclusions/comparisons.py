"""What a comparison of runs comes to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from observatory.advice.conclusions.reasons import Code, Conclusion, Row
from observatory.reasons import Reason

#: What is named first of what changed: times before what only explains them.
_FIRST_NAMED = ("ms", "ms_per_token", "tokens_per_s", "mj_per_token", "exchange_ms", "wait_ms")
#: Reasons of one conclusion.
_MOST = 3


def conclude_comparison(document: Row) -> Conclusion:
    """Of ``observatory compare``: what changed most beyond noise, and what else differs."""
    rows = [(item, row) for item in document["comparisons"] for row in item["rows"]]
    tested = [(item, row) for item, row in rows if row["adjusted_p"] is not None]
    if not tested:
        few = any(row["reason"] is not None and row["reason"]["code"] == "few_steps" for _, row in rows)
        next_step = (Reason(Code.MORE_STEPS),) if few else ()
        return (Reason(Code.NO_DIFFERENCE_KNOWN), *next_step)
    changed = [(item, row) for item, row in tested if row["verdict"] in ("higher", "lower")]
    if all(row["verdict"] == "identical" for _, row in tested):
        return (Reason(Code.IDENTICAL, {"tested": len(tested)}),)
    if not changed:
        return (Reason(Code.ALL_SAME, {"tested": len(tested)}),)
    item, row = min(changed, key=_rank_of_change)
    values = {
        name: row[name] for name in ("name", "base", "other", "relative", "relative_low", "relative_high")
    }
    several = len(document["comparisons"]) > 1
    counts = {
        "changed": len(changed),
        "tested": len(tested),
        "which": _which(item) if several else None,
    }
    facts = [reason["code"] for reason in item["confounders"] if reason["code"].startswith("other_")]
    concluded = [*_models(document["architectures"]), Reason(Code.CHANGED, {**values, **counts})]
    if facts:
        concluded.append(Reason(Code.BOTH_DIFFER, {"facts": facts}))
    if row["metric"] in _FIRST_NAMED:
        concluded.append(Reason(Code.REPEAT_RUNS))
    return tuple(concluded[:_MOST])


def _models(architectures: Sequence[Row]) -> Iterator[Reason]:
    """Of models next to each other the least and the most even one, in the phase where they differ most."""
    apart: dict[str, tuple[Row, Row]] = {}
    for phase in dict.fromkeys(row["phase"] for row in architectures):
        known = [row for row in architectures if row["phase"] == phase and row["gini"] is not None]
        if len(known) > 1:
            apart[phase] = max(known, key=_gini), min(known, key=_gini)
    if not apart:
        return
    phase, (worst, best) = max(apart.items(), key=lambda item: _gini(item[1][0]) - _gini(item[1][1]))
    yield Reason(
        Code.MODELS_APART,
        {
            "phase": phase,
            "models": len({row["model"] for row in architectures}),
            "worst": _named(worst),
            "worst_gini": worst["gini"],
            "best": _named(best),
            "best_gini": best["gini"],
        },
    )


def _named(row: Row) -> str:
    """A model with its mixer."""
    return f"{row['model']} ({row['mixer']})" if row["mixer"] else str(row["model"])


def _gini(row: Row) -> float:
    return float(row["gini"])


def _which(item: Row) -> str:
    """The other side of a comparison, by its model and data where that sets it apart."""
    base, other = item["base"], item["other"]
    apart = base["model"] != other["model"] and other["data"]
    return f"{other['model']} on {other['data']}" if apart else str(other["name"])


def _rank_of_change(pair: tuple[Row, Row]) -> tuple[int, float]:
    row = pair[1]
    place = _FIRST_NAMED.index(row["metric"]) if row["metric"] in _FIRST_NAMED else len(_FIRST_NAMED)
    return place, -abs(row["relative"] or 0.0)


def conclude_history(document: Row) -> Conclusion:
    """Of ``observatory history``: the change that matters most, and what else changed there."""
    changes = [(series, row) for series in document["series"] for row in series["changes"]]
    tracks = [track for series in document["series"] for track in (*series["tracks"], *series["layers"])]
    tested = sum(track["adjusted_p"] is not None for track in tracks)
    if not changes:
        if tested:
            return (Reason(Code.NO_CHANGE, {"tested": tested}),)
        points = max((len(series["points"]) for series in document["series"]), default=0)
        return (Reason(Code.TOO_FEW_POINTS, {"points": points}),)
    series, row = min(changes, key=_rank_of_step)
    values = {name: row[name] for name in ("name", "layer", "from", "before", "after", "relative")}
    concluded = [Reason(Code.LEVEL_CHANGED, {**values, "which": series["name"], "changes": len(changes)})]
    facts = [fact["code"] for fact in row["also_changed"] if fact["code"].startswith("other_")]
    if facts:
        concluded.append(Reason(Code.ALSO_CHANGED, {"facts": facts}))
    return tuple(concluded)


def _rank_of_step(pair: tuple[Row, Row]) -> tuple[bool, int, float]:
    row = pair[1]
    metric = row["name"].partition(".")[2]
    place = _FIRST_NAMED.index(metric) if metric in _FIRST_NAMED else len(_FIRST_NAMED)
    return row["layer"] is not None, place, -abs(row["relative"] or 0.0)
