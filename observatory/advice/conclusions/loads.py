"""Conclusions about loads of experts and ranks, and about ranks that wait."""

from __future__ import annotations

from pathlib import Path

from observatory.advice.conclusions.reasons import (
    NOTHING,
    WORTH,
    Code,
    Conclusion,
    Row,
    chosen,
    command,
    load_excess,
    worst_row,
)
from observatory.analysis.parallel.step_loads import FEWEST_STEPS
from observatory.reasons import Reason


def conclude_routing(document: Row, run: Path) -> Conclusion:
    """Of ``observatory routing``: the layer whose experts are most unbalanced, beyond chance.

    A layer counts where the interval of its Gini lies above the floor of uniform routing.
    """
    layers = document["layers"]
    if layers and all(row["gini_low"] is None for row in layers):
        return (Reason(Code.TOO_FEW_STEPS), Reason(Code.MORE_STEPS))
    surely = [
        row
        for row in layers
        if None not in (row["gini_low"], row["gini_floor"], row["expert_max_over_mean_floor"])
        and row["gini_low"] > row["gini_floor"]
    ]
    worst = worst_row(surely, load_excess("expert_max_over_mean"))
    if worst is None:
        return NOTHING
    place = chosen(worst, "layer", "phase", "gini", "gini_low", "gini_high", "gini_floor")
    return (
        Reason(Code.BUSIEST_EXPERT, place),
        _load_cost(worst, "expert"),
        command("scan", run),
    )


def conclude_scan(document: Row, run: Path) -> Conclusion:
    """Of ``observatory scan``: the slower layout where times are predicted, else the busiest rank.

    Two layouts that predicted times do not distinguish are no reason for a change.
    """
    if "comparisons" in document:
        apart = [row for row in document["comparisons"] if row["code"] == "apart"]
        worst = worst_row(apart, lambda row: abs(row["ratio"] - 1.0))
        if worst is None:
            return NOTHING
        better, slower = ("second", "first") if worst["ratio"] > 1.0 else ("first", "second")
        return (
            Reason(
                Code.SLOWER_LAYOUT,
                {
                    "phase": worst["phase"],
                    **{f"slower_{name}": worst[f"{slower}_{name}"] for name in ("ep", "placement")},
                    **{f"better_{name}": worst[f"{better}_{name}"] for name in ("ep", "placement")},
                    "extra_ms": abs(worst["first_us"] - worst["second_us"]) * 1e-3,
                },
            ),
            command("replay", run, "--ep", worst[f"{better}_ep"], "--out", "replay.json"),
        )
    worst = worst_row(document["rows"], load_excess("rank_max_over_mean"))
    if worst is None:
        return NOTHING
    return (
        Reason(Code.BUSIEST_RANK, chosen(worst, "layer", "phase", "ep", "placement")),
        _load_cost(worst, "rank"),
        command("place", run, "--ranks", worst["ep"], "--out", "placement.json")
        if worst["steps"] >= 2 * FEWEST_STEPS
        else command("replay", run, "--ep", worst["ep"], "--out", "replay.json"),
    )


def conclude_exchanges(document: Row, run: Path) -> Conclusion:
    """Of ``observatory exchanges``: the layer whose ranks wait longest in all."""
    if document["short_of_cores"]:
        return (Reason(Code.SHORT_OF_CORES), Reason(Code.MORE_CORES))
    known = [row for row in document["layers"] if row["wait_s"] is not None and row["duration_s"]]
    if not known:
        return (Reason(Code.WAIT_UNKNOWN), command("exchanges", run, "--wide"))
    worst = max(known, key=lambda row: row["wait_s"])
    waited_s = sum(row["wait_s"] for row in known)
    total_s = sum(row["duration_s"] - row["unknown_s"] for row in known)
    share = waited_s / total_s if total_s > 0 else 0.0
    if share < WORTH:
        return NOTHING
    rows = worst["rows"] - worst["rows_unknown"]
    names = ("layer", "phase", "role", "slowest_rank", "slowest_share", "slowest_cause")
    return (
        Reason(Code.LONGEST_WAIT, chosen(worst, *names)),
        Reason(
            Code.WAIT_COST,
            {
                "wait_share": share,
                "wait_ms": worst["wait_s"] / max(rows, 1) * 1e3,
                **chosen(worst, "layer", "phase", "role"),
            },
        ),
        command("scan", run)
        if worst["slowest_cause"] == "compute load"
        else command("report", run, "--out", "report.html", code=Code.OPEN_REPORT),
    )


def _load_cost(row: Row, holder: str) -> Reason:
    name = f"{holder}_max_over_mean"
    values = {"max_over_mean": row[name], "max_over_mean_floor": row[f"{name}_floor"]}
    return Reason(Code.LOAD_COST, {"holder": holder, **values})
