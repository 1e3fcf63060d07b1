"""Which points of a sweep count for what, and their repeats put together.

What a label means for a point, and why:

* The clock that was sampled counts, never the request. A ``clamped`` point is a good observation at the clock
  it ran at.
* ``power-capped`` with a steady clock is one too: time and power follow from the clock, whatever holds it.
  Where the limit makes the clock wander, the mean time belongs to no one clock: left out of the fit, kept in
  the comparison of locks with caps, since that is how the cap behaves.
* ``thermal`` and ``braked`` are left out of everything: hot silicon leaks more, hardware slowdown skips
  pulses that the sampled clock does not show, and no setting can be credited with either.
* ``unverified`` is left out of the fit, as there is no clock. Under a power limit alone it is still compared:
  the limit needs no clock to be verified.
* Labels are checked: one that says ``ok`` while the event reasons or the clock say otherwise is corrected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from observatory.analysis.frequency.curves import Points
from observatory.analysis.frequency.model_file import FitCode, Setting
from observatory.devices.event_reasons import IDLE_BIT, POWER_CAP_BIT, slowed_label
from observatory.run.documents.clock_sweep import ClockPoint, PointLabel

#: Clocks of NVIDIA devices come in steps of 15 MHz.
CLOCK_STEP_MHZ = 15
#: Points whose clock no setting can be credited with.
SLOWED_LABELS: tuple[PointLabel, ...] = ("thermal", "braked")
#: A tenth of the window under the limit is not an accident any more.
_CAPPED_SHARE = 0.1
_STEADY_SHARE = 0.03
#: A repeat is set aside this many standard deviations from the median of three or more, and at least so far.
_DISTURBED = 6.0
_LEAST_DISTURBED = 0.03
#: What an iteration and its power can be: from a nanosecond to twelve days, from a milliwatt to a megawatt.
_SECONDS = (1e-9, 1e6)
_MILLIWATTS = (1.0, 1e9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A point with what it counts for.

    Attributes:
        point: the point.
        kind: what was set: ``unlocked``, ``lock``, ``cap`` or ``both``.
        limit_mw: the limit of the setting, None for the device's own.
        label: its label, corrected.
        fitted: it enters the fit.
        compared: it is compared with other settings.
        reason: why not fitted; None when it is.
    """

    point: ClockPoint
    kind: str
    limit_mw: int | None
    label: PointLabel
    fitted: bool
    compared: bool
    reason: FitCode | None = None

    @property
    def setting(self) -> tuple[int | None, int | None]:
        """What repeats have in common."""
        return self.point.requested_sm_clock_mhz, self.limit_mw


def judge(points: Sequence[ClockPoint], default_limit_mw: int | None) -> list[Judged]:
    """Every point with what it counts for; repeats that something disturbed are set aside."""
    judged = [_judge(point, default_limit_mw) for point in points]
    disturbed = _disturbed(judged)
    return [
        item
        if index not in disturbed
        else Judged(
            point=item.point, kind=item.kind, limit_mw=item.limit_mw, label=item.label,
            fitted=False, compared=False, reason=FitCode.DISTURBED,
        )
        for index, item in enumerate(judged)
    ]  # fmt: skip


def _judge(point: ClockPoint, default_limit_mw: int | None) -> Judged:
    limit_mw = point.requested_limit_mw
    if limit_mw is not None and default_limit_mw is not None and limit_mw >= default_limit_mw:
        limit_mw = None  # the device's own limit, asked for
    locked = point.requested_sm_clock_mhz is not None
    kind = {(False, False): "unlocked", (True, False): "lock", (False, True): "cap"}.get(
        (locked, limit_mw is not None), "both"
    )
    label = corrected_label(point)
    reason = _why_unfit(point, label)
    compared = label not in SLOWED_LABELS and (label != "unverified" or kind == "cap")
    if not _possible(point):
        compared, reason = False, FitCode.IMPOSSIBLE
    return Judged(
        point=point,
        kind=kind,
        limit_mw=limit_mw,
        label=label,
        fitted=reason is None,
        compared=compared,
        reason=reason,
    )


