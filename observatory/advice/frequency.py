"""Which clock to lock each phase to, and one for all of them.

Shapes: B bootstrap samples, F candidate clocks.

A candidate is a clock that the device supports (or, where the sweep does not say, one that a lock was seen to
reach), within what was measured and not above what the phase runs at unlocked: no extrapolation. The budget
is a promise, so that the upper end of the slowdown's 90 % interval must keep it. Of the candidates inside,
energies within half a percent of the least are ties, and the highest clock among them is taken. Unless all
of the saving's interval is more than a tie, the advice is to leave the clock alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.frequency.classes import Behaviour, behaviour_of
from observatory.analysis.frequency.comparing import (
    LockAgainstCap,
    PlanePoint,
    against_caps,
    measured_change,
    plane,
)
from observatory.analysis.frequency.model_file import ClockEstimate, ClockModel, Confound
from observatory.analysis.frequency.points import CLOCK_STEP_MHZ
from observatory.analysis.frequency.views import TIE, ClockChoice, SeriesView, highest_of_ties, surely_saves
from observatory.analysis.statistics import Interval, sample_interval
from observatory.errors import ClockError
from observatory.run.manifest import DeviceSpec, Record, Text

Float64 = NDArray[np.float64]

#: A measured lock this close to a recommended clock is evidence for it.
_NEARBY_MHZ = 60.0
#: A series that gives up more than this at the common clock is named.
_WORTH_A_DEVICE = 0.02
_NO_TOGGLING = (
    "do not lock and unlock around phases or steps: a lock takes effect after the step it was meant for, "
    "concerns every process on the device, and stays when the program dies"
)
#: The advice says that more repeats would help when the interval costs this much of the saving.
_WORTH_MORE_REPEATS = 0.02


class MeasuredNearby(Record):
    """The measured lock closest to a recommended clock, which the model must agree with.

    Attributes:
        sm_clock_mhz: the clock it ran at.
        slowdown, saving: as measured.
        agrees: whether its intervals and the model's at that clock meet, or miss each other by no more than
            energies that count as the same.
    """

    sm_clock_mhz: float
    slowdown: Interval
    saving: Interval
    agrees: bool


class SeriesAdvice(Record):
    """Advice for one phase, batch and context.

    Attributes:
        title: what ran.
        index: of the series in the model.
        verdict: ``lock``, ``leave unlocked`` or ``no energy``.
        text: the advice with its evidence, one sentence.
        reference_mhz: clock that all is relative to.
        reference_how: whether that is the unlocked clock, as in ``Reference``.
        reference_mj_per_token: energy per token there; None when not known.
        choice: the recommended clock; None unless the verdict is ``lock``.
        unsure_mhz: the clock that would be recommended if the estimate alone had to keep the budget, where it
            saves more: what more repeats may win. None otherwise.
        measured: the measured lock nearby; None without one.
        edp, ed2p: clocks of least energy x time and energy x time^2, whatever the budget; None without
            energy.
        critical, compute_optimum, optimum: f_crit, f_energy and the clock of least energy.
        behaviour: the class.
        points: what was measured, with the Pareto front.
        lock_against_cap: which saves more.
        confounds: found by the fit.
    """

    title: Text
    index: int
    verdict: Literal["lock", "leave unlocked", "no energy"]
    text: Text
    reference_mhz: float
    reference_how: Literal["unlocked", "highest clock"] = "unlocked"
    reference_mj_per_token: float | None = None
    choice: ClockChoice | None = None
    unsure_mhz: float | None = None
    measured: MeasuredNearby | None = None
    edp: ClockChoice | None = None
    ed2p: ClockChoice | None = None
    critical: ClockEstimate
    compute_optimum: ClockEstimate
    optimum: ClockEstimate
    behaviour: Behaviour
    points: tuple[PlanePoint, ...] = ()
    lock_against_cap: LockAgainstCap
    confounds: tuple[Confound, ...] = ()


class CommonClock(Record):
    """One clock for all series.

    Attributes:
        sm_clock_mhz: the clock; None when none keeps every budget and saves anything.
        saving: mean saving over series, each weighing the same; None likewise.
        choices: what it does to each series, in their order.
        lost: saving that each series gives up against its own clock.
        text: the advice in words.
    """

    sm_clock_mhz: float | None = None
    saving: Interval | None = None
    choices: tuple[ClockChoice, ...] = ()
    lost: tuple[float, ...] = ()
    text: Text


class ClockAdvice(Record):
    """What ``observatory clocks recommend`` prints.

    Attributes:
        device: the device.
        max_slowdown: the budget.
        candidates: where the candidate clocks come from.
        series: advice for each series.
        common: advice for all of them together; None for a single one.
        notes: of the model.
    """

    device: DeviceSpec
    max_slowdown: float
    candidates: Text
    series: tuple[SeriesAdvice, ...]
    common: CommonClock | None = None
    notes: tuple[Text, ...] = ()


def recommend_clocks(model: ClockModel, *, max_slowdown: float = 0.02) -> ClockAdvice:
    """Choose clocks.

    Args:
        model: fitted by :func:`observatory.analysis.frequency.fit_clocks`.
        max_slowdown: how much longer an iteration may take than unlocked, as a share.

    Raises:
        ClockError: a budget that is none.
    """
    if not 0.0 <= max_slowdown <= 10.0:
        raise ClockError(f"a slowdown of {max_slowdown} is no budget; expected a share such as 0.02 for 2 %")
    views = [SeriesView(fit, model.supported_sm_clocks_mhz) for fit in model.series]
    series = [_advise(view, index, model, max_slowdown) for index, view in enumerate(views)]
    return ClockAdvice(
        device=model.device,
        max_slowdown=max_slowdown,
        candidates="clocks that the device supports"
        if model.supported_sm_clocks_mhz
        else "clocks that a lock was seen to reach, as the sweep does not list the supported ones",
        series=tuple(series),
        common=_common(views, series, max_slowdown) if len(views) > 1 else None,
        notes=model.notes,
    )


def _advise(view: SeriesView, index: int, model: ClockModel, max_slowdown: float) -> SeriesAdvice:
    fit, clock_F = view.fit, view.candidate_F
    behaviour = behaviour_of(fit, model.idle_power_mw, model.default_limit_mw)
    common = {
        "title": fit.title,
        "index": index,
        "reference_mhz": view.reference_mhz,
        "reference_how": fit.reference.how,
        "reference_mj_per_token": view.reference_mj_per_token,
        "critical": fit.critical,
        "compute_optimum": fit.compute_optimum,
        "optimum": fit.optimum,
        "behaviour": behaviour,
        "points": tuple(plane(fit)),
        "confounds": fit.confounds,
    }
    inside_F = view.inside(clock_F, max_slowdown)
    if not view.has_energy:
        lowest = float(clock_F[inside_F].min())
        return SeriesAdvice.model_validate(
            {
                **common,
                "lock_against_cap": against_caps(view, max_slowdown, None),
                "verdict": "no energy",
                "text": f"{fit.title}: {fit.no_power}, so that no saving can be stated; down to "
                f"{lowest:.0f} MHz the time stays within the budget of {100 * max_slowdown:.1f} %",
            }
        )
    time_BF, energy_BF = view.ratios(clock_F)
    best = highest_of_ties(clock_F[inside_F], energy_BF[0, inside_F])
    bold_F = time_BF[0] <= 1.0 + max_slowdown + 1e-12
    bold = highest_of_ties(clock_F[bold_F], energy_BF[0, bold_F])
    choice = view.choice(best)
    worth = best < view.reference_mhz and surely_saves(choice.saving)
    more = view.choice(bold).saving.value - choice.saving.value
    measured = _nearby(view, best)
    return SeriesAdvice.model_validate(
        {
            **common,
            "lock_against_cap": against_caps(view, max_slowdown, best if worth else None),
            "verdict": "lock" if worth else "leave unlocked",
            "text": _sentence(view, choice, measured, worth, max_slowdown),
            "choice": choice if worth else None,
            "unsure_mhz": bold if bold < best and more > _WORTH_MORE_REPEATS else None,
            "measured": measured if worth else None,
            "edp": view.choice(highest_of_ties(clock_F, energy_BF[0] * time_BF[0])),
            "ed2p": view.choice(highest_of_ties(clock_F, energy_BF[0] * time_BF[0] ** 2)),
        }
    )


def _nearby(view: SeriesView, mhz: float) -> MeasuredNearby | None:
    fit = view.fit
    locks = [
        item
        for item in fit.settings
        if item.kind == "lock" and item.energy_mj_R and item.sm_clock_mhz is not None
        if abs(item.sm_clock_mhz - mhz) <= _NEARBY_MHZ
        # A lock that runs at the reference's clock is the reference once more.
        if abs(item.sm_clock_mhz - fit.reference.sm_clock_mhz) > CLOCK_STEP_MHZ / 2.0
    ]
    if not locks or fit.reference.energy_mj is None:
        return None
    nearest = min(locks, key=lambda item: abs((item.sm_clock_mhz or 0.0) - mhz))
    clock = nearest.sm_clock_mhz or 0.0
    slowdown, saving = measured_change(fit, nearest)
    model = view.choice(clock)
    agrees = all(_meet(*pair) for pair in ((slowdown, model.slowdown), (saving, model.saving)))
    return MeasuredNearby(sm_clock_mhz=clock, slowdown=slowdown, saving=saving, agrees=agrees)


def _meet(first: Interval, second: Interval) -> bool:
    if first.low is None or first.high is None or second.low is None or second.high is None:
        return True  # nothing says that they differ
    return first.low <= second.high + TIE and second.low <= first.high + TIE


def _sentence(
    view: SeriesView, choice: ClockChoice, measured: MeasuredNearby | None, worth: bool, max_slowdown: float
) -> str:
    title, reference, words = view.fit.title, view.reference_mhz, view.fit.reference.words
    slowed = {
        "heat": sum(item.heated for item in view.fit.settings),
        "the brake": sum(item.braked for item in view.fit.settings),
    }
    counted = [f"{count} points slowed by {cause}" for cause, count in slowed.items() if count]
    if counted:
        words += f" ({' and '.join(counted)} do not count)"
    if not worth:
        if choice.sm_clock_mhz >= reference:
            return (
                f"{title}: leave the clock unlocked: against the {words} no lower clock surely keeps the "
                f"budget of {100 * max_slowdown:.1f} % and saves energy"
            )
        return (
            f"{title}: leave the clock unlocked: against the {words}, what {choice.sm_clock_mhz:.0f} MHz "
            f"would save, {choice.saving.percent()}, is not surely more than the {100 * TIE:.1f} % by which "
            "energies that count as the same differ"
        )
    flagged = sum(item.flagged for item in view.fit.settings)
    doubt = ""
    if flagged:
        doubt = (
            f"; the energy of {flagged} points is integrated power in time with the sensor: distrust the "
            "saving"
        )
    sentence = (
        f"{title}: lock to {choice.sm_clock_mhz:.0f} MHz, which saves {choice.saving.percent()} of the "
        f"energy for a slowdown of {choice.slowdown.percent()} against the {words}"
    )
    sentence += doubt
    if view.fit.reference.how != "unlocked":
        sentence += "; what it saves against running unlocked is not known"
    if measured is None:
        near = f"no lock within {_NEARBY_MHZ:.0f} MHz of it was measured"
        return f"{sentence}; {near}: measure it before relying on it"
    if abs(measured.sm_clock_mhz - choice.sm_clock_mhz) <= CLOCK_STEP_MHZ / 2.0:
        seen = "measured there"
    else:
        seen = f"measured at {measured.sm_clock_mhz:.0f} MHz"
    sentence += f" ({seen}: saves {measured.saving.percent()}, slower by {measured.slowdown.percent()}"
    return sentence + (")" if measured.agrees else "; the model does not agree with this: distrust it)")


def _common(views: Sequence[SeriesView], advice: Sequence[SeriesAdvice], max_slowdown: float) -> CommonClock:
    """One clock for everything the device does, since locking is too slow and too coarse to follow phases."""
    if not all(view.has_energy for view in views):
        return CommonClock(text=f"no common clock is advised, as energies are missing; {_NO_TOGGLING}")
    low = max(view.fit.low_mhz for view in views)
    top = max(view.reference_mhz for view in views)
    clock_F = np.array(
        sorted({mhz for view in views for mhz in view.candidate_F.tolist() if mhz >= low} | {top})
    )
    kept_F = np.all([view.inside(clock_F, max_slowdown) for view in views], axis=0) | (clock_F == top)
    clock_F = clock_F[kept_F]
    energy_SBF = [view.ratios(clock_F)[1] for view in views]
    rows = min(len(energy_BF) for energy_BF in energy_SBF)
    mean_BF = np.mean([energy_BF[:rows] for energy_BF in energy_SBF], axis=0)
    best = highest_of_ties(clock_F, mean_BF[0])
    saving_B = 1.0 - mean_BF[:, clock_F == best][:, 0]
    saving = sample_interval(float(saving_B[0]), saving_B[1:])
    none = best >= top or not surely_saves(saving)
    choices = [view.choice(top if none else best) for view in views]
    own = [item.choice.saving.value if item.choice else 0.0 for item in advice]
    lost = [max(0.0, alone - choice.saving.value) for alone, choice in zip(own, choices, strict=True)]
    gaining = [f"{item.title} (by {100 * more:.0f} points)" for item, more in zip(advice, lost, strict=True)
               if more > _WORTH_A_DEVICE]  # fmt: skip
    apart = ""
    if gaining:
        apart = (
            f"; with a clock of its own more would be saved by {', '.join(gaining)[:600]}: give it devices "
            "of its own (prefill and decode on separate devices, for example) and lock those"
        )
    if none:
        return CommonClock(
            text=f"no single clock keeps a budget of {100 * max_slowdown:.1f} % for all {len(views)} series "
            f"and surely saves energy: leave a device that runs them all unlocked{apart}; {_NO_TOGGLING}"
        )
    return CommonClock(
        sm_clock_mhz=best,
        saving=saving,
        choices=tuple(choices),
        lost=tuple(lost),
        text=f"for a device that runs all {len(views)} series, {best:.0f} MHz keeps every budget and "
        f"saves {saving.percent()} on average{apart}; {_NO_TOGGLING}",
    )
