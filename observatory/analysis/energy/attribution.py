"""Mean power of every phase of a run, by the first method that can determine it.

1. **Repetition**: a phase that fills windows of 5 s or more is measured in them.
2. **Least squares** over time shares, on the counter's updates; where these refuse, on instant power's.
3. Otherwise none, with the reasons of both.

Idle is what no phase covers: its power comes from idle windows of the run, else from least squares, else from
the calibration when the sampler started (a device that waits between steps draws more than that).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from observatory.analysis.energy.codes import EnergyCode
from observatory.analysis.energy.design import IDLE
from observatory.analysis.energy.least_squares import LeastSquares, solve_phases
from observatory.analysis.energy.observations import Observations, counter_observations, power_observations
from observatory.analysis.energy.repetition import SHORTEST_REPEAT_S, measure_repeated, repeated_stretches
from observatory.analysis.energy.timeline import Timeline
from observatory.analysis.energy.traces import PowerTrace
from observatory.devices.sensors import SensorModel
from observatory.reasons import Reason

#: Idle windows shorter than ten update periods are not measured alone, and of longer ones the edges are left
#: out, where a late sensor still shows the load: one update period and half.
_SHORTEST_IDLE_S, _IDLE_EDGE_NS = 1.0, 150_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PhasePower:
    """Mean power of one phase on one device.

    Attributes:
        name: the phase, or the span inside it; ``idle`` for time in none.
        seconds: its time in the run.
        power_mw: mean power; None where ``reason`` says why.
        low_mw, high_mw: 90 % interval, calibration left out; None like it.
        method: ``repetition`` or ``least squares``; None like it.
        source: ``counter``, ``integral``, ``mixed`` or ``power``: what it was computed from; None like it.
        observations: windows (repetition) or updates (least squares); 0 like it.
        measured_s: time of this phase that was measured alone; None with least squares.
        condition: condition number of the least squares; None with repetition.
        reason: why there is no power.
        flags: what to know of a power that there is.
    """

    name: str
    seconds: float
    power_mw: float | None = None
    low_mw: float | None = None
    high_mw: float | None = None
    method: Literal["repetition", "least squares"] | None = None
    source: str | None = None
    observations: int = 0
    measured_s: float | None = None
    condition: float | None = None
    reason: Reason | None = None
    flags: tuple[Reason, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribution:
    """Powers of all phases on one device.

    Attributes:
        phases: one per name of the timeline, in its order; then ``idle`` if there was such time.
        solutions: the least squares that were tried, counter first; empty where repetition gave every power.
    """

    phases: tuple[PhasePower, ...]
    solutions: tuple[LeastSquares, ...] = ()

    @property
    def lag_ms(self) -> tuple[float, float] | None:
        """Bounds of the sensor's lag, where least squares on a source found powers and so its lag."""
        bounds = [
            solution.lag_ms[1:]
            for solution in self.solutions
            if solution.lag_ms is not None and any(power is not None for power in solution.power_mw)
        ]
        return (min(low for low, _ in bounds), max(high for _, high in bounds)) if bounds else None

    @property
    def energy_mj(self) -> float | None:
        """Energy of all phases and idle together; None when one of them is not known."""
        energies_mj = [phase.power_mw * phase.seconds for phase in self.phases if phase.power_mw is not None]
        return sum(energies_mj) if len(energies_mj) == len(self.phases) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class IdlePower:
    """Power of a device that does nothing.

    Attributes:
        power_mw: the power; None where ``source`` is the reason.
        low_mw, high_mw: 90 % interval; None where that is not known.
        source: where it comes from.
    """

    power_mw: float | None
    low_mw: float | None = None
    high_mw: float | None = None
    source: Reason


def attribute(
    trace: PowerTrace,
    timeline: Timeline,
    sensor: SensorModel,
    *,
    fillers: Collection[str] = (),
    inside_only: bool = False,
    clock_error_ns: float = 0.0,
    lag_ms: tuple[float, float] | None = None,
    shortest_repeat_s: float = SHORTEST_REPEAT_S,
    seed: int = 0,
) -> Attribution:
    """Power of each name of a timeline.

    Args:
        trace: samples of the device.
        timeline: what ran when, on the samples' clock.
        sensor: what is known of the device's sensors.
        fillers: names that may stand between repetitions of another.
        inside_only: use only what was observed wholly inside the timeline: what is outside is not idle.
        clock_error_ns: how far the timeline's times may be off.
        lag_ms: bounds of the sensor's lag, where an attribution of the whole run found them.
        shortest_repeat_s: length of a window that is measured alone.
        seed: of the bootstrap.
    """
    power_of: dict[str, PhasePower] = {}
    why: dict[str, Reason] = {}
    seconds = timeline.seconds()
    for name in timeline.names:
        stretches = repeated_stretches(timeline, name, fillers=fillers, shortest_s=shortest_repeat_s)
        if not stretches:
            why[name] = Reason(EnergyCode.NEVER_ALONE, {"shortest_s": shortest_repeat_s})
            continue
        measured = measure_repeated(trace, stretches, sensor)
        if isinstance(measured, Reason):
            why[name] = measured
            continue
        power_of[name] = PhasePower(
            name=name, seconds=seconds[name], power_mw=measured.power_mw, low_mw=measured.low_mw,
            high_mw=measured.high_mw, method="repetition", source=measured.source,
            observations=measured.windows, measured_s=measured.measured_s, flags=measured.flags,
        )  # fmt: skip
    solutions: list[LeastSquares] = []
    missing = [name for name in timeline.names if name not in power_of]
    if missing or not inside_only:
        solutions = _solutions(trace, timeline, sensor, missing, inside_only, clock_error_ns, lag_ms, seed)
    for name in missing:
        power_of[name] = _solved(name, seconds[name], solutions, why[name])
    phases = [power_of[name] for name in timeline.names]
    idle_s = (timeline.end_ns - timeline.start_ns) * 1e-9 - sum(seconds.values())
    if not inside_only and idle_s > 1e-6:
        phases.append(_solved(IDLE, idle_s, solutions, None))
    return Attribution(phases=tuple(phases), solutions=tuple(solutions))


