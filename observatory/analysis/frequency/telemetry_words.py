"""English for the findings of telemetry."""

from __future__ import annotations

from collections.abc import Callable

from observatory.analysis.frequency.confounds import BINDING_SHARE
from observatory.analysis.frequency.telemetry_records import (
    DeviceTelemetry,
    FindingCode,
    Missing,
    Readings,
    StateName,
)
from observatory.text import listing, percent_words

_MISSING_WORDS: dict[Missing, str] = {
    "event reasons": "event reasons",
    "power": "instant power",
    "power of the phase": "instant power that is surely of this phase",
    "power limit": "the power limit",
    "power beside a limit": "instant power and the limit in force at the same time",
    "SM clock": "the SM clock",
    "highest SM clock": "the highest SM clock",
}
#: What a state is due to.
_CAUSE_WORDS: dict[StateName, str] = {"power cap": "the power limit", "thermal": "heat"}


def finding_words(code: FindingCode, device: DeviceTelemetry) -> str:
    """A finding of telemetry as a sentence, made of the numbers of the state it is about.

    Where no sample holds event reasons, no state can be selected: sentences are then about all samples, and
    say so, or say what is missing.
    """
    return _FINDINGS[code](device)


def _limit_binds(device: DeviceTelemetry) -> str:
    share = _share_words(device.power_cap_share, device.power_cap_busy_share)
    return (
        f"{_limit_words(device)} binds: it holds the clock down for {share}{_drawn(device)}; "
        f"{_clock_where_held(device)}"
    )


def _limit_does_not_bind(device: DeviceTelemetry) -> str:
    share = _share_words(device.power_cap_share, device.power_cap_busy_share)
    held = f", holding the clock down for {share} only" if device.power_cap_share else ""
    highest_mw = device.busy.power_highest_mw
    cap = "a higher limit" if highest_mw is None else f"a cap above {highest_mw / 1e3:.0f} W"
    return (
        f"{_limit_words(device)} does not bind{held}{_drawn(device)}: {cap} changes nothing, locking the "
        "clock would"
    )


def _limit_not_known(device: DeviceTelemetry) -> str:
    limit = _limit_words(device)
    if device.states is not None:
        return (
            f"whether {limit} binds under load is not known: none of "
            f"{_samples(device.reason_samples, with_='event reasons')} is busy"
        )
    if device.power_cap_share is not None:
        return (
            f"whether {limit} binds is not known: it holds the clock down for "
            f"{percent_words(device.power_cap_share)} of the time, and which part of the busy time that is "
            "cannot be said without event reasons"
        )
    if device.highest_power_over_limit is not None:
        return (
            f"whether {limit} binds is not known: {_no_reading('event reasons')}, and power reaches "
            f"{percent_words(device.highest_power_over_limit)} of {_limit_it(device)}, where it may act"
        )
    words = [_MISSING_WORDS[name] for name in device.missing_for_limit]
    return f"whether {limit} binds is not known: {_no_reading(*words)}"


def _limit_words(device: DeviceTelemetry) -> str:
    low_mw, high_mw = device.limit_mw, device.highest_limit_mw
    if low_mw is None or high_mw is None:
        return "its power limit"
    if device.limit_changed:
        return f"the power limit, which was changed between {low_mw / 1e3:.0f} and {high_mw / 1e3:.0f} W,"
    return f"the power limit of {low_mw / 1e3:.0f} W"


def _limit_it(device: DeviceTelemetry) -> str:
    return "the limit in force" if device.limit_changed else "it"


def _drawn(device: DeviceTelemetry) -> str:
    """How near the limit a busy device runs, in brackets; nothing where its power is not known."""
    readings = device.busy
    if readings.power_p95_mw is None:
        return ""
    whose = "busy samples" if device.states is not None else "samples, busy or idle,"
    if readings.power_samples < readings.samples:
        kind = "busy" if device.states is not None else ""
        whose = _samples(readings.power_samples, kind, with_="power")
    text = f" (95 % of the {whose} stay below {readings.power_p95_mw / 1e3:.0f} W"
    if readings.power_over_limit is not None:
        text += f", {percent_words(readings.power_over_limit)} of {_limit_it(device)}"
    return f"{text})"


def _clock_where_held(device: DeviceTelemetry) -> str:
    reason = _no_clock_reason(device, "power cap")
    if reason is not None:
        return f"the clock at which it holds is not known: {reason}"
    held = _state(device, "power cap")
    limit = ""
    if device.limit_changed and held.limit_mw is not None and held.highest_limit_mw is not None:
        limit = f", at {held.limit_mw / 1e3:.0f} W"
        if held.limit_changed:
            limit += f" to {held.highest_limit_mw / 1e3:.0f} W"
    return (
        f"where it holds ({_samples(held.clock_samples)}{limit}), the SM clock is {_clock_words(held)}: a "
        f"lock above {held.sm_clock_highest_mhz:.0f} MHz would do nothing there"
    )


def _no_clock_reason(device: DeviceTelemetry, name: StateName) -> str | None:
    """Why the clock in a state is not known; None where it is."""
    if "SM clock" in device.missing:
        return _no_reading(_MISSING_WORDS["SM clock"])
    if device.states is None:
        return "without event reasons its samples cannot be picked out"
    held = _state(device, name)
    if not held.samples:
        return f"no busy sample has a bit of {_CAUSE_WORDS[name]}"
    if held.sm_clock_mhz is None:
        return f"none of {_samples(held.samples, 'busy')} with a bit of {_CAUSE_WORDS[name]} has an SM clock"
    return None


def _clock_not_known(device: DeviceTelemetry) -> str:
    if device.sm_clock_mhz is None:
        return "the SM clock was not sampled: no lock can be verified on such telemetry"
    busy = device.busy
    why = f"none of {_samples(busy.samples, 'busy')} has it" if busy.samples else "no sample is busy"
    return f"the SM clock under load is not known: {why}"


