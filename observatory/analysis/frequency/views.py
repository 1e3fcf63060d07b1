"""Time and energy of one series at any clock, relative to its reference, in every sample of its curves.

Shapes: B samples, F clocks. Values are medians of samples, intervals of 90 %.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from observatory.analysis.frequency.curves import UNREPEATED, UNREPEATED_DOF, energy_of, seconds_of
from observatory.analysis.frequency.model_file import SeriesFit
from observatory.analysis.frequency.points import CLOCK_STEP_MHZ
from observatory.analysis.statistics import Interval, sample_interval
from observatory.run.records import Record

Float64 = NDArray[np.float64]

#: Energies this close, relative, are the same: sensors are calibrated to a few percent, repeats to about
#: this.
TIE = 0.005
#: Probability with which a clock has to keep a budget. With 0.9 and more, noisy repeats leave energy on the
#: table; with 0.8, at most 1.5 % of random devices of a class break it
#: (docs/evidence/power.md#random-devices-of-known-truth).
LEAST_PROBABILITY = 0.8


def highest_of_ties(clock_F: Float64, cost_F: Float64) -> float:
    """The highest clock whose cost ties with the least."""
    return float(clock_F[cost_F <= cost_F.min() * (1.0 + TIE)].max())


def surely_saves(saving: Interval) -> bool:
    """Whether all of a saving's interval is more than energies that count as the same differ by."""
    return saving.low is not None and saving.low > TIE


class ClockChoice(Record):
    """A clock and what it does against the reference.

    Attributes:
        sm_clock_mhz: the clock.
        slowdown: time relative to the reference, minus 1.
        saving: 1 minus energy relative to the reference.
        mj_per_token: energy per token; None when tokens per iteration are not known.
    """

    sm_clock_mhz: float
    slowdown: Interval
    saving: Interval
    mj_per_token: float | None = None


class SeriesView:
    """One series of a model, ready to be asked.

    Attributes:
        fit: the series.
        reference_mhz: clock of the reference.
        candidate_F: clocks that may be recommended, rising: those that a lock was measured at, and the
            reference's.
    """

    def __init__(self, fit: SeriesFit) -> None:
        self.fit = fit
        self._row_BT = np.array(fit.samples_B, dtype=np.float64)
        self.reference_mhz = fit.reference.sm_clock_mhz
        locked = {
            min(fit.clock_mhz_K, key=lambda mhz: abs(mhz - clock))
            for item in fit.settings
            if item.kind == "lock" and item.fitted and (clock := item.sm_clock_mhz) is not None
        }
        below = {mhz for mhz in locked if mhz < self.reference_mhz - CLOCK_STEP_MHZ / 2.0}
        self.candidate_F = np.array(sorted(below | {self.reference_mhz}))

    @property
    def has_energy(self) -> bool:
        """Whether energies were measured; without, all energies come out as those of the reference."""
        return self.fit.has_energy and self.fit.reference.energy_mj is not None

    def ratios(self, mhz_F: Float64) -> tuple[Float64, Float64]:
        """Time and energy over those of the reference, (B, F); at and above it a lock does nothing."""
        is_below_F = mhz_F < self.reference_mhz
        reference_s_B1, reference_mj_B1 = self._reference()
        time_BF = np.where(is_below_F, self.seconds(mhz_F) / reference_s_B1, 1.0)
        if not self.has_energy:
            return time_BF, np.ones_like(time_BF)
        return time_BF, np.where(is_below_F, self.millijoules(mhz_F) / reference_mj_B1, 1.0)

    def _reference(self) -> tuple[Float64, Float64]:
        """Time and energy of the reference, (B, 1) each: of the curves, else of its repeats."""
        reference = self.fit.reference
        if reference.on_curve:
            at_F = np.array([reference.sm_clock_mhz])
            return self.seconds(at_F), self.millijoules(at_F) if self.has_energy else np.ones((1, 1))
        generator = np.random.default_rng(0)
        repeats = next((len(s.iteration_s_R) for s in self.fit.settings if s.kind == "unlocked"), 1)
        freedom = self.fit.scatter_dof or UNREPEATED_DOF
        scatters = (self.fit.time_scatter, self.fit.energy_scatter)
        time, energy = (
            np.exp(
                (UNREPEATED if scatter is None else scatter)
                * generator.standard_t(freedom, size=(len(self._row_BT), 1))
                / np.sqrt(max(repeats, 1))
            )
            for scatter in scatters
        )
        return reference.iteration_s * time, (reference.energy_mj or 1.0) * energy

    def seconds(self, mhz_F: Float64) -> Float64:
        """t(f), (B, F)."""
        return seconds_of(self._row_BT, self.fit.high_mhz, np.clip(mhz_F, None, self.fit.high_mhz))

    def millijoules(self, mhz_F: Float64) -> Float64:
        """E(f), (B, F)."""
        return energy_of(self._row_BT, self.fit.clock_mhz_K, np.clip(mhz_F, None, self.fit.high_mhz))

    def milliwatts(self, mhz_F: Float64) -> Float64:
        """Mean power, (B, F); zeros without energy."""
        return self.millijoules(mhz_F) / self.seconds(mhz_F)

    def curve(self, clocks: int = 100) -> pd.DataFrame:
        """The curves for a figure, clocks evenly spread over the measured range.

        Columns: sm_clock_mhz; iteration_s, energy_mj (NaN without), slowdown, saving,
        each with _low and _high.
        """
        mhz_F = np.linspace(self.fit.low_mhz, self.fit.high_mhz, clocks)
        seconds_BF = self.seconds(mhz_F)
        energy_BF = self.millijoules(mhz_F) if self.has_energy else np.full_like(seconds_BF, np.nan)
        time_BF, ratio_BF = self.ratios(mhz_F)
        columns = {"sm_clock_mhz": mhz_F}
        for name, value_BF in (
            ("iteration_s", seconds_BF),
            ("energy_mj", energy_BF),
            ("slowdown", time_BF - 1.0),
            ("saving", 1.0 - ratio_BF if self.has_energy else energy_BF),
        ):
            low_F, middle_F, high_F = np.quantile(value_BF, [0.05, 0.5, 0.95], axis=0)
            columns |= {name: middle_F, f"{name}_low": low_F, f"{name}_high": high_F}
        return pd.DataFrame(columns)

    def choice(self, mhz: float) -> ClockChoice:
        """What a clock does."""
        time_B, energy_B = (ratio_B1[:, 0] for ratio_B1 in self.ratios(np.array([mhz])))
        saving = sample_interval(1.0 - float(np.median(energy_B)), 1.0 - energy_B)
        per_token = self.reference_mj_per_token
        return ClockChoice(
            sm_clock_mhz=mhz,
            slowdown=sample_interval(float(np.median(time_B)) - 1.0, time_B - 1.0),
            saving=saving,
            mj_per_token=None if per_token is None else per_token * (1.0 - saving.value),
        )

    @property
    def reference_mj_per_token(self) -> float | None:
        """Energy per token at the reference, as measured; None when not known."""
        tokens, energy = self.fit.tokens_per_iteration, self.fit.reference.energy_mj
        return energy / tokens if tokens and energy is not None else None

    def inside(self, mhz_F: Float64, max_slowdown: float) -> NDArray[np.bool_]:
        """Which clocks keep the budget with a probability of :data:`LEAST_PROBABILITY`, (F,)."""
        upper_F = np.quantile(self.ratios(mhz_F)[0], LEAST_PROBABILITY, axis=0)
        kept: NDArray[np.bool_] = upper_F <= 1.0 + max_slowdown + 1e-12
        return kept
