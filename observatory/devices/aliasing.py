"""Steps that move in time with the sensor: how much of their mean power it may miss.

A sensor that averages the last W of every U milliseconds and a program whose steps last p see each other at
the positions k U mod p. If U / p is (near) a simple fraction r / q there are only q of them, p / q apart, and
what lies between is never seen: p = 100 and p = 50 have one, p = 75 has three.

    steps   |####------|####------|####------|####------|      p = 100 ms, # drawing more power
    sensor          ##         ##         ##         ##        U = 100 ms, W = 25 ms: sees - alone

Written as a Fourier series, harmonic m of the step reaches the mean of N samples as

    c_m * sinc(m W / p) * |mean over n of exp(2 pi i m place_n)|

with place_n where in its step, as a share of p, sample n falls. Over all positions of the sensor against the
program the squared error is the sum of 2 |..|^2 over m (Parseval). For a square wave of mean P that draws
P (1 + a) for a share d of it, |c_m| = P a sin(pi m d) / (pi m (1 - d)); a = 1, d = 1/2 is a load that is on
half of the time and else draws nothing. The derivation is ours, the sensor's numbers are arXiv 2312.02741's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from observatory.errors import EnergyError

Float64 = npt.NDArray[np.float64]

_HARMONICS = 120
#: Errors below this are no aliasing.
TOLERATED = 0.02
#: Shares of a step for which a square wave draws more; the worst of them counts where the step's form is
#: unknown.
_DUTIES = (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRhythm:
    """How regularly steps follow each other.

    Attributes:
        period_ms: mean time from step to step; times more than a fifth off the median are gaps.
        jitter_ms: robust standard deviation of it.
    """

    period_ms: float
    jitter_ms: float


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
    return StepRhythm(period_ms=period, jitter_ms=1.4826 * float(np.median(off)))


def missed_error(
    step_starts_ns: npt.NDArray[np.int64],
    period_ms: float,
    *,
    update_ms: float,
    window_ms: float,
    swing: float = 1.0,
    duty: float | None = None,
) -> float:
    """Root mean square relative error of the mean power that a sensor shows of steps.

    Steps are taken as they were: with their jitter, their drift against the sensor and gaps between them.
    When the sensor looked is known but for a shift of all moments, which changes nothing.

    Args:
        step_starts_ns: starts of the steps, ascending.
        period_ms: of the steps; what is later than that in a step is a gap and belongs to none.
        update_ms: period of the sensor.
        window_ms: what it averages.
        swing: a: power above the mean while on, relative to it.
        duty: d: share of the step that is on; None: the worst of several.

    Raises:
        EnergyError: a time is not positive, or there is no step.
    """
    if min(period_ms, update_ms, window_ms) <= 0 or not len(step_starts_ns):
        raise EnergyError(
            f"{len(step_starts_ns)} steps of {period_ms} ms and a sensor of {window_ms} ms every {update_ms} "
            "ms make no rhythm",
            expected="positive times and at least one step",
        )
    starts_ms = (step_starts_ns - step_starts_ns[0]) * 1e-6
    looked_ms = np.arange(0.0, starts_ms[-1] + period_ms, update_ms)
    place = (looked_ms - starts_ms[np.searchsorted(starts_ms, looked_ms, side="right") - 1]) / period_ms
    inside = place[place < 1.0]
    window = np.abs(np.sinc(np.arange(1, _HARMONICS + 1) * window_ms / period_ms))
    residual = window * _coherence(inside) if len(inside) else window
    waves = [_square_wave(d, swing * min(1.0, (1 - d) / d)) for d in _DUTIES]
    if duty is not None:
        waves = [_square_wave(duty, swing)]
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
