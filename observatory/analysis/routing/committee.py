"""Standing committees: the few experts that hold half of a layer's load, and whether they stay the same.

Shapes: E experts. The idea is COMMITTEEAUDIT's (arXiv 2601.03425); definition and chance level are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from observatory.analysis.routing.imbalance import checked_loads
from observatory.analysis.routing.loads import RunLoads
from observatory.analysis.statistics import hypergeometric
from observatory.errors import LoadError


def standing_committee(load_E: ArrayLike, mass: float = 0.5) -> NDArray[np.int64] | None:
    """Smallest set of experts that holds at least ``mass`` of the assignments.

    Args:
        load_E: assignments per expert, (E,).
        mass: share in (0, 1].

    Returns:
        Expert ids, most loaded first (equal loads: lower id first); None when nothing was assigned.

    Raises:
        LoadError: impossible loads, or a mass outside (0, 1].
    """
    if not 0 < mass <= 1:
        raise LoadError(f"committee mass is {mass}; expected a share above 0 and at most 1")
    load = checked_loads(load_E)
    order_E = np.argsort(-load, kind="stable")
    held_E = np.cumsum(load[order_E].astype(object))
    needed = math.ceil(Fraction(mass) * int(held_E[-1]))
    if needed == 0:
        return None
    size = 1 + int(np.argmax((held_E >= needed).astype(bool)))
    return order_E[:size].astype(np.int64)


def jaccard(first: Iterable[int], second: Iterable[int]) -> float | None:
    """Size of the intersection over size of the union; None when both are empty."""
    one, other = set(first), set(second)
    return len(one & other) / len(one | other) if one | other else None


def jaccard_by_chance(first_size: int, second_size: int, experts: int) -> float | None:
    """Expected Jaccard index of two independent random sets of these sizes out of E experts, exact."""
    if not 0 <= min(first_size, second_size) <= max(first_size, second_size) <= experts:
        raise LoadError(f"sets of {first_size} and {second_size} out of {experts} experts are impossible")
    if first_size + second_size == 0:
        return None
    shared = np.arange(max(0, first_size + second_size - experts), min(first_size, second_size) + 1)
    chance = hypergeometric(shared.tolist(), population=experts, marked=first_size, drawn=second_size)
    return float(np.dot(chance, shared / (first_size + second_size - shared)))


def committee_stability(conditions: Mapping[str, RunLoads], *, mass: float = 0.5) -> pd.DataFrame:
    """How much the committees of each layer overlap between data conditions.

    Args:
        conditions: condition name -> loads of a run of the same model.
        mass: share that makes a committee.

    Returns:
        phase, layer, experts, condition_a, condition_b, size_a, size_b, jaccard, jaccard_chance: one row
        per pair of conditions in which the layer got assignments. Read jaccard against jaccard_chance:
        two halves of all experts drawn blindly already overlap by about a third.

    Raises:
        LoadError: a layer's number of experts differs between conditions.
    """
    rows: list[dict[str, object]] = []
    for first, second in combinations(conditions, 2):
        for key in sorted(set(conditions[first]) & set(conditions[second])):
            one, other = conditions[first][key], conditions[second][key]
            if one.experts != other.experts:
                raise LoadError(
                    f"layer {key[1]} has {one.experts} experts in {first} and {other.experts} in {second}; "
                    "compare runs of one model"
                )
            set_a, set_b = standing_committee(one.load_E, mass), standing_committee(other.load_E, mass)
            if set_a is None or set_b is None:
                continue
            rows.append(
                {
                    "phase": key[0],
                    "layer": key[1],
                    "experts": one.experts,
                    "condition_a": first,
                    "condition_b": second,
                    "size_a": set_a.size,
                    "size_b": set_b.size,
                    "jaccard": jaccard(set_a.tolist(), set_b.tolist()),
                    "jaccard_chance": jaccard_by_chance(set_a.size, set_b.size, one.experts),
                }
            )
    columns = [
        "phase", "layer", "experts", "condition_a", "condition_b", "size_a", "size_b",
        "jaccard", "jaccard_chance",
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)
