"""Tables of imbalance: one row per layer and phase, one row per phase.

A value that cannot be given is NaN in these frames and ``notes`` says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from observatory.analysis.routing.floor import gini_floor, gini_uniform_limit, max_over_mean_floor
from observatory.analysis.routing.imbalance import (
    balancedness,
    coefficient_of_variation,
    entropy_bits,
    gini,
    idle_experts,
    max_over_mean,
)
from observatory.analysis.routing.intervals import FEWEST_GROUPS, centred_interval, resampled_gini
from observatory.analysis.routing.loads import LayerLoads, RunLoads, collect_layer_loads

if TYPE_CHECKING:
    from observatory.run import Run

_LAYER_COLUMNS = (
    "layer", "phase", "experts", "top_k", "steps", "tokens", "assignments",
    "gini", "gini_low", "gini_high", "gini_floor", "gini_excess", "gini_uniform_limit",
    "expert_max_over_mean", "expert_max_over_mean_floor", "balancedness", "excess_over_mean",
    "cv", "entropy_bits", "idle_experts",
    "step_gini_p10", "step_gini_p50", "step_gini_p90", "step_gini_floor",
    "step_expert_max_over_mean_p50", "step_expert_max_over_mean_max", "step_expert_max_over_mean_floor",
    "floor_basis", "notes",
)  # fmt: skip


_MEANS = (
    "gini", "gini_floor", "gini_excess", "gini_uniform_limit", "expert_max_over_mean",
    "expert_max_over_mean_floor", "cv", "entropy_bits", "step_gini_p50", "step_gini_floor",
)  # fmt: skip

_PHASE_COLUMNS = (
    "phase", "layers", "experts", "top_k", "steps", "tokens", "gini_low", "gini_high", *_MEANS,
    "gini_min", "gini_max", "expert_max_over_mean_max", "idle_experts",
)  # fmt: skip

_NOT_REAL = frozenset(
    {
        "layer",
        "phase",
        "experts",
        "top_k",
        "steps",
        "tokens",
        "assignments",
        "idle_experts",
        "floor_basis",
        "notes",
    }
)


def floor_top_k(
    top_k: int | None, *, tokens: int, assignments: int, experts: int
) -> tuple[float | None, str]:
    """K for the sampling floors, and where it comes from.

    The configured K where the counts agree with it; otherwise the observed mean of assignments per token
    (variable K, null experts), which makes the floors estimates; None when tokens were not counted.
    """
    if tokens == 0 or assignments == 0:
        return None, "n/a (no tokens or no assignments)"
    if top_k is not None and assignments == tokens * top_k:
        return float(top_k), "configured top-k"
    observed = assignments / tokens
    if observed > experts:
        return None, "n/a (more assignments per token than experts)"
    return observed, f"observed {observed:.3f} assignments per token (estimate)"


def layer_metrics(run: Run | RunLoads, *, bootstrap: int = 200, seed: int = 0) -> pd.DataFrame:
    """Imbalance of every layer in every phase.

    Args:
        run: an open run, or what `collect_layer_loads` gathered from one.
        bootstrap: resamples of the interval of Gini, 0 for none.
        seed: of the resamples.

    Returns:
        One row per (layer, phase); columns and formulas in docs/metrics.md. Unknown values are NaN,
        ``notes`` says why.

    Raises:
        LoadError: loads are negative or inconsistent.
    """
    loads = _collected(run)
    rows = [_layer_row(loads[key], bootstrap=bootstrap, seed=seed) for key in loads]
    frame = pd.DataFrame(rows, columns=list(_LAYER_COLUMNS))
    frame["top_k"] = frame["top_k"].astype("Int64")
    real = [name for name in _LAYER_COLUMNS if name not in _NOT_REAL]
    return frame.astype(dict.fromkeys(real, "float64")).sort_values(["phase", "layer"], ignore_index=True)


def phase_summary(run: Run | RunLoads, *, bootstrap: int = 200, seed: int = 0) -> pd.DataFrame:
    """One row per phase: the unweighted mean over layers of whole-run per-layer values.

    Every layer counts the same however many experts or tokens it has; layers in which nothing was assigned
    are left out. The interval resamples steps for all layers together.

    Args:
        run: an open run, or what `collect_layer_loads` gathered from one.
        bootstrap: resamples of the interval, 0 for none.
        seed: of the resamples.

    Returns:
        Columns in docs/metrics.md; ``experts`` and ``top_k`` are missing where layers differ, ``steps`` and
        ``tokens`` are the most of any layer, ``idle_experts`` is a sum over layers.
    """
    loads = _collected(run)
    layers = layer_metrics(loads, bootstrap=0)
    rows: list[dict[str, object]] = []
    for phase, part in layers.groupby("phase", sort=True):
        row = _phase_row(str(phase), part)
        of_phase = [layer for (name, _), layer in loads.items() if name == phase and layer.assignments]
        interval = _mean_interval(of_phase, row["gini"], resamples=bootstrap, seed=seed)
        rows.append(row | ({"gini_low": interval[0], "gini_high": interval[1]} if interval else {}))
    frame = pd.DataFrame(rows, columns=list(_PHASE_COLUMNS))
    frame[["experts", "top_k"]] = frame[["experts", "top_k"]].astype("Int64")
    return frame.astype({"gini_low": "float64", "gini_high": "float64"})


def run_summary(run: Run | RunLoads) -> pd.DataFrame:
    """`phase_summary` without intervals: cheap enough to call for every cell of a grid."""
    return phase_summary(run, bootstrap=0)


def _collected(run: Run | RunLoads) -> RunLoads:
    return run if isinstance(run, Mapping) else collect_layer_loads(run)


def _phase_row(phase: str, layers: pd.DataFrame) -> dict[str, object]:
    def only(name: str) -> object:
        values = layers[name].unique()
        return values[0] if len(values) == 1 else None

    return {
        "phase": phase,
        "layers": len(layers),
        "experts": only("experts"),
        "top_k": only("top_k"),
        "steps": int(layers["steps"].max()),
        "tokens": int(layers["tokens"].max()),
        **{name: float(layers[name].mean()) for name in _MEANS},
        "gini_min": layers["gini"].min(),
        "gini_max": layers["gini"].max(),
        "expert_max_over_mean_max": layers["expert_max_over_mean"].max(),
        "idle_experts": int(layers["idle_experts"].sum()),
    }


def _mean_interval(
    layers: list[LayerLoads], value: object, *, resamples: int, seed: int
) -> tuple[float, float] | None:
    """Interval of a mean over layers; None unless all layers have one."""
    drawn = [resampled_gini(layer.load_GE, resamples=resamples, seed=seed) for layer in layers]
    defined = [gini_B for gini_B in drawn if gini_B is not None]
    if not layers or len(defined) < len(drawn) or not isinstance(value, float):
        return None
    fewest = min(len(layer.load_GE) for layer in layers)
    return centred_interval(np.mean(defined, axis=0), value, groups=fewest)


def _layer_row(loads: LayerLoads, *, bootstrap: int, seed: int) -> dict[str, object]:
    experts, notes = loads.experts, _notes(loads)
    top_k, basis = floor_top_k(
        loads.top_k, tokens=loads.tokens, assignments=loads.assignments, experts=experts
    )
    value = gini(loads.load_E)
    interval = centred_interval(
        resampled_gini(loads.load_GE, resamples=bootstrap, seed=seed), value, groups=len(loads.load_GE)
    )
    if interval is None and value is not None and bootstrap > 0:
        notes.append(f"no interval: {len(loads.load_GE)} steps, at least {FEWEST_GROUPS} needed")
    floors = _floors(loads.tokens, top_k, experts)
    ratio = max_over_mean(loads.load_E)
    return {
        "layer": loads.layer,
        "phase": loads.phase,
        "experts": experts,
        "top_k": loads.top_k,
        "steps": loads.steps,
        "tokens": loads.tokens,
        "assignments": loads.assignments,
        "gini": value,
        "gini_low": interval[0] if interval else None,
        "gini_high": interval[1] if interval else None,
        "gini_floor": floors[0],
        "gini_excess": None if value is None or floors[0] is None else value - floors[0],
        "gini_uniform_limit": floors[1],
        "expert_max_over_mean": ratio,
        "expert_max_over_mean_floor": floors[2],
        "balancedness": balancedness(loads.load_E),
        "excess_over_mean": None if ratio is None else ratio - 1.0,
        "cv": coefficient_of_variation(loads.load_E),
        "entropy_bits": entropy_bits(loads.load_E),
        "idle_experts": idle_experts(loads.load_E),
        **_per_step(loads, top_k),
        "floor_basis": basis,
        "notes": "; ".join(notes),
    }


def _floors(
    tokens: int, top_k: float | None, experts: int
) -> tuple[float | None, float | None, float | None]:
    """Floor of Gini, its uniform limit, floor of max/mean."""
    if top_k is None:
        return None, None, None
    return (
        gini_floor(tokens=tokens, top_k=top_k, experts=experts),
        gini_uniform_limit(tokens=tokens, top_k=top_k, experts=experts),
        max_over_mean_floor(tokens=tokens, top_k=top_k, experts=experts),
    )


def _per_step(loads: LayerLoads, top_k: float | None) -> dict[str, float | None]:
    """Distribution over steps; without single steps only the stored extreme is known."""
    has_extremes = not bool(np.isnan(loads.step_max_over_mean_S[loads.tokens_S > 0]).any())
    row: dict[str, float | None] = {
        "step_expert_max_over_mean_max": _quantile(loads.step_max_over_mean_S, 1.0) if has_extremes else None
    }
    if loads.keeps_steps:
        tokens = int(np.median(loads.tokens_S[loads.tokens_S > 0])) if loads.tokens else 0
        floor, _, ratio_floor = _floors(tokens, top_k, loads.experts)
        row |= {
            "step_gini_p10": _quantile(loads.gini_S, 0.1),
            "step_gini_p50": _quantile(loads.gini_S, 0.5),
            "step_gini_p90": _quantile(loads.gini_S, 0.9),
            "step_gini_floor": floor,
            "step_expert_max_over_mean_p50": _quantile(loads.max_over_mean_S, 0.5),
            "step_expert_max_over_mean_floor": ratio_floor,
        }
    return row


def _quantile(values_S: NDArray[np.float64], quantile: float) -> float | None:
    some = values_S[~np.isnan(values_S)]
    return float(np.quantile(some, quantile)) if some.size else None


def _notes(loads: LayerLoads) -> list[str]:
    notes = []
    if loads.assignments == 0:
        notes.append("nothing was assigned")
    if not loads.keeps_steps:
        notes.append("rows fold several steps: no per-step Gini or median")
    if loads.incomplete_rows:
        notes.append(f"{loads.incomplete_rows} of {loads.step_S.size} rows lack some ranks")
    if loads.partial_rows:
        notes.append(
            f"{loads.partial_rows} of {loads.step_S.size} rows are partial: calls are missing in them"
        )
    if loads.rows_per_group > 1:
        notes.append(f"interval from groups of {loads.rows_per_group} rows")
    return notes
