"""Sweeps of synthetic devices, changed point by point, and their fits."""

from __future__ import annotations

from observatory.analysis.frequency import fit_clocks
from observatory.analysis.frequency.model_file import SeriesFit
from observatory.run.documents.clock_sweep import ClockPoint, ClockSweep

CAPS_W = (250.0, 300.0, 350.0, 400.0, 450.0)


def fitted(sweep: ClockSweep, bootstrap: int = 60) -> SeriesFit:
    return fit_clocks([sweep], bootstrap=bootstrap).series[0]


def changed(sweep: ClockSweep, **update: object) -> ClockSweep:
    return sweep.model_copy(update=update)


def with_points(sweep: ClockSweep, *points: ClockPoint) -> ClockSweep:
    """The sweep with its only series' points replaced."""
    series = sweep.series[0].model_copy(update={"points": points})
    return changed(sweep, series=(series,))


def map_points(sweep: ClockSweep, which: object, **update: object) -> ClockSweep:
    """The sweep with some points changed: those with this request, or this limit in mW."""
    points = [
        point.model_copy(update=update)
        if which in (point.requested_sm_clock_mhz, point.requested_limit_mw)
        else point
        for point in sweep.series[0].points
    ]
    return with_points(sweep, *points)
