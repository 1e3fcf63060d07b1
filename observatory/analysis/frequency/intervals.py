"""Values with 90 % intervals."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import stats

from observatory.run.manifest import Record

_LEVELS = (0.05, 0.95)


class Interval(Record):
    """A value with its 90 % interval; the ends are None where nothing tells them."""

    value: Annotated[float, Field(allow_inf_nan=False)]
    low: Annotated[float, Field(allow_inf_nan=False)] | None = None
    high: Annotated[float, Field(allow_inf_nan=False)] | None = None

    def percent(self) -> str:
        """For people, as percent: ``12.3 % (11.8 to 12.9)``."""
        if self.low is None or self.high is None:
            return f"{100 * self.value:.1f} % (interval not known)"
        return f"{100 * self.value:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f})"


def sample_interval(value: float, sample_B: NDArray[np.float64]) -> Interval:
    """From bootstrap samples; always holds the value itself."""
    if not len(sample_B):
        return Interval(value=value)
    low, high = np.quantile(sample_B, _LEVELS)
    return Interval(value=value, low=min(float(low), value), high=max(float(high), value))


def student_interval(value: float, error: float | None, freedom: int) -> Interval:
    """From a standard error with that many degrees of freedom; without ends when either is missing."""
    if error is None or freedom < 1:
        return Interval(value=value)
    half = float(stats.t.ppf(_LEVELS[1], freedom)) * error
    return Interval(value=value, low=value - half, high=value + half)
