"""Whether predicted times distinguish two layouts: their ratio against the error of the model.

Two exchanges on the same ranks are predicted by the same coefficients, so a part of the error is common to
both and cancels in their ratio. What is left is known from held-out matrices: how far measured / predicted of
two different matrices of one size on the same ranks lie apart (``paired_ratio_Q``). On other ranks the errors
of both count, as if they had nothing in common. Sums over layers are given the error of one exchange, since
layers have traffic of one kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from observatory.analysis.network.network import AlgorithmFit


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Predicted time of one thing over that of another.

    Attributes:
        ratio: the first over the second.
        low, high: 90 % interval; None when the error is not known.
        code: ``apart`` when 1 lies outside the interval, ``within_error`` when inside, ``unknown`` where no
            measurement says how such ranks are predicted.
    """

    ratio: float
    low: float | None
    high: float | None
    code: Literal["apart", "within_error", "unknown"]


def compare_times(
    fit: AlgorithmFit, first_us: float, second_us: float, *, ranks: tuple[int, int], same_ranks: bool
) -> Comparison:
    """Compare two predicted times.

    Args:
        fit: what predicted both.
        first_us: one time, positive.
        second_us: the other.
        ranks: numbers of ranks of the first and of the second.
        same_ranks: whether both are exchanges of the same ranks.
    """
    ratio = first_us / second_us
    errors = [_errors(fit, number) for number in ranks]
    paired_Q = _paired(fit, ranks[0]) if same_ranks else None
    if paired_Q is not None:
        apart = paired_Q
    elif errors[0] is None or errors[1] is None:
        return Comparison(ratio=ratio, low=None, high=None, code="unknown")
    else:
        apart = np.outer(errors[0], 1.0 / errors[1]).ravel()
    low, high = (ratio * np.quantile(apart, [0.05, 0.95])).tolist()
    return Comparison(ratio=ratio, low=low, high=high, code="within_error" if low <= 1.0 <= high else "apart")


def compare_layouts(fit: AlgorithmFit, rows: pd.DataFrame) -> pd.DataFrame:
    """Compare every two layouts of a scan, phase by phase.

    Args:
        fit: what predicted the times.
        rows: ep, placement, layer, phase, dispatch_us, combine_us.

    Returns:
        phase, first_ep, first_placement, second_ep, second_placement, first_us, second_us (sums over
        layers of dispatch and combine), and ratio, low, high, code of ``Comparison``. Layouts without a time
        for every layer are left out.
    """
    comparisons = []
    for phase, of_phase in rows.groupby("phase", sort=True):
        times: dict[tuple[int, str], float] = {}
        for _, of_layout in of_phase.groupby(["ep", "placement"], sort=False):
            us = float(of_layout[["dispatch_us", "combine_us"]].to_numpy(dtype=np.float64).sum())
            if us > 0:  # neither 0 nor missing
                times[int(of_layout["ep"].iloc[0]), str(of_layout["placement"].iloc[0])] = us
        for (first, first_us), (second, second_us) in combinations(times.items(), 2):
            ranks = (first[0], second[0])
            compared = compare_times(fit, first_us, second_us, ranks=ranks, same_ranks=ranks[0] == ranks[1])
            comparisons.append(
                {
                    "phase": phase,
                    "first_ep": first[0], "first_placement": first[1],
                    "second_ep": second[0], "second_placement": second[1],
                    "first_us": first_us, "second_us": second_us,
                    "ratio": compared.ratio, "low": compared.low, "high": compared.high,
                    "code": compared.code,
                }
            )  # fmt: skip
    return pd.DataFrame(comparisons)


def _errors(fit: AlgorithmFit, ranks: int) -> NDArray[np.float64] | None:
    """Measured / predicted for a number of ranks; None where no such error was measured."""
    if ranks in fit.domain.ranks:
        return np.array(fit.ratio_Q)
    return None if fit.other_ranks_ratio_Q is None else np.array(fit.other_ranks_ratio_Q)


def _paired(fit: AlgorithmFit, ranks: int) -> NDArray[np.float64] | None:
    ratio_Q = fit.paired_ratio_Q if ranks in fit.domain.ranks else fit.other_ranks_paired_ratio_Q
    return None if ratio_Q is None else np.array(ratio_Q)
