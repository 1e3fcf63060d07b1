"""Time and energy of one series at any clock, relative to its reference, with all bootstrap samples.

Shapes: B bootstrap samples, F clocks. The first row of every result is the fit itself, samples follow.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from observatory.analysis.frequency.model import POWER_TERMS, TIME_TERMS, energy_mj, iteration_s, power_mw
from observatory.analysis.frequency.model_file import SeriesFit
from observatory.analysis.statistics import Interval, sample_interval
from observatory.run.records import Record

Float64 = NDArray[np.float64]

#: Energies this close, relative, are the same: sensors are calibrated to a few percent, repeats to about
#: this.
TIE = 0.005


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
        reference_mhz: clock without a lock, or the highest measured where that is lower.
        candidate_F: clocks that may be recommended, rising, the reference among them.
    """

    def __init__(self, fit: SeriesFit, supported_mhz: Sequence[float] | None) -> None:
        self.fit = fit
        terms = len(TIME_TERMS) + len(POWER_TERMS)
        sample_BT = np.array(fit.samples_B, dtype=np.float64).reshape(-1, terms)
        power = fit.power.parameters if fit.power else (0.0,) * len(POWER_TERMS)
        # The fitted parameters stand in the first row, the samples below.
        self._row_BT = np.vstack([[*fit.time.parameters, *power], sample_BT])
        self.reference_mhz = min(fit.reference.sm_clock_mhz, fit.high_mhz)
        self.candidate_F = self._candidates(supported_mhz)

    @property
    def has_energy(self) -> bool:
        """Whether energies were measured; without, all energies come out as those of the reference."""
        return self.fit.power is not None

    def _candidates(self, supported_mhz: Sequence[float] | None) -> Float64:
        if supported_mhz:
            clocks = set(supported_mhz)
        else:
            clocks = {
                item.sm_clock_mhz
                for item in self.fit.settings
                if item.kind == "lock" and item.label == "ok" and item.sm_clock_mhz is not None
            }
        inside = {mhz for mhz in clocks if self.fit.low_mhz <= mhz <= self.reference_mhz}
        return np.array(sorted(inside | {self.reference_mhz}))

    def ratios(self, mhz_F: Float64) -> tuple[Float64, Float64]:
        """Time and energy over those of the reference, (1 + B, F); above it a lock does nothing."""
        time_BT, power_BT = np.split(self._row_BT, [len(TIME_TERMS)], axis=1)
        held_F = np.append(np.minimum(mhz_F, self.reference_mhz), self.reference_mhz)
        seconds_BF = iteration_s(time_BT, self.fit.high_mhz, held_F)
        time_BF = seconds_BF[:, :-1] / seconds_BF[:, -1:]
        if not self.has_energy:
            return time_BF, np.ones_like(time_BF)
        energy_BF = energy_mj(time_BT, power_BT, self.fit.high_mhz, held_F)
        return time_BF, energy_BF[:, :-1] / energy_BF[:, -1:]

    def seconds(self, mhz_F: Float64) -> Float64:
        """t(f), (1 + B, F)."""
        return iteration_s(self._row_BT[:, : len(TIME_TERMS)], self.fit.high_mhz, mhz_F)

    def milliwatts(self, mhz_F: Float64) -> Float64:
        """P(f), (1 + B, F); zeros without energy."""
        power_BT = self._row_BT[:, len(TIME_TERMS) :]
        return power_mw(power_BT, self.fit.high_mhz, mhz_F, self.seconds(mhz_F))

    def curve(self, clocks: int = 100) -> pd.DataFrame:
        """The fitted curves for a figure, clocks evenly spread over the measured range.

        Columns: sm_clock_mhz; iteration_s, energy_mj (NaN without), slowdown, saving,
        each with _low and _high.
        """
        mhz_F = np.linspace(self.fit.low_mhz, self.fit.high_mhz, clocks)
        seconds_BF = self.seconds(mhz_F)
        energy_BF = (
            self.milliwatts(mhz_F) * seconds_BF if self.has_energy else np.full_like(seconds_BF, np.nan)
        )
        time_BF, ratio_BF = self.ratios(mhz_F)
        columns = {"sm_clock_mhz": mhz_F}
        for name, value_BF in (
            ("iteration_s", seconds_BF),
            ("energy_mj", energy_BF),
            ("slowdown", time_BF - 1.0),
            ("saving", 1.0 - ratio_BF if self.has_energy else energy_BF),
        ):
            spread_BF = value_BF[1:] if len(value_BF) > 1 else value_BF
            columns[name] = value_BF[0]
            columns[f"{name}_low"] = np.minimum(np.quantile(spread_BF, 0.05, axis=0), value_BF[0])
            columns[f"{name}_high"] = np.maximum(np.quantile(spread_BF, 0.95, axis=0), value_BF[0])
        return pd.DataFrame(columns)

    def choice(self, mhz: float) -> ClockChoice:
        """What a clock does."""
        time_B1, energy_B1 = self.ratios(np.array([mhz]))
        saving = sample_interval(1.0 - float(energy_B1[0, 0]), 1.0 - energy_B1[1:, 0])
        per_token = self.reference_mj_per_token
        return ClockChoice(
            sm_clock_mhz=mhz,
            slowdown=sample_interval(float(time_B1[0, 0]) - 1.0, time_B1[1:, 0] - 1.0),
            saving=saving,
            mj_per_token=None if per_token is None else per_token * (1.0 - saving.value),
        )

    @property
    def reference_mj_per_token(self) -> float | None:
        """Energy per token at the reference, as measured; None when not known."""
        tokens, energy = self.fit.tokens_per_iteration, self.fit.reference.energy_mj
        return energy / tokens if tokens and energy is not None else None

    def inside(self, mhz_F: Float64, max_slowdown: float) -> NDArray[np.bool_]:
        """Which clocks surely keep the budget, (F,)."""
        time_BF, _ = self.ratios(mhz_F)
        upper_F = np.quantile(time_BF[1:], 0.95, axis=0) if len(time_BF) > 1 else time_BF[0]
        kept: NDArray[np.bool_] = np.maximum(upper_F, time_BF[0]) <= 1.0 + max_slowdown + 1e-12
        return kept
