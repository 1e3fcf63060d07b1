"""Conclusions about benchmarks, and models that are fitted to them."""

from __future__ import annotations

from pathlib import Path

from observatory.advice.conclusions.reasons import NOTHING, WORTH, Code, Conclusion, Row, chosen, command
from observatory.reasons import Reason

#: A case of a benchmark is noisy where its slowest tenth takes this much longer than its median.
_NOISY = 1.5
#: A cost of experts is not to be relied on where a tenth of held-out points is off by more than this.
_UNSURE = 0.5


def conclude_bench(document: Row, out: Path) -> Conclusion:
    """Of ``observatory bench``: wrong bytes, else the noisiest case."""
    cases = document["rows"]
    wrong = [row for row in cases if not row["correct"]]
    if wrong:
        place = chosen(wrong[0], "algorithm", "pattern", "mean_send_bytes")
        return (Reason(Code.WRONG_BYTES, {**place, "cases": len(wrong)}), Reason(Code.CHECK_FABRIC))
    if document["short_of_cores"]:
        return (Reason(Code.SHORT_OF_CORES), Reason(Code.MORE_CORES))
    noisy = [row for row in cases if row["median_us"] and row["p90_us"] > _NOISY * row["median_us"]]
    if not noisy:
        return (*NOTHING, command("fit", out, "--out", "network.json"))
    worst = max(noisy, key=lambda row: row["p90_us"] / row["median_us"])
    return (
        Reason(Code.NOISY_CASE, chosen(worst, "algorithm", "pattern", "mean_send_bytes")),
        Reason(
            Code.NOISE_COST,
            {"ratio": worst["p90_us"] / worst["median_us"], "noisy": len(noisy), "cases": len(cases)},
        ),
        Reason(Code.MORE_REPEATS),
    )


def conclude_experts(document: Row, out: Path) -> Conclusion:
    """Of ``observatory bench experts``: below how many assignments balancing them gains little."""
    if document["p90_error"] > _UNSURE:
        return (
            Reason(Code.EXPERTS_UNSURE, chosen(document, "median_error", "p90_error")),
            Reason(Code.MORE_REPEATS),
        )
    below = document["even_rows"]
    if below is None:
        return (*NOTHING, command("advise", "RUN", "--experts", out))
    terms = {row["term"]: row["us_per_unit"] for row in document["coefficients"]}
    expert_us = terms.get("activated expert", 0.0)
    reasons = [Reason(Code.EXPERTS_BELOW, {"assignments": round(below), **chosen(document, "experts_here")})]
    if expert_us > 0:
        rows = expert_us / terms["row"]
        reasons.append(Reason(Code.EXPERTS_PER_EXPERT, {"expert_us": expert_us, "rows": round(rows)}))
    return (*reasons, command("advise", "RUN", "--experts", out))


def conclude_replay(document: Row, run: Path) -> Conclusion:
    """Of ``observatory replay``: where captured traffic takes surely longer than uniform traffic."""
    if document["short_of_cores"]:
        return (Reason(Code.SHORT_OF_CORES), Reason(Code.MORE_CORES))
    slower = [
        row
        for row in document["rows"]
        if row["layer"] is not None and row["ratio_low"] is not None and row["ratio_low"] > 1.0 + WORTH
    ]
    if not slower:
        return NOTHING
    worst = max(slower, key=lambda row: row["extra_us"])
    return (
        Reason(Code.DEAREST_REALISM, chosen(worst, "algorithm", "phase", "layer", "role")),
        Reason(Code.REALISM_COST, chosen(worst, "ratio", "ratio_low", "ratio_high", "extra_us")),
        command("scan", run, "--placement", "linear", "--placement", "round-robin"),
    )


def conclude_fit(document: Row, out: Path) -> Conclusion:
    """Of ``observatory fit``: the algorithm whose model is not to be relied on."""
    if document["short_of_cores"]:
        return (Reason(Code.SHORT_OF_CORES), Reason(Code.MORE_CORES))
    invalid = [row for row in document["fits"] if row["verdict"] and row["verdict"]["code"] != "valid"]
    if not invalid:
        return (*NOTHING, command("scan", "RUN", "--network", out))
    worst = max(invalid, key=lambda row: row["verdict"]["p90_error"])
    verdict = worst["verdict"]
    is_noisy = verdict["code"] == "too_noisy"
    return (
        Reason(Code.UNRELIABLE_FIT, {"algorithm": worst["algorithm"], "verdict": verdict["code"]}),
        Reason(Code.FIT_COST, chosen(verdict, "median_error", "p90_error")),
        Reason(Code.MORE_REPEATS if is_noisy else Code.CHECK_FABRIC),
    )
