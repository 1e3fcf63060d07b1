"""Fits the clock model to sweeps.

Shapes: B samples, K measured clocks.

Points are judged (:mod:`observatory.analysis.frequency.points`) and curves sampled
(:mod:`observatory.analysis.frequency.curves`); the clock that was sampled counts, never the request. Nothing
is said outside the measured range; a value at its edge says ``at most`` or ``at least``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from observatory.analysis.frequency.confounds import find_confounds
from observatory.analysis.frequency.curves import Points, energy_of, knees_mhz, sample_curves, seconds_of
from observatory.analysis.frequency.model_file import (
    ClockEstimate,
    ClockModel,
    FitCode,
    LeftOut,
    Reference,
    SeriesFit,
    Setting,
    series_title,
)
from observatory.analysis.frequency.points import CLOCK_STEP_MHZ, fit_points, judge, scatter_of, settings_of
from observatory.analysis.frequency.words import confound_words, fit_words
from observatory.analysis.statistics import sample_interval
from observatory.errors import ClockError
from observatory.reasons import Reason
from observatory.run.documents.clock_sweep import ClockPoint, ClockSeries, ClockSweep

Float64 = NDArray[np.float64]

_LEAST_CLOCKS = 3
_MOST_POINTS = 1000
#: Points that lie further than this from the curve, rms of ln, follow none.
_MOST_MISSED = 0.25
_MOST_NOTES = 20
_LONGEST_NOTE = 500
#: Temperatures of the chip so far apart are no accident; leakage grows with them.
_WARMER_C = 10


def fit_clocks(
    sweeps: Sequence[ClockSweep],
    *,
    sources: Sequence[str] = (),
    argv: Sequence[str] = (),
    bootstrap: int = 200,
    seed: int = 0,
) -> ClockModel:
    """Fit every series of the sweeps; equal series of several sweeps are one.

    Args:
        sweeps: sweeps of one device.
        sources: names of their files.
        argv: command line, for the document.
        bootstrap: B.
        seed: of the samples.

    Raises:
        ClockError: no sweeps, several devices, measurements given twice, or no series with enough clocks.
    """
    if not sweeps:
        raise ClockError("no clock sweep was given; make one with `observatory clocks sweep`")
    devices = {(sweep.device.name, sweep.device.uuid): sweep.device for sweep in sweeps}
    if len(devices) > 1:
        named = ", ".join(
            f"{name or 'unnamed'} {uuid or ''}".strip() for name, uuid in sorted(map(_names, devices))
        )
        raise ClockError(f"the sweeps are of {len(devices)} devices ({named[:200]}); fit each on its own")
    _refuse_repeated(sweeps, sources)
    limits = [sweep.default_limit_mw for sweep in sweeps if sweep.default_limit_mw is not None]
    merged: dict[tuple[object, ...], list[ClockSeries]] = {}
    for sweep in sweeps:
        for series in sweep.series:
            key = (series.name, series.phase, series.batch_size, series.context_tokens)
            merged.setdefault((*key, series.tokens_per_iteration), []).append(series)
    fitted: list[SeriesFit] = []
    notes: list[Reason] = []
    for parts in merged.values():
        points = [point for series in parts for point in series.points]
        outcome = _fit_series(parts[0], points, max(limits, default=None), bootstrap, seed)
        if isinstance(outcome, Reason):
            first = parts[0]
            title = series_title(first.name[:200], first.phase, first.batch_size, first.context_tokens)
            notes.append(Reason(FitCode.NOT_FITTED, {"title": title}, because=(outcome,)))
        else:
            fitted.append(outcome)
    notes += _join_notes(sweeps, sources)
    if not fitted:
        raise ClockError(f"nothing can be fitted: {'; '.join(map(fit_words, notes))[:800]}")
    notes += _limit_notes(merged, limits)
    from observatory.host.provenance import find_git_sha

    return ClockModel(
        created_unix_s=time.time(),
        argv=tuple(argv),
        device=sweeps[0].device,
        default_limit_mw=max(limits, default=None),
        idle_power_mw=_idle_power_mw(sweeps),
        series=tuple(fitted),
        seed=seed,
        sources=tuple(sources),
        git_sha=find_git_sha(),
        notes=tuple(map(fit_words, notes)),
        note_codes=tuple(note.code.value for note in notes),
    )


def _names(key: tuple[str | None, str | None]) -> tuple[str, str]:
    return key[0] or "", key[1] or ""


def _limit_notes(merged: dict[tuple[object, ...], list[ClockSeries]], limits: Sequence[int]) -> list[Reason]:
    """Whether the device ran under a limit that had been lowered before."""
    lowered = {
        point.enforced_limit_mw
        for parts in merged.values()
        for series in parts
        for point in series.points
        if point.requested_limit_mw is None and point.enforced_limit_mw is not None
        if limits and point.enforced_limit_mw < 0.99 * max(limits)
    }
    if not lowered:
        return []
    return [Reason(FitCode.LIMIT_WAS_LOWERED, {"limit_mw": min(lowered), "default_mw": max(limits)})]


def _fit_series(
    series: ClockSeries, points: Sequence[ClockPoint], default_limit_mw: int | None, samples: int, seed: int
) -> SeriesFit | Reason:
    """The fit of one series, or why there is none."""
    if len(points) > _MOST_POINTS:
        return Reason(FitCode.TOO_MANY_POINTS, {"points": len(points), "most": _MOST_POINTS})
    judged = judge(points, default_limit_mw)
    fitted, left_out = fit_points(judged)
    unused: list[JsonValue] = [{"points": count, "code": code.value} for code, count in left_out.items()]
    if fitted is None or len(fitted.mhz_K) < _LEAST_CLOCKS:
        usable = 0 if fitted is None else len(fitted.mhz_K)
        clocks: dict[str, JsonValue] = {"clocks": usable, "needed": _LEAST_CLOCKS, "left_out": unused}
        return Reason(FitCode.TOO_FEW_CLOCKS, clocks)
    settings = settings_of(judged)
    row_BT = sample_curves(fitted, samples, seed)
    missed = _missed(row_BT, fitted)
    if missed > _MOST_MISSED:
        return Reason(FitCode.NO_CURVE, {"error": missed})
    no_power = None
    if not fitted.has_energy:
        flagged = sum(item.fitted and item.point.energy_flag is not None for item in judged)
        missing = int((~np.isfinite(fitted.log_mj_N)).sum())
        counts = {"missing": missing, "points": len(fitted.log_mj_N), "flagged": flagged}
        no_power = Reason(FitCode.ENERGY_NOT_KNOWN, counts)
    time_scatter, energy_scatter, freedom = scatter_of(settings)
    low_mhz, f0_mhz = float(fitted.mhz_K[0]), float(fitted.mhz_K[-1])
    reference = _reference(settings, points, low_mhz)
    if reference is None:
        return Reason(FitCode.NO_REFERENCE, {"left_out": unused})
    critical_B = knees_mhz(row_BT, low_mhz, f0_mhz)
    optimum = ClockEstimate(mhz=None, reason=fit_words(Reason(FitCode.NO_ENERGY)), reason_code="no energy")
    if no_power is None:
        energy_BK = energy_of(row_BT, fitted.mhz_K, fitted.mhz_K)
        least_mhz = float(fitted.mhz_K[np.argmin(np.median(energy_BK, axis=0))])
        optimum = _estimate(least_mhz, fitted.mhz_K[np.argmin(energy_BK, axis=1)], low_mhz, f0_mhz)
    powers_mw = [energy / seconds for item in settings for energy, seconds in _pairs(item)]
    return SeriesFit(
        name=series.name,
        phase=series.phase,
        batch_size=series.batch_size,
        context_tokens=series.context_tokens,
        tokens_per_iteration=series.tokens_per_iteration,
        clock_mhz_K=tuple(fitted.mhz_K.tolist()),
        points=len(fitted.log_s_N),
        reference=reference,
        has_energy=no_power is None,
        no_power=fit_words(no_power) if no_power else "",
        no_power_code=no_power.code.value if no_power else None,
        samples_B=tuple(map(tuple, row_BT.tolist())),
        critical=_estimate(float(np.median(critical_B)), critical_B, low_mhz, f0_mhz),
        optimum=optimum,
        settings=tuple(settings),
        time_scatter=time_scatter,
        energy_scatter=energy_scatter,
        scatter_dof=freedom,
        left_out=tuple(
            LeftOut(reason=fit_words(Reason(code)), reason_code=code.value, points=count)
            for code, count in left_out.items()
        ),
        confounds=tuple(
            item.model_copy(update={"text": confound_words(item)})
            for item in find_confounds(settings, reference, time_scatter)
        ),
        highest_power_mw=max(powers_mw, default=None),
    )


def _pairs(setting: Setting) -> list[tuple[float, float]]:
    return list(zip(setting.energy_mj_R, setting.iteration_s_R, strict=False))


def _reference(settings: Sequence[Setting], points: Sequence[ClockPoint], low_mhz: float) -> Reference | None:
    """The unlocked setting, else the one with the highest clock; never one below the fitted range."""
    measured = [item for item in settings if (item.sm_clock_mhz or 0.0) >= low_mhz and item.iteration_s_R]
    unlocked = [item for item in measured if item.kind == "unlocked"]
    if not measured:
        return None
    chosen = unlocked[0] if unlocked else max(measured, key=lambda item: item.sm_clock_mhz or 0.0)
    powers = [energy / seconds for energy, seconds in _pairs(chosen)]
    limits = [
        point.enforced_limit_mw
        for point in points
        if point.requested_limit_mw is None and point.enforced_limit_mw is not None
    ]
    return Reference(
        how="unlocked" if unlocked else "highest clock",
        sm_clock_mhz=chosen.sm_clock_mhz or 0.0,
        iteration_s=float(np.median(chosen.iteration_s_R)),
        energy_mj=float(np.median(chosen.energy_mj_R)) if chosen.energy_mj_R else None,
        power_mw=float(np.median(powers)) if powers else None,
        power_cap_share=chosen.power_cap_share,
        limit_mw=float(np.median(limits)) if limits else None,
        on_curve=chosen.fitted > 0,
    )


def _missed(row_BT: Float64, points: Points) -> float:
    """How far points lie from the curve, rms of the logarithm."""
    seconds_K = np.median(seconds_of(row_BT, points.mhz_K[-1], points.mhz_K), axis=0)
    return float(np.sqrt(np.mean((points.log_s_N - np.log(seconds_K)[points.clock_N]) ** 2)))


def _estimate(mhz: float, sample_B: Float64, low_mhz: float, f0_mhz: float) -> ClockEstimate:
    interval = sample_interval(mhz, sample_B)
    edge = CLOCK_STEP_MHZ / 2.0
    return ClockEstimate(
        mhz=mhz,
        low_mhz=interval.low,
        high_mhz=interval.high,
        relation="at most" if mhz < low_mhz + edge else "at least" if mhz > f0_mhz - edge else "at",
    )


def _idle_power_mw(sweeps: Sequence[ClockSweep]) -> float | None:
    """Median power without load, of the sweeps that began without a lock if there are any: locks raise it."""
    with_idle = [sweep for sweep in sweeps if sweep.idle_power_mw is not None]
    free = [sweep for sweep in with_idle if not (sweep.set_outside and _locked(sweep))]
    powers = [sweep.idle_power_mw for sweep in free or with_idle if sweep.idle_power_mw is not None]
    return float(median(powers)) if powers else None


def _refuse_repeated(sweeps: Sequence[ClockSweep], sources: Sequence[str]) -> None:
    """Refuse measurements that are given twice: they would count as repeats that agree.

    Raises:
        ClockError: a series of two sweeps has the same points.
    """
    name_of: dict[tuple[ClockPoint, ...], str] = {}
    for name, sweep in zip(_source_names(sweeps, sources), sweeps, strict=True):
        for series in sweep.series:
            if series.points in name_of:
                raise ClockError(
                    f"{name} and {name_of[series.points]} hold the same measurements, which would count "
                    "twice; give each result once"
                )
            name_of[series.points] = name


def _source_names(sweeps: Sequence[ClockSweep], sources: Sequence[str]) -> list[str]:
    return [
        sources[number][:100] if number < len(sources) else f"sweep {number + 1}"
        for number in range(len(sweeps))
    ]


def _join_notes(sweeps: Sequence[ClockSweep], sources: Sequence[str]) -> list[Reason]:
    """What a reader of the model must know: doubts about how the sweeps fit together, and their own notes.

    Args:
        sweeps: the sweeps.
        sources: names of their files, of as many as have one.
    """
    names = _source_names(sweeps, sources)
    notes = [
        Reason(FitCode.NOTE_OF_SWEEP, {"source": name, "note": note[:_LONGEST_NOTE]})
        for name, sweep in zip(names, sweeps, strict=False)
        for note in sweep.notes
    ]
    if len(notes) > _MOST_NOTES:
        notes[_MOST_NOTES:] = [Reason(FitCode.MORE_NOTES, {"notes": len(notes) - _MOST_NOTES})]
    return [*_unlike_unlocked(sweeps, names), *_unlike_warm(sweeps, names), *notes]


def _points(sweep: ClockSweep) -> list[ClockPoint]:
    return [point for series in sweep.series for point in series.points]


def _locked(sweep: ClockSweep) -> bool:
    return any(point.requested_sm_clock_mhz is not None for point in _points(sweep))


def _unlike_unlocked(sweeps: Sequence[ClockSweep], names: Sequence[str]) -> list[Reason]:
    """Sweeps without any lock that ran at different clocks, which were set without being stated."""
    clock_of: dict[str, float] = {}
    for name, sweep in zip(names, sweeps, strict=False):
        clocks = [
            point.sm_clock_mhz for point in _points(sweep) if point.sm_clock_mhz and point.label == "ok"
        ]
        limited = any(point.requested_limit_mw is not None for point in _points(sweep))
        if clocks and not _locked(sweep) and not limited:
            clock_of[name] = median(clocks)
    if not clock_of or max(clock_of.values()) - min(clock_of.values()) <= 2 * CLOCK_STEP_MHZ:
        return []
    low, high = min(clock_of, key=lambda name: clock_of[name]), max(clock_of, key=lambda name: clock_of[name])
    values: dict[str, JsonValue] = {"low": low, "high": high}
    clocks_mhz = {"low_mhz": clock_of[low], "high_mhz": clock_of[high]}
    return [Reason(FitCode.UNLOCKED_DIFFER, {**values, **clocks_mhz})]


def _unlike_warm(sweeps: Sequence[ClockSweep], names: Sequence[str]) -> list[Reason]:
    """Sweeps whose points began at different temperatures."""
    start_c: dict[str, float] = {}
    for name, sweep in zip(names, sweeps, strict=False):
        temperatures = [p.start_temperature_c for p in _points(sweep) if p.start_temperature_c is not None]
        if temperatures:
            start_c[name] = median(temperatures)
    if not start_c or max(start_c.values()) - min(start_c.values()) < _WARMER_C:
        return []
    cold, warm = min(start_c, key=lambda name: start_c[name]), max(start_c, key=lambda name: start_c[name])
    values: dict[str, JsonValue] = {"cold": cold, "warm": warm}
    temperatures_c = {"cold_c": start_c[cold], "warm_c": start_c[warm]}
    return [Reason(FitCode.TEMPERATURES_DIFFER, {**values, **temperatures_c})]