def corrected_label(point: ClockPoint) -> PointLabel:
    """The label that clock and event reasons bear out."""
    reasons = point.event_reasons or 0
    # Before schema 1.1 ``thermal`` stood for the brake, too.
    slowed = slowed_label(point.event_reasons)
    if slowed or point.label in SLOWED_LABELS:
        return slowed or point.label
    if point.label == "unverified" or point.sm_clock_mhz is None:
        return "unverified"
    if point.label != "ok":
        return point.label
    request = point.requested_sm_clock_mhz
    missed = request is not None and abs(point.sm_clock_mhz - request) > CLOCK_STEP_MHZ
    capped = (point.power_cap_share or 0.0) >= _CAPPED_SHARE or bool(reasons & POWER_CAP_BIT)
    if capped and (missed or request is None):
        return "power-capped"
    return "clamped" if missed else "ok"


def _possible(point: ClockPoint) -> bool:
    """Whether time and power are any device's; sweeps come from files."""
    if point.iterations > point.duration_s / _SECONDS[0] or point.iteration_s > _SECONDS[1]:
        return False
    power_mw = None if point.energy_mj is None else point.energy_mj / point.duration_s
    return power_mw is None or _MILLIWATTS[0] <= power_mw <= _MILLIWATTS[1]


def _why_unfit(point: ClockPoint, label: PointLabel) -> FitCode | None:
    if label == "thermal":
        return FitCode.HEATED
    if label == "braked":
        return FitCode.BRAKED
    if label == "unverified" or point.sm_clock_mhz is None:
        return FitCode.NO_CLOCK
    low, high = point.sm_clock_low_mhz, point.sm_clock_high_mhz
    if low is None or high is None:
        return FitCode.MAY_WANDER if label == "power-capped" else None
    steady_mhz = max(2 * CLOCK_STEP_MHZ, _STEADY_SHARE * point.sm_clock_mhz)
    return FitCode.WANDERED if high - low > steady_mhz else None


def _disturbed(judged: Sequence[Judged]) -> set[int]:
    """Repeats far from the median of their setting, where there are three or more.

    One repeat that another job slowed down would bend the fit and widen every interval.
    """
    disturbed: set[int] = set()
    groups: dict[tuple[int | None, int | None], list[int]] = {}
    for index, item in enumerate(judged):
        if item.compared:
            groups.setdefault(item.setting, []).append(index)
    for quantity in (_seconds, _millijoules):
        apart: dict[int, float] = {}
        usual: list[float] = []
        for members in groups.values():
            values = np.array([quantity(judged[index].point) for index in members])
            if len(members) < 3 or not np.isfinite(values).all():
                continue
            deviation = np.abs(np.log(values / np.median(values)))
            # The median itself deviates by nothing and says nothing about the scatter.
            usual.extend(np.sort(deviation)[len(members) % 2 :].tolist())
            apart.update(zip(members, deviation.tolist(), strict=True))
        if usual:
            allowed = max(_DISTURBED * float(np.median(usual)) / 0.6745, _LEAST_DISTURBED)
            disturbed |= {index for index, deviation in apart.items() if deviation > allowed}
    return disturbed


def _seconds(point: ClockPoint) -> float:
    return point.iteration_s


def _millijoules(point: ClockPoint) -> float:
    return np.nan if point.energy_mj is None else point.energy_mj / point.iterations


