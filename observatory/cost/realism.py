"""What realism costs: captured traffic beside mock traffic of equal volume, as replayed."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from observatory.errors import BenchmarkError
from observatory.records_bench import BenchCase, BenchResult

__all__ = ["realism"]


def realism(result: BenchResult, *, bootstrap: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Ratio of captured to uniform time per algorithm, phase, layer and role, and over all of each algorithm.

    The ratio is of sums over steps (what a program waits in all), each exchange with the median of its time
    over repeats. The interval is a 90 % bootstrap over pairs (captured, uniform) of the same step;
    None with a single pair.

    Returns:
        algorithm, phase, layer, role (missing: all), exchanges, captured_us, uniform_us (means of one
        exchange), ratio, ratio_low, ratio_high.

    Raises:
        BenchmarkError: the result is no replay, or a captured matrix lacks its uniform companion.
    """
    pairs = _pairs(result)
    generator = np.random.default_rng(seed)
    groups: dict[tuple[str, str | None, int | None, str | None], list[tuple[float, float]]] = {}
    for (algorithm, phase, layer, role, _), times in pairs.items():
        groups.setdefault((algorithm, None, None, None), []).append(times)
        groups.setdefault((algorithm, phase, layer, role), []).append(times)
    rows = []
    for group, found in groups.items():
        captured_S, uniform_S = np.array(found).T
        low, high = _interval(captured_S, uniform_S, generator, bootstrap)
        rows.append(
            {
                **dict(zip(("algorithm", "phase", "layer", "role"), group, strict=True)),
                "exchanges": len(found),
                "captured_us": float(captured_S.mean()),
                "uniform_us": float(uniform_S.mean()),
                "ratio": float(captured_S.sum() / uniform_S.sum()),
                "ratio_low": low,
                "ratio_high": high,
            }
        )
    frame = pd.DataFrame(rows)
    return frame.astype({"layer": "Int64", "ratio_low": "float64", "ratio_high": "float64"})


_Key = tuple[str, str, int, str, int]


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


def _interval(
    captured_S: NDArray[np.float64],
    uniform_S: NDArray[np.float64],
    generator: np.random.Generator,
    samples: int,
) -> tuple[float | None, float | None]:
    if len(captured_S) < 2 or samples < 1:
        return None, None
    drawn_BS = generator.integers(len(captured_S), size=(samples, len(captured_S)))
    ratio_B = captured_S[drawn_BS].sum(axis=1) / uniform_S[drawn_BS].sum(axis=1)
    low, high = np.quantile(ratio_B, [0.05, 0.95])
    return float(low), float(high)
