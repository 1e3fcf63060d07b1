"""Standing committees of a report's runs, from their summed loads.

``committees`` run, phase, layer, experts, size (experts that hold half of the layer's assignments)
``overlaps``   label, phase, layer, with_kind, jaccard, jaccard_chance: one row per layer and pair of
               conditions whose first is real text; ``with_kind`` is the other's kind, or ``same`` for the two
               halves of one real text's steps
"""

from __future__ import annotations

from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from observatory.analysis.routing import jaccard, jaccard_by_chance, standing_committee
from observatory.reports.frames.report import ReportFrames

_Key = tuple[int, str, int]  # run, phase, layer
_Set = tuple[frozenset[int], int]  # committee, experts of its layer


def committee_sizes(loads: pd.DataFrame) -> pd.DataFrame:
    """Size of every layer's committee; layers without assignments are left out.

    Args:
        loads: the report's ``loads``.
    """
    rows = [
        (run, phase, layer, experts, len(members))
        for (run, phase, layer), (members, experts) in _committees(loads, "load").items()
    ]
    return pd.DataFrame(rows, columns=["run", "phase", "layer", "experts", "size"])


def committee_overlaps(frames: ReportFrames) -> pd.DataFrame:
    """Overlap of a real text's committees with those of each other condition of the same model.

    Even and odd steps of one text give two committees that differ by sampling and by text alone. Conditions
    whose committees overlap as much as those cannot be distinguished.
    """
    whole = _committees(frames.loads, "load")
    odd, even = _committees(frames.loads, "load_odd"), _committees(frames.loads, "load_even")
    rows: list[tuple[object, ...]] = []
    for label, runs in frames.runs.groupby("label", sort=False):
        kinds = dict(zip(runs["run"], runs["kind"], strict=True))
        pairs = [
            (one, other) if kinds[one] == "real" else (other, one) for one, other in combinations(kinds, 2)
        ]
        for run, phase, layer in whole:
            if kinds.get(run) != "real":
                continue
            key = (run, phase, layer)
            rows += _row(label, key, "same", odd.get(key), even.get(key))
            for one, other in pairs:
                if one == run:
                    rows += _row(label, key, kinds[other], whole[key], whole.get((other, phase, layer)))
    return pd.DataFrame(
        rows, columns=["label", "phase", "layer", "with_kind", "jaccard", "jaccard_chance"]
    ).astype({"jaccard": "float64", "jaccard_chance": "float64"})


def _committees(loads: pd.DataFrame, column: str) -> dict[_Key, _Set]:
    """Committee of every run, phase and layer in which ``column`` holds assignments."""
    sets: dict[_Key, _Set] = {}
    for (run, phase, layer), load_E in _histograms(loads, column).items():
        members = standing_committee(load_E)
        if members is not None:
            sets[run, phase, layer] = (frozenset(members.tolist()), load_E.size)
    return sets


def _histograms(loads: pd.DataFrame, column: str) -> dict[Any, NDArray[np.int64]]:
    """Loads per run, phase and layer; an expert's position is its id."""
    return {
        key: load.to_numpy(dtype=np.int64)
        for key, load in loads.groupby(["run", "phase", "layer"], sort=False)[column]
    }


def _row(
    label: object, key: _Key, kind: str, one: _Set | None, other: _Set | None
) -> list[tuple[object, ...]]:
    """One row, or none where a committee is missing or the layers differ in their experts."""
    if one is None or other is None or one[1] != other[1]:
        return []
    chance = _chance(len(one[0]), len(other[0]), one[1])
    return [(label, *key[1:], kind, jaccard(one[0], other[0]), chance)]


@cache
def _chance(first: int, second: int, experts: int) -> float | None:
    return jaccard_by_chance(first, second, experts)
