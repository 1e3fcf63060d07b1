"""Sentences on what power samples show of a device, each made of the numbers of the state it is about.

Where no sample holds event reasons, no state can be picked out. Sentences are then about all samples, and say
so, or say that they cannot be made.
"""

from __future__ import annotations

from collections.abc import Iterator

from observatory.analysis.frequency.confounds import BINDING_SHARE
from observatory.analysis.frequency.telemetry_records import (
    DeviceTelemetry,
    Finding,
    FindingCode,
    Missing,
    Readings,
    StateName,
)
from observatory.text import listing, percent_words

_STEADY_MHZ = 30.0
_IDLE_SHARE = 0.1
_LOW_DRAW = 0.15
#: A limit was changed when its lowest and highest reading differ by more than this.
_CHANGED = 1.01

_MISSING_WORDS: dict[Missing, str] = {
    "event reasons": "event reasons",
    "power": "instant power",
    "power of the phase": "instant power that is surely of this phase",
    "power limit": "the power limit",
    "power beside a limit": "instant power and the limit in force at the same time",
    "SM clock": "the SM clock",
    "highest SM clock": "the highest SM clock",
}
#: What is not missing for statements on power and limit.
_OF_CLOCKS: tuple[Missing, ...] = ("SM clock", "highest SM clock")
#: What a state is due to.
_CAUSE_WORDS: dict[StateName, str] = {"power cap": "the power limit", "thermal": "heat"}


def device_findings(device: DeviceTelemetry) -> tuple[Finding, ...]:
    """What the numbers of one device, or of one phase on it, say."""
    return (
        _limit(device),
        *_clock(device),
        *_heat_and_brake(device),
        *_waiting(device),
        *_not_known(device),
    )


def _limit(device: DeviceTelemetry) -> Finding:
    if device.cap is None:
        return _limit_not_known(device)
    limit = _limit_words(device)
    share = _share_words(device.power_cap_share, device.power_cap_busy_share)
    if device.cap == "binds":
        return _finding(
            "limit binds",
            f"{limit} binds: it holds the clock down for {share}{_drawn(device)}; "
            f"{_clock_where_held(device)}",
        )
    held = f", holding the clock down for {share} only" if device.power_cap_share else ""
    highest_mw = _busy(device).power_highest_mw
    cap = "a higher limit" if highest_mw is None else f"a cap above {highest_mw / 1e3:.0f} W"
    return _finding(
        "limit does not bind",
        f"{limit} does not bind{held}{_drawn(device)}: {cap} changes nothing, locking the clock would",
    )


def _limit_not_known(device: DeviceTelemetry) -> Finding:
    limit = _limit_words(device)
    if device.states is not None:
        return _finding(
            "limit not known",
            f"whether {limit} binds under load is not known: none of "
            f"{_samples(device.reason_samples, with_='event reasons')} is busy",
        )
    if device.power_cap_share is not None:
        return _finding(
            "limit not known",
            f"whether {limit} binds is not known: it holds the clock down for "
            f"{percent_words(device.power_cap_share)} of the time, and which part of the busy time that is "
            "cannot be said without event reasons",
        )
    if device.highest_power_over_limit is not None:
        return _finding(
            "limit not known",
            f"whether {limit} binds is not known: {_no_reading('event reasons')}, and power reaches "
            f"{percent_words(device.highest_power_over_limit)} of {_limit_it(device)}, where it may act",
        )
    words = [_MISSING_WORDS[name] for name in device.missing if name not in _OF_CLOCKS]
    return _finding("limit not known", f"whether {limit} binds is not known: {_no_reading(*words)}")


def _limit_lists_missing(device: DeviceTelemetry) -> bool:
    """Whether the sentence on the limit names what is missing, be it power or the limit itself."""
    no_share = device.states is None and device.power_cap_share is None
    return device.cap is None and no_share and device.highest_power_over_limit is None


