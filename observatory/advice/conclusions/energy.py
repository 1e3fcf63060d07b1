"""Conclusions about energy and clocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from observatory.advice.conclusions.reasons import (
    INTERVAL,
    NOTHING,
    WORTH,
    Code,
    Conclusion,
    Row,
    chosen,
    command,
    worst_row,
)
from observatory.reasons import Reason


def conclude_energy(document: Row, run: Path) -> Conclusion:
    """Of ``observatory energy``: the phase that most energy goes to."""
    whole = [row for row in document["phases"] if row["span"] is None]
    known = [row for row in whole if row["energy_mj"] is not None]
    phases = [row for row in known if row["phase"] != "idle"]
    if not phases:
        return (Reason(Code.ENERGY_UNKNOWN), command("energy", run, "--wide"))
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
            {
                **chosen(worst, "phase", "source_rank", "device_uuid"),
                "share": worst["energy_mj"] / total_mj,
                "all_known": len(known) == len(whole),
                "unattributed": _unattributed(document["devices"], total_mj),
            },
        ),
        Reason(
            Code.ENERGY_COST,
            {
                **chosen(worst, "energy_mj", "energy_low_mj", "energy_high_mj", "energy_flag"),
                **{
                    name: tokens.get(name)
                    for name in ("mj_per_token", "mj_per_token_low", "mj_per_token_high")
                },
            },
        ),
        command("clocks", "recommend", "--telemetry", run),
    )


def _unattributed(devices: Sequence[Row], attributed_mj: float) -> float | None:
    """Share of the energy of all devices that no phase has; None where that of a device is not known."""
    energies_mj = [row["energy_mj"] for row in devices]
    if not energies_mj or None in energies_mj or sum(energies_mj) <= 0:
        return None
    return max(0.0, 1.0 - attributed_mj / float(sum(energies_mj)))


def conclude_reuse(document: Row, measurements: Path) -> Conclusion:
    """Of ``observatory reuse show``: what a prompt of which nothing is cached costs, and what a hit saves."""
    curve = document["reuse"]
    if curve["saved_low"] is None:
        return (Reason(Code.REUSE_UNKNOWN), Reason(Code.MORE_REPEATS))
    if curve["saved_low"] < WORTH:
        return NOTHING
    miss = min(curve["cells"], key=lambda row: row["cached_fraction"])
    return (
        Reason(
            Code.DEAREST_PREFILL,
            {**chosen(document, "model", "prompt_tokens"), **chosen(miss, "cached_fraction", "prefill_mj")},
        ),
        Reason(Code.REUSE_COST, {f"saving_{name}": curve[f"saved{end}"] for name, end in INTERVAL.items()}),
        command("energy", "RUN", "--reuse", measurements),
    )


def conclude_sweep(document: Row, out: Path) -> Conclusion:
    """Of ``observatory clocks sweep``: the setting that saves most, beyond scatter and errors."""
    fit = command("clocks", "fit", out, "--out", "clocks.json")
    if document["set_outside"]:
        return (Reason(Code.ONE_SETTING), command("clocks", "fit", "RESULTS", "--out", "clocks.json"))
    worst = worst_row(
        (row for series in document["series"] for row in _saving_settings(series)),
        lambda row: float(row["saving"]),
    )
    if worst is None:
        return (*NOTHING, fit)
    place = ("series", "requested_sm_clock_mhz", "requested_limit_mw")
    return (
        Reason(Code.LEAST_ENERGY, chosen(worst, *place)),
        Reason(Code.SETTING_COST, chosen(worst, "saving", "slowdown")),
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
            Reason(Code.CLOCK_TOO_HIGH, chosen(worst, "title", "reference_mhz")),
            Reason(
                Code.CLOCK_COST,
                {
                    **{f"saving_{name}": choice["saving"][name] for name in INTERVAL},
                    "slowdown": choice["slowdown"]["value"],
                },
            ),
            _lock(choice["sm_clock_mhz"], model),
        )
    devices = document.get("telemetry", {}).get("devices", ())
    held = [row for row in devices if row["cap"] == "binds" and row["power_cap_busy_share"] is not None]
    worst = worst_row(held, lambda row: row["power_cap_busy_share"])
    if worst is None and (devices or any(row["verdict"] == "no energy" for row in series)):
        return (Reason(Code.CLOCK_UNKNOWN), command("clocks", "sweep", "--help"))
    if worst is None:
        return NOTHING
    return (
        Reason(Code.HELD_BY_CAP, chosen(worst, "device_uuid", "phase")),
        Reason(Code.CAP_COST, chosen(worst, "power_cap_busy_share")),
        command("clocks", "sweep", "--help"),
    )


def _common_clock(worst: Row, common: Row, model: Path | None) -> Conclusion:
    """Of several series on one device: the clock of all of them, which a device has only one of."""
    high = Reason(Code.CLOCK_TOO_HIGH, chosen(worst, "title", "reference_mhz"))
    if common["sm_clock_mhz"] is None or common["saving"] is None:
        return (high, Reason(Code.NO_COMMON_CLOCK, {"series": worst["title"]}))
    return (
        high,
        Reason(Code.COMMON_COST, {f"saving_{name}": common["saving"][name] for name in INTERVAL}),
        _lock(common["sm_clock_mhz"], model),
    )


def _lock(sm_clock_mhz: float, model: Path | None) -> Reason:
    """Lock it, or, where no commands were printed, how to get them."""
    if model is not None:
        return command("clocks", "recommend", model)
    return Reason(Code.LOCK_CLOCK, {"sm_clock_mhz": sm_clock_mhz})
