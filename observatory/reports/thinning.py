"""Fewer points than samples, without hiding a peak.

Shapes: N samples.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]


def kept_samples(
    time_ns_N: Int64, value_N: npt.NDArray[np.float64], segment_N: Int64, *, bins: int
) -> npt.NDArray[np.int64]:
    """Positions of the samples that are drawn, ascending: of every bin of time the least and the greatest.

    Time is cut into ``bins`` equal bins. The first and last sample of each segment stay as well, so that a
    stretch ends where its samples do. With fewer than two samples a bin all are kept.

    Args:
        time_ns_N: ascending times.
        value_N: values, none missing.
        segment_N: number of the gapless stretch that each belongs to, ascending.
        bins: how many.
    """
    if len(time_ns_N) <= 2 * bins:
        return np.arange(len(time_ns_N), dtype=np.int64)
    whole = max(int(time_ns_N[-1] - time_ns_N[0]), 1)
    bin_N = np.minimum((time_ns_N - time_ns_N[0]).astype(np.float64) / whole * bins, bins - 1).astype(
        np.int64
    )
    extremes: list[int] = []
    for low, high in itertools.pairwise([0, *(np.flatnonzero(np.diff(bin_N)) + 1).tolist(), len(bin_N)]):
        of_bin = value_N[low:high]
        # Of equal ones the first of the least and the last of the greatest.
        extremes += [low + int(of_bin.argmin()), high - 1 - int(of_bin[::-1].argmax())]
    edge = np.flatnonzero(np.append(segment_N[1:] != segment_N[:-1], True))
    edges = np.concatenate([edge, [0], edge[:-1] + 1])
    return np.unique(np.concatenate([extremes, edges])).astype(np.int64)


def joined_stretches(start_ns: Int64, end_ns: Int64, *, closer_ns: int) -> tuple[Int64, Int64]:
    """Stretches in the order of their starts, those joined between which less than ``closer_ns`` lies."""
    if not len(start_ns):
        return start_ns, end_ns
    order = np.argsort(start_ns, kind="stable")
    start, end = start_ns[order], np.maximum.accumulate(end_ns[order])
    fresh = np.ones(len(start), dtype=bool)
    fresh[1:] = start[1:] - end[:-1] >= closer_ns
    first = np.flatnonzero(fresh)
    return start[first], end[np.append(first[1:] - 1, len(start) - 1)]
