"""What realism costs: captured against mock traffic of equal volume, as replayed.

Shapes: S steps.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from observatory.analysis.statistics import student_quantile
from observatory.errors import BenchmarkError
from observatory.run.documents.bench import BenchCase, BenchResult

_Key = tuple[str, str, int, str, int]
_Group = tuple[str, str | None, int | None, str | None]


def realism(result: BenchResult) -> pd.DataFrame:
    """What captured traffic costs compared with uniform traffic, as a ratio of times and in microseconds.

    One row per algorithm, phase, layer and role, and before them pooled ones: of everything under one
    algorithm, of a phase, of a phase and role over its layers. The ratio is of sums over steps (what a
    program waits in all), each exchange with the median of its time over repeats. Intervals of 90 % are those
    of a ratio estimator over steps with Student's t (Cochran, Sampling Techniques, 1977, chapter 6): all
    exchanges of a step, captured and uniform, are one observation. None with a single step.

    Returns:
        algorithm, phase, layer, role (missing: pooled over all), exchanges, steps, captured_us, uniform_us
        (means of one exchange), ratio, ratio_low, ratio_high, extra_us (captured - uniform), extra_low_us,
        extra_high_us.

    Raises:
        BenchmarkError: the result is no replay, or a captured matrix lacks its uniform companion.
    """
    groups: dict[_Group, dict[int, list[tuple[float, float]]]] = {}
    for key, times in _pairs(result).items():
        for group in _groups_of(key):
            groups.setdefault(group, {}).setdefault(key[-1], []).append(times)
    rows = []
    for group, by_step in sorted(groups.items(), key=lambda item: -item[0].count(None)):
        # Sums of one step: captured, uniform, number of exchanges.
        sums_S3 = np.array([(*np.sum(pairs, axis=0), len(pairs)) for pairs in by_step.values()])
        captured, uniform, exchanges = sums_S3.sum(axis=0).tolist()
        ratio_half, extra_half_us = (
            _half_width(numerator_S, of_S)
            for numerator_S, of_S in (
                (sums_S3[:, 0], sums_S3[:, 1]),
                (sums_S3[:, 0] - sums_S3[:, 1], sums_S3[:, 2]),
            )
        )
        rows.append(
            {
                **dict(zip(("algorithm", "phase", "layer", "role"), group, strict=True)),
                "exchanges": int(exchanges),
                "steps": len(by_step),
                "captured_us": captured / exchanges,
                "uniform_us": uniform / exchanges,
                "ratio": captured / uniform,
                "ratio_low": max(captured / uniform - ratio_half, 0.0),
                "ratio_high": captured / uniform + ratio_half,
                "extra_us": (captured - uniform) / exchanges,
                "extra_low_us": (captured - uniform) / exchanges - extra_half_us,
                "extra_high_us": (captured - uniform) / exchanges + extra_half_us,
            }
        )
    ends = ("ratio_low", "ratio_high", "extra_low_us", "extra_high_us")
    return pd.DataFrame(rows).astype({"layer": "Int64", **dict.fromkeys(ends, "float64")})


def _groups_of(key: _Key) -> Iterator[_Group]:
    """The rows an exchange counts in, the widest first."""
    algorithm, phase, layer, role, _ = key
    yield algorithm, None, None, None
    yield algorithm, phase, None, None
    yield algorithm, phase, None, role
    yield algorithm, phase, layer, role


def _pairs(result: BenchResult) -> dict[_Key, tuple[float, float]]:
    """Captured and uniform time by algorithm, phase, layer, role and step."""
    if result.kind != "replay":
        raise BenchmarkError("this is no replay but a benchmark; make one with `observatory replay RUN`")
    times: dict[str, dict[_Key, float]] = {"captured": {}, "uniform": {}}
    for case in result.cases:
        times.setdefault(case.pattern, {})[_key(case)] = case.median_us
    captured, uniform = times["captured"], times["uniform"]
    if not captured or captured.keys() != uniform.keys():
        raise BenchmarkError(
            f"the replay has {len(captured)} captured and {len(uniform)} uniform exchanges "
            "that do not pair up; replay the run again"
        )
    return {key: (captured[key], uniform[key]) for key in captured}


def _key(case: BenchCase) -> _Key:
    if case.phase is None or case.layer is None or case.role is None or case.step is None:
        raise BenchmarkError(
            "a replayed exchange does not say its step, phase, layer and role; replay it again"
        )
    return case.algorithm, case.phase, case.layer, case.role, case.step


def _half_width(above_S: NDArray[np.float64], below_S: NDArray[np.float64]) -> float:
    """Half of the 90 % interval of sum(above) / sum(below); NaN with a single step."""
    steps = len(above_S)
    if steps < 2:
        return float("nan")
    residual_S = above_S - below_S * (above_S.sum() / below_S.sum())
    error = np.sqrt((residual_S**2).sum() / (steps - 1) / steps) / below_S.mean()
    return student_quantile(steps - 1) * float(error)
