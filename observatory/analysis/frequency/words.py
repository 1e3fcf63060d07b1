"""English for what frequency analysis finds: what a fit lacks, confounds, classes, locks against caps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from observatory.analysis.frequency.model_file import Confound, FitCode, Reference
from observatory.analysis.statistics import Interval
from observatory.reasons import Reason

if TYPE_CHECKING:
    from observatory.analysis.frequency.classes import Behaviour
    from observatory.analysis.frequency.comparing import LockAgainstCap

_FIT_WORDS: dict[FitCode, str | Callable[[Mapping[str, Any]], str]] = {
    FitCode.TOO_MANY_POINTS: "{points} points are more than the {most} one fit takes; give fewer repeats",
    FitCode.TOO_FEW_CLOCKS: lambda v: (
        f"points at {v['clocks']} different clocks can be used, {v['needed']} at least are needed; measure "
        f"more clocks, or fit it together with sweeps of others{_left_out(v, ' ({})')}"
    ),
    FitCode.NO_CURVE: lambda v: (
        f"the time of an iteration follows no curve of the clock: points lie {100 * v['error']:.0f} % from "
        "it (rms of ln); something else changed the time, such as other work on the machine: measure again "
        "without it, longer and with more repeats"
    ),
    FitCode.NO_REFERENCE: lambda v: (
        f"no setting has both a time and a clock{_left_out(v, ': {}')}; measure again"
    ),
    FitCode.NOT_FITTED: lambda v: f"{v['title']}: {v['cause']}",
    FitCode.DISTURBED: "far from the other repeats of its setting",
    FitCode.IMPOSSIBLE: "no device has such a time or power",
    FitCode.HEATED: "heat slowed the chip",
    FitCode.BRAKED: "a hardware slowdown or the power brake slowed the chip",
    FitCode.NO_CLOCK: "the clock was not sampled",
    FitCode.MAY_WANDER: "power-capped, and not known whether the clock was steady",
    FitCode.WANDERED: "the clock wandered, so that the time belongs to no one clock",
    FitCode.NO_ENERGY: "energies are missing",
    FitCode.ENERGY_NOT_KNOWN: lambda v: (
        f"the energy of {v['missing']} of {v['points']} points is not known"
        + (
            f"; {v['flagged']} are integrated power of iterations in time with the sensor"
            if v["flagged"]
            else ""
        )
    ),
    FitCode.LIMIT_WAS_LOWERED: lambda v: (
        f"the power limit stood at {v['limit_mw'] / 1e3:.0f} W where the sweep set none, below the default "
        f"of {v['default_mw'] / 1e3:.0f} W: the reference is of this site's setting"
    ),
    FitCode.UNLOCKED_DIFFER: "{low} and {high} state no lock, but ran at {low_mhz:.0f} and {high_mhz:.0f} "
    "MHz, and they are taken for repeats of one setting: where the clock had been set, sweep with "
    "--set-outside --clocks MHZ",
    FitCode.TEMPERATURES_DIFFER: "the chip had {cold_c:.0f} C at the points of {cold} and {warm_c:.0f} C at "
    "those of {warm}: warm silicon draws more, a part of the difference between their clocks may be that",
    FitCode.NOTE_OF_SWEEP: "of {source}: {note}",
    FitCode.MORE_NOTES: "{notes} more notes stand in the sweeps",
}
#: Why locks were not compared with caps.
_NOT_COMPARED = {
    "caps slowed": "no point under a cap counts",
    "no caps": "caps are missing",
    "no energies": "energies are missing",
    "no repeats": "repeats are missing",
    "no energies of repeats": "energies of repeats are missing",
}
_SLOWED_WORDS = {
    "slowed by heat": ("heat", "cool the device better, rest longer between points"),
    "slowed by the brake": (
        "a hardware slowdown or the power brake",
        "mend the power supply of the device",
    ),
}
_FIX_FIRST = {
    "capped": "the power limit sets the speed here: where it can be raised, raise it and sweep again; where "
    "it cannot, a lock just below the clock it allows takes away its hunting, not its cost",
    "host-bound": "the device waits for the host: launch less (CUDA graphs, fused kernels, larger batches) "
    "before choosing a clock, and sweep again, since the knee moves up when the waiting goes",
}


def fit_words(reason: Reason) -> str:
    """What a fit lacks, and why."""
    words = _FIT_WORDS[FitCode(reason.code)]
    values = {**reason.values, "cause": "; ".join(map(fit_words, reason.because))}
    return words.format_map(values) if isinstance(words, str) else words(values)


def _left_out(values: Mapping[str, Any], template: str) -> str:
    parts = [f"{item['points']} left out: {_FIT_WORDS[FitCode(item['code'])]}" for item in values["left_out"]]
    return template.format("; ".join(parts)) if parts else ""


def confound_words(confound: Confound) -> str:
    """A confound with its evidence, in one sentence."""
    return _CONFOUNDS[confound.kind](confound.kind, confound.numbers)


def _capped_reference(_: str, numbers: Mapping[str, Any]) -> str:
    limit = "" if numbers["limit_mw"] is None else f" of {numbers['limit_mw'] / 1e3:.0f} W"
    return (
        f"without any lock the power limit{limit} holds the clock down for "
        f"{100 * numbers['power_cap_share']:.0f} % of the time, and the median clock over all of it is "
        f"{numbers['sm_clock_mhz']:.0f} MHz: slowdown and saving are relative to that, not to the highest "
        "clock"
    )


def _slowed(kind: str, numbers: Mapping[str, Any]) -> str:
    cause, remedy = _SLOWED_WORDS[kind]
    missing = ""
    if numbers["lost"]:
        missing = (
            f"; nothing is left of {numbers['lost']:.0f} of {numbers['settings']:.0f} settings, so that the "
            "advice holds for the other clocks only"
        )
    return (
        f"{cause} held the clock at {numbers['points']:.0f} points ({_places(numbers)}), which count for "
        f"nothing{missing}: {remedy}, and sweep again"
    )


def _in_time(_: str, numbers: Mapping[str, Any]) -> str:
    return (
        f"the energy of {numbers['points']:.0f} points ({_places(numbers)}) is integrated power of "
        "iterations that move in time with the power sensor: repeats agree on what it misses, so that "
        "intervals of energies and savings may be too narrow; vary the length of an iteration (batch, "
        "context), or read an energy counter"
    )


def _places(numbers: Mapping[str, Any]) -> str:
    low_mhz, high_mhz = numbers["lowest_lock_mhz"], numbers["highest_lock_mhz"]
    places = ["unlocked"] if numbers["unlocked"] else []
    if low_mhz is not None:
        one = f"at the lock of {low_mhz:.0f} MHz"
        places.append(one if numbers["locks"] == 1 else f"at locks from {low_mhz:.0f} to {high_mhz:.0f} MHz")
    return ", ".join(places + (["under power caps"] if numbers["capped"] else []))


def _no_cap_binds(_: str, numbers: Mapping[str, Any]) -> str:
    draws = "its power is not known"
    if numbers["highest_power_over_limit"] is not None:
        draws = (
            f"it draws {numbers['lowest_power_mw'] / 1e3:.0f} to {numbers['highest_power_mw'] / 1e3:.0f} W, "
            f"at most {100 * numbers['highest_power_over_limit']:.0f} % of a cap"
        )
    noise = ""
    if numbers["time_scatter"] is not None:
        noise = f", where repeats of one setting scatter by {100 * numbers['time_scatter']:.1f} %"
    return (
        f"none of the {numbers['caps']:.0f} power caps from {numbers['lowest_cap_mw'] / 1e3:.0f} to "
        f"{numbers['highest_cap_mw'] / 1e3:.0f} W ever holds the clock ({draws}) and throughput differs by "
        f"{100 * numbers['throughput_spread']:.1f} % between caps{noise}: these caps do nothing, whatever "
        "they seem to save"
    )


def _some_caps_loose(_: str, numbers: Mapping[str, Any]) -> str:
    return (
        f"caps of {numbers['lowest_loose_cap_mw'] / 1e3:.0f} W and more do not hold the clock, the highest "
        f"one that does is {numbers['highest_binding_cap_mw'] / 1e3:.0f} W: differences between the others "
        "are noise"
    )


def _clock_missed(_: str, numbers: Mapping[str, Any]) -> str:
    requests = f"{numbers['requested_low_mhz']:.0f} MHz"
    if numbers["locks"] > 1:
        requests = (
            f"{numbers['requested_low_mhz']:.0f} to {numbers['requested_high_mhz']:.0f} MHz "
            f"({numbers['locks']:.0f} locks)"
        )
    why = "the power limit holds it there" if numbers["capped"] else "accepted and clamped without a word"
    return f"requests for {requests} ran at {numbers['sm_clock_mhz']:.0f} MHz, {why}: one clock, not several"


def _limit_missed(_: str, numbers: Mapping[str, Any]) -> str:
    return (
        f"a power limit of {numbers['requested_limit_mw'] / 1e3:.0f} W was asked for and "
        f"{numbers['limit_mw'] / 1e3:.0f} W was in force"
    )


def behaviour_words(behaviour: Behaviour, reference: Reference) -> str:
    """The evidence for a class, in one sentence."""
    numbers: Mapping[str, Any] = behaviour.numbers
    mhz, free_mhz = numbers["reference_mhz"], behaviour.free_mhz
    clock = f"the {reference_words(reference)}" if reference.how == "unlocked" else f"its {mhz:.0f} MHz"
    shape = (
        f"the time stays within 2 % of the reference's down to {free_mhz:.0f} MHz, "
        f"{100 * free_mhz / mhz:.0f} % of {clock}"
    )
    if behaviour.curve is None:
        shape += "; no lower clock was measured, so that flat and knee cannot be distinguished"
    if behaviour.evidence == "capped":
        share = 100 * numbers["power_cap_share"]
        return f"the power limit holds the unlocked clock for {share:.0f} % of the time; {shape}"
    if behaviour.evidence == "idles":
        return (
            f"the device reported that it idled at {numbers['idle_settings']:.0f} of "
            f"{numbers['settings']:.0f} settings; {shape}"
        )
    if behaviour.evidence == "little power":
        return (
            f"{shape}; at {numbers['power_mw'] / 1e3:.0f} W it draws little more than the "
            f"{numbers['idle_power_mw'] / 1e3:.0f} W of an idle device: it may be waiting for the host "
            "rather than for memory"
        )
    return shape


def fix_first_words(behaviour: Behaviour) -> str:
    """What to mend before choosing a clock; empty when nothing."""
    return _FIX_FIRST.get(behaviour.name or "", "")


def reference_words(reference: Reference) -> str:
    """The clock, and what makes it the reference."""
    if reference.how == "unlocked":
        return f"{reference.sm_clock_mhz:.0f} MHz it runs at unlocked"
    return f"{reference.sm_clock_mhz:.0f} MHz of the highest clock measured, as no unlocked point counts"


def _reference_energy(reference: Reference) -> str:
    return (
        "the unlocked energy" if reference.how == "unlocked" else "the energy at the highest clock measured"
    )


def lock_against_cap_words(
    comparison: LockAgainstCap, reference: Reference, max_slowdown: float, no_energy_reason: str
) -> str:
    """Which of locking and capping saves more, in one sentence.

    Args:
        comparison: the verdict with its evidence.
        reference: whose energy savings are shares of.
        max_slowdown: the budget, as a share.
        no_energy_reason: why the series has no energy; empty when it has.
    """
    if comparison.reason_code is not None:
        why = _NOT_COMPARED[comparison.reason_code]
        if comparison.reason_code == "no energies" and no_energy_reason:
            why = no_energy_reason
        return f"locks were not compared with caps: {why}"
    assert comparison.advantage is not None
    assert comparison.lowest_cap_mw is not None
    budget = f"with at most {100 * max_slowdown:.3g} % more time"
    caps = f"caps down to {comparison.lowest_cap_mw / 1e3:.0f} W, the lowest tried"
    advantage, of_energy = comparison.advantage, _reference_energy(reference)
    if comparison.verdict == "locking beats capping":
        text = f"{budget}, locking saves {advantage.percent()} of {of_energy} more than {caps}"
        if comparison.lock_mhz is None:
            text += ", but no single clock keeps that budget and saves: leave it unlocked"
    elif comparison.verdict == "capping beats locking":
        assert advantage.low is not None
        assert advantage.high is not None
        more = Interval(value=-advantage.value, low=-advantage.high, high=-advantage.low)
        text = f"{budget}, capping saves {more.percent()} of {of_energy} more than locking"
    elif comparison.lock_mhz is None or comparison.lock_power_mw is None:
        text = f"{budget}, neither a lock nor {caps}, surely saves energy: leave both as they are"
    else:
        apart = f"({advantage.percent()} apart)"
        text = f"{budget}, these points show no difference between locks and {caps} {apart}"
        if comparison.lock_power_mw >= comparison.lowest_cap_mw:
            text += (
                f": a cap near {comparison.lock_power_mw / 1e3:.0f} W would hold the same "
                f"{comparison.lock_mhz:.0f} MHz"
            )
    return text + _cost_of_caps(comparison.cap_excess)


def _cost_of_caps(excess: Interval | None) -> str:
    if excess is None:
        return ""
    if excess.low is not None and excess.high is not None and excess.low <= 0.0 <= excess.high:
        return f"; where a cap binds, it costs no more than a lock at its clock, {excess.percent()}"
    return f"; where a cap binds, it costs {excess.percent()} more energy than a lock at its clock"


_CONFOUNDS: dict[str, Callable[[str, Mapping[str, Any]], str]] = {
    "unlocked is capped": _capped_reference,
    "slowed by heat": _slowed,
    "slowed by the brake": _slowed,
    "in time with the sensor": _in_time,
    "cap never binds": _no_cap_binds,
    "some caps do not bind": _some_caps_loose,
    "clock not as requested": _clock_missed,
    "limit not as requested": _limit_missed,
}