def _solutions(
    trace: PowerTrace,
    timeline: Timeline,
    sensor: SensorModel,
    missing: list[str],
    inside_only: bool,
    clock_error_ns: float,
    lag_ms: tuple[float, float] | None,
    seed: int,
) -> list[LeastSquares]:
    """Least squares on the counter, then on instant power if something is still missing."""
    solutions: list[LeastSquares] = []
    near = trace.between(timeline.start_ns, timeline.end_ns, margin_ns=2_000_000_000)
    for observe in (counter_observations, power_observations):
        observations = observe(near, sensor)
        if isinstance(observations, Reason):
            solutions.append(
                _nothing(timeline, observations, "counter" if observe is counter_observations else "power")
            )
            continue
        observations = replace(observations, shift_ns=observations.shift_ns + clock_error_ns)
        if lag_ms is not None:
            observations = replace(
                observations,
                lag_low_ns=max(observations.lag_low_ns, lag_ms[0] * 1e6 - observations.shift_ns),
                lag_high_ns=min(observations.lag_high_ns, lag_ms[1] * 1e6 + observations.shift_ns),
            )
        solution = solve_phases(
            _wholly_inside(observations, timeline) if inside_only else observations, timeline, seed=seed
        )
        solutions.append(solution)
        if all(solution.of(name) is not None for name in missing):
            break
    return solutions


def _nothing(timeline: Timeline, reason: Reason, source: Literal["counter", "power"]) -> LeastSquares:
    none = (None,) * len(timeline.names)
    return LeastSquares(
        source=source, names=timeline.names, power_mw=none, low_mw=none, high_mw=none,
        reasons=(reason,) * len(timeline.names), reason=reason,
    )  # fmt: skip


def _wholly_inside(observations: Observations, timeline: Timeline) -> Observations:
    """Observations that lie in the timeline's segments whatever the shift."""
    start = observations.start_ns_N - observations.lag_high_ns - observations.shift_ns
    end = observations.end_ns_N - observations.lag_low_ns + observations.shift_ns
    covered_s = timeline.seconds_in(start, end).sum(axis=1)
    return observations.chosen(covered_s >= (end - start) * 1e-9 * (1 - 1e-9) - 1e-9)


def _solved(
    name: str, seconds: float, solutions: list[LeastSquares], repetition: Reason | None
) -> PhasePower:
    """What least squares say of one name, from the first solution that gives its power."""
    reasons = [] if repetition is None else [repetition]
    for solution in solutions:
        answer = solution.of(name)
        if answer is None:
            why = solution.reasons[solution.names.index(name)] if name in solution.names else solution.reason
            cause = why or Reason(EnergyCode.NOT_OBSERVED)
            reasons.append(Reason(EnergyCode.NO_LEAST_SQUARES, {"source": solution.source}, (cause,)))
            continue
        return PhasePower(
            name=name, seconds=seconds, power_mw=answer[0], low_mw=answer[1], high_mw=answer[2],
            method="least squares", source=solution.source, observations=solution.observations,
            condition=solution.condition,
        )  # fmt: skip
    return PhasePower(name=name, seconds=seconds, reason=Reason(EnergyCode.NO_METHOD, because=tuple(reasons)))


def idle_power(
    trace: PowerTrace,
    timeline: Timeline,
    sensor: SensorModel,
    attribution: Attribution,
    calibrated_mw: float | None,
) -> IdlePower:
    """Power of the device when it does nothing.

    Args:
        trace: samples of the device.
        timeline: phases of the run.
        sensor: what is known of its sensors.
        attribution: of these phases.
        calibrated_mw: idle power that the sampler measured when it started; None when it did not.
    """
    before, after = timeline.end_ns_M[:-1], timeline.start_ns_M[1:]
    long = after - before >= _SHORTEST_IDLE_S * 1e9
    gaps = [
        (int(a) + _IDLE_EDGE_NS, int(b) - _IDLE_EDGE_NS)
        for a, b in zip(before[long], after[long], strict=True)
    ]
    why = Reason(EnergyCode.NO_IDLE_WINDOWS)
    if gaps:
        measured = measure_repeated(trace, gaps, sensor)
        if isinstance(measured, Reason):
            why = Reason(EnergyCode.IDLE_WINDOWS_UNMEASURED, because=(measured,))
        else:
            return IdlePower(
                power_mw=measured.power_mw, low_mw=measured.low_mw, high_mw=measured.high_mw,
                source=Reason(
                    EnergyCode.IDLE_WINDOWS, {"windows": measured.windows, "measured_s": measured.measured_s}
                ),
            )  # fmt: skip
    solved = next((phase for phase in attribution.phases if phase.name == IDLE), None)
    if solved is not None and solved.power_mw is not None:
        return IdlePower(
            power_mw=solved.power_mw, low_mw=solved.low_mw, high_mw=solved.high_mw,
            source=Reason(EnergyCode.IDLE_BY_LEAST_SQUARES),
        )  # fmt: skip
    if calibrated_mw is not None:
        return IdlePower(power_mw=calibrated_mw, source=Reason(EnergyCode.IDLE_BY_CALIBRATION))
    return IdlePower(power_mw=None, source=Reason(EnergyCode.IDLE_NOT_KNOWN, because=(why,)))
