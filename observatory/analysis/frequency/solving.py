"""Least squares with few linear and few nonlinear parameters, for many weightings and targets at once.

Shapes: B problems (folds or bootstrap samples), N points, G trial positions, D nonlinear parameters,
    K linear ones.

A form is linear in K <= 4 non-negative coefficients once its D <= 3 nonlinear parameters are given. Those are
searched on a grid that covers their whole range and is then narrowed around the best position of each
problem: nothing depends on a starting point, and kinks do no harm. Points enter as columns divided by what
was measured, so that targets are about 1 and errors are relative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

#: The narrowing tries one step to either side on every axis, in steps that shrink by this factor.
_LEVELS = 8
_SHRINK = 0.6
_FIRST_STEP = 0.7
_TINY = 1e-300
_RIDGE = 1e-12
#: Numbers in one chunk of the narrowing, which bounds its memory.
_CHUNK = 4_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Range of one nonlinear parameter and the number of positions on the first grid."""

    low: float
    high: float
    count: int
    logarithmic: bool = False

    def points(self) -> Float64:
        """The first grid, in the axis' own scale."""
        low, high = self.scaled()
        return np.linspace(low, high, self.count) if high > low else np.array([low])

    def scaled(self) -> tuple[float, float]:
        """Both ends in the axis' own scale."""
        return (
            (float(np.log(self.low)), float(np.log(self.high))) if self.logarithmic else (self.low, self.high)
        )

    def value(self, scaled: Float64) -> Float64:
        """Back from the axis' own scale."""
        return np.exp(scaled) if self.logarithmic else scaled


def solve(
    columns: Callable[[Float64], Float64],
    axes: Sequence[Axis],
    weight_BN: Float64,
    target_BN: Float64 | None = None,
) -> tuple[Float64, Float64]:
    """Best parameters for each problem: non-negative linear ones (B, K), nonlinear ones (B, D).

    Minimises sum_N weight * (target - columns @ linear)^2.

    Args:
        columns: of nonlinear parameters (..., D), the relative columns (..., N, K).
        axes: ranges of the nonlinear parameters; none for a plain linear fit.
        weight_BN: weights, none negative.
        target_BN: relative targets; None is 1 for all.
    """
    grids = np.meshgrid(*(axis.points() for axis in axes), indexing="ij")
    trial_GD = np.stack([grid.ravel() for grid in grids], axis=-1) if axes else np.zeros((1, 0))
    column_GNK = columns(_values(trial_GD, axes))
    points, terms = column_GNK.shape[1:]
    pairs_GNKK = column_GNK[..., :, None] * column_GNK[..., None, :]
    gram = np.moveaxis(np.tensordot(weight_BN, pairs_GNKK, axes=(1, 1)), 1, 1)
    wanted_BN = weight_BN if target_BN is None else weight_BN * target_BN
    right = np.tensordot(wanted_BN, column_GNK, axes=(1, 1))
    total_B = (wanted_BN if target_BN is None else wanted_BN * target_BN).sum(axis=1)
    linear_BGK, loss_BG = _non_negative(gram, right, total_B[:, None])
    best_B = np.argmin(loss_BG, axis=1)
    row_B = np.arange(len(weight_BN))
    linear_BK, loss_B, at_BD = linear_BGK[row_B, best_B], loss_BG[row_B, best_B], trial_GD[best_B]
    if not axes:
        return linear_BK, at_BD
    step_D = _FIRST_STEP * np.array([np.ptp(axis.points()) / max(axis.count - 1, 1) for axis in axes])
    low_D, high_D = np.array([axis.scaled() for axis in axes]).T
    offsets = np.meshgrid(*([np.array([-1.0, 0.0, 1.0])] * len(axes)), indexing="ij")
    offset_GD = np.stack([offset.ravel() for offset in offsets], axis=-1)
    rows = max(1, _CHUNK // (len(offset_GD) * points * terms * terms))
    for _ in range(_LEVELS):
        for start in range(0, len(weight_BN), rows):
            part = slice(start, start + rows)
            trial_BGD = np.clip(at_BD[part, None, :] + offset_GD * step_D, low_D, high_D)
            column = columns(_values(trial_BGD, axes))
            weighted = column * weight_BN[part, None, :, None]
            linear, loss = _non_negative(
                np.swapaxes(weighted, -1, -2) @ column,
                np.einsum("bn,bgnk->bgk", wanted_BN[part], column),
                total_B[part, None],
            )
            best = np.argmin(loss, axis=1)
            row = np.arange(len(best))
            better = loss[row, best] < loss_B[part]
            loss_B[part] = np.where(better, loss[row, best], loss_B[part])
            linear_BK[part] = np.where(better[:, None], linear[row, best], linear_BK[part])
            at_BD[part] = np.where(better[:, None], trial_BGD[row, best], at_BD[part])
        step_D = step_D * _SHRINK
    return linear_BK, _values(at_BD, axes)


def _values(scaled: Float64, axes: Sequence[Axis]) -> Float64:
    if not axes:
        return scaled
    return np.stack([axis.value(scaled[..., index]) for index, axis in enumerate(axes)], axis=-1)


def _non_negative(gram: Float64, right: Float64, total: Float64) -> tuple[Float64, Float64]:
    """Least squares with coefficients >= 0, by trying every set of positive ones.

    Args:
        gram: (..., K, K).
        right: (..., K).
        total: sum of squares of the target, (...).

    Returns:
        coefficients (..., K) and what is left of ``total`` (...).
    """
    terms = right.shape[-1]
    scale = np.sqrt(np.maximum(np.einsum("...kk->...k", gram), _TINY))
    gram = gram / (scale[..., :, None] * scale[..., None, :])
    right = right / scale
    best = np.zeros_like(right)
    loss = np.broadcast_to(total, right.shape[:-1]).copy()
    for size in range(1, terms + 1):
        for chosen in combinations(range(terms), size):
            part = list(chosen)
            matrix = gram[..., part, :][..., :, part] + _RIDGE * np.eye(size)
            wanted = right[..., part]
            found = np.linalg.solve(matrix, wanted[..., None])[..., 0]
            left = total - np.sum(found * wanted, axis=-1)
            better = (found >= 0).all(axis=-1) & (left < loss)
            loss = np.where(better, left, loss)
            candidate = np.zeros_like(best)
            candidate[..., part] = found
            best = np.where(better[..., None], candidate, best)
    return best / scale, loss
