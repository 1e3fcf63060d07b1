"""Which clock to lock each phase to, and one for all of them.

Shapes: B samples, F candidate clocks.

A candidate is a clock that a lock was measured at, below what the phase runs at unlocked: nothing between,
no extrapolation. It has to keep the budget with a probability of 80 %, by the samples of the curves.
Of the candidates that do, energies within half a percent of the least are ties, and the highest clock among
them is taken. Unless all of the saving's interval is more than a tie, the advice is to leave the clock alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from observatory.advice.frequency_words import common_words, series_words
from observatory.analysis.frequency.classes import Behaviour, behaviour_of
from observatory.analysis.frequency.comparing import (
    LockAgainstCap,
    PlanePoint,
    against_caps,
    measured_change,
    plane,
)
from observatory.analysis.frequency.model_file import ClockEstimate, ClockModel, Confound, Reference
from observatory.analysis.frequency.views import TIE, ClockChoice, SeriesView, highest_of_ties, surely_saves
from observatory.analysis.statistics import Interval, sample_interval
from observatory.errors import ClockError
from observatory.run.manifest import DeviceSpec
from observatory.run.records import Count, Record, Text

Float64 = NDArray[np.float64]

#: A series that gives up more than this at the common clock is named.
_WORTH_A_DEVICE = 0.02
#: The advice says that more repeats would help when the interval costs this much of the saving.
_WORTH_MORE_REPEATS = 0.02


SeriesCode = Literal["lock", "no lower clock", "saving not sure", "no energy"]
CommonCode = Literal["lock", "leave unlocked", "no energy"]


class Measured(Record):
    """The repeats of the recommended lock alone, which the curves must agree with.

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
        code: the verdict, and why the clock is left unlocked.
        text: the advice with its evidence, one sentence.
        reference: what slowdown and saving are relative to.
        considered: clock of least energy within the budget, recommended or not; None without energy.
        lowest_mhz: lowest clock within the budget.
        no_energy_reason: why there is no energy; empty when there is.
        heated, braked, flagged: points slowed by heat, by the brake, and with the energy of a sensor in time
            with the iterations.
        reference_mhz: clock that all is relative to.
        reference_how: whether that is the unlocked clock, as in ``Reference``.
        reference_mj_per_token: energy per token there; None when not known.
        choice: the recommended clock; None unless the verdict is ``lock``.
        unsure_mhz: the clock that would be recommended if the estimate alone had to keep the budget, where it
            saves more: what more repeats may win. None otherwise.
        measured: the repeats of that clock alone; None without a recommendation.
        edp, ed2p: clocks of least energy x time and energy x time^2, whatever the budget; None without
            energy.
        critical, optimum: f_crit and the measured clock of least energy.
        behaviour: the class.
        points: what was measured, with the Pareto front.
        lock_against_cap: which saves more.
        confounds: found by the fit.
    """

    title: Text
    index: int
    verdict: Literal["lock", "leave unlocked", "no energy"]
    code: SeriesCode
    text: Text = ""
    reference: Reference
    considered: ClockChoice | None = None
    lowest_mhz: float
    no_energy_reason: Text = ""
    heated: Count = 0
    braked: Count = 0
    flagged: Count = 0
    reference_mhz: float
    reference_how: Literal["unlocked", "highest clock"] = "unlocked"
    reference_mj_per_token: float | None = None
    choice: ClockChoice | None = None
    unsure_mhz: float | None = None
    measured: Measured | None = None
    edp: ClockChoice | None = None
    ed2p: ClockChoice | None = None
    critical: ClockEstimate
    optimum: ClockEstimate
    behaviour: Behaviour
    points: tuple[PlanePoint, ...] = ()
    lock_against_cap: LockAgainstCap
    confounds: tuple[Confound, ...] = ()


class SeparateGain(Record):
    """A series that would save more with a clock of its own.

    Attributes:
        title: what ran.
        saving: how much more.
    """

    title: Text
    saving: float


class CommonClock(Record):
    """One clock for all series.

    Attributes:
        code: what is advised.
        sm_clock_mhz: the clock; None when none keeps every budget and saves anything.
        saving: mean saving over series, each weighing the same; None likewise.
        choices: what it does to each series, in their order.
        lost: saving that each series gives up against its own clock.
        separate: series that lose much by the common clock.
        text: the advice in words.
    """

    code: CommonCode
    sm_clock_mhz: float | None = None
    saving: Interval | None = None
    choices: tuple[ClockChoice, ...] = ()
    lost: tuple[float, ...] = ()
    separate: tuple[SeparateGain, ...] = ()
    text: Text = ""


class ClockAdvice(Record):
    """What ``observatory clocks recommend`` prints.

    Attributes:
        device: the device.
        max_slowdown: the budget.
        series: advice for each series.
        common: advice for all of them together; None for a single one.
        notes: of the model.
    """

    device: DeviceSpec
    max_slowdown: float
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
    views = [SeriesView(fit) for fit in model.series]
    series = [_advise(view, index, model, max_slowdown) for index, view in enumerate(views)]
    return ClockAdvice(
        device=model.device,
        max_slowdown=max_slowdown,
        series=tuple(series),
        common=_common(views, series, max_slowdown) if len(views) > 1 else None,
        notes=model.notes,
    )


def _advise(view: SeriesView, index: int, model: ClockModel, max_slowdown: float) -> SeriesAdvice:
    fit, clock_F = view.fit, view.candidate_F
    inside_F = view.inside(clock_F, max_slowdown)
    common = {
        "title": fit.title,
        "index": index,
        "reference": fit.reference,
        "reference_mhz": view.reference_mhz,
        "reference_how": fit.reference.how,
        "reference_mj_per_token": view.reference_mj_per_token,
        "lowest_mhz": float(clock_F[inside_F].min()),
        "no_energy_reason": fit.no_power,
        "heated": sum(item.heated for item in fit.settings),
        "braked": sum(item.braked for item in fit.settings),
        "flagged": sum(item.flagged for item in fit.settings),
        "critical": fit.critical,
        "optimum": fit.optimum,
        "behaviour": behaviour_of(view, model.idle_power_mw, model.default_limit_mw),
        "points": tuple(plane(fit)),
        "confounds": fit.confounds,
    }
    if not view.has_energy:
        against = against_caps(view, max_slowdown, None)
        advice = {**common, "lock_against_cap": against, "verdict": "no energy", "code": "no energy"}
        return _with_text(SeriesAdvice.model_validate(advice), max_slowdown)
    time_F, energy_F = (np.median(ratio_BF, axis=0) for ratio_BF in view.ratios(clock_F))
    best = highest_of_ties(clock_F[inside_F], energy_F[inside_F])
    bold_F = time_F <= 1.0 + max_slowdown + 1e-12
    bold = highest_of_ties(clock_F[bold_F], energy_F[bold_F])
    choice = view.choice(best)
    worth = best < view.reference_mhz and surely_saves(choice.saving)
    more = view.choice(bold).saving.value - choice.saving.value
    advice = {
        **common,
        "lock_against_cap": against_caps(view, max_slowdown, best if worth else None),
        "verdict": "lock" if worth else "leave unlocked",
        "code": "lock" if worth else "no lower clock" if best >= view.reference_mhz else "saving not sure",
        "considered": choice,
        "choice": choice if worth else None,
        "unsure_mhz": bold if bold < best and more > _WORTH_MORE_REPEATS else None,
        "measured": _measured(view, best) if worth else None,
        "edp": view.choice(highest_of_ties(clock_F, energy_F * time_F)),
        "ed2p": view.choice(highest_of_ties(clock_F, energy_F * time_F**2)),
    }
    return _with_text(SeriesAdvice.model_validate(advice), max_slowdown)


def _with_text(advice: SeriesAdvice, max_slowdown: float) -> SeriesAdvice:
    return advice.model_copy(update={"text": f"{advice.title}: {series_words(advice, max_slowdown)}"})


def _measured(view: SeriesView, mhz: float) -> Measured | None:
    fit = view.fit
    locks = [item for item in fit.settings if item.kind == "lock" and item.fitted and item.energy_mj_R]
    if not locks or fit.reference.energy_mj is None:
        return None
    nearest = min(locks, key=lambda item: abs((item.sm_clock_mhz or 0.0) - mhz))
    slowdown, saving = measured_change(fit, nearest)
    curve = view.choice(mhz)
    agrees = all(_meet(*pair) for pair in ((slowdown, curve.slowdown), (saving, curve.saving)))
    return Measured(sm_clock_mhz=nearest.sm_clock_mhz or mhz, slowdown=slowdown, saving=saving, agrees=agrees)


def _meet(first: Interval, second: Interval) -> bool:
    if first.low is None or first.high is None or second.low is None or second.high is None:
        return True  # nothing says that they differ
    return first.low <= second.high + TIE and second.low <= first.high + TIE


def _common(views: Sequence[SeriesView], advice: Sequence[SeriesAdvice], max_slowdown: float) -> CommonClock:
    """One clock for everything the device does, since locking is too slow and too coarse to follow phases."""
    if not all(view.has_energy for view in views):
        return _common_with_text(CommonClock(code="no energy"), len(views), max_slowdown)
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
    best = highest_of_ties(clock_F, np.median(mean_BF, axis=0))
    saving_B = 1.0 - mean_BF[:, clock_F == best][:, 0]
    saving = sample_interval(float(np.median(saving_B)), saving_B)
    none = best >= top or not surely_saves(saving)
    choices = [view.choice(top if none else best) for view in views]
    alone = [item.choice.saving.value if item.choice else 0.0 for item in advice]
    lost = [max(0.0, saved - choice.saving.value) for saved, choice in zip(alone, choices, strict=True)]
    separate = tuple(
        SeparateGain(title=item.title, saving=more)
        for item, more in zip(advice, lost, strict=True)
        if more > _WORTH_A_DEVICE
    )
    clock = CommonClock(code="leave unlocked", separate=separate)
    if not none:
        clock = CommonClock(
            code="lock",
            sm_clock_mhz=best,
            saving=saving,
            choices=tuple(choices),
            lost=tuple(lost),
            separate=separate,
        )
    return _common_with_text(clock, len(views), max_slowdown)


def _common_with_text(clock: CommonClock, series: int, max_slowdown: float) -> CommonClock:
    return clock.model_copy(update={"text": common_words(clock, series, max_slowdown)})