def _limit_words(device: DeviceTelemetry) -> str:
    low_mw, high_mw = device.limit_mw, device.highest_limit_mw
    if low_mw is None or high_mw is None:
        return "its power limit"
    if _changed(device):
        return f"the power limit, which was changed between {low_mw / 1e3:.0f} and {high_mw / 1e3:.0f} W,"
    return f"the power limit of {low_mw / 1e3:.0f} W"


def _limit_it(device: DeviceTelemetry) -> str:
    return "the limit in force" if _changed(device) else "it"


def _changed(readings: Readings) -> bool:
    low_mw, high_mw = readings.limit_mw, readings.highest_limit_mw
    return low_mw is not None and high_mw is not None and high_mw > _CHANGED * low_mw


def _drawn(device: DeviceTelemetry) -> str:
    """How near the limit a busy device runs, in brackets; nothing where its power is not known."""
    readings = _busy(device)
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
    if _changed(device) and held.limit_mw is not None and held.highest_limit_mw is not None:
        limit = f", at {held.limit_mw / 1e3:.0f} W"
        if _changed(held):
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


def _clock(device: DeviceTelemetry) -> Iterator[Finding]:
    if device.sm_clock_mhz is None:
        yield _finding(
            "SM clock not known", "the SM clock was not sampled: no lock can be verified on such telemetry"
        )
        return
    if device.states is None:
        text = f"over all samples, busy or idle, {_course(device)}"
        if _below_highest(device, device):
            text += (
                f", below the highest of {device.max_sm_clock_mhz:.0f}: what keeps it there is not known "
                "without event reasons"
            )
        yield _finding("SM clock", text + _no_highest(device, device))
        return
    busy, free = _state(device, "busy"), _state(device, "free")
    if busy.sm_clock_mhz is None:
        why = f"none of {_samples(busy.samples, 'busy')} has it" if busy.samples else "no sample is busy"
        yield _finding("SM clock not known", f"the SM clock under load is not known: {why}")
        return
    text = f"in {_samples(busy.clock_samples, 'busy')}, {_course(busy)}"
    cause = ""
    if _below_highest(device, free):
        cause = (
            f", below the highest of {device.max_sm_clock_mhz:.0f}: it is locked or clamped; no event reason "
            'says "locked"'
        )
    if free.samples == busy.samples:
        code: FindingCode = "SM clock below the highest" if cause else "SM clock"
        yield _finding(code, text + cause + _no_highest(device, busy))
        return
    yield _finding("SM clock", text + _no_highest(device, busy))
    if cause:
        yield _finding(
            "SM clock below the highest",
            f"in the {_samples(free.clock_samples, 'busy')} in which no event reason holds it down, "
            f"{_course(free)}{cause}",
        )


def _no_highest(device: DeviceTelemetry, readings: Readings) -> str:
    """What a steady clock leaves open where the device's highest is not known."""
    if "highest SM clock" not in device.missing or not _steady(readings):
        return ""
    return ", and whether that is below the highest is not known: the device reports no highest SM clock"


def _below_highest(device: DeviceTelemetry, readings: Readings) -> bool:
    """Whether the clock of these readings is steady and lower than the device's highest."""
    most_mhz, clock_mhz = device.max_sm_clock_mhz, readings.sm_clock_mhz
    if most_mhz is None or clock_mhz is None or readings.clock_samples < 2 or not _steady(readings):
        return False
    return clock_mhz < most_mhz - _STEADY_MHZ


def _steady(readings: Readings) -> bool:
    low_mhz, high_mhz = readings.sm_clock_low_mhz, readings.sm_clock_high_mhz
    return low_mhz is not None and high_mhz is not None and high_mhz - low_mhz <= _STEADY_MHZ


def _course(readings: Readings) -> str:
    if not _steady(readings):
        return f"the SM clock moved between {_clock_words(readings, joined_by='and')}"
    return f"the SM clock {'was' if readings.clock_samples == 1 else 'stood at'} {_clock_words(readings)}"


