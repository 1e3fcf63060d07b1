"""What making a chunk here costs, from measured prefills at several cached fractions of a prompt.

``observatory reuse measure`` times prefills of a prompt of n tokens of which a fraction is cached. A chunk of
C tokens that is not cached behind n - C that are is the fraction 1 - C / n; a chunk longer than the prompt
was not measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.energy.prefix_cache import ReuseFit, fit_reuse
from observatory.run.documents.prefix_cache import ReuseMeasurements

Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeasuredPrefill:
    """Time and energy of prefilling a chunk.

    Attributes:
        model: what was prefilled.
        prompt_tokens: longest chunk.
        batch_size: prompts prefilled together; costs are of one.
    """

    model: str
    prompt_tokens: int
    batch_size: int
    _time_ms: ReuseFit
    _energy: ReuseFit

    def us(self, size_C: Float64) -> Float64:
        """Microseconds; NaN for chunks longer than the prompt."""
        return self._of(self._time_ms, size_C) * 1e3

    def mj(self, size_C: Float64) -> Float64:
        """Millijoules; NaN likewise."""
        return self._of(self._energy, size_C)

    def _of(self, fit: ReuseFit, size_C: Float64) -> Float64:
        return np.array(
            [
                fit.prefill_mj(1.0 - size / self.prompt_tokens) / self.batch_size
                if size <= self.prompt_tokens
                else np.nan
                for size in size_C.tolist()
            ]
        )


def measured_prefill(measured: ReuseMeasurements) -> MeasuredPrefill:
    """Fit time and energy of prefills against the cached fraction.

    Raises:
        EnergyError: fewer than two cached fractions.
    """
    # The form of the energy holds for the time as well: fixed, linear and square parts of what is not cached.
    times = [item.model_copy(update={"energy_mj": item.duration_s * 1e3}) for item in measured.measurements]
    return MeasuredPrefill(
        model=measured.model,
        prompt_tokens=measured.prompt_tokens,
        batch_size=measured.batch_size,
        _time_ms=fit_reuse(measured.model_copy(update={"measurements": tuple(times)})),
        _energy=fit_reuse(measured),
    )