def fit_points(judged: Sequence[Judged]) -> tuple[Points | None, Counter[FitCode]]:
    """Points of the fit, None without any, and how many were left out for which reason.

    Settings with median clocks in one step of the device are one clock.
    """
    left_out = Counter(item.reason for item in judged if item.reason is not None)
    used = [item for item in judged if item.fitted]
    if not used:
        return None, left_out
    clocks: dict[tuple[int | None, int | None], list[int]] = {}
    for item in used:
        clocks.setdefault(item.setting, []).append(item.point.sm_clock_mhz or 0)
    step_of = {key: round(float(np.median(values)) / CLOCK_STEP_MHZ) for key, values in clocks.items()}
    steps, clock_N = np.unique([step_of[item.setting] for item in used], return_inverse=True)
    mhz_N = np.array([float(item.point.sm_clock_mhz or 0) for item in used])
    return (
        Points(
            mhz_K=np.array([np.median(mhz_N[clock_N == clock]) for clock in range(len(steps))]),
            clock_N=clock_N.astype(np.int64),
            log_s_N=np.log([item.point.iteration_s for item in used]),
            log_mj_N=np.log([_millijoules(item.point) for item in used]),
        ),
        left_out,
    )


def settings_of(judged: Sequence[Judged]) -> list[Setting]:
    """Repeats put together by setting, in the order of kinds, then falling clock or limit."""
    groups: dict[tuple[int | None, int | None], list[Judged]] = {}
    for item in judged:
        groups.setdefault(item.setting, []).append(item)
    order = {"unlocked": 0, "lock": 1, "cap": 2, "both": 3}
    settings = [_setting(members) for members in groups.values()]
    return sorted(
        settings,
        key=lambda item: (order[item.kind], -(item.requested_sm_clock_mhz or 0.0), -(item.limit_mw or 0.0)),
    )


def _setting(members: Sequence[Judged]) -> Setting:
    first = members[0]
    compared = [item for item in members if item.compared]
    clocks = [item.point.sm_clock_mhz for item in compared or members if item.point.sm_clock_mhz is not None]
    shares = [item.point.power_cap_share for item in compared if item.point.power_cap_share is not None]
    reasons = [item.point.event_reasons for item in compared if item.point.event_reasons is not None]
    energies = [_millijoules(item.point) for item in compared]
    limits = [item.point.enforced_limit_mw for item in members if item.point.enforced_limit_mw is not None]
    return Setting(
        kind=first.kind,  # type: ignore[arg-type]  # one of the four by construction
        requested_sm_clock_mhz=first.point.requested_sm_clock_mhz,
        requested_limit_mw=first.limit_mw,
        limit_mw=None if first.limit_mw is None else float(np.median(limits)) if limits else first.limit_mw,
        sm_clock_mhz=float(np.median(clocks)) if clocks else None,
        label=Counter(item.label for item in members).most_common(1)[0][0],
        iteration_s_R=tuple(item.point.iteration_s for item in compared),
        energy_mj_R=tuple(energies) if np.isfinite(energies).all() else (),
        power_cap_share=float(np.mean(shares)) if shares else None,
        idle=sum(bool(bits & IDLE_BIT) for bits in reasons) > len(reasons) / 2 if reasons else None,
        fitted=sum(item.fitted for item in members),
        heated=sum(item.label == "thermal" for item in members),
        braked=sum(item.label == "braked" for item in members),
        flagged=sum(item.point.energy_flag is not None for item in compared),
    )


def scatter_of(settings: Sequence[Setting]) -> tuple[float | None, float | None, int]:
    """Standard deviations of ln(time) and ln(energy) over repeats, pooled, and their degrees of freedom.

    The smaller number of degrees of freedom where they differ.
    """
    scatters: list[tuple[float | None, int]] = []
    for values in ([item.iteration_s_R for item in settings], [item.energy_mj_R for item in settings]):
        squares, freedom = 0.0, 0
        for repeats in values:
            if len(repeats) > 1:
                logs = np.log(repeats)
                squares += float(np.sum((logs - logs.mean()) ** 2))
                freedom += len(repeats) - 1
        scatters.append((float(np.sqrt(squares / freedom)) if freedom else None, freedom))
    (time_scatter, time_dof), (energy_scatter, energy_dof) = scatters
    return (
        time_scatter,
        energy_scatter,
        min(dof for dof in (time_dof, energy_dof) if dof) if (time_dof or energy_dof) else 0,
    )
