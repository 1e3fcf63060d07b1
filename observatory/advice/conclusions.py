"""What a command's result comes to: the worst place, what it costs, what to do next; or that nothing is.

Each function takes the document that a command prints with ``--json`` and returns at most three reasons:
codes and values, which ``words.py`` puts into sentences. What lies within its interval, or at its sampling
floor, is never called worse than anything else.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import Any

from observatory.analysis.parallel.step_loads import FEWEST_STEPS
from observatory.reasons import Reason

Conclusion = tuple[Reason, ...]
Row = Mapping[str, Any]

#: A load or time this much over its reference is worth a change: step times of one program scatter as much.
_WORTH = 0.05
#: A case of a benchmark is noisy where its slowest tenth takes this much longer than its median.
_NOISY = 1.5
#: A cost of experts is not to be relied on where a tenth of held-out points is off by more than this.
_UNSURE = 0.5
#: Parts of an interval, and how the names of their columns end.
_INTERVAL = {"value": "", "low": "_low", "high": "_high"}


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
    EXTRAPOLATED = "extrapolated"
    OTHER_FABRIC = "other_fabric"
    DOES_NOT_FIT = "does_not_fit"
    RUN_COMMAND = "run_command"
    OPEN_REPORT = "open_report"
    MORE_REPEATS = "more_repeats"
    MORE_STEPS = "more_steps"
    MORE_CORES = "more_cores"
    LOCK_CLOCK = "lock_clock"
    CHECK_FABRIC = "check_fabric"


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
            case Code.CLOCK_COST:
                return float(values["saving_value"])
            case Code.CHANGE_GAIN:
                return float(values["gain"])
            case Code.CAP_COST:
                return float(values["power_cap_busy_share"])
    return 0.0


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
    worst = _worst(surely, _excess("expert_max_over_mean"))
    if worst is None:
        return NOTHING
    place = _values(worst, "layer", "phase", "gini", "gini_low", "gini_high", "gini_floor")
    return (
        Reason(Code.BUSIEST_EXPERT, place),
        _load_cost(worst, "expert"),
        _command("scan", run),
    )


def conclude_scan(document: Row, run: Path) -> Conclusion:
    """Of ``observatory scan``: the slower layout where times are predicted, else the busiest rank.

    Two layouts that predicted times do not distinguish are no reason for a change.
    """
    if "comparisons" in document:
        apart = [row for row in document["comparisons"] if row["code"] == "apart"]
        worst = _worst(apart, lambda row: abs(row["ratio"] - 1.0))
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
            _command("replay", run, "--ep", worst[f"{better}_ep"], "--out", "replay.json"),
        )
    worst = _worst(document["rows"], _excess("rank_max_over_mean"))
    if worst is None:
        return NOTHING
    return (
        Reason(Code.BUSIEST_RANK, _values(worst, "layer", "phase", "ep", "placement")),
        _load_cost(worst, "rank"),
        _command("place", run, "--ranks", worst["ep"], "--out", "placement.json")
        if worst["steps"] >= 2 * FEWEST_STEPS
        else _command("replay", run, "--ep", worst["ep"], "--out", "replay.json"),
    )


def conclude_exchanges(document: Row, run: Path) -> Conclusion:
    """Of ``observatory exchanges``: the layer whose ranks wait longest in all."""
    if document["short_of_cores"]:
        return (Reason(Code.SHORT_OF_CORES), Reason(Code.MORE_CORES))
    known = [row for row in document["layers"] if row["wait_s"] is not None and row["duration_s"]]
    if not known:
        return (Reason(Code.WAIT_UNKNOWN), _command("exchanges", run, "--wide"))
    worst = max(known, key=lambda row: row["wait_s"])
    waited_s = sum(row["wait_s"] for row in known)
    total_s = sum(row["duration_s"] - row["unknown_s"] for row in known)
    share = waited_s / total_s if total_s > 0 else 0.0
    if share < _WORTH:
        return NOTHING
    rows = worst["rows"] - worst["rows_unknown"]
    names = ("layer", "phase", "role", "slowest_rank", "slowest_share", "slowest_cause")
    return (
        Reason(Code.LONGEST_WAIT, _values(worst, *names)),
        Reason(Code.WAIT_COST, {"wait_share": share, "wait_ms": worst["wait_s"] / max(rows, 1) * 1e3}),
        _command("scan", run)
        if worst["slowest_cause"] == "compute load"
        else _command("report", run, "--out", "report.html", code=Code.OPEN_REPORT),
    )


def conclude_energy(document: Row, run: Path) -> Conclusion:
    """Of ``observatory energy``: the phase that most energy goes to."""
    known = [row for row in document["phases"] if row["span"] is None and row["energy_mj"] is not None]
    phases = [row for row in known if row["phase"] != "idle"]
    if not phases:
        return (Reason(Code.ENERGY_UNKNOWN), _command("energy", run, "--wide"))
    worst = max(phases, key=lambda row: row["energy_mj"])
    total_mj = sum(row["energy_mj"] for row in known)
    tokens: Row = next(
        (
            row
            for row in (*document["totals"], *document["tokens"])
            if row["phase"] == worst["phase"] and row["mj_per_token"] is not None
        ),
        {},
    )
    return (
        Reason(
            Code.MOST_ENERGY,
            {**_values(worst, "phase", "source_rank", "device_uuid"), "share": worst["energy_mj"] / total_mj},
        ),
        Reason(
            Code.ENERGY_COST,
            {
                **_values(worst, "energy_mj", "energy_low_mj", "energy_high_mj", "energy_flag"),
                **{
                    name: tokens.get(name)
                    for name in ("mj_per_token", "mj_per_token_low", "mj_per_token_high")
                },
            },
        ),
        _command("clocks", "recommend", "--telemetry", run),
    )


def conclude_reuse(document: Row, measurements: Path) -> Conclusion:
    """Of ``observatory reuse show``: what a prompt of which nothing is cached costs, and what a hit saves."""
    curve = document["reuse"]
    if curve["saved_low"] is None:
        return (Reason(Code.REUSE_UNKNOWN), Reason(Code.MORE_REPEATS))
    if curve["saved_low"] < _WORTH:
        return NOTHING
    miss = min(curve["cells"], key=lambda row: row["cached_fraction"])
    return (
        Reason(
            Code.DEAREST_PREFILL,
            {**_values(document, "model", "prompt_tokens"), **_values(miss, "cached_fraction", "prefill_mj")},
        ),
        Reason(Code.REUSE_COST, {f"saving_{name}": curve[f"saved{end}"] for name, end in _INTERVAL.items()}),
        _command("energy", "RUN", "--reuse", measurements),
    )


def conclude_advice(document: Row) -> Conclusion:
    """Of ``observatory advise``: the change that gains most, or what perfect balance alone would."""
    rows = [
        (run, phase, row) for run in document["runs"] for phase in run["phases"] for row in phase["verdicts"]
    ]
    needed = next((item for item in rows if item[2]["verdict"] == "needed"), None)
    if needed is not None:
        run, _, row = needed
        place = {"run": run["run"], "ranks": run["setup"]["ranks"], "setting": row["setting"]}
        return (Reason(Code.DOES_NOT_FIT, place),)
    best = [item for item in rows if item[1]["best"] is not None and item[2] is _best(item[1])]
    outside = [
        {"phase": phase["phase"], "ranks": run["setup"]["ranks"], **row}
        for run, phase, row in rows
        if row["verdict"] == "extrapolated"
    ]
    if not best and outside:
        likely = max(outside, key=lambda row: row["gain"])
        place = _values(likely, "phase", "change", "setting", "gain", "gain_low", "gain_high", "ranks")
        return (Reason(Code.EXTRAPOLATED, place), Reason(Code.OTHER_FABRIC, _values(likely, "ranks")))
    if not best:
        balanced = [
            {"phase": phase["phase"], **row}
            for _, phase, row in rows
            if row["change"] == "perfect balance" and row["gain"] is not None
        ]
        most = _worst(balanced, lambda row: row["gain"])
        shown = () if most is None else (Reason(Code.PERFECT_BALANCE, _values(most, "phase", "gain")),)
        return (*NOTHING, *shown)
    run, phase, row = max(best, key=lambda item: item[2]["gain"])
    place = {"run": run["run"], "phase": phase["phase"], **_values(row, "change", "setting")}
    gain = _values(row, "gain", "gain_low", "gain_high", "break_even_steps")
    gain["cost_known"] = row["change_us"] is not None
    values = {**gain, "has_exchanges": run["network"] is not None, "elsewhere": phase["elsewhere"]}
    return (
        Reason(Code.BEST_CHANGE, place),
        Reason(Code.CHANGE_GAIN, values),
        *_next_of_change(run, phase, row),
    )


def _best(phase: Row) -> Row:
    best: Row = phase["verdicts"][phase["best"]]
    return best


def _next_of_change(run: Row, phase: Row, row: Row) -> Iterator[Reason]:
    """The command that makes the change, where there is one."""
    ranks, out = str(run["setup"]["ranks"]), ("--out", "placement.json")
    if row["change"] in ("placement", "placement, once per rank"):
        yield _command("place", Path(run["run"]), "--ranks", ranks, "--phase", phase["phase"], *out)
    elif row["setting"].endswith(" replicas"):
        copies = ("--replicas", row["setting"].split()[0])
        yield _command("place", Path(run["run"]), "--ranks", ranks, *copies, "--phase", phase["phase"], *out)
    elif row["change"] == "deduplication":
        yield _command("profile", run["model"], "--ep", ranks, "--deduplicate", "--out", "RUN")
    elif row["change"] in ("flat", "hierarchical", "gather"):
        yield _command("profile", run["model"], "--ep", ranks, "--algorithm", row["change"], "--out", "RUN")


def conclude_sweep(document: Row, out: Path) -> Conclusion:
    """Of ``observatory clocks sweep``: the setting that saves most, beyond scatter and errors."""
    fit = _command("clocks", "fit", out, "--out", "clocks.json")
    if document["set_outside"]:
        return (Reason(Code.ONE_SETTING), _command("clocks", "fit", "RESULTS", "--out", "clocks.json"))
    worst = _worst(
        (row for series in document["series"] for row in _saving_settings(series)),
        lambda row: float(row["saving"]),
    )
    if worst is None:
        return (*NOTHING, fit)
    place = ("series", "requested_sm_clock_mhz", "requested_limit_mw")
    return (
        Reason(Code.LEAST_ENERGY, _values(worst, *place)),
        Reason(Code.SETTING_COST, _values(worst, "saving", "slowdown")),
        fit,
    )


def _saving_settings(series: Row) -> Iterator[Row]:
    """Settings all of whose energies lie below all those without a lock or a limit, with what they save."""
    points: dict[tuple[float | None, float | None], list[Row]] = {}
    for point in series["points"]:
        if point["label"] == "ok" and point["energy_mj"] is not None:
            setting = (point["requested_sm_clock_mhz"], point["requested_limit_mw"])
            points.setdefault(setting, []).append(point)
    free = points.pop((None, None), None)
    if free is None:
        return
    lowest_mj = min(_iteration_mj(point, -1.0) for point in free)
    free_mj, free_s = median(_iteration_mj(point, 0.0) for point in free), median(map(_iteration_s, free))
    for (clock_mhz, limit_mw), rows in points.items():
        if max(_iteration_mj(point, 1.0) for point in rows) < lowest_mj:
            yield {
                "series": series["name"],
                "requested_sm_clock_mhz": clock_mhz,
                "requested_limit_mw": limit_mw,
                "saving": 1.0 - median(_iteration_mj(point, 0.0) for point in rows) / free_mj,
                "slowdown": median(map(_iteration_s, rows)) / free_s - 1.0,
            }


def _iteration_mj(point: Row, errors: float) -> float:
    """Energy of an iteration, so many half-widths of its interval away."""
    return float(point["energy_mj"] * (1.0 + errors * (point["energy_error"] or 0.0)) / point["iterations"])


def _iteration_s(point: Row) -> float:
    return float(point["duration_s"] / point["iterations"])


def conclude_clocks(document: Row, model: Path | None = None) -> Conclusion:
    """Of ``observatory clocks recommend``: the surest saving, else the device that its cap holds.

    Args:
        document: the advice.
        model: of ``observatory clocks fit``, which prints no commands: the file that gives the advice.
    """
    series = document.get("series", ())
    locked = [row for row in series if row["verdict"] == "lock"]
    if locked:
        worst = max(locked, key=lambda row: row["choice"]["saving"]["low"] or 0.0)
        if document.get("common") is not None:
            return _common_clock(worst, document["common"], model)
        choice = worst["choice"]
        return (
            Reason(Code.CLOCK_TOO_HIGH, _values(worst, "title", "reference_mhz")),
            Reason(
                Code.CLOCK_COST,
                {
                    **{f"saving_{name}": choice["saving"][name] for name in _INTERVAL},
                    "slowdown": choice["slowdown"]["value"],
                },
            ),
            _lock(choice["sm_clock_mhz"], model),
        )
    devices = document.get("telemetry", {}).get("devices", ())
    held = [row for row in devices if row["cap"] == "binds" and row["power_cap_busy_share"] is not None]
    worst = _worst(held, lambda row: row["power_cap_busy_share"])
    if worst is None and (devices or any(row["verdict"] == "no energy" for row in series)):
        return (Reason(Code.CLOCK_UNKNOWN), _command("clocks", "sweep", "--help"))
    if worst is None:
        return NOTHING
    return (
        Reason(Code.HELD_BY_CAP, _values(worst, "device_uuid", "phase")),
        Reason(Code.CAP_COST, _values(worst, "power_cap_busy_share")),
        _command("clocks", "sweep", "--help"),
    )


def _common_clock(worst: Row, common: Row, model: Path | None) -> Conclusion:
    """Of several series on one device: the clock of all of them, which a device has only one of."""
    high = Reason(Code.CLOCK_TOO_HIGH, _values(worst, "title", "reference_mhz"))
    if common["sm_clock_mhz"] is None or common["saving"] is None:
        return (high, Reason(Code.NO_COMMON_CLOCK, {"series": worst["title"]}))
    return (
        high,
        Reason(Code.COMMON_COST, {f"saving_{name}": common["saving"][name] for name in _INTERVAL}),
        _lock(common["sm_clock_mhz"], model),
    )


def _lock(sm_clock_mhz: float, model: Path | None) -> Reason:
    """Lock it, or, where no commands were printed, how to get them."""
    if model is not None:
        return _command("clocks", "recommend", model)
    return Reason(Code.LOCK_CLOCK, {"sm_clock_mhz": sm_clock_mhz})


def conclude_bench(document: Row, out: Path) -> Conclusion:
    """Of ``observatory bench``: wrong bytes, else the noisiest case."""
    cases = document["rows"]
    wrong = [row for row in cases if not row["correct"]]
    if wrong:
        place = _values(wrong[0], "algorithm", "pattern", "mean_send_bytes")
        return (Reason(Code.WRONG_BYTES, {**place, "cases": len(wrong)}), Reason(Code.CHECK_FABRIC))
    if document["short_of_cores"]:
        return (Reason(Code.SHORT_OF_CORES), Reason(Code.MORE_CORES))
    noisy = [row for row in cases if row["median_us"] and row["p90_us"] > _NOISY * row["median_us"]]
    if not noisy:
        return (*NOTHING, _command("fit", out, "--out", "network.json"))
    worst = max(noisy, key=lambda row: row["p90_us"] / row["median_us"])
    return (
        Reason(Code.NOISY_CASE, _values(worst, "algorithm", "pattern", "mean_send_bytes")),
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
            Reason(Code.EXPERTS_UNSURE, _values(document, "median_error", "p90_error")),
            Reason(Code.MORE_REPEATS),
        )
    below = document["even_rows"]
    if below is None:
        return (*NOTHING, _command("advise", "RUN", "--experts", out))
    terms = {row["term"]: row["us_per_unit"] for row in document["coefficients"]}
    expert_us = terms.get("activated expert", 0.0)
    reasons = [Reason(Code.EXPERTS_BELOW, {"assignments": round(below), **_values(document, "experts_here")})]
    if expert_us > 0:
        rows = expert_us / terms["row"]
        reasons.append(Reason(Code.EXPERTS_PER_EXPERT, {"expert_us": expert_us, "rows": round(rows)}))
    return (*reasons, _command("advise", "RUN", "--experts", out))


def conclude_replay(document: Row, run: Path) -> Conclusion:
    """Of ``observatory replay``: where captured traffic takes surely longer than uniform traffic."""
    if document["short_of_cores"]:
        return (Reason(Code.SHORT_OF_CORES), Reason(Code.MORE_CORES))
    slower = [
        row
        for row in document["rows"]
        if row["layer"] is not None and row["ratio_low"] is not None and row["ratio_low"] > 1.0 + _WORTH
    ]
    if not slower:
        return NOTHING
    worst = max(slower, key=lambda row: row["extra_us"])
    return (
        Reason(Code.DEAREST_REALISM, _values(worst, "algorithm", "phase", "layer", "role")),
        Reason(Code.REALISM_COST, _values(worst, "ratio", "ratio_low", "ratio_high", "extra_us")),
        _command("scan", run, "--placement", "linear", "--placement", "round-robin"),
    )


def conclude_fit(document: Row, out: Path) -> Conclusion:
    """Of ``observatory fit``: the algorithm whose model is not to be relied on."""
    if document["short_of_cores"]:
        return (Reason(Code.SHORT_OF_CORES), Reason(Code.MORE_CORES))
    invalid = [row for row in document["fits"] if row["verdict"] and row["verdict"]["code"] != "valid"]
    if not invalid:
        return (*NOTHING, _command("scan", "RUN", "--network", out))
    worst = max(invalid, key=lambda row: row["verdict"]["p90_error"])
    verdict = worst["verdict"]
    is_noisy = verdict["code"] == "too_noisy"
    return (
        Reason(Code.UNRELIABLE_FIT, {"algorithm": worst["algorithm"], "verdict": verdict["code"]}),
        Reason(Code.FIT_COST, _values(verdict, "median_error", "p90_error")),
        Reason(Code.MORE_REPEATS if is_noisy else Code.CHECK_FABRIC),
    )


def _worst(rows: Iterable[Row], excess: Callable[[Row], float | None]) -> Row | None:
    """The row with the largest excess that is worth a change."""
    rated = [(value, row) for row in rows if (value := excess(row)) is not None and value >= _WORTH]
    return max(rated, key=lambda pair: pair[0])[1] if rated else None


def _excess(name: str) -> Callable[[Row], float | None]:
    """How far a load ratio lies above its sampling floor; None where either is not known."""

    def excess(row: Row) -> float | None:
        value, floor = row[name], row[f"{name}_floor"]
        return None if value is None or floor is None else float(value - floor)

    return excess


def _load_cost(row: Row, holder: str) -> Reason:
    name = f"{holder}_max_over_mean"
    values = {"max_over_mean": row[name], "max_over_mean_floor": row[f"{name}_floor"]}
    return Reason(Code.LOAD_COST, {"holder": holder, **values})


def _values(row: Row, *names: str) -> dict[str, Any]:
    return {name: row[name] for name in names}


def _command(*words: object, code: Code = Code.RUN_COMMAND) -> Reason:
    """A command to run next, quoted for a shell."""
    argv: Sequence[str] = ("observatory", *map(str, words))
    return Reason(code, {"command": shlex.join(argv)})
