"""When a sensor updated its value, as far as polling shows.

Shapes: N samples, K updates, D trial periods.

When a poll reads another value than the poll before, the update lies between the two: with polls every 50 ms
it is known to 50 ms, which is half of a 100 ms window. But updates come at a regular period, so all of them
together are known more precisely: period and phase must put *each* update into *its* interval. Polls
whose period is no simple fraction of the update's (53 ms) narrow this down to a millisecond within seconds.
Polls at half of it do not: then all moments are off by the same slowly changing shift, which
:mod:`observatory.analysis.energy.design` has to find or to carry along.

    polls      |    |    |    |    |    |    |    |
    value      a    a    b    b    c    c    c    d
    intervals       |----|    |----|         |----|     each holds one update
    lattice            x         x         x  x        phase + n * period, within all of them

Where no lattice fits, updates are not regular, and each keeps its own interval.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

#: Updates that are fitted together, at most and at least. Long blocks know more; where none fits, halves are
#: tried.
_LONGEST_BLOCK, _SHORTEST_BLOCK, _FEWEST = 8192, 32, 8
#: Updates may be this far off their lattice; where they evidently are further off, up to a tenth of the
#: period.
_TOLERANCE_NS, _MOST_IRREGULAR = 0.5e6, 0.1
_TRIALS = 241
#: The nominal period may be wrong by this much of itself when periods are counted.
_SLACK = 0.2
#: Places are halved as long as there are more products of lines and places than this.
_MOST_PRODUCTS = 4096
#: Slower polls than this share of the period miss updates, and no lattice can be determined.
_SLOWEST_POLL = 0.8
#: A pause longer than this many periods ends a block: the number of updates in it is not known for sure.
_LONGEST_PAUSE = 6.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Updates:
    """Times at which a value was updated.

    Attributes:
        row_K: the sample that first showed the value, as an index of the trace.
        value_K: the value.
        time_ns_K: the moment, on the sampler's clock; best estimate.
        shift_ns_K: the moments of a stretch may all be off by the same shift of at most this.
        own_ns_K: and each on its own by this.
        period_ns: between updates; None with fewer than three.
        regular: whether most moments were found by a common period.
    """

    row_K: Int64
    value_K: Float64
    time_ns_K: Float64
    shift_ns_K: Float64
    own_ns_K: Float64
    period_ns: float | None
    regular: bool

    @property
    def error_ns_K(self) -> Float64:
        """Half-width of the interval that holds each moment."""
        return self.shift_ns_K + self.own_ns_K


def find_updates(
    time_ns_N: Int64,
    read_ns_N: Int64,
    value_N: Float64,
    *,
    period_ns: float | None = None,
    equal_values: bool = False,
) -> Updates:
    """Find the updates of one quantity.

    Args:
        time_ns_N: times just before the device was asked, ascending.
        read_ns_N: how long it took to answer.
        value_N: what it reported; NaN where nothing.
        period_ns: nominal period of the updates; None: found from the samples.
        equal_values: an update may leave the value as it was (power does, a counter under load does not);
            then one is known to have come in every period.
    """
    row_N = np.flatnonzero(~np.isnan(value_N))
    time, read, value = time_ns_N[row_N].astype(np.float64), read_ns_N[row_N], value_N[row_N]
    changed = np.flatnonzero(value[1:] != value[:-1]) + 1
    if period_ns is None and len(changed) >= 3:
        period_ns = _period_of(time[changed])
    if equal_values and period_ns is not None:
        changed = _with_equal(time, changed, period_ns)
    # A value was read at some moment between asking and answer.
    high = time[changed] + read[changed]
    low = time[changed - 1]
    if period_ns is not None:
        low = np.maximum(low, time[changed] - 1.05 * period_ns)  # the newest update is at most a period old
    centre_ns, bound_ns = (low + high) / 2, (high - low) / 2
    shift, fitted = np.zeros(len(changed)), np.zeros(len(changed), dtype=bool)
    poll_ns = float(np.median(np.diff(time))) if len(time) > 1 else np.inf
    if period_ns is not None and poll_ns <= _SLOWEST_POLL * period_ns:
        for block in _stretches(centre_ns, period_ns):
            _fit_block(block, low, high, period_ns, (centre_ns, shift, bound_ns, fitted))
    regular = bool(len(fitted) and fitted.mean() > 0.5)
    if regular:
        period_ns = float(np.median(np.diff(centre_ns)[fitted[1:]]))
    return Updates(
        row_K=row_N[changed].astype(np.int64),
        value_K=value[changed],
        time_ns_K=centre_ns,
        shift_ns_K=shift,
        own_ns_K=bound_ns,
        period_ns=period_ns,
        regular=regular,
    )


def _period_of(time_K: Float64) -> float:
    """Period of updates known to a poll: the mean of those spacings that span one period."""
    spacing = np.diff(time_K)
    median = float(np.median(spacing))
    return float(spacing[spacing < 1.5 * median].mean())


def _with_equal(time: Float64, changed: Int64, period_ns: float) -> Int64:
    """Polls that showed a changed value, and those more than a period after the last known update."""
    if not len(time):
        return changed
    # Of each poll the next one that must show another update: one at least lies within each 1.05 periods.
    following = np.searchsorted(time, time + 1.05 * period_ns, side="left").astype(np.int64).data
    positions: list[int] = []
    last = 0
    for change in [*changed.tolist(), len(time)]:
        while (last := following[last]) < change:
            positions.append(last)
        positions.append(change)
        last = change
    return np.array(positions[:-1], dtype=np.int64)


def _stretches(time_K: Float64, period_ns: float) -> list[slice]:
    """Consecutive updates without long pauses, cut into blocks of about the same length."""
    pauses = np.flatnonzero(np.diff(time_K) > _LONGEST_PAUSE * period_ns) + 1
    blocks = []
    for first, last in zip([0, *pauses.tolist()], [*pauses.tolist(), len(time_K)], strict=True):
        cuts = np.linspace(first, last, -(-(last - first) // _LONGEST_BLOCK) + 1).astype(int)
        blocks += [slice(int(a), int(b)) for a, b in itertools.pairwise(cuts)]
    return blocks


def _fit_block(
    block: slice,
    low_K: Float64,
    high_K: Float64,
    period_ns: float,
    results: tuple[Float64, Float64, Float64, Bool],
) -> None:
    """Fit a lattice to a block, or else to its halves.

    Moments, shift, own error and success are written to ``results``.
    """
    if block.stop - block.start < _FEWEST:
        return
    fit = _lattice(low_K[block], high_K[block], period_ns)
    if fit is not None:
        time_ns_K, shift_K, error_ns_K, fitted_K = results
        time_ns_K[block], shift_K[block], error_ns_K[block] = fit
        fitted_K[block] = True
    elif block.stop - block.start >= 2 * _SHORTEST_BLOCK:
        half = (block.start + block.stop) // 2
        for part in (slice(block.start, half), slice(half, block.stop)):
            _fit_block(part, low_K, high_K, period_ns, results)


def _lattice(low_K: Float64, high_K: Float64, period_ns: float) -> tuple[Float64, Float64, float] | None:
    """Moments ``phase + n * period`` that lie in all intervals, and how far they may be off.

    For a trial period the phase lies between the largest ``low - n * period`` and the smallest
    ``high - n * period``. All trial periods that leave something make up what is possible.

    Returns:
        Middle and half-width of what is possible for the lattice at each update, and how far single updates
        may be off it; None when no lattice is near them.
    """
    origin = low_K[0]
    low, high = low_K - origin, high_K - origin
    middle = (low + high) / 2
    # The fewest periods that fit between two updates: polls this fast miss none.
    fewest = np.ceil((low[1:] - high[:-1]) / period_ns - _SLACK)
    number_K = np.concatenate([[0.0], np.cumsum(np.maximum(fewest, 1.0))])
    span = number_K[-1]
    rough = (middle[-1] - middle[0]) / span
    reach = 1.2 * (float((high - low).max()) + _TOLERANCE_NS) / span
    trial_D = rough + reach * np.linspace(-1, 1, _TRIALS)
    first_D = -_lowest_of_lines(-low, number_K, trial_D)
    last_D = _lowest_of_lines(high, -number_K, trial_D)
    missed = max(0.0, float((first_D - last_D).min()) / 2)  # how far the updates are off the best lattice
    if missed > _MOST_IRREGULAR * period_ns:
        return None
    tolerance_ns = _TOLERANCE_NS + 2 * missed
    possible = last_D + 2 * tolerance_ns >= first_D
    # Trial periods that almost fit count as well, and the lattice itself may be off by what its updates are.
    middle_D, half_D = (first_D + last_D) / 2, np.maximum((last_D - first_D) / 2, 0.0) + tolerance_ns
    earliest_K = _lowest_of_lines((middle_D - half_D)[possible], trial_D[possible], number_K)
    latest_K = -_lowest_of_lines(-(middle_D + half_D)[possible], -trial_D[possible], number_K)
    return (earliest_K + latest_K) / 2 + origin, (latest_K - earliest_K) / 2, tolerance_ns


def _lowest_of_lines(level_L: Float64, slope_L: Float64, at_X: Float64) -> Float64:
    """The least of ``level + slope * at`` over all lines, at each of some places.

    Args:
        level_L: of the lines.
        slope_L: of the lines, ascending or descending.
        at_X: places, ascending.
    """
    if slope_L[0] > slope_L[-1]:
        level_L, slope_L = level_L[::-1], slope_L[::-1]
    # Left out is a line that is nowhere the lowest: a flatter one is not above it at the first place, or a
    # steeper one below it at the last.
    first_L, last_L = level_L + slope_L * at_X[0], level_L + slope_L * at_X[-1]
    lowest_L = np.ones(len(level_L), dtype=bool)
    lowest_L[1:] &= first_L[1:] < np.minimum.accumulate(first_L)[:-1]
    lowest_L[:-1] &= last_L[:-1] <= np.minimum.accumulate(last_L[::-1])[-2::-1]
    level_L, slope_L = level_L[lowest_L], slope_L[lowest_L]
    if len(level_L) * len(at_X) > _MOST_PRODUCTS and len(at_X) > 1:
        half = len(at_X) // 2
        parts = [_lowest_of_lines(level_L, slope_L, part_X) for part_X in (at_X[:half], at_X[half:])]
        return np.concatenate(parts)
    lowest_X: Float64 = (level_L[:, None] + slope_L[:, None] * at_X[None, :]).min(axis=0)
    return lowest_X
