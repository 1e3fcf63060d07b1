"""Fits one form of t(f) or P(f) to points, under many weightings and with many targets at once.

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

from observatory.analysis.frequency.model import (
    POWER_TERMS,
    TIME_TERMS,
    PowerForm,
    TimeForm,
    softmax,
    voltage,
)

Float64 = NDArray[np.float64]

_SHARPNESS = (2.0, 64.0)
_MOST_SLOPE = 0.9
_VOLTAGE_SLOPE = (0.1, 1.0)
#: A column that differs from a mix of those before it by less than this, relative, cannot be separated from
#: them in the presence of a percent of noise.
_DISTINCT = 0.02
#: The narrowing tries one step to either side on every axis, in steps that shrink by this factor.
_LEVELS = 8
_SHRINK = 0.6
_FIRST_STEP = 0.7
_TINY = 1e-300
_RIDGE = 1e-12
#: Numbers in one chunk of the narrowing, which bounds its memory.
_CHUNK = 4_000_000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Points:
    """What a fit sees.

    Attributes:
        mhz_N: clock that was sampled.
        iteration_s_N: time of an iteration.
        power_mw_N: mean power; NaN where the energy is not known.
        block_N: points at the same clock have the same number, counted from the lowest clock.
        power_weight_N: what each power is worth, about 1; 0 where there is none.
    """

    mhz_N: Float64
    iteration_s_N: Float64
    power_mw_N: Float64
    block_N: NDArray[np.int64]
    power_weight_N: Float64

    @property
    def f0_mhz(self) -> float:
        """The highest clock."""
        return float(self.mhz_N.max())

    @property
    def blocks(self) -> int:
        """Different clocks."""
        return int(self.block_N.max()) + 1

    def block_mhz(self) -> Float64:
        """Mean clock of each block, rising."""
        return np.bincount(self.block_N, weights=self.mhz_N) / np.bincount(self.block_N)


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


def time_axes(form: TimeForm, points: Points) -> list[Axis]:
    """Where the nonlinear parameters of a form are sought.

    The knee lies where at least two clocks show its compute side, unless there is no host part and one clock
    is enough, and, where the memory's slope is to be found, two its memory side. A knee between the two
    lowest clocks is thus put at the second lowest: a chord lies above a convex curve, so that the time is
    rather over- than understated. See :func:`spread_last_knees`.
    """
    if not form.has_knee:
        return []
    x = points.f0_mhz / points.block_mhz()[::-1]
    lowest = x[1] if "memory_slope_s" in form.terms else x[0]
    highest = x[-2] if "host_s" in form.terms else x[-1]
    axes = [Axis(low=float(lowest), high=float(highest), count=24, logarithmic=True)]
    if "memory_slope_s" in form.terms:
        axes.append(Axis(low=0.0, high=_MOST_SLOPE, count=7))
    if "sharpness" in form.terms:
        axes.append(Axis(low=_SHARPNESS[0], high=_SHARPNESS[1], count=6, logarithmic=True))
    return axes


def fit_time(form: TimeForm, points: Points, weight_BN: Float64, target_BN: Float64 | None = None) -> Float64:
    """Parameters of t(f) for each problem, (B, 5) in the order of ``TIME_TERMS``.

    Args:
        form: the form.
        points: the points.
        weight_BN: weights of points.
        target_BN: times to fit over those measured; None fits those measured.
    """
    x_N = points.f0_mhz / points.mhz_N
    relative_N = 1.0 / points.iteration_s_N
    host = "host_s" in form.terms
    axes = time_axes(form, points)

    def columns(shape: Float64) -> Float64:
        knee, slope, sharpness = _shape(form, shape)
        terms_N = []
        if host:
            terms_N.append(np.ones((*shape.shape[:-1], len(x_N))))
        if form.has_knee:
            memory = (1.0 - slope) * knee + slope * x_N
            terms_N.append(softmax(memory, np.broadcast_to(x_N, memory.shape), sharpness))
        elif "compute_s" in form.terms:
            terms_N.append(np.broadcast_to(x_N, (*shape.shape[:-1], len(x_N))))
        else:
            terms_N.append(np.ones((*shape.shape[:-1], len(x_N))))
        return np.stack(terms_N, axis=-1) * relative_N[:, None]

    linear_BK, shape_BD = solve(columns, axes, weight_BN, target_BN)
    time_BT = np.zeros((len(weight_BN), len(TIME_TERMS)))
    if host:
        time_BT[:, 0] = linear_BK[:, 0]
    last_B = linear_BK[:, -1]
    if form.has_knee:
        knee, slope, sharpness = (values[:, 0] for values in _shape(form, shape_BD))
        time_BT[:, 1] = last_B * (1.0 - slope) * knee
        time_BT[:, 2] = last_B * slope
        time_BT[:, 3] = last_B
        time_BT[:, 4] = np.where(last_B > 0, sharpness, 0.0)
    else:
        time_BT[:, 3 if "compute_s" in form.terms else 1] = last_B
    return time_BT


def spread_last_knees(
    form: TimeForm, time_BT: Float64, points: Points, generator: np.random.Generator
) -> Float64:
    """Bootstrap samples whose knee came to lie at the second lowest clock, with knees anywhere below it.

    The points do not show where between the two lowest clocks such a knee is: with a steeper compute side
    and a smaller host part it may lie lower and the curve still passes through all points. Each sample gets
    one of the knees that need no negative host part, so that intervals in between say what is not known.
    """
    if not form.has_knee or "host_s" not in form.terms or "sharpness" in form.terms:
        return time_BT
    x = points.f0_mhz / points.block_mhz()[::-1]
    host, memory, slope, compute = time_BT[:, :4].T
    base, last_s = host + memory, host + compute * x[-1]
    knee = np.divide(memory, compute - slope, out=np.zeros_like(memory), where=compute > slope)
    with np.errstate(divide="ignore", invalid="ignore"):
        furthest = np.minimum(base * x[-1] / (last_s - slope * x[-1]), 0.999 * x[-1])
    hidden = (knee > 0.99 * x[-2]) & (last_s > base + slope * x[-1]) & (furthest > knee)
    chosen = knee + generator.uniform(size=len(knee)) * np.where(hidden, furthest - knee, 0.0)
    at_knee_s = base + slope * chosen
    steep = np.where(hidden, (last_s - at_knee_s) / (x[-1] - np.minimum(chosen, 0.9999 * x[-1])), compute)
    moved = time_BT.copy()
    moved[:, 0] = np.where(hidden, np.maximum(at_knee_s - steep * chosen, 0.0), host)
    moved[:, 1] = np.where(hidden, base - moved[:, 0], memory)
    moved[:, 3] = steep
    return moved


def _shape(form: TimeForm, shape: Float64) -> tuple[Float64, Float64, Float64]:
    """Knee (in x), slope of memory over compute, and sharpness, each (..., 1)."""
    zero = np.zeros((*shape.shape[:-1], 1))
    if not form.has_knee:
        return zero, zero, zero
    sloped, soft = "memory_slope_s" in form.terms, "sharpness" in form.terms
    return (
        shape[..., 0:1],
        shape[..., 1:2] if sloped else zero,
        shape[..., -1:] if soft else zero,
    )


def fit_power(
    form: PowerForm,
    terms: tuple[str, ...],
    points: Points,
    weight_BN: Float64,
    target_BN: Float64 | None = None,
) -> Float64:
    """Parameters of P(f) for each problem, (B, 6) in the order of ``POWER_TERMS``.

    Args:
        form: the form.
        terms: those of its linear terms that the points can separate.
        points: the points; those without power have weight 0.
        weight_BN: weights of points, before their own worth.
        target_BN: powers to fit over those measured; None fits those measured.
    """
    phi_N = points.mhz_N / points.f0_mhz
    has_power_N = np.isfinite(points.power_mw_N)
    relative_N = 1.0 / np.where(has_power_N, points.power_mw_N, 1.0)
    phi_B = points.block_mhz() / points.f0_mhz
    axes = []
    if "ridge" in form.terms:
        axes.append(Axis(low=float(phi_B[0]), high=float(phi_B[-2]), count=16))
    if "voltage_slope" in form.terms:
        axes.append(Axis(low=_VOLTAGE_SLOPE[0], high=_VOLTAGE_SLOPE[1], count=10))

    def columns(shape: Float64) -> Float64:
        ridge, slope = _voltage(form, shape)
        volts = voltage(phi_N, ridge, slope)
        all_terms = _power_columns(volts**2, phi_N, points.iteration_s_N)
        return np.stack([all_terms[term] for term in terms], axis=-1) * relative_N[:, None]

    weight_BN = weight_BN * np.where(has_power_N, points.power_weight_N, 0.0)
    linear_BK, shape_BD = solve(columns, axes, weight_BN, target_BN)
    power_BT = np.zeros((len(weight_BN), len(POWER_TERMS)))
    for index, term in enumerate(terms):
        power_BT[:, POWER_TERMS.index(term)] = linear_BK[:, index]
    ridge, slope = _voltage(form, shape_BD)
    power_BT[:, 4], power_BT[:, 5] = ridge[:, 0], slope[:, 0]
    return power_BT


def _voltage(form: PowerForm, shape: Float64) -> tuple[Float64, Float64]:
    """Ridge and slope of the voltage, each (..., 1)."""
    zero = np.zeros((*shape.shape[:-1], 1))
    if "ridge" not in form.terms:
        return zero, zero
    return shape[..., 0:1], shape[..., 1:2] if "voltage_slope" in form.terms else zero + 1.0


def _power_columns(squared: Float64, phi_N: Float64, iteration_s_N: Float64) -> dict[str, Float64]:
    ones = np.ones_like(squared)
    return {
        "static_mw": ones,
        "clock_mw": phi_N * squared,
        "memory_mj": ones / iteration_s_N,
        "op_mj": squared / iteration_s_N,
    }


def determined_terms(form: PowerForm, points: Points) -> tuple[str, ...]:
    """Linear terms of the form that the points can separate, in its order.

    A memory-bound phase takes equally long at every clock, so that energy per iteration and static power are
    the same column; a compute-bound phase mixes energy per operation with the clock's power.
    """
    linear = tuple(term for term in form.terms if term in POWER_TERMS[:4])
    has_power_N = np.isfinite(points.power_mw_N)
    power_BT = fit_power(form, linear, points, np.ones((1, len(has_power_N))))
    phi_N = points.mhz_N[has_power_N] / points.f0_mhz
    squared = voltage(phi_N, power_BT[:, 4:5], power_BT[:, 5:6])[0] ** 2
    columns = _power_columns(squared, phi_N, points.iteration_s_N[has_power_N])
    kept: list[str] = []
    for term in linear:
        column = columns[term]
        if kept:
            basis = np.stack([columns[name] for name in kept], axis=-1)
            left = column - basis @ np.linalg.lstsq(basis, column, rcond=None)[0]
            if np.linalg.norm(left) < _DISTINCT * np.linalg.norm(column):
                continue
        kept.append(term)
    return tuple(kept)


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
            solution = np.linalg.solve(matrix, wanted[..., None])[..., 0]
            left = total - np.sum(solution * wanted, axis=-1)
            better = (solution >= 0).all(axis=-1) & (left < loss)
            loss = np.where(better, left, loss)
            candidate = np.zeros_like(best)
            candidate[..., part] = solution
            best = np.where(better[..., None], candidate, best)
    return best / scale, loss
