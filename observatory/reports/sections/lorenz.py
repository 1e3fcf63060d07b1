"""Lorenz curves."""

from __future__ import annotations

import numpy as np
import pandas as pd

from observatory.analysis.columns import Column
from observatory.analysis.routing.imbalance import lorenz_curve
from observatory.reports.figures import LORENZ_GRID, floor_lorenz, lorenz_curves
from observatory.reports.frames.report import ReportFrames
from observatory.reports.page import FigureBlock, Section, Variant, frame_table
from observatory.reports.sections.common import NO_LOADS, layer_window_text, model_on, run_choice, run_keys
from observatory.reports.text import percent, shorten

_TABLE_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
_HELD = (
    Column(name="share", title="least loaded", unit="%", digits=0),
    Column(name="mean", title="mean over layers", unit="%", digits=1),
    Column(name="uniform", title="uniform routing", unit="%", digits=1, legend="an estimate"),
)


def curves_of(loads: pd.DataFrame) -> pd.DataFrame:
    """Lorenz curve of every layer of one run and phase on ``LORENZ_GRID``: layer, x, y.

    Layers without assignments have no curve.
    """
    curves = {
        layer: np.interp(LORENZ_GRID, *curve)
        for layer, load_E in loads.groupby("layer")["load"]
        if (curve := lorenz_curve(load_E.to_numpy())) is not None
    }
    return pd.DataFrame(
        {
            "layer": np.repeat(list(curves), len(LORENZ_GRID)),
            "x": np.tile(LORENZ_GRID, len(curves)),
            "y": np.concatenate([*curves.values(), []]),
        }
    )


def lorenz_section(frames: ReportFrames) -> Section:
    """One figure per run and phase."""
    title = "How few experts do most of the work"
    loads = dict(iter(frames.loads.groupby(["run", "phase"], sort=False)))
    layers = dict(iter(frames.layers.groupby(["run", "phase"], sort=False)))
    variants = [
        variant
        for run, label, condition, phase in frames.cells_in_order()
        if (run, phase) in loads
        and (variant := _variant(loads[run, phase], layers[run, phase], label, condition, phase)) is not None
    ]
    if not variants:
        return Section(id="lorenz", title=title, short="Lorenz curves", reason=NO_LOADS)
    return Section(
        id="lorenz",
        title=title,
        short="Lorenz curves",
        lead=(
            "Lorenz curves: sort the experts of a layer from least to most loaded and add up their shares. "
            "On the diagonal all are equal; the further a curve hangs below it, the fewer experts do the "
            "work. Gini is twice the area between curve and diagonal, so the bold curve's Gini is the "
            "model's value in the grid above. The dotted curve is what sampling alone would show with "
            "perfectly uniform routing.",
        ),
        blocks=(
            FigureBlock(
                id="lorenz-curves",
                title="Lorenz curves of expert loads",
                caption="Experts, whole window (lorenz_curve, under Methods). Drawn at 41 points. The "
                "curve of uniform routing is an estimate: loads taken as normal, with the Gini of the "
                "sampling floor; it is left out where loads are too small for that.",
                choice="Run",
                narrow=True,
                variants=tuple(variants),
            ),
        ),
    )


def _variant(
    loads: pd.DataFrame, layers: pd.DataFrame, label: str, condition: str, phase: str
) -> Variant | None:
    curves = curves_of(loads)
    if curves.empty:
        return None
    known = layers.dropna(subset=["gini"])
    worst = int(known["layer"].to_numpy()[known["gini"].to_numpy().argmax()]) if len(known) > 1 else None
    floor = float(layers["gini_floor"].mean())
    mean = curves.groupby("x")["y"].mean()
    uniform = floor_lorenz(floor)
    top_half = 1 - float(np.interp(0.5, mean.index.to_numpy(), mean.to_numpy()))
    rows = [
        {
            "share": share,
            "mean": float(np.interp(share, mean.index.to_numpy(), mean.to_numpy())),
            "uniform": None if uniform is None else float(np.interp(share, LORENZ_GRID, uniform)),
        }
        for share in _TABLE_SHARES
    ]
    return Variant(
        group=shorten(label),
        label=run_choice(label, condition, phase),
        keys=run_keys(label, condition, phase),
        figure=lorenz_curves(curves, gini_floor=floor if np.isfinite(floor) else None, worst_layer=worst),
        alt=f"Lorenz curves of {curves['layer'].nunique()} layers for {model_on(label, condition)}, {phase}: "
        f"the busier half of the experts takes {percent(top_half)} of the assignments on average.",
        note=f"{model_on(label, condition)}, {phase}. " + layer_window_text(layers),
        numbers=frame_table(
            f"{model_on(label, condition)}, {phase}: share of assignments held by the least loaded experts",
            _HELD,
            rows,
        ),
    )
