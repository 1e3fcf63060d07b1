"""Locks against caps.

Shapes: B samples, F clocks, R repeats.

Each setting is a point in the plane of time and energy per iteration, as measured. The Pareto front holds
those that no other beats in both.

Whether locking beats capping is a question about all locks and all caps, not about the few that were tried:
the best of twelve locks beats the best of five caps by the luck of its steps alone. A cap of W holds the
clock at which P(f) = W. So caps reach the clocks whose power is at least that of the lowest cap tried, and,
where a cap never binds, none but the unlocked one; locks reach all. Both are asked for the least energy
within the budget. What a binding cap costs compared with a lock at the same clock (a limit makes the clock
hunt) is measured on the cap points and added to the caps' side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

from observatory.analysis.frequency.model_file import SeriesFit, Setting
from observatory.analysis.frequency.views import SeriesView
from observatory.analysis.frequency.words import lock_against_cap_words
from observatory.analysis.statistics import Interval, sample_interval, student_interval
from observatory.run.records import Record, Text

Float64 = NDArray[np.float64]

LockVerdict = Literal["locking beats capping", "capping beats locking", "not told apart", "not measured"]

NotCompared = Literal["caps slowed", "no caps", "no energies", "no repeats", "no energies of repeats"]

#: Less than this part of the reference's energy gives no verdict: errors of calibration and of the model's
#: form are as large.
_MARGIN = 0.01
#: A cap that slows an iteration by less is compared at the clock it ran at, as time shows no clock there.
_SLOWED = 0.01
#: ln of the largest ratio believed: files may say anything.
_MOST_EXCESS = 3.0


class PlanePoint(Record):
    """One measured setting in the plane of time and energy.

    Attributes:
        kind, requested_sm_clock_mhz, limit_mw, sm_clock_mhz, label: of the setting.
        repeats: how many.
        slowdown: time relative to the reference, minus 1.
        saving: 1 minus energy relative to the reference.
        on_front: no other setting is at least as good in both and better in one.
    """

    kind: Literal["unlocked", "lock", "cap", "both"]
    requested_sm_clock_mhz: float | None
    limit_mw: float | None
    sm_clock_mhz: float | None
    label: Text
    repeats: int
    slowdown: Interval
    saving: Interval
    on_front: bool


class LockAgainstCap(Record):
    """Which of locking and capping saves more within the budget.

    Attributes:
        verdict: ``locking beats capping`` and its reverse need an interval wholly beyond 1 % of the
            reference's energy.
        advantage: energy that the best cap costs more than the best lock, relative to the reference; None
            when it cannot be measured.
        cap_excess: ln(energy of a binding cap / energy of a lock at its clock); None when no cap binds.
        lock_mhz, lock_power_mw: the recommended clock and its power; None where none is recommended.
        lowest_cap_mw: the lowest cap tried; None without caps.
        reason_code: why they were not compared; None where they were.
        text: one sentence.
    """

    verdict: LockVerdict
    advantage: Interval | None = None
    cap_excess: Interval | None = None
    lock_mhz: float | None = None
    lock_power_mw: float | None = None
    lowest_cap_mw: float | None = None
    reason_code: NotCompared | None = None
    text: Text = ""


def plane(fit: SeriesFit) -> list[PlanePoint]:
    """All settings with an energy, and which are on the Pareto front."""
    settings = [item for item in fit.settings if item.energy_mj_R]
    if not settings or fit.reference.energy_mj is None:
        return []
    points = []
    for item in settings:
        slowdown, saving = measured_change(fit, item)
        points.append((item, slowdown, saving))
    return [
        PlanePoint(
            kind=item.kind,
            requested_sm_clock_mhz=item.requested_sm_clock_mhz,
            limit_mw=item.limit_mw,
            sm_clock_mhz=item.sm_clock_mhz,
            label=item.label,
            repeats=len(item.iteration_s_R),
            slowdown=slowdown,
            saving=saving,
            on_front=not any(
                other.value <= slowdown.value
                and more.value >= saving.value
                and (other.value < slowdown.value or more.value > saving.value)
                for _, other, more in points
            ),
        )
        for item, slowdown, saving in points
    ]


def measured_change(fit: SeriesFit, setting: Setting) -> tuple[Interval, Interval]:
    """Slowdown and saving of a setting against the reference, from its repeats."""
    assert fit.reference.energy_mj is not None
    reference = _reference_repeats(fit)
    parts = 1.0 / len(setting.iteration_s_R) + 1.0 / max(reference, 1)
    is_unlocked = setting.kind == "unlocked"
    time = float(np.median(setting.iteration_s_R)) / fit.reference.iteration_s
    energy = float(np.median(setting.energy_mj_R)) / fit.reference.energy_mj
    # The median of repeats is worth a factor of sqrt(pi/2) less than their mean.
    errors = [
        None if scatter is None else 0.0 if is_unlocked else scatter * float(np.sqrt(np.pi / 2.0 * parts))
        for scatter in (fit.time_scatter, fit.energy_scatter)
    ]
    slowdown = student_interval(time - 1.0, None if errors[0] is None else errors[0] * time, fit.scatter_dof)
    saving = student_interval(
        1.0 - energy, None if errors[1] is None else errors[1] * energy, fit.scatter_dof
    )
    return slowdown, saving


def _reference_repeats(fit: SeriesFit) -> int:
    same = [item for item in fit.settings if item.kind == "unlocked" and item.iteration_s_R]
    return len(same[0].iteration_s_R) if same else 1


def against_caps(view: SeriesView, max_slowdown: float, lock_mhz: float | None) -> LockAgainstCap:
    """Whether locking beats capping within the budget.

    Args:
        view: the series.
        max_slowdown: the budget.
        lock_mhz: the clock that is recommended; None where none is.
    """
    comparison = _compare(view, max_slowdown, lock_mhz)
    text = lock_against_cap_words(comparison, view.fit.reference, max_slowdown, view.fit.no_power)
    return comparison.model_copy(update={"text": text})


def _compare(view: SeriesView, max_slowdown: float, lock_mhz: float | None) -> LockAgainstCap:
    """The verdict with its evidence, without words."""
    fit = view.fit
    caps = [item for item in fit.settings if item.kind == "cap" and item.iteration_s_R and item.limit_mw]
    if not view.has_energy or not caps or fit.energy_scatter is None:
        return LockAgainstCap(verdict="not measured", reason_code=_why_not_compared(view, caps))
    lowest_mw = min(item.limit_mw or np.inf for item in caps)
    clock_F = view.candidate_F
    time_BF, energy_BF = view.ratios(clock_F)
    inside_BF = time_BF <= 1.0 + max_slowdown + 1e-12
    unlocked_F = clock_F == view.reference_mhz
    reached_BF = view.milliwatts(clock_F) >= lowest_mw
    excess, excess_B = _cap_excess(view, caps, len(time_BF))
    cap_BF = np.where(unlocked_F, energy_BF, energy_BF * np.exp(excess_B)[:, None])
    least_lock_B = np.where(inside_BF, energy_BF, np.inf).min(axis=1)
    least_cap_B = np.where(inside_BF & (reached_BF | unlocked_F), cap_BF, np.inf).min(axis=1)
    advantage_B = least_cap_B - least_lock_B
    advantage = sample_interval(float(np.median(advantage_B)), advantage_B)
    return LockAgainstCap(
        verdict=_verdict(advantage),
        advantage=advantage,
        cap_excess=excess,
        lock_mhz=lock_mhz,
        lock_power_mw=None if lock_mhz is None else float(np.median(view.milliwatts(np.array([lock_mhz])))),
        lowest_cap_mw=lowest_mw,
    )


def _verdict(advantage: Interval) -> LockVerdict:
    if advantage.low is not None and advantage.low > _MARGIN:
        return "locking beats capping"
    capping = advantage.high is not None and advantage.high < -_MARGIN
    return "capping beats locking" if capping else "not told apart"


def _why_not_compared(view: SeriesView, caps: Sequence[Setting]) -> NotCompared:
    if not caps:
        tried = any(item.kind == "cap" for item in view.fit.settings)
        return "caps slowed" if tried else "no caps"
    if not view.has_energy:
        return "no energies"
    return "no repeats" if view.fit.time_scatter is None else "no energies of repeats"


def _cap_excess(view: SeriesView, caps: Sequence[Setting], rows: int) -> tuple[Interval | None, Float64]:
    """By how much binding caps cost more than a lock at the same clock: ln of the ratio, and (rows,) draws.

    Where the limit made the clock wander, a lock that takes as long stands for it. None and zeros when no cap
    binds: there is nothing that it could cost.
    """
    fit = view.fit
    grid_F = np.linspace(fit.low_mhz, fit.high_mhz, 400)
    seconds_F = np.median(view.seconds(grid_F), axis=0)
    energy_F = np.median(view.millijoules(grid_F), axis=0)
    flat_s = float(seconds_F[-1]) * (1.0 + max(_SLOWED, 3.0 * (fit.time_scatter or 0.0)))
    excesses, repeats = [], 0
    for item in caps:
        if item.label != "power-capped" or not item.energy_mj_R:
            continue
        took_s = float(np.median(item.iteration_s_R))
        if item.fitted == 0 and flat_s < took_s <= float(seconds_F[0]):
            clock = float(np.interp(-took_s, -seconds_F, grid_F))  # it wandered: time alone is to be trusted
        elif item.sm_clock_mhz is not None and fit.low_mhz <= item.sm_clock_mhz <= fit.high_mhz:
            clock = item.sm_clock_mhz
        else:
            continue
        ratio = np.median(item.energy_mj_R) / np.interp(clock, grid_F, energy_F)
        excesses.append(float(np.clip(np.log(ratio), -_MOST_EXCESS, _MOST_EXCESS)))
        repeats += len(item.energy_mj_R)
    if not excesses or fit.energy_scatter is None:
        return None, np.zeros(rows)
    value, error = float(np.mean(excesses)), fit.energy_scatter / float(np.sqrt(repeats))
    draws_B = special.stdtrit(max(fit.scatter_dof, 1), (np.arange(rows) + 0.5) / rows)
    shuffled_B = np.random.default_rng(0).permutation(draws_B)
    return student_interval(value, error, fit.scatter_dof), value + error * shuffled_B
