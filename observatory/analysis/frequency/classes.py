"""How a phase behaves when the SM clock falls: classes with thresholds. They are ours.

arXiv 2605.11999 reports three classes without publishing their names or limits; these need not be the same.
Let f_free be the lowest clock whose slowdown against the reference is at most 2 %.

| class | rule |
|---|---|
| capped | without a lock, the power limit holds the clock down in at least a tenth of the time |
| host-bound | the device says that it idles at most settings |
| memory-bound flat | f_free is at most 0.6 of the reference clock |
| knee | f_free lies between 0.6 and 0.9 of it |
| compute-proportional | f_free is above 0.9 of it |

The first two come first, since they say what to mend before any clock is worth choosing; the curve's own
class is named next to them.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from observatory.analysis.frequency.model_file import SeriesFit
from observatory.analysis.frequency.views import SeriesView
from observatory.analysis.frequency.words import behaviour_words, fix_first_words
from observatory.run.records import Record, Text

Float64 = NDArray[np.float64]

CurveClass = Literal["memory-bound flat", "knee", "compute-proportional"]
Evidence = Literal["capped", "idles", "little power"]

_FREE_SLOWDOWN = 0.02
_FLAT = 0.6
_PROPORTIONAL = 0.9
_CAPPED_SHARE = 0.1
_STEP_MHZ = 5.0
_MOST_STEPS = 1000
_CAUSED: dict[Evidence | None, Literal["capped", "host-bound"]] = {
    "capped": "capped",
    "idles": "host-bound",
}
#: Below this part of the way from idle power to the limit, a device hardly works.
_HARDLY_WORKS = 0.15


class Behaviour(Record):
    """The class of a series.

    Attributes:
        name: the class; None when the clocks do not reach low enough to decide.
        curve: the class of the time curve alone; None likewise.
        agreement: share of samples whose curve is of that class; None like ``curve``.
        free_mhz: f_free; never below the lowest clock measured.
        evidence: what decided the class; None where the curve alone did.
        numbers: what belongs to the evidence.
        text: the same in one sentence.
        fix_first: what to mend before choosing a clock; empty when nothing.
    """

    name: Literal["memory-bound flat", "knee", "compute-proportional", "host-bound", "capped"] | None
    curve: CurveClass | None
    agreement: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    free_mhz: float
    evidence: Evidence | None = None
    numbers: dict[str, float] = Field(default_factory=dict)
    text: Text = ""
    fix_first: Text = ""

    @property
    def words(self) -> str:
        """The class; with a cause that takes precedence, that of the curve."""
        name = self.name or "not known"
        return name if self.curve in (None, self.name) else f"{name} (curve: {self.curve})"


def _free_mhz_B(view: SeriesView) -> Float64:
    """f_free within the measured range in every sample, (B,)."""
    low_mhz, reference = view.fit.low_mhz, _reference_mhz(view.fit)
    steps = min(_MOST_STEPS, round((reference - low_mhz) / _STEP_MHZ) + 1)
    grid_F = np.linspace(low_mhz, reference, max(2, steps))
    is_free_BF = view.ratios(grid_F)[0] <= 1.0 + _FREE_SLOWDOWN
    is_free_BF[:, -1] = True
    free_B: Float64 = grid_F[np.argmax(is_free_BF, axis=1)]
    return free_B


def behaviour_of(view: SeriesView, idle_power_mw: float | None, limit_mw: float | None) -> Behaviour:
    """The class of a series.

    Args:
        view: the series.
        idle_power_mw: power of the device without load; None when not known.
        limit_mw: its default power limit, for a fit that does not know the one in force; None likewise.
    """
    fit = view.fit
    free_B = _free_mhz_B(view)
    free_mhz = float(np.median(free_B))
    curve = _curve_class(free_mhz, fit)
    agreement = None
    if curve is not None:
        agreement = float(np.mean([_curve_class(float(mhz), fit) == curve for mhz in free_B]))
    evidence, numbers = _cause(fit)
    if evidence is None and curve == "memory-bound flat":
        numbers = _low_power(fit, idle_power_mw, fit.reference.limit_mw or limit_mw)
        evidence = "little power" if numbers else None
    behaviour = Behaviour(
        name=_CAUSED.get(evidence, curve),
        curve=curve,
        agreement=agreement,
        free_mhz=free_mhz,
        evidence=evidence,
        numbers={"reference_mhz": _reference_mhz(fit), **numbers},
    )
    words = {"text": behaviour_words(behaviour, fit.reference), "fix_first": fix_first_words(behaviour)}
    return behaviour.model_copy(update=words)


def _reference_mhz(fit: SeriesFit) -> float:
    return min(fit.reference.sm_clock_mhz, fit.high_mhz)


def _curve_class(free_mhz: float, fit: SeriesFit) -> CurveClass | None:
    ratio = free_mhz / _reference_mhz(fit)
    if ratio <= _FLAT:
        return "memory-bound flat"
    if free_mhz <= fit.low_mhz + _STEP_MHZ / 2.0:
        return None
    return "knee" if ratio <= _PROPORTIONAL else "compute-proportional"


def _cause(fit: SeriesFit) -> tuple[Evidence | None, dict[str, float]]:
    """What sets the speed other than the clock, with its evidence."""
    capped = fit.reference.power_cap_share
    if fit.reference.how == "unlocked" and capped is not None and capped >= _CAPPED_SHARE:
        return "capped", {"power_cap_share": capped}
    idle = [item.idle for item in fit.settings if item.idle is not None and item.kind in ("unlocked", "lock")]
    if idle and sum(idle) > len(idle) / 2:
        return "idles", {"idle_settings": sum(idle), "settings": len(idle)}
    return None, {}


def _low_power(fit: SeriesFit, idle_power_mw: float | None, limit_mw: float | None) -> dict[str, float]:
    """Power of a device that hardly works, and without load; empty for any other."""
    power = fit.reference.power_mw
    if power is None or idle_power_mw is None or limit_mw is None or limit_mw <= idle_power_mw:
        return {}
    if (power - idle_power_mw) / (limit_mw - idle_power_mw) >= _HARDLY_WORKS:
        return {}
    return {"power_mw": power, "idle_power_mw": idle_power_mw}
