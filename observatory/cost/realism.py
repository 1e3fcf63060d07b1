"""What realism costs: captured traffic beside mock traffic of equal volume, as replayed.

Shapes: S steps, B bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from observatory.errors import BenchmarkError
from observatory.records_bench import BenchCase, BenchResult

__all__ = ["realism"]

_Key = tuple[str, str, int, str, int]
_Group = tuple[str, str | None, int | None, str | None]


def realism(result: BenchResult, *, bootstrap: int = 1000, seed: int = 0) -> pd.DataFrame:
    """What captured traffic costs beside uniform traffic, as a ratio of times and in microseconds.

    One row per algorithm, phase, layer and role, and before them pooled ones: of everything under one
    algorithm, of a phase, of a phase and role over its layers. The ratio is of sums over steps (what a
    program waits in all), each exchange with the median of its time over repeats. Intervals are a 90 %
    bootstrap over steps: all exchanges of a step, captured and uniform, are drawn together. None with a
    single step.

    Returns:
        algorithm, phase, layer, role (missing: pooled over all), exchanges, steps, captured_us, uniform_us
        (means of one exchange), ratio, ratio_low, ratio_high, extra_us (captured - uniform), extra_low_us,
        extra_high_us.

    Raises:
        BenchmarkError: the result is no replay, or a captured matrix lacks its uniform companion.
    """
    generator = np.random.default_rng(seed)
    groups: dict[_Group, dict[int, list[tuple[float, float]]]] = {}
    for key, times in _pairs(result).items():
        for group in _groups_of(key):
            groups.setdefault(group, {}).setdefault(key[-1], []).append(times)
    rows = []
    for group, by_step in sorted(groups.items(), key=lambda item: -item[0].count(None)):
        # Sums of one step: captured, uniform, number of exchanges.
        sums_S3 = np.array([(*np.sum(pairs, axis=0), len(pairs)) for pairs in by_step.values()])
        captured, uniform, exchanges = sums_S3.sum(axis=0).tolist()
        ratio, extra_us = _intervals(sums_S3, generator, bootstrap)
        rows.append(
            {
                **dict(zip(("algorithm", "phase", "layer", "role"), group, strict=True)),
                "exchanges": int(exchanges),
                "steps": len(by_step),
                "captured_us": captured / exchanges,
                "uniform_us": uniform / exchanges,
                "ratio": captured / uniform,
                "ratio_low": ratio[0],
                "ratio_high": ratio[1],
                "extra_us": (captured - uniform) / exchanges,
                "extra_low_us": extra_us[0],
                "extra_high_us": extra_us[1],
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


_Interval = tuple[float | None, float | None]


def _intervals(
    sums_S3: NDArray[np.float64], generator: np.random.Generator, samples: int
) -> tuple[_Interval, _Interval]:
    """90 % intervals of the ratio, and of the difference of one exchange in microseconds."""
    steps = len(sums_S3)
    if steps < 2 or samples < 1:
        return (None, None), (None, None)
    drawn_BS = generator.integers(steps, size=(samples, steps))
    captured_B, uniform_B, exchanges_B = sums_S3[drawn_BS].sum(axis=1).T
    ratio = np.quantile(captured_B / uniform_B, [0.05, 0.95])
    extra_us = np.quantile((captured_B - uniform_B) / exchanges_B, [0.05, 0.95])
    return (float(ratio[0]), float(ratio[1])), (float(extra_us[0]), float(extra_us[1]))
