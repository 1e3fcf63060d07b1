"""The power law by which performance models draw expert loads, fitted to loads.

aiconfigurator draws the load of each expert from the density f(x) ~ x**-alpha on [x_min, x_max] and scales
the draws to T K assignments; x_min, x_max = 1, 0.8 T where T K > E, else 0.01, 2 [its
docs/POWER_LAW_DISTRIBUTION.md and collector/helper.py]. With u = (i - 0.5) / E, i = 1..E, in place of
uniform draws, the load at rank i is its inverse distribution function

    Q(u) = ((x_max**(1 - alpha) - x_min**(1 - alpha)) u + x_min**(1 - alpha))**(1 / (1 - alpha)),
    Q(u) = x_min (x_max / x_min)**u  for alpha = 1.

Shapes: S steps, E experts, A exponents.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.routing.imbalance import checked_loads
from observatory.errors import LoadError

Float64 = NDArray[np.float64]

#: Exponents that are tried.
ALPHAS: tuple[float, ...] = tuple(round(0.01 * step, 2) for step in range(1, 301))
#: Those that its tables are keyed by; 0 is balanced.
TABULATED = (0.0, 1.01, 1.2)


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerLawFit:
    """The exponent that comes nearest to some loads.

    Attributes:
        alpha: it; 0 where equal loads come nearer than any power law.
        misplaced_share: assignments that would have to move to another rank in the order of loads for the
            two histograms to be equal, as a share of all; mean over the steps.
        balanced_misplaced_share: likewise against equal loads.
        nearest: of `TABULATED` the one with the smallest misplaced share.
        tokens: mean of the steps.
        steps: steps with assignments.
    """

    alpha: float
    misplaced_share: float
    balanced_misplaced_share: float
    nearest: float
    tokens: float
    steps: int


def fit_power_law(load_SE: NDArray[np.integer], *, top_k: int) -> PowerLawFit | None:
    """Fit one exponent to the loads of several steps.

    The exponent minimises the mean over steps of 1/2 sum_i |s_(i) - q_i|, s_(i) the i-th smallest share of
    the step's assignments and q_i that of Q(u_i).

    Args:
        load_SE: assignments of each step.
        top_k: K.

    Returns:
        The fit; None where nothing was assigned.

    Raises:
        LoadError: a load is negative or not an integer, or fewer than two experts.
    """
    load_SE = checked_loads(load_SE, dimensions=2)
    load_SE = load_SE[load_SE.sum(axis=1) > 0]
    if load_SE.shape[1] < 2:
        raise LoadError("a power law needs at least two experts")
    if not len(load_SE):
        return None
    total_S = load_SE.sum(axis=1).astype(np.float64)
    share_SE = np.sort(load_SE, axis=1) / total_S[:, None]
    misplaced_A = np.zeros(len(ALPHAS))
    for share_E, total in zip(share_SE, total_S.tolist(), strict=True):
        law_AE = power_law_shares(len(share_E), tokens=total / top_k, assignments=total)
        misplaced_A += 0.5 * np.abs(law_AE - share_E).sum(axis=1)
    misplaced_A /= len(share_SE)
    balanced = float(np.abs(share_SE - 1 / share_SE.shape[1]).sum() / (2 * len(share_SE)))
    best = int(misplaced_A.argmin())
    return PowerLawFit(
        alpha=0.0 if balanced <= misplaced_A[best] else ALPHAS[best],
        misplaced_share=min(balanced, float(misplaced_A[best])),
        balanced_misplaced_share=balanced,
        nearest=min(TABULATED, key=lambda alpha: misplaced_A[ALPHAS.index(alpha)] if alpha else balanced),
        tokens=float(total_S.mean() / top_k),
        steps=len(share_SE),
    )


@lru_cache(maxsize=64)  # steps mostly have as many tokens
def power_law_shares(experts: int, *, tokens: float, assignments: float) -> Float64:
    """Shares of the experts, ascending, under each of `ALPHAS`; (A, E)."""
    low, high = (1.0, max(0.8 * tokens, 1.0)) if assignments > experts else (0.01, 2.0)
    u_E = (np.arange(experts) + 0.5) / experts
    power_A1 = 1.0 - np.array(ALPHAS)[:, None]
    one_A = np.isclose(power_A1[:, 0], 0.0)
    law_AE = np.empty((len(ALPHAS), experts))
    rest_A1 = power_A1[~one_A]
    law_AE[~one_A] = ((high**rest_A1 - low**rest_A1) * u_E + low**rest_A1) ** (1 / rest_A1)
    law_AE[one_A] = low * (high / low) ** u_E
    law_AE /= law_AE.sum(axis=1, keepdims=True)
    law_AE.flags.writeable = False
    return law_AE