def _clock_words(readings: Readings, *, joined_by: str = "to") -> str:
    if _steady(readings):
        return f"{readings.sm_clock_mhz:.0f} MHz"
    return (
        f"{readings.sm_clock_low_mhz:.0f} {joined_by} {readings.sm_clock_high_mhz:.0f} MHz "
        f"(median {readings.sm_clock_mhz:.0f})"
    )


def _heat_and_brake(device: DeviceTelemetry) -> Iterator[Finding]:
    if _acted(device.thermal_share, device.thermal_busy_share):
        reason, hot = _no_clock_reason(device, "thermal"), _state(device, "thermal")
        where = f" (to which clock is not known: {reason})"
        if reason is None:
            where = f" (to {_clock_words(hot)}, {_samples(hot.clock_samples)})"
        yield _finding(
            "slowed by heat",
            f"heat slowed the chip for {_share_words(device.thermal_share, device.thermal_busy_share)}"
            f"{where}: mend that first",
        )
    if _acted(device.brake_share, device.brake_busy_share):
        yield _finding(
            "slowed by the brake",
            "hardware slowdown or the power brake acted for "
            f"{_share_words(device.brake_share, device.brake_busy_share)}: mend that first",
        )


def _acted(share: float | None, busy_share: float | None) -> bool:
    return max(share or 0.0, busy_share or 0.0) >= BINDING_SHARE


def _waiting(device: DeviceTelemetry) -> Iterator[Finding]:
    idle = device.idle_share or 0.0
    if idle >= _IDLE_SHARE:
        # Power that is read soon after idling may still be that of the idle device: nothing is said of it.
        yield _finding(
            "idle",
            f"the device idled in {percent_words(idle)} of the samples: it waits for the host or for other "
            "ranks, which a clock does not change",
        )
        return
    readings = _busy(device)
    power_mw, limit_mw, idle_mw = readings.power_median_mw, readings.limit_mw, device.idle_power_mw
    if power_mw is None or limit_mw is None or idle_mw is None:
        return
    if (power_mw - idle_mw) / max(limit_mw - idle_mw, 1.0) < _LOW_DRAW:
        whose = "all" if device.states is None else "busy"
        yield _finding(
            "little power",
            f"at {power_mw / 1e3:.0f} W (median of {whose} samples) it draws little more than the "
            f"{idle_mw / 1e3:.0f} W of an idle device: it may be waiting for the host",
        )


def _not_known(device: DeviceTelemetry) -> Iterator[Finding]:
    """What the other sentences leave open, with what is missing for it."""
    if device.states is None:
        heat = device.thermal_share is None or 0.0 < device.thermal_share < BINDING_SHARE
        slowed = "heat or the power brake slows it" if heat else "the power brake slows it"
        yield _finding(
            "states not known",
            f"{_no_reading('event reasons')}: which samples are busy is not known, nor whether the device "
            f"idles or {slowed}",
        )
    elif device.reason_samples < device.samples:
        yield _finding(
            "states in part",
            f"event reasons stand in {device.reason_samples} of {_samples(device.samples)}: what is said of "
            "a state is from those",
        )
    if _limit_lists_missing(device):
        return
    missing = [name for name in device.missing if name not in ("event reasons", *_OF_CLOCKS)]
    if missing:
        why = _no_reading(*(_MISSING_WORDS[name] for name in missing))
    elif (
        device.states is not None and device.states["busy"].samples and _busy(device).power_over_limit is None
    ):
        why = f"no busy sample has {_MISSING_WORDS['power beside a limit']}"
    else:
        return
    yield _finding("power over limit not known", f"how near the power limit it runs is not known: {why}")


def _busy(device: DeviceTelemetry) -> Readings:
    """Readings of the busy samples; of all where they cannot be picked out."""
    return device if device.states is None else device.states["busy"]


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


def _finding(code: FindingCode, text: str) -> Finding:
    return Finding(code=code, text=text)
