"""Power of phases that are too short to be measured alone: non-negative least squares over their time shares.

Shapes: N observations, J phases, B blocks.

    energy of observation n  =  sum over phases j of  power_j * seconds of j in n  +  error

The seconds are those in the observation's own window (100 ms of the counter, the 25 ms that instant power
averages). Time that is in no phase is a column of its own, ``idle``.

What can go wrong is looked for, and where it did there is a reason instead of numbers:

* **the mix never changes**: every window holds the same shares, so only their sum is known. The condition
  number of the columns, each scaled to length 1, says so.
* **too few observations**, of all or of one phase.
* **the sensor's lag**: a phase seen in the wrong window. Lag and the common shift of the updates' moments are
  searched together; every lag that explains the data about as well as the best counts, and the intervals span
  the answers of all of them.
* **moments known too poorly**: windows moved at random within their error must not change the answer.

Intervals: bootstrap of blocks of consecutive observations (length about N^(1/3)), percentiles widened for few
blocks as in :mod:`observatory.analysis.routing.intervals` (arXiv 1411.5279).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from observatory.analysis.energy.codes import EnergyCode
from observatory.analysis.energy.design import Design, Shift, conditions, nnls, plausible_shifts
from observatory.analysis.energy.estimators import LEFT_OUT
from observatory.analysis.energy.observations import Observations
from observatory.analysis.energy.timeline import Timeline
from observatory.analysis.statistics import few_blocks_widening
from observatory.reasons import Reason

Float64 = npt.NDArray[np.float64]

#: Chosen with the synthetic loads of benchmarks/energy_truth.py: the condition number up to which powers come
#: out right, observations in all and of each phase, and the relative half-width of an interval and relative
#: change of a power beyond which the power is worth nothing.
WORST_CONDITION = 60.0
FEWEST_OBSERVATIONS, FEWEST_PER_PHASE = 20, 5
WIDEST_INTERVAL = 0.25
MOST_MOVED = 0.1
LEVEL = 0.9

#: Shares of a window below this are no presence of a phase.
_PRESENT = 0.01
_RESAMPLES, _MOVES = 200, 12


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastSquares:
    """Powers by least squares, or why there are none.

    Attributes:
        source: the observations used.
        names: phases, ``idle`` last where there was any.
        power_mw: power of each; None where its reason says why.
        low_mw, high_mw: 90 % interval, calibration left out.
        reasons: why a phase has no power; None where it has.
        reason: why none has.
        observations: how many were used.
        condition: condition number of the scaled columns; None when it was not come to.
        lag_ms: (best, lowest, highest) lag that explains the data; likewise.
        smear_ms: time constant with which power reaches the sensor, as it explains the data best; likewise.
    """

    source: Literal["counter", "power"]
    names: tuple[str, ...]
    power_mw: tuple[float | None, ...]
    low_mw: tuple[float | None, ...]
    high_mw: tuple[float | None, ...]
    reasons: tuple[Reason | None, ...]
    reason: Reason | None = None
    observations: int = 0
    condition: float | None = None
    lag_ms: tuple[float, float, float] | None = None
    smear_ms: float | None = None

    def of(self, name: str) -> tuple[float, float, float] | None:
        """Power, low and high of one phase."""
        if name not in self.names:
            return None
        j = self.names.index(name)
        power, low, high = self.power_mw[j], self.low_mw[j], self.high_mw[j]
        return None if power is None or low is None or high is None else (power, low, high)


def solve_phases(observed: Observations, timeline: Timeline, *, seed: int = 0) -> LeastSquares:
    """Mean power of each name of a timeline.

    Args:
        observed: observations; those that reach outside the timeline are left out.
        timeline: what ran when, on the observations' clock.
        seed: of the bootstrap.
    """
    reach_ns = observed.shift_ns + max(abs(observed.lag_low_ns), abs(observed.lag_high_ns))
    observed = observed.chosen(
        (observed.start_ns_N >= timeline.start_ns + reach_ns)
        & (observed.end_ns_N <= timeline.end_ns - reach_ns)
    )
    needed = max(FEWEST_OBSERVATIONS, 5 * (len(timeline.names) + 1))
    if len(observed) < needed:
        return _refused(
            observed, timeline.names,
            Reason(
                EnergyCode.FEW_UPDATES_INSIDE,
                {"source": observed.source, "updates": len(observed), "needed": needed},
            ),
        )  # fmt: skip
    design = Design(observed, timeline)
    shifts = plausible_shifts(design)
    blocks = [_block_equations(design, shift) for shift in shifts]
    gram_QJJ = np.array([gram_BJJ.sum(axis=0) for gram_BJJ, _ in blocks])
    power_QJ = nnls(gram_QJJ, np.array([right_BJ.sum(axis=0) for _, right_BJ in blocks]))
    condition = float(conditions(gram_QJJ).max())
    lags_ms = [shift.lag_ns * 1e-6 for shift in shifts]
    about: dict[str, Any] = {
        "observations": len(observed),
        "condition": condition,
        "lag_ms": (lags_ms[0], min(lags_ms), max(lags_ms)),
        "smear_ms": shifts[0].smear_ns * 1e-6,
    }
    if len(design.names) > 1 and condition > WORST_CONDITION:
        return _refused(
            observed, design.names,
            Reason(EnergyCode.CONSTANT_MIX, {"condition": condition, "highest": WORST_CONDITION}),
            **about,
        )  # fmt: skip
    best_NJ, power_J = design.at(shifts[0]), power_QJ[0]
    spread_J = np.ptp(power_QJ, axis=0) / 2
    moved_J = _moved(design, shifts[0], power_J, np.random.default_rng(seed))
    low_J, high_J = _intervals(blocks, power_QJ, moved_J, np.random.default_rng(seed))
    reasons = _reasons(design, best_NJ, power_J, (low_J, high_J), moved_J, spread_J)

    def identified(values_J: Float64) -> tuple[float | None, ...]:
        return tuple(
            None if reason else float(value) for reason, value in zip(reasons, values_J, strict=True)
        )

    return LeastSquares(
        source=observed.source,
        names=design.names,
        power_mw=identified(power_J),
        low_mw=identified(low_J),
        high_mw=identified(high_J),
        reasons=reasons,
        **about,
    )


def _refused(observed: Observations, names: tuple[str, ...], reason: Reason, **about: Any) -> LeastSquares:
    nothing = (None,) * len(names)
    return LeastSquares(
        source=observed.source, names=names, power_mw=nothing, low_mw=nothing, high_mw=nothing,
        reasons=(reason,) * len(names), reason=reason, **{"observations": len(observed), **about},
    )  # fmt: skip


def _powers(design_NJ: Float64, energy_mj_N: Float64) -> Float64:
    result: Float64 = nnls((design_NJ.T @ design_NJ)[None], (design_NJ.T @ energy_mj_N)[None])[0]
    return result


def _moved(design: Design, shift: Shift, power_J: Float64, generator: np.random.Generator) -> Float64:
    """How far the answer moves when every window moves within the error of its own moment."""
    observed = design.observed
    total_J = np.zeros(len(power_J))
    for _ in range(_MOVES):
        end = observed.own_ns * generator.uniform(-1, 1, len(observed))
        start = end if observed.source == "power" else np.concatenate([[0.0], end[:-1]])
        moved_NJ = design.at(shift, moved_ns=(start, end))
        total_J += _powers(moved_NJ, observed.energy_mj_N)
    return np.abs(total_J / _MOVES - power_J)


def _block_equations(design: Design, shift: Shift) -> tuple[Float64, Float64]:
    """Normal equations of each block of consecutive observations, (B, J, J) and (B, J)."""
    size = len(design.observed)
    first_B = np.arange(0, size, max(4, round(size ** (1 / 3))))
    at_NJ = design.at(shift)
    gram_BJJ = np.add.reduceat(at_NJ[:, :, None] * at_NJ[:, None, :], first_B)
    return gram_BJJ, np.add.reduceat(at_NJ * design.observed.energy_mj_N[:, None], first_B)


def _intervals(
    equations: list[tuple[Float64, Float64]],
    power_QJ: Float64,
    moved_J: Float64,
    generator: np.random.Generator,
) -> tuple[Float64, Float64]:
    """90 % intervals over all plausible shifts, the best first, by the normal equations of their blocks."""
    blocks, power_J = len(equations[0][0]), power_QJ[0]
    draws = generator.integers(0, blocks, size=(_RESAMPLES, blocks))
    weight_RB = np.stack([np.bincount(draw, minlength=blocks) for draw in draws]).astype(np.float64)
    tail = (1 - LEVEL) / 2
    widening = few_blocks_widening(blocks, LEVEL)
    lows, highs = [power_J], [power_J]
    for (gram_BJJ, right_BJ), middle_J in zip(equations, power_QJ, strict=True):
        drawn_RJ = nnls(np.tensordot(weight_RB, gram_BJJ, 1), weight_RB @ right_BJ)
        drawn_RJ = np.where(np.isnan(drawn_RJ), middle_J, drawn_RJ)  # a phase that was not drawn
        quantiles = np.quantile(drawn_RJ, [tail, 1 - tail], axis=0)
        lows.append(middle_J + widening * (quantiles[0] - middle_J))
        highs.append(middle_J + widening * (quantiles[1] - middle_J))
    wider_J = moved_J + LEFT_OUT * np.nanmax(power_J)
    low_J = np.maximum(np.min(lows, axis=0) - wider_J, 0.0)
    return low_J, np.max(highs, axis=0) + wider_J


def _reasons(
    design: Design,
    at_NJ: Float64,
    power_J: Float64,
    interval_2J: tuple[Float64, Float64],
    moved_J: Float64,
    spread_J: Float64,
) -> tuple[Reason | None, ...]:
    """Why each phase has no power; None where it has."""
    observed = design.observed
    length_s_N = (observed.end_ns_N - observed.start_ns_N) * 1e-9
    present_J = (at_NJ > _PRESENT * length_s_N[:, None]).sum(axis=0)

    def reason(j: int) -> Reason | None:
        power, low, high = float(power_J[j]), float(interval_2J[0][j]), float(interval_2J[1][j])
        if present_J[j] < FEWEST_PER_PHASE:
            return Reason(
                EnergyCode.RARE_PHASE,
                {"source": observed.source, "updates": int(present_J[j]), "needed": FEWEST_PER_PHASE},
            )
        if not power > 0:
            return Reason(EnergyCode.NO_POSITIVE_POWER)
        if not spread_J[j] <= MOST_MOVED * power:
            return Reason(EnergyCode.LAG_NOT_KNOWN)
        if not moved_J[j] <= MOST_MOVED * power:
            return Reason(
                EnergyCode.UPDATE_TIMES_UNCERTAIN,
                {"error_ms": observed.own_ns * 1e-6, "change": float(moved_J[j]) / power},
            )
        if not high - low <= 2 * WIDEST_INTERVAL * power:
            return Reason(EnergyCode.WIDE_INTERVAL, {"low_mw": low, "high_mw": high})
        return None

    return tuple(reason(j) for j in range(len(power_J)))
