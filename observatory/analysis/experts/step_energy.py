"""Energy of predicted layer-steps, from their time and the power that was measured in a phase.

Shapes: S steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from observatory.analysis.experts.step_time import StepTimes
from observatory.analysis.experts.words import StepCode
from observatory.reasons import Reason

#: Parts of a layer-step and the spans whose power is theirs; without one, the power of the whole phase.
_SPANS = {
    "counts": "count_exchange",
    "dispatch": "dispatch",
    "experts": "experts",
    "combine": "combine",
    "shared": None,
    "local": None,
}
#: Less of the time with a known power gives no energy of the whole.
COVERED = 0.9


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepEnergy:
    """Energy of all MoE layers of each step, over all devices.

    Attributes:
        joules_S: None where power is known for less than nine tenths of the time; the rest is taken to draw
            what the known parts draw.
        covered: share of the time of which power is known.
        reason: why there is no energy; None when there is.
    """

    joules_S: NDArray[np.float64] | None
    covered: float
    reason: Reason | None = None


def step_energy(times: StepTimes, phase: str, phases: pd.DataFrame) -> StepEnergy:
    """Joules of each step: the time of each part times the power measured in it.

    It holds at the clocks and limits of that measurement, and waiting is taken to draw what the part that it
    is in draws.

    Args:
        times: predicted layer-steps.
        phase: whose steps they are.
        phases: ``EnergySummary.phases`` of a run of the same program on the same devices.
    """
    if times.total_s is None:
        return StepEnergy(joules_S=None, covered=0.0, reason=times.reasons["total"][0])
    rows = phases[phases["phase"] == phase] if len(phases) else phases
    if not len(rows):
        return StepEnergy(
            joules_S=None, covered=0.0, reason=Reason(StepCode.PHASE_WITHOUT_POWER, {"phase": phase})
        )
    joules_S, known_s = np.zeros(len(times.total_s)), 0.0
    for part, span in _SPANS.items():
        part_SL = getattr(times, f"{part}_s")
        watts = _watts(rows, span)
        if part_SL is not None and watts is not None:
            joules_S += watts * part_SL.sum(axis=1)
            known_s += float(part_SL.sum())
    total_s = float(times.total_s.sum())
    covered = known_s / total_s if total_s > 0 else 0.0
    if covered < COVERED:
        reason = Reason(StepCode.POWER_COVERS, {"phase": phase, "covered": covered})
        return StepEnergy(joules_S=None, covered=covered, reason=reason)
    return StepEnergy(joules_S=joules_S / covered, covered=covered)


def _watts(rows: pd.DataFrame, span: str | None) -> float | None:
    """Power of all devices in a span, else in the phase; None where neither is known of a device."""
    total = 0.0
    for _, of_device in rows.groupby("device_uuid"):
        of_span = of_device[of_device["span"] == span] if span is not None else of_device[:0]
        whole = of_device[of_device["span"].isna()]
        known = pd.concat([of_span["power_mw"], whole["power_mw"]]).dropna()
        if known.empty:
            return None
        total += float(known.iloc[0]) / 1e3
    return total
