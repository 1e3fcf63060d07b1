"""Clock models of synthetic devices, and the advice for them."""

from __future__ import annotations

import functools

from observatory.advice.frequency import ClockAdvice, SeriesAdvice, recommend_clocks
from observatory.analysis.frequency import ClockModel, fit_clocks
from observatory.run.documents.clock_sweep import ClockSweep
from tests.devices.synthetic_device import (
    DEVICES,
    made_sweep,
)

CAPS_W = (250.0, 300.0, 350.0, 400.0, 450.0)


@functools.cache
def model_of(name: str, seed: int = 0, time_noise: float = 0.003, energy_noise: float = 0.01) -> ClockModel:
    """A usual sweep of one device, fitted."""
    sweep = made_sweep(
        [DEVICES[name]], caps_w=CAPS_W, time_noise=time_noise, energy_noise=energy_noise, seed=seed
    )
    return fit_clocks([sweep], bootstrap=60, seed=seed)


def advice_of(name: str, max_slowdown: float = 0.02, **noise: float) -> SeriesAdvice:
    return recommend_clocks(model_of(name, **noise), max_slowdown=max_slowdown).series[0]  # type: ignore[arg-type]


def fit(sweep: ClockSweep, bootstrap: int = 60) -> ClockModel:
    return fit_clocks([sweep], bootstrap=bootstrap)


def only(advice: ClockAdvice) -> SeriesAdvice:
    (series,) = advice.series
    return series
