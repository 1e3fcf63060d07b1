"""Times of exchanges from the intervals that all ranks read off their clocks.

Shapes: P ranks, C cases, R repeats.

    rank 0   start ............... end          own time: end - start
    rank 1            start ................ end
    rank 2                start ....... end     last start: from here on everybody exchanges
                          |<--- exchange --->|

A rank that leaves the barrier early waits for the last one inside its own interval. On a common clock (of
one host, or aligned by `observatory.probes.alignment`) that part is known, and the exchange lasts from the
last start to the last end, as `observatory.analysis.exchange` has it for running programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from observatory.probes.alignment import TimeBaseAlignment
from observatory.run.records import Record

Interval = tuple[int, int]


class RankTimes(Record):
    """What one rank reports about all its exchanges.

    Attributes:
        start_ns_CR: starts on the reference's clock; None when this rank's clock could not be aligned.
        duration_ns_CR: own end minus own start.
        uncertainty_ns: half-width of the interval that holds the clock's true offset; None like the starts.
    """

    start_ns_CR: tuple[tuple[int, ...], ...] | None
    duration_ns_CR: tuple[tuple[int, ...], ...]
    uncertainty_ns: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseTimes:
    """Times of one case.

    Attributes:
        rank_us_RP: own time of every repeat and rank, per exchange.
        wait_us_RP: the part of it before the last rank's start, per exchange; None without a common clock.
    """

    rank_us_RP: tuple[tuple[float, ...], ...]
    wait_us_RP: tuple[tuple[float, ...], ...] | None


def rank_times(interval_ns_CR: Sequence[Sequence[Interval]], clock: TimeBaseAlignment) -> RankTimes:
    """This rank's intervals (start, end) of its own clock, ready to be sent to the others."""
    aligned = clock.offset_ns is not None
    return RankTimes(
        start_ns_CR=tuple(
            tuple(clock.to_reference_ns(start) or 0 for start, _ in interval_ns_R)
            for interval_ns_R in interval_ns_CR
        )
        if aligned
        else None,
        # The clock's own step bounds what a time of 0 can mean.
        duration_ns_CR=tuple(
            tuple(max(end - start, 1) for start, end in interval_ns_R) for interval_ns_R in interval_ns_CR
        ),
        uncertainty_ns=clock.uncertainty_ns,
    )


def case_times(times_P: Sequence[RankTimes], case: int, iterations: int) -> CaseTimes:
    """Times of one case from the reports of all ranks."""
    per_us = 1e3 * iterations
    duration_RP = np.array([times.duration_ns_CR[case] for times in times_P], dtype=np.int64).T
    starts = [times.start_ns_CR[case] for times in times_P if times.start_ns_CR is not None]
    wait_us_RP = None
    if len(starts) == len(times_P):
        start_RP = np.array(starts, dtype=np.int64).T
        wait_RP = start_RP.max(axis=1, keepdims=True) - start_RP
        wait_us_RP = tuple(map(tuple, (wait_RP / per_us).tolist()))
    return CaseTimes(
        rank_us_RP=tuple(map(tuple, (duration_RP / per_us).tolist())),
        wait_us_RP=wait_us_RP,
    )
