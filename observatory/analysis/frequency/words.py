"""English for what frequency analysis finds: references, comparisons of locks with caps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from observatory.analysis.frequency.model_file import Reference
from observatory.analysis.statistics import Interval

if TYPE_CHECKING:
    from observatory.analysis.frequency.comparing import LockAgainstCap

#: Why locks were not compared with caps.
_NOT_COMPARED = {
    "caps slowed": "no point under a cap counts",
    "no caps": "caps are missing",
    "no energies": "energies are missing",
    "no repeats": "repeats are missing",
    "no energies of repeats": "energies of repeats are missing",
}


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
        why = _NOT_COMPARED.get(comparison.reason_code)
        if why is None:
            return "without bootstrap samples locks and caps cannot be compared"
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
            text += ", but no single clock surely keeps that budget and saves: leave it unlocked"
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
