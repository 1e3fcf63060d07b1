"""Rows of the frames of an energy summary."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from observatory.analysis.energy.attribution import Attribution, IdlePower, PhasePower
from observatory.analysis.energy.design import IDLE
from observatory.analysis.energy.estimates import NORMAL_90
from observatory.analysis.energy.least_squares import WIDEST_INTERVAL
from observatory.analysis.energy.missed import update_period_ms
from observatory.analysis.energy.phases import RankPhases
from observatory.analysis.energy.timeline import Timeline
from observatory.analysis.energy.tokens import count_tokens
from observatory.analysis.energy.traces import PowerTrace
from observatory.analysis.energy.windows import WindowEnergy
from observatory.devices.aliasing import TOLERATED, find_aliasing, rhythm_of, visited_error
from observatory.devices.sensors import SensorModel
from observatory.run import Run
from observatory.run.manifest import EnergyFlag

DEVICE_COLUMNS = (
    "device_uuid", "device", "kind", "sampled_by", "source_rank", "samples", "duration_s", "energy_mj",
    "error", "source", "power_mw", "counter_mj", "integral_mj", "disagreement", "flag",
    "energy_flag", "attributed_share",
    "idle_power_mw",
    "idle_source", "sensor_update_ms", "sensor_window_ms", "counter_ms", "sensor_source", "reason",
)  # fmt: skip
PHASE_COLUMNS = (
    "source_rank", "device_uuid", "phase", "span", "seconds", "power_mw", "power_low_mw", "power_high_mw",
    "energy_mj", "energy_low_mj", "energy_high_mj", "idle_mj", "above_idle_mj", "above_idle_low_mj",
    "above_idle_high_mj", "method", "source", "observations", "measured_s", "condition", "flag",
    "energy_flag", "reason",
)  # fmt: skip
_PER_TOKEN = (
    "mj_per_token", "mj_per_token_low", "mj_per_token_high", "above_idle_mj_per_token", "idle_mj_per_token",
)  # fmt: skip
TOKEN_COLUMNS = (
    "source_rank", "phase", "kind", "tokens", "tokens_source", "devices", *_PER_TOKEN, "flag",
    "energy_flag", "reason",
)  # fmt: skip
TOTAL_COLUMNS = (
    "phase",
    "ranks",
    "devices",
    "kind",
    "tokens",
    "energy_mj",
    *_PER_TOKEN,
    "flag",
    "energy_flag",
    "reason",
)
ALIASING_COLUMNS = (
    "source_rank", "device_uuid", "phase", "step_period_ms", "step_jitter_ms", "update_ms", "window_ms",
    "positions", "error", "shifts", "shift_ms", "error_after",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Device:
    """One sampled device and what is known of it."""

    sampler: int
    uuid: str
    trace: PowerTrace
    sensor: SensorModel
    name: str | None
    kind: str | None
    calibrated_idle_mw: float | None
    rank: int | None
    rank_reason: str | None
    disorder: str | None = None


_IN_TIME: EnergyFlag = "in time with the sensor"
#: Of a phase's row: ends of intervals, and all that there is only with a power.
_ENDS = (
    "power_low_mw", "power_high_mw", "energy_low_mj", "energy_high_mj",
)  # fmt: skip
_MEASURED = (
    "power_mw", "energy_mj", "above_idle_mj", "above_idle_low_mj", "above_idle_high_mj", "method", "source",
    "measured_s", "condition", "flag", *_ENDS,
)  # fmt: skip

#: Columns that are words or whole numbers; all others are numbers, NaN where they are missing.
_WORDS = (
    "device_uuid", "device", "kind", "source", "flag", "energy_flag",
    "idle_source", "sensor_source", "reason", "phase",
    "span", "method", "tokens_source",
)  # fmt: skip
_COUNTS = (
    "sampled_by", "source_rank", "samples", "observations", "tokens", "devices", "ranks", "positions",
    "shifts",
)  # fmt: skip


def tidy_frame(rows: list[dict[str, object]], columns: tuple[str, ...]) -> pd.DataFrame:
    """A frame whose columns have one type each, whatever is missing."""
    frame = pd.DataFrame(rows, columns=columns, dtype=object)
    words = {name: frame[name].where(frame[name].notna(), None) for name in columns if name in _WORDS}
    kinds = {name: "Int64" if name in _COUNTS else "float64" for name in columns if name not in _WORDS}
    return frame.astype(kinds).assign(**words)


def device_row(
    device: Device,
    energy: WindowEnergy | None,
    idle: IdlePower | None,
    attributed_mj: float | None,
    reason: str | None,
) -> dict[str, object]:
    """Row of one device."""
    sensor = device.sensor
    row: dict[str, object] = {
        "device_uuid": device.uuid, "device": device.name, "kind": device.kind, "sampled_by": device.sampler,
        "source_rank": device.rank, "samples": len(device.trace.time_ns_N),
        "idle_power_mw": device.calibrated_idle_mw if idle is None else idle.power_mw,
        "idle_source": "calibration when the sampler started" if idle is None and device.calibrated_idle_mw
        else None if idle is None else idle.source,
        "sensor_update_ms": sensor.update_ms, "sensor_window_ms": sensor.window_ms,
        "counter_ms": sensor.counter_ms, "sensor_source": sensor.source, "reason": reason,
    }  # fmt: skip
    if energy is None:
        return row | {"duration_s": 0.0, "reason": device.disorder or "it has one sample only"}
    reasons = [text for text in (reason, energy.reason) if text]
    return row | {
        "duration_s": energy.duration_s, "energy_mj": energy.energy_mj, "error": energy.relative_error,
        "source": energy.source, "power_mw": energy.power_mw, "counter_mj": energy.counter_mj,
        "integral_mj": energy.integral_mj, "disagreement": energy.disagreement, "flag": energy.flag,
        "attributed_share": attributed_mj / energy.energy_mj if attributed_mj and energy.energy_mj else None,
        "reason": "; ".join(reasons) or None,
    }  # fmt: skip


def flag_device(row: dict[str, object], aliased: list[dict[str, object]]) -> dict[str, object]:
    """Row of a device, with what the sensor missed of steps in time with it where power was integrated."""
    error = max((float(str(item["error"])) for item in aliased), default=0.0)
    if row.get("source") != "integral" or error <= TOLERATED:
        return row
    row = row | {"energy_flag": _IN_TIME}
    text = f"steps of the run move in time with the power sensor, which may be off by {100 * error:.0f} %"
    if NORMAL_90 * error > WIDEST_INTERVAL:
        lost = dict.fromkeys(("energy_mj", "error", "source", "power_mw", "attributed_share"))
        return row | lost | {"reason": joined(row["reason"], text)}
    wider = math.hypot(float(str(row["error"] or 0.0)), NORMAL_90 * error)
    return row | {"error": wider, "flag": joined(row["flag"], f"{text}: its error allows for it")}


def phase_rows(
    device: Device, attribution: Attribution, phase: str | None, idle: IdlePower
) -> list[dict[str, object]]:
    """Rows of the phases (``phase`` None) or of the spans inside one."""
    rows = []
    for item in attribution.phases:
        row: dict[str, object] = {
            "source_rank": device.rank, "device_uuid": device.uuid,
            "phase": item.name if phase is None else phase, "span": None if phase is None else item.name,
            "seconds": item.seconds, "method": item.method, "source": item.source,
            "observations": item.observations, "measured_s": item.measured_s, "condition": item.condition,
            "flag": "; ".join(item.flags) or None, "reason": item.reason,
        }  # fmt: skip
        rows.append(row | _energies(item, idle, is_idle=phase is None and item.name == IDLE))
    return rows


def refused_rows(device: Device, ran: RankPhases) -> list[dict[str, object]]:
    """Rows of the phases of a rank whose spans overlap, without energy."""
    return [
        {"source_rank": device.rank, "device_uuid": device.uuid, "phase": phase, "span": None,
         "observations": 0, "reason": ran.overlap}
        for phase in ran.steps
    ]  # fmt: skip


def _energies(item: PhasePower, idle: IdlePower, *, is_idle: bool) -> dict[str, object]:
    """Energy of a phase, and what of it is above idle."""
    seconds, idle_mw = item.seconds, idle.power_mw
    if item.power_mw is None or item.low_mw is None or item.high_mw is None:
        return {} if idle_mw is None else {"idle_mj": idle_mw * seconds}
    result: dict[str, object] = {
        "power_mw": item.power_mw, "power_low_mw": item.low_mw, "power_high_mw": item.high_mw,
        "energy_mj": item.power_mw * seconds, "energy_low_mj": item.low_mw * seconds,
        "energy_high_mj": item.high_mw * seconds,
    }  # fmt: skip
    if idle_mw is None:
        return result
    if is_idle:
        return result | {"idle_mj": item.power_mw * seconds, "above_idle_mj": 0.0}
    low = idle_mw if idle.low_mw is None else idle.low_mw
    high = idle_mw if idle.high_mw is None else idle.high_mw
    return result | {
        "idle_mj": idle_mw * seconds,
        "above_idle_mj": (item.power_mw - idle_mw) * seconds,
        "above_idle_low_mj": (item.low_mw - high) * seconds,
        "above_idle_high_mj": (item.high_mw - low) * seconds,
    }


def aliasing_rows(device: Device, ran: RankPhases, phases: Timeline) -> list[dict[str, object]]:
    """What the sensor makes of steps that are regular; rows for those only."""
    sensor, trace = device.sensor, device.trace
    if sensor.window_ms is None or np.isnan(trace.power_mw_N).all():
        return []
    update_ms = update_period_ms(trace, sensor)
    if update_ms is None:
        return []
    rows: list[dict[str, object]] = []
    seconds = phases.seconds()
    for phase, starts in ran.step_starts_ns.items():
        rhythm = rhythm_of(starts)
        if rhythm is None or not seconds.get(phase):
            continue
        found = find_aliasing(
            rhythm, update_ms=update_ms, window_ms=sensor.window_ms, duration_s=seconds[phase]
        )
        error = visited_error(starts, rhythm.period_ms, update_ms=update_ms, window_ms=sensor.window_ms)
        # Pauses that were made, or the steps' own wandering, may have cured it already.
        pauses = found.shifts_ms if error > max(TOLERATED, found.error_after) else ()
        rows.append(
            {
                "source_rank": device.rank, "device_uuid": device.uuid, "phase": phase,
                "step_period_ms": rhythm.period_ms, "step_jitter_ms": rhythm.jitter_ms,
                "update_ms": update_ms, "window_ms": sensor.window_ms, "positions": found.positions,
                "error": error, "shifts": len(pauses), "shift_ms": pauses[0] if pauses else None,
                "error_after": found.error_after if pauses else error,
            }
        )  # fmt: skip
    return rows


def flag_aliased(rows: list[dict[str, object]], aliased: list[dict[str, object]]) -> list[dict[str, object]]:
    """Rows of phases, those flagged whose power was integrated over steps in time with the sensor.

    What the sensor may have missed is in their intervals, and where these then exceed +-25 % there is no
    power. Powers by least squares are flagged only: the shifts of the sensor that they allow for cover it.
    """
    errors = {str(row["phase"]): float(str(row["error"])) for row in aliased}
    return [
        _aliased(row, errors[str(row["phase"])])
        if row["method"] and row["source"] != "counter" and errors.get(str(row["phase"]), 0.0) > TOLERATED
        else row
        for row in rows
    ]


def _aliased(row: dict[str, object], error: float) -> dict[str, object]:
    row = row | {"energy_flag": _IN_TIME}
    text = "its steps move in time with the power sensor"
    if row["method"] != "repetition":
        return row | {"flag": joined(row["flag"], f"{text}; its interval allows for it")}
    off = f"{text}, which may be off by {100 * error:.0f} %"
    half = NORMAL_90 * error
    if half > WIDEST_INTERVAL:
        lost = {name: None for name in row if name in _MEASURED}
        return row | lost | {"observations": 0, "reason": off}
    wider = {
        name: float(str(value)) * (1 - half if "low" in name else 1 + half)
        for name, value in row.items()
        if value is not None and name in _ENDS
    }
    for name in ("above_idle_low_mj", "above_idle_high_mj"):
        if row.get(name) is not None:
            end = name.replace("above_idle", "energy")
            wider[name] = float(str(row[name])) + wider[end] - float(str(row[end]))
    return row | wider | {"flag": joined(row["flag"], f"{off}: its interval allows for it")}


def joined(*texts: object) -> str | None:
    """Sentences that are there, each once; None without any."""
    return "; ".join(dict.fromkeys(str(text) for text in texts if text)) or None


def _flags_of(own: pd.DataFrame, devices: Mapping[str, str]) -> str | None:
    """What flags the energies that a number rests on: those of phases, and of their devices."""
    return joined(*own["flag"].dropna(), *(devices.get(uuid) for uuid in own["device_uuid"]))


def token_frame(
    run: Run,
    rows: list[dict[str, object]],
    phases_of: Mapping[int, RankPhases],
    missing: Mapping[int, str],
    flagged: Mapping[str, str],
) -> pd.DataFrame:
    """Energy per token of each rank and phase.

    Args:
        run: the run.
        rows: of the phases of all devices.
        phases_of: phases of each rank.
        missing: of the ranks whose energy is not known, or not that of all their devices, why.
        flagged: flags of devices.
    """
    phases = tidy_frame(rows, PHASE_COLUMNS)
    phases = phases[phases["span"].isna() & (phases["phase"] != IDLE)]
    of_rank = dict(list(phases.groupby(["source_rank", "phase"], sort=False)))
    routed = run.routed_tokens() if phases_of else pd.DataFrame()
    result: list[dict[str, object]] = []
    for rank, phase in [(one, name) for one in sorted(phases_of) for name in phases_of[one].steps]:
        own = of_rank.get((rank, phase), phases.iloc[:0])
        counted = count_tokens(
            phase, rank, phases_of[rank].steps[phase], routed, run.manifest.data,
            ranks=run.manifest.topology.ranks,
        )  # fmt: skip
        row: dict[str, object] = {
            "source_rank": rank, "phase": phase, "kind": counted.kind, "tokens": counted.tokens,
            "tokens_source": counted.source, "devices": len(own),
        }  # fmt: skip
        unknown = own["energy_mj"].isna()
        if rank in missing:
            result.append(row | {"reason": missing[rank]})
        elif unknown.any():
            reason = str(own.loc[unknown, "reason"].iloc[0])
            which = "its energy is not known" if len(own) == 1 else f"{unknown.sum()} of {len(own)} devices"
            lost = joined(*own.loc[unknown, "energy_flag"].dropna())
            result.append(row | {"energy_flag": lost, "reason": f"{which}: {reason}"})
        elif counted.tokens is None:
            result.append(row | {"reason": counted.reason})
        else:
            flags = {"flag": _flags_of(own, flagged), "energy_flag": joined(*own["energy_flag"].dropna())}
            result.append(row | _per_token(own, counted.tokens) | flags)
    return tidy_frame(result, TOKEN_COLUMNS)


def total_frame(tokens: pd.DataFrame) -> pd.DataFrame:
    """Energy of each phase over all ranks that ran it, where these are several; ``TOTAL_COLUMNS``.

    Args:
        tokens: energy per token of each rank and phase.
    """
    result: list[dict[str, object]] = []
    for phase, own in tokens.groupby("phase", sort=False):
        if len(own) < 2:
            continue
        row: dict[str, object] = {
            "phase": phase, "ranks": len(own), "devices": int(own["devices"].sum()),
            "kind": own["kind"].iloc[0],
        }  # fmt: skip
        unknown = own[own["mj_per_token"].isna()]
        if len(unknown):
            first = unknown.iloc[0]
            which = f"{len(unknown)} of {len(own)} ranks are not known, rank {first['source_rank']}"
            lost = joined(*unknown["energy_flag"].dropna())
            result.append(row | {"energy_flag": lost, "reason": f"{which}: {first['reason']}"})
            continue
        count = own["tokens"].astype("float64")
        whole = {name: float((own[name] * count).sum()) for name in _PER_TOKEN}
        total = int(own["tokens"].sum())
        idle_known = bool(own["idle_mj_per_token"].notna().all())
        row |= {"tokens": total, "energy_mj": whole["mj_per_token"]}
        for name in _PER_TOKEN:
            if idle_known or "idle" not in name:
                row[name] = whole[name] / total
        row["flag"] = joined(*own["flag"].dropna())
        row["energy_flag"] = joined(*own["energy_flag"].dropna())
        result.append(row | {"reason": None if idle_known else "its idle part is not known: no idle power"})
    return tidy_frame(result, TOTAL_COLUMNS)


def _per_token(own: pd.DataFrame, tokens: int) -> dict[str, object]:
    idle_known = bool(own["above_idle_mj"].notna().all())
    return {
        "mj_per_token": float(own["energy_mj"].sum()) / tokens,
        "mj_per_token_low": float(own["energy_low_mj"].sum()) / tokens,
        "mj_per_token_high": float(own["energy_high_mj"].sum()) / tokens,
        "above_idle_mj_per_token": float(own["above_idle_mj"].sum()) / tokens if idle_known else None,
        "idle_mj_per_token": float(own["idle_mj"].sum()) / tokens if idle_known else None,
        "reason": None if idle_known else "its idle part is not known: no idle power",
    }
