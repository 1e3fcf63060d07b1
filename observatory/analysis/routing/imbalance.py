"""Imbalance of expert loads.

Shapes: S steps, E experts. Loads count assignments (token, expert), not tokens. Every function takes
integer counts and looks at one histogram, (E,); the ``_rows`` forms take (S, E) and look at each row.
A histogram in which nothing was assigned has no imbalance: the answer is None (NaN in a row form).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from observatory.errors import LoadError


def checked_loads(load: ArrayLike, *, dimensions: int = 1) -> NDArray[np.int64]:
    """Loads as int64, or an error that says what is wrong with them.

    Args:
        load: assignments per expert; the last axis runs over experts.
        dimensions: expected number of axes.

    Raises:
        LoadError: not integers (floats and NaN included), negative, above 2**63 - 1, of another shape,
            or without experts.
    """
    array = np.asarray(load)
    if array.ndim != dimensions:
        raise LoadError(f"loads have shape {array.shape}; expected {dimensions} axis(es), experts last")
    if array.shape[-1] == 0:
        raise LoadError(
            f"loads have shape {array.shape}: no experts; pass one count per expert, idle ones as 0"
        )
    if array.dtype.kind not in "iu":
        raise LoadError(
            f"loads are {array.dtype}; expected integer counts: pass raw counts, not shares or NaN"
        )
    if array.size and int(array.min()) < 0:
        raise LoadError(f"a load is {int(array.min())}; counts are never negative: the capture is damaged")
    if array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise LoadError(f"a load is {int(array.max())}, above 2**63 - 1; expected counts that fit in int64")
    return array.astype(np.int64, copy=False)


def _wide(load: NDArray[np.int64]) -> NDArray[Any]:
    """The same counts in a type in which rank-weighted sums cannot overflow (int64 or Python integers)."""
    experts = load.shape[-1]
    largest = int(load.max()) if load.size else 0
    return load if largest * experts * experts < 2**62 else load.astype(object)


def gini_rows(load_SE: ArrayLike) -> NDArray[np.float64]:
    """Gini coefficient of each row, (S,); NaN where nothing was assigned. See `gini`."""
    load = _wide(checked_loads(load_SE, dimensions=2))
    experts = load.shape[1]
    weight_E = 2 * np.arange(1, experts + 1) - experts - 1
    numerator_S = (np.sort(load, axis=1) * weight_E).sum(axis=1)
    return _ratio_rows(numerator_S, experts * load.sum(axis=1))


def gini(load_E: ArrayLike) -> float | None:
    """Gini coefficient of one load histogram.

    G = sum_i (2 i - E - 1) x_(i) / (E sum x) with x_(1) <= ... <= x_(E): half the mean absolute difference
    over all E**2 ordered pairs (an expert with itself included), divided by the mean. Sums are exact
    integers; only the last division rounds.

    Args:
        load_E: assignments per expert, shape (E,), none negative.

    Returns:
        0.0 for equal loads, (E - 1) / E when one expert takes all, None when nothing was assigned.

    Raises:
        LoadError: a load is negative or not an integer.
    """
    return _none_if_nan(gini_rows(checked_loads(load_E)[None, :])[0])


def max_over_mean_rows(load_SE: ArrayLike) -> NDArray[np.float64]:
    """Largest over mean load of each row, (S,); NaN where nothing was assigned."""
    load = _wide(checked_loads(load_SE, dimensions=2))
    return _ratio_rows(load.shape[1] * load.max(axis=1), load.sum(axis=1))


def max_over_mean(load_E: ArrayLike) -> float | None:
    """Largest over mean load: 1.0 when equal, E when one expert takes all, None when nothing was assigned."""
    return _none_if_nan(max_over_mean_rows(checked_loads(load_E)[None, :])[0])


def balancedness(load_E: ArrayLike) -> float | None:
    """Balancedness b = mean / max, in [1 / E, 1]; None when nothing was assigned.

    The same quantity appears elsewhere as 1 / b (`max_over_mean`, "imbalance factor") and as 1 / b - 1
    ("excess over mean"). State which.
    """
    ratio = max_over_mean(load_E)
    return None if ratio is None else 1.0 / ratio


def coefficient_of_variation(load_E: ArrayLike) -> float | None:
    """Population standard deviation over mean, in [0, sqrt(E - 1)]; None when nothing was assigned."""
    share_E = _shares(load_E)
    if share_E is None:
        return None
    return float(np.std(share_E) / np.mean(share_E))


def entropy_bits(load_E: ArrayLike) -> float | None:
    """Shannon entropy of the load shares in bits, in [0, log2 E]; None when nothing was assigned."""
    share_E = _shares(load_E)
    if share_E is None:
        return None
    used = share_E[share_E > 0]
    return abs(float(np.dot(used, np.log2(used))))


def idle_experts(load_E: ArrayLike) -> int:
    """Experts that got no assignment (all E of them when nothing was assigned)."""
    return int(np.count_nonzero(checked_loads(load_E) == 0))


def lorenz_curve(load_E: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Lorenz curve: share of experts, least loaded first, against the share of assignments they hold.

    Returns:
        (x, y), both of shape (E + 1,), from (0, 0) to (1, 1); None when nothing was assigned. Gini is
        1 minus twice the area under the straight segments.
    """
    load = _wide(checked_loads(load_E))
    total = int(load.sum())
    if total == 0:
        return None
    held = np.concatenate(([0], np.cumsum(np.sort(load)))) / total
    return np.linspace(0.0, 1.0, load.size + 1), held.astype(np.float64)


def _shares(load_E: ArrayLike) -> NDArray[np.float64] | None:
    load = _wide(checked_loads(load_E))
    total = int(load.sum())
    return None if total == 0 else (load / total).astype(np.float64)


def _ratio_rows(numerator_S: NDArray[Any], denominator_S: NDArray[Any]) -> NDArray[np.float64]:
    ratio_S = np.full(denominator_S.shape, np.nan)
    some = (denominator_S > 0).astype(bool)
    ratio_S[some] = (numerator_S[some] / denominator_S[some]).astype(np.float64)
    return ratio_S


def _none_if_nan(value: np.float64) -> float | None:
    return None if np.isnan(value) else float(value)
