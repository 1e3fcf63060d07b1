"""Two ways to run the same work, compared in the order A, B, B, A: what drifts falls on both alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

_RESAMPLES = 10_000


def interleaved(
    block: Callable[[], tuple[float, ...]], switch: Callable[[bool], Any], *, groups: int
) -> list[tuple[float, float, float]]:
    """Ratio of the time of a block with something on over that with it off.

    Args:
        block: does the work; its times, by one or several clocks.
        switch: turns what is compared on or off; not timed.
        groups: of four blocks: off, on, on, off. A group's ratio is that of the sums.

    Returns:
        Per clock, geometric mean over groups and its 90 % bootstrap interval.
    """
    ratios = []
    for _ in range(groups):
        taken: dict[bool, list[tuple[float, ...]]] = {True: [], False: []}
        for on in (False, True, True, False):
            switch(on)
            taken[on].append(block())
        ratios.append(np.sum(taken[True], axis=0) / np.sum(taken[False], axis=0))
    log_GC = np.log(ratios)
    drawn = np.random.default_rng(0).integers(0, groups, (_RESAMPLES, groups))
    low_C, high_C = np.exp(np.quantile(log_GC[drawn].mean(axis=1), [0.05, 0.95], axis=0))
    middle_C = np.exp(log_GC.mean(axis=0))
    return [(float(m), float(lo), float(hi)) for m, lo, hi in zip(middle_C, low_C, high_C, strict=True)]