def _clock(device: DeviceTelemetry) -> str:
    if device.states is not None:
        busy = device.busy
        return f"in {_samples(busy.clock_samples, 'busy')}, {_course(busy)}{_no_highest(device, busy)}"
    below = ""
    if device.is_below_highest(device):
        below = (
            f", below the highest of {device.max_sm_clock_mhz:.0f}: what keeps it there is not known without "
            "event reasons"
        )
    return f"over all samples, busy or idle, {_course(device)}{below}{_no_highest(device, device)}"


def _clock_below_highest(device: DeviceTelemetry) -> str:
    busy, free = device.busy, _state(device, "free")
    cause = (
        f", below the highest of {device.max_sm_clock_mhz:.0f}: it is locked or clamped; no event reason "
        'says "locked"'
    )
    if free.samples == busy.samples:
        where = f"in {_samples(busy.clock_samples, 'busy')}"
    else:
        where = f"in the {_samples(free.clock_samples, 'busy')} in which no event reason holds it down"
    return f"{where}, {_course(free)}{cause}"


def _no_highest(device: DeviceTelemetry, readings: Readings) -> str:
    """What a steady clock leaves open where the device's highest is not known."""
    if "highest SM clock" not in device.missing or not readings.is_steady:
        return ""
    return ", and whether that is below the highest is not known: the device reports no highest SM clock"


def _course(readings: Readings) -> str:
    if not readings.is_steady:
        return f"the SM clock moved between {_clock_words(readings, joined_by='and')}"
    return f"the SM clock {'was' if readings.clock_samples == 1 else 'stood at'} {_clock_words(readings)}"


def _clock_words(readings: Readings, *, joined_by: str = "to") -> str:
    if readings.is_steady:
        return f"{readings.sm_clock_mhz:.0f} MHz"
    return (
        f"{readings.sm_clock_low_mhz:.0f} {joined_by} {readings.sm_clock_high_mhz:.0f} MHz "
        f"(median {readings.sm_clock_mhz:.0f})"
    )


def _slowed_by_heat(device: DeviceTelemetry) -> str:
    reason, hot = _no_clock_reason(device, "thermal"), _state(device, "thermal")
    where = f" (to which clock is not known: {reason})"
    if reason is None:
        where = f" (to {_clock_words(hot)}, {_samples(hot.clock_samples)})"
    share = _share_words(device.thermal_share, device.thermal_busy_share)
    return f"thermal throttling for {share}{where}: fix cooling first"


def _slowed_by_brake(device: DeviceTelemetry) -> str:
    share = _share_words(device.brake_share, device.brake_busy_share)
    return f"hardware slowdown or the power brake acted for {share}: fix its cause first"


def _idle(device: DeviceTelemetry) -> str:
    return (
        f"the device idled in {percent_words(device.idle_share or 0.0)} of the samples: it waits for the "
        "host or for other ranks, which a clock does not change"
    )


def _little_power(device: DeviceTelemetry) -> str:
    power_mw, idle_mw = device.busy.power_median_mw or 0.0, device.idle_power_mw or 0.0
    whose = "all" if device.states is None else "busy"
    return (
        f"at {power_mw / 1e3:.0f} W (median of {whose} samples) it draws little more than the "
        f"{idle_mw / 1e3:.0f} W of an idle device: it may be waiting for the host"
    )


def _states_not_known(device: DeviceTelemetry) -> str:
    heat = device.thermal_share is None or 0.0 < device.thermal_share < BINDING_SHARE
    slowed = "heat or the power brake slows it" if heat else "the power brake slows it"
    return (
        f"{_no_reading('event reasons')}: which samples are busy is not known, nor whether the device idles "
        f"or {slowed}"
    )


def _states_in_part(device: DeviceTelemetry) -> str:
    return (
        f"event reasons stand in {device.reason_samples} of {_samples(device.samples)}: what is stated about "
        "a state is from those"
    )


def _power_over_limit_not_known(device: DeviceTelemetry) -> str:
    missing = [name for name in device.missing_for_limit if name != "event reasons"]
    why = f"no busy sample has {_MISSING_WORDS['power beside a limit']}"
    if missing:
        why = _no_reading(*(_MISSING_WORDS[name] for name in missing))
    return f"how near the power limit it runs is not known: {why}"


def _state(device: DeviceTelemetry, name: StateName) -> Readings:
    return Readings(samples=0) if device.states is None else device.states[name]


def _share_words(share: float | None, busy_share: float | None) -> str:
    text = f"{percent_words(share or 0.0)} of the time"
    return text if busy_share is None else f"{text}, {percent_words(busy_share)} of the busy time"


def _samples(number: int, kind: str = "", *, with_: str = "") -> str:
    text = f"{number} {kind}{' ' if kind else ''}sample{'' if number == 1 else 's'}"
    return f"{text} with {with_}" if with_ else text


def _no_reading(*words: str) -> str:
    return f"no sample has a valid reading of {listing(words, most=len(words), joined_by='or')}"


_FINDINGS: dict[FindingCode, Callable[[DeviceTelemetry], str]] = {
    "limit binds": _limit_binds,
    "limit does not bind": _limit_does_not_bind,
    "limit not known": _limit_not_known,
    "SM clock": _clock,
    "SM clock below the highest": _clock_below_highest,
    "SM clock not known": _clock_not_known,
    "slowed by heat": _slowed_by_heat,
    "slowed by the brake": _slowed_by_brake,
    "idle": _idle,
    "little power": _little_power,
    "states in part": _states_in_part,
    "states not known": _states_not_known,
    "power over limit not known": _power_over_limit_not_known,
}
