"""English for advice on SM clocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from observatory.analysis.frequency.points import CLOCK_STEP_MHZ
from observatory.analysis.frequency.views import LEAST_PROBABILITY, TIE
from observatory.analysis.frequency.words import reference_words

if TYPE_CHECKING:
    from observatory.advice.frequency import CommonClock, SeriesAdvice

_NO_TOGGLING = (
    "do not lock and unlock around phases or steps: a lock takes effect after the step it was meant for, "
    "affects every process on the device, and stays when the program dies"
)


def series_words(advice: SeriesAdvice, max_slowdown: float) -> str:
    """The advice for one series with its evidence; the series is not named.

    Args:
        advice: for the series.
        max_slowdown: the budget, as a share.
    """
    budget = f"budget of {100 * max_slowdown:.1f} %"
    considered = advice.considered
    if advice.code == "no energy" or considered is None:
        return (
            f"{advice.no_energy_reason}, so that no saving can be stated; down to {advice.lowest_mhz:.0f} "
            f"MHz the time stays within the {budget}"
        )
    reference = f"the {reference_words(advice.reference)}{_slowed(advice)}"
    if advice.code == "no lower clock":
        return (
            f"leave the clock unlocked: against {reference} no lower clock keeps the {budget} with a "
            f"probability of {100 * LEAST_PROBABILITY:.0f} % and saves energy"
        )
    if advice.code == "saving not sure":
        return (
            f"leave the clock unlocked: against {reference}, what {considered.sm_clock_mhz:.0f} MHz would "
            f"save, {considered.saving.percent()}, is not surely more than the {100 * TIE:.1f} % by which "
            "energies that count as the same differ"
        )
    return (
        f"lock to {considered.sm_clock_mhz:.0f} MHz, which saves {considered.saving.percent()} of the energy "
        f"for a slowdown of {considered.slowdown.percent()} against {reference}{_doubts(advice)}"
        f"{_measured(advice, considered.sm_clock_mhz)}"
    )


def _slowed(advice: SeriesAdvice) -> str:
    causes = (("thermal throttling", advice.heated), ("the power brake", advice.braked))
    counted = [f"{count} points slowed by {cause}" for cause, count in causes if count]
    return f" ({' and '.join(counted)} do not count)" if counted else ""


def _doubts(advice: SeriesAdvice) -> str:
    doubts = ""
    if advice.flagged:
        doubts = (
            f"; the energy of {advice.flagged} points is integrated power in time with the sensor: distrust "
            "the saving"
        )
    if advice.reference.how != "unlocked":
        doubts += "; what it saves against running unlocked is not known"
    return doubts


def _measured(advice: SeriesAdvice, clock_mhz: float) -> str:
    """What the repeats of the recommended clock say by themselves."""
    measured = advice.measured
    if measured is None:
        return ""
    where = "there"
    if abs(measured.sm_clock_mhz - clock_mhz) > CLOCK_STEP_MHZ / 2.0:
        where = f"at {measured.sm_clock_mhz:.0f} MHz"
    end = ")" if measured.agrees else "; the curves do not agree with this: distrust it)"
    return (
        f" (measured {where}: saves {measured.saving.percent()}, slower by {measured.slowdown.percent()}{end}"
    )


def common_words(common: CommonClock, series: int, max_slowdown: float) -> str:
    """The advice for a device that runs all series.

    Args:
        common: the clock.
        series: how many there are.
        max_slowdown: the budget, as a share.
    """
    if common.code == "no energy":
        return f"no common clock is advised, as energies are missing; {_NO_TOGGLING}"
    apart = ""
    if common.separate:
        gains = [f"{item.title} (by {100 * item.saving:.0f} points)" for item in common.separate]
        apart = (
            f"; with a clock of its own more would be saved by {', '.join(gains)[:600]}: give it devices of "
            "its own (prefill and decode on separate devices, for example) and lock those"
        )
    if common.sm_clock_mhz is None or common.saving is None:
        return (
            f"no single clock keeps a budget of {100 * max_slowdown:.1f} % for all {series} series and "
            f"surely saves energy: leave a device that runs them all unlocked{apart}; {_NO_TOGGLING}"
        )
    return (
        f"for a device that runs all {series} series, {common.sm_clock_mhz:.0f} MHz keeps every budget and "
        f"saves {common.saving.percent()} on average{apart}; {_NO_TOGGLING}"
    )
