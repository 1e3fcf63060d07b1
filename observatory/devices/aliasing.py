"""Steps that move in time with the sensor: how badly, and which pauses cure it.

A sensor that averages the last W of every U milliseconds and a program whose steps last p see each other at
the positions k U mod p. If U / p is (near) a simple fraction r / q there are only q of them, p / q apart, and
what lies between is never seen: p = 100 and p = 50 have one, p = 75 has three.

    steps   |####------|####------|####------|####------|      p = 100 ms, # drawing more power
    sensor          ##         ##         ##         ##        U = 100 ms, W = 25 ms: sees - alone

**Predicted error.** Written as a Fourier series, harmonic m of the step reaches the mean of N samples as

    c_m * sinc(m W / p) * |mean over n of exp(2 pi i m n U / p)| * exp(-(2 pi m s / p)^2 / 2)

The mean is 1 where m U / p is a whole number and falls off as samples visit other positions; s is the jitter
of where in a step a sample falls. Over all positions of the sensor against the program the squared error is
the sum of 2 |..|^2 over m (Parseval). For a square wave of mean P that draws P (1 + a) for a share d of it,
|c_m| = P a sin(pi m d) / (pi m (1 - d)); a = 1, d = 1/2 is a load that is on half of the time and else draws
nothing. The derivation is ours, the sensor's numbers are arXiv 2312.02741's.

**Cure.** n equal parts of the run, each begun a further p / (q n) later, cancel all harmonics but those that
are multiples of q n. So a run needs n - 1 pauses of p / (q n): three of 25 ms for p = 100 ms. The smallest n
that brings the error below what is wanted is chosen by the same formula. Where samples wander through the
step anyway, but a run is too short for it, no pause helps and a longer run does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from observatory.errors import EnergyError

Float64 = npt.NDArray[np.float64]

_HARMONICS = 120
#: Longer runs are no worse than runs of so many samples.
_MOST_SAMPLES = 1000
_MOST_PARTS, _MOST_PLACES = 16, 64
#: Errors below this are no aliasing.
TOLERATED = 0.02
#: Shares of a step for which a square wave draws more; the worst of them counts where the step's form is
#: unknown.
_DUTIES = (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRhythm:
    """How regularly steps follow each other.

    Attributes:
        period_ms: mean time from step to step; times more than a fifth off the median are pauses.
        jitter_ms: robust standard deviation of it.
        steps: how many were looked at.
    """

    period_ms: float
    jitter_ms: float
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Aliasing:
    """What a sensor makes of a rhythm.

    Attributes:
        rhythm: of the steps.
        update_ms, window_ms: of the sensor.
        samples: updates of the sensor in the run.
        positions: places in the step at which samples fall; None when they wander through it.
        error: predicted relative error (root mean square over the sensor's position) of the mean power of a
            load that is on half of the time; the worst share of the step counts.
        shifts_ms: pauses that cure it; empty where there is nothing to cure.
        error_after: the same error with them.
    """

    rhythm: StepRhythm
    update_ms: float
    window_ms: float
    samples: int
    positions: int | None
    error: float
    shifts_ms: tuple[float, ...]
    error_after: float


def rhythm_of(step_starts_ns: npt.NDArray[np.int64]) -> StepRhythm | None:
    """Rhythm of steps by their starts; None with fewer than three, or when they have none.

    Steps have none when half of the gaps between them differ from the median by more than a fifth.
    """
    gaps_ms = np.diff(step_starts_ns) * 1e-6
    gaps_ms = gaps_ms[gaps_ms > 0]
    if len(gaps_ms) < 2:
        return None
    middle = float(np.median(gaps_ms))
    off = np.abs(gaps_ms - middle)
    if np.median(off) > 0.2 * middle:
        return None
    # A step that is late shortens the next: means over a third of the steps know the period better than
    # single gaps do, and their median is not misled by one late step.
    starts_ms = np.concatenate([[0.0], np.cumsum(gaps_ms[off <= 0.2 * middle])])
    lag = max(1, len(starts_ms) // 3)
    period = float(np.median(starts_ms[lag:] - starts_ms[:-lag])) / lag
    return StepRhythm(period_ms=period, jitter_ms=1.4826 * float(np.median(off)), steps=len(gaps_ms) + 1)


def locked_positions(
    step_period_ms: float, *, update_ms: float, window_ms: float, samples: int
) -> int | None:
    """At how many places of a step the samples of a run fall, where they come back to the same ones.

    Returns:
        q, the fewest samples after which the place repeats, so closely that a whole run's drift stays below
        half a window; None when the samples wander through the step.

    Raises:
        EnergyError: a time is not positive, or there is no sample.
    """
    _check(step_period_ms, update_ms, window_ms, samples)
    for q in range(1, min(samples, _MOST_PLACES) + 1):
        cycles = q * update_ms / step_period_ms
        drift_ms = abs(cycles - round(cycles)) * step_period_ms * samples / q
        if drift_ms < window_ms / 2:
            return q
    return None


def predicted_error(
    step_period_ms: float,
    *,
    update_ms: float,
    window_ms: float,
    samples: int,
    jitter_ms: float = 0.0,
    parts: int = 1,
    shift_ms: float = 0.0,
    swing: float = 1.0,
    duty: float | None = None,
) -> float:
    """Root mean square relative error of the mean power of a square-wave load.

    Args:
        step_period_ms: p.
        update_ms: U.
        window_ms: W.
        samples: N, of the whole run.
        jitter_ms: how far the place of a sample in its step varies by itself.
        parts: n, equal parts of the run.
        shift_ms: how much later in its step each part begins than the one before.
        swing: a: power above the mean while on, relative to it.
        duty: d: share of the step that is on; None: the worst of several.

    Raises:
        EnergyError: a time is not positive, or there is no sample.
    """
    _check(step_period_ms, update_ms, window_ms, samples)
    m = np.arange(1, _HARMONICS + 1)
    window = np.abs(np.sinc(m * window_ms / step_period_ms))
    wandering = np.exp(-((2 * np.pi * m * jitter_ms / step_period_ms) ** 2) / 2)
    n = np.arange(min(samples, _MOST_SAMPLES))
    place_ms = n * update_ms - (n * parts // len(n)) * shift_ms
    coherent = wandering * _coherence(place_ms / step_period_ms)
    # What jitter scatters does not add up, but averages out like noise.
    squares = window**2 * (coherent**2 + (1 - wandering**2) / samples)
    waves = [_square_wave(d, swing * min(1.0, (1 - d) / d)) for d in _DUTIES]
    if duty is not None:
        waves = [_square_wave(duty, swing)]
    return max(math.sqrt(2 * float((wave**2 * squares).sum())) for wave in waves)


def phase_shifts_ms(
    step_period_ms: float,
    *,
    update_ms: float = 100.0,
    window_ms: float = 25.0,
    samples: int = 50,
    jitter_ms: float = 0.0,
    tolerated: float = TOLERATED,
    longest_ms: float = math.inf,
    most_ms: float = math.inf,
) -> tuple[float, ...]:
    """Pauses that a run should insert between its equal parts, so that samples fall everywhere in its steps.

    Args:
        step_period_ms: time from step to step.
        update_ms: period of the sensor.
        window_ms: what it averages.
        samples: updates of the sensor during the run; few samples cannot be cured by many parts.
        jitter_ms: how far the place of a sample in its step varies by itself.
        tolerated: relative error that needs no cure.
        longest_ms: longer pauses are not considered.
        most_ms: nor those that are longer all together.

    Returns:
        n - 1 equal pauses, one after each of the first n - 1 of n equal parts; empty where none are needed or
        none would halve the error: then a longer run is the cure.

    Raises:
        EnergyError: a time is not positive, or there is no sample.
    """
    common: dict[str, Any] = {
        "update_ms": update_ms, "window_ms": window_ms, "samples": samples, "jitter_ms": jitter_ms,
    }  # fmt: skip
    before = predicted_error(step_period_ms, **common)
    if before <= tolerated:
        return ()
    places = locked_positions(step_period_ms, update_ms=update_ms, window_ms=window_ms, samples=samples)
    best: tuple[float, tuple[float, ...]] = (before / 2, ())
    for parts in range(2, min(_MOST_PARTS, samples) + 1):
        spacing_ms = step_period_ms / (places or 1)
        # Later by a part, or by all but a part: where samples drift by themselves, one of them goes against
        # it.
        for pause in (spacing_ms / parts, spacing_ms - spacing_ms / parts):
            pause_ms = round(pause, 3)
            if pause_ms > longest_ms or pause_ms * (parts - 1) > most_ms:
                continue
            error = predicted_error(step_period_ms, **common, parts=parts, shift_ms=pause_ms)
            if error < best[0]:
                best = (error, (pause_ms,) * (parts - 1))
            if best[0] <= tolerated:
                return best[1]
    return best[1]


def find_aliasing(rhythm: StepRhythm, *, update_ms: float, window_ms: float, duration_s: float) -> Aliasing:
    """What a sensor makes of steps of this rhythm in a run of this length.

    Jitter adds up from step to step, so the place of a sample varies by ``jitter * sqrt(steps)`` over a run;
    half of that stands for the whole.
    """
    samples = max(1, round(duration_s * 1e3 / update_ms))
    common: dict[str, Any] = {"update_ms": update_ms, "window_ms": window_ms, "samples": samples}
    wander_ms = rhythm.jitter_ms * math.sqrt(rhythm.steps) / 2
    period_ms = rhythm.period_ms
    shifts = phase_shifts_ms(period_ms, **common, jitter_ms=wander_ms)
    parts = len(shifts) + 1
    shift_ms = shifts[0] if shifts else 0.0
    return Aliasing(
        rhythm=rhythm,
        **common,
        positions=locked_positions(period_ms, **common),
        error=predicted_error(period_ms, **common, jitter_ms=wander_ms),
        shifts_ms=shifts,
        error_after=predicted_error(period_ms, **common, jitter_ms=wander_ms, parts=parts, shift_ms=shift_ms),
    )


def visited_error(
    step_starts_ns: npt.NDArray[np.int64],
    period_ms: float,
    *,
    update_ms: float,
    window_ms: float,
) -> float:
    """The predicted error again, from the places in their steps at which a sensor did look.

    Steps are taken as they were: with their jitter, their drift against the sensor and any pauses. When the
    sensor looked is known but for a shift of all moments, which changes nothing.

    Args:
        step_starts_ns: starts of the steps, ascending.
        period_ms: of the steps; what is later than that in a step is a pause and belongs to none.
        update_ms: period of the sensor.
        window_ms: what it averages.

    Raises:
        EnergyError: a time is not positive, or there is no step.
    """
    _check(period_ms, update_ms, window_ms, len(step_starts_ns))
    starts_ms = (step_starts_ns - step_starts_ns[0]) * 1e-6
    looked_ms = np.arange(0.0, starts_ms[-1] + period_ms, update_ms)
    place = (looked_ms - starts_ms[np.searchsorted(starts_ms, looked_ms, side="right") - 1]) / period_ms
    inside = place[place < 1.0]
    window = np.abs(np.sinc(np.arange(1, _HARMONICS + 1) * window_ms / period_ms))
    residual = window * _coherence(inside) if len(inside) else window
    waves = (_square_wave(d, min(1.0, (1 - d) / d)) for d in _DUTIES)
    return max(math.sqrt(2 * float(((wave * residual) ** 2).sum())) for wave in waves)


def _coherence(place_N: Float64) -> Float64:
    """|mean over samples of exp(2 pi i m place)| for each harmonic; 1 where all see the same place."""
    turn = np.exp(2j * np.pi * place_N)
    power, result = np.ones_like(turn), np.empty(_HARMONICS)
    for m in range(_HARMONICS):
        power = power * turn
        result[m] = abs(power.mean())
    return result


def _square_wave(duty: float, swing: float) -> Float64:
    """|c_m| / P of a square wave."""
    m = np.arange(1, _HARMONICS + 1)
    return np.asarray(swing * np.abs(np.sin(np.pi * m * duty)) / (np.pi * m * (1 - duty)))


def _check(step_period_ms: float, update_ms: float, window_ms: float, samples: int) -> None:
    if min(step_period_ms, update_ms, window_ms) <= 0 or samples < 1:
        raise EnergyError(
            f"steps of {step_period_ms} ms, a sensor of {window_ms} ms every {update_ms} ms and {samples} "
            "samples make no rhythm",
            expected="positive times and at least one sample",
        )
