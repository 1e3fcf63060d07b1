"""Fits the clock model to sweeps.

Shapes: N points, B bootstrap samples.

Points are judged (:mod:`observatory.analysis.frequency.points`), forms chosen
(:mod:`observatory.analysis.frequency.choosing`) and intervals drawn
(:mod:`observatory.analysis.frequency.resampling`); the clock that was sampled counts, never the request.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from observatory.analysis.frequency.choosing import choose_power, choose_time, curve_fit, fold_of
from observatory.analysis.frequency.confounds import find_confounds
from observatory.analysis.frequency.estimates import clock_estimates
from observatory.analysis.frequency.joining import idle_power_mw, join_notes, refuse_repeated
from observatory.analysis.frequency.model import POWER_TERMS, TIME_TERMS
from observatory.analysis.frequency.points import fit_points, judge, scatter_of, settings_of
from observatory.analysis.frequency.records import ClockModel, Reference, SeriesFit, Setting, series_title
from observatory.analysis.frequency.resampling import bootstrap_curves
from observatory.errors import ClockError
from observatory.run.documents.clock_sweep import ClockPoint, ClockSeries, ClockSweep

_LEAST_CLOCKS = 3
_MOST_POINTS = 1000
#: A curve that misses clocks which it did not see by more than this, rms of ln, describes nothing.
_MOST_MISSED = 0.25


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
        seed: of folds and bootstrap.

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
    refuse_repeated(sweeps, sources)
    limits = [sweep.default_limit_mw for sweep in sweeps if sweep.default_limit_mw is not None]
    merged: dict[tuple[object, ...], list[ClockSeries]] = {}
    for sweep in sweeps:
        for series in sweep.series:
            key = (series.name, series.phase, series.batch_size, series.context_tokens)
            merged.setdefault((*key, series.tokens_per_iteration), []).append(series)
    fitted: list[SeriesFit] = []
    missing: list[str] = []
    notes = join_notes(sweeps, sources)
    for alike in merged.values():
        points = [point for series in alike for point in series.points]
        outcome = _fit_series(alike[0], points, max(limits, default=None), bootstrap, seed)
        if isinstance(outcome, str):
            first = alike[0]
            title = series_title(first.name[:200], first.phase, first.batch_size, first.context_tokens)
            missing.append(f"{title}: {outcome}")
        else:
            fitted.append(outcome)
    if not fitted:
        raise ClockError(f"nothing can be fitted: {'; '.join([*missing, *notes])[:800]}")
    from observatory.host.provenance import find_git_sha

    return ClockModel(
        created_unix_s=time.time(),
        argv=tuple(argv),
        device=sweeps[0].device,
        default_limit_mw=max(limits, default=None),
        idle_power_mw=idle_power_mw(sweeps),
        supported_sm_clocks_mhz=_supported(sweeps),
        series=tuple(fitted),
        seed=seed,
        sources=tuple(sources),
        git_sha=find_git_sha(),
        notes=tuple(missing + notes + _limit_notes(merged, limits)),
    )


def _names(key: tuple[str | None, str | None]) -> tuple[str, str]:
    return key[0] or "", key[1] or ""


def _supported(sweeps: Sequence[ClockSweep]) -> tuple[float, ...] | None:
    """Clocks that every sweep which names them names."""
    lists = [set(sweep.supported_sm_clocks_mhz) for sweep in sweeps if sweep.supported_sm_clocks_mhz]
    return tuple(sorted(map(float, set.intersection(*lists)))) if lists else None


def _limit_notes(merged: dict[tuple[object, ...], list[ClockSeries]], limits: Sequence[int]) -> list[str]:
    """Whether the device ran under a limit that somebody had lowered before."""
    lowered = {
        point.enforced_limit_mw
        for alike in merged.values()
        for series in alike
        for point in series.points
        if point.requested_limit_mw is None and point.enforced_limit_mw is not None
        if limits and point.enforced_limit_mw < 0.99 * max(limits)
    }
    if not lowered:
        return []
    return [
        f"the power limit stood at {min(lowered) / 1e3:.0f} W where the sweep set none, below the default "
        f"of {max(limits) / 1e3:.0f} W: the reference is of this site's setting"
    ]


def _fit_series(
    series: ClockSeries, points: Sequence[ClockPoint], default_limit_mw: int | None, samples: int, seed: int
) -> SeriesFit | str:
    """The fit of one series, or why there is none."""
    if len(points) > _MOST_POINTS:
        return f"{len(points)} points are more than the {_MOST_POINTS} one fit takes; give fewer repeats"
    judged = judge(points, default_limit_mw)
    found, left_out = fit_points(judged)
    why = "; ".join(f"{item.points} left out: {item.reason}" for item in left_out)
    if found is None or found.blocks < _LEAST_CLOCKS:
        usable = 0 if found is None else found.blocks
        return (
            f"points at {usable} different clocks can be used, {_LEAST_CLOCKS} at least are needed; "
            f"measure more clocks, or fit it together with sweeps of others{' (' + why + ')' if why else ''}"
        )
    settings = settings_of(judged)
    fold_N = fold_of(found.block_N, seed)
    time_trials = choose_time(found, fold_N)
    missed = time_trials[0].score().rms_error
    if missed > _MOST_MISSED:
        return (
            "the time of an iteration follows no curve of the clock: the best form, "
            f"{time_trials[0].form.name}, misses clocks that it did not see by {100 * missed:.0f} % (rms of "
            "ln); something else changed the time, such as other work on the machine: measure again without "
            "it, longer and with more repeats"
        )
    known_N = np.isfinite(found.power_mw_N)
    no_power, power_trials = "", []
    if len(set(found.block_N[known_N])) < found.blocks:
        missing = int((~known_N).sum())
        no_power = f"the energy of {missing} of {len(known_N)} points is not known"
        flagged = sum(item.fitted and item.point.energy_flag is not None for item in judged)
        if flagged:
            no_power += f"; {flagged} are integrated power of iterations in time with the sensor"
    else:
        power_trials = choose_power(found, fold_N)
    time_BT, power_BT, time_form_B, power_form_B = bootstrap_curves(
        time_trials, power_trials, found, samples, seed
    )
    time_fit = curve_fit(time_trials, TIME_TERMS, time_BT, time_form_B)
    power_fit = curve_fit(power_trials, POWER_TERMS, power_BT, power_form_B) if power_trials else None
    time_scatter, energy_scatter, freedom = scatter_of(settings)
    reference = _reference(settings, points, float(found.mhz_N.min()))
    if reference is None:
        return f"no setting has both a time and a clock{': ' + why if why else ''}; measure again"
    estimates = clock_estimates(
        np.array([time_fit.parameters]),
        np.array([power_fit.parameters]) if power_fit else None,
        time_BT,
        power_BT if power_fit else None,
        low_mhz=float(found.mhz_N.min()),
        f0_mhz=found.f0_mhz,
    )
    powers_mw = [energy / seconds for item in settings for energy, seconds in _pairs(item)]
    return SeriesFit(
        name=series.name,
        phase=series.phase,
        batch_size=series.batch_size,
        context_tokens=series.context_tokens,
        tokens_per_iteration=series.tokens_per_iteration,
        low_mhz=float(found.mhz_N.min()),
        high_mhz=found.f0_mhz,
        clocks=found.blocks,
        points=len(found.mhz_N),
        reference=reference,
        time=time_fit,
        power=power_fit,
        no_power=no_power,
        samples_B=tuple(map(tuple, np.hstack([time_BT, power_BT]).tolist())),
        critical=estimates[0],
        compute_optimum=estimates[1],
        optimum=estimates[2],
        settings=tuple(settings),
        time_scatter=time_scatter,
        energy_scatter=energy_scatter,
        scatter_dof=freedom,
        left_out=tuple(left_out),
        confounds=tuple(find_confounds(settings, reference, time_scatter)),
        highest_power_mw=max(powers_mw, default=None),
    )


def _pairs(setting: Setting) -> list[tuple[float, float]]:
    return list(zip(setting.energy_mj_R, setting.iteration_s_R, strict=False))


def _reference(settings: Sequence[Setting], points: Sequence[ClockPoint], low_mhz: float) -> Reference | None:
    """The unlocked setting, else the one with the highest clock; never one below the fitted range."""
    known = [item for item in settings if (item.sm_clock_mhz or 0.0) >= low_mhz and item.iteration_s_R]
    unlocked = [item for item in known if item.kind == "unlocked"]
    if not known:
        return None
    chosen = unlocked[0] if unlocked else max(known, key=lambda item: item.sm_clock_mhz or 0.0)
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
    )
