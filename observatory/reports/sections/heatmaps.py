"""Layer x expert maps."""

from __future__ import annotations

import numpy as np
import pandas as pd

from observatory.analysis.columns import Column
from observatory.reports.figures import expert_shares
from observatory.reports.frames.report import ReportFrames
from observatory.reports.page import FigureBlock, Section, Table, Variant, frame_table
from observatory.reports.sections.common import NO_LOADS, layer_window_text, model_on, run_choice, run_keys
from observatory.reports.text import shorten, times

#: Maps of more counts than this altogether would make the file too large; the rest is named, not drawn.
_MOST_COUNTS = 1_000_000
_EXPERTS = (
    Column(name="layer", title="layer"),
    Column(name="busiest", title="busiest experts", text=True),
    Column(name="most", title="busiest", digits=2),
    Column(name="median", title="median", digits=2),
    Column(name="least", title="least busy", digits=2),
    Column(name="idle", title="idle", legend="experts without a token"),
)


def heatmap_section(frames: ReportFrames) -> Section:
    """One map per run and phase."""
    title = "Who takes the load, layer by layer"
    variants: list[Variant] = []
    left_out, counts = 0, 0
    loads = dict(iter(frames.loads.groupby(["run", "phase"], sort=False)))
    layers = dict(iter(frames.layers.groupby(["run", "phase"], sort=False)))
    for run, label, condition, phase in frames.cells_in_order():
        phase_loads = loads.get((run, phase))
        if phase_loads is None:
            continue
        counts += len(phase_loads)
        if counts > _MOST_COUNTS:
            left_out += 1
            continue
        variants.append(_variant(phase_loads, layers[run, phase], label, condition, phase))
    if not variants:
        return Section(id="experts", title=title, short="Experts by layer", reason=NO_LOADS)
    lead: tuple[str, ...] = (
        "Load of each expert divided by its layer's mean load: 1× is the uniform share. Vertical stripes "
        "would mean that the same position is busy in every layer; scattered cells are each layer's own "
        "favourites.",
    )
    if left_out:
        lead += (
            f"{left_out} further maps are left out to keep this file small; report fewer runs to see them.",
        )
    return Section(
        id="experts",
        title=title,
        short="Experts by layer",
        lead=lead,
        blocks=(
            FigureBlock(
                id="expert-map",
                title="Share of assignments by layer and expert",
                caption="Experts, whole window, source ranks summed. The colour scale is even in the "
                "logarithm and saturates at ¼× and 4×. Values are rounded to 1 % of the uniform share.",
                choice="Run",
                variants=tuple(variants),
            ),
        ),
    )


def _variant(loads: pd.DataFrame, layers: pd.DataFrame, label: str, condition: str, phase: str) -> Variant:
    return Variant(
        group=shorten(label),
        label=run_choice(label, condition, phase),
        keys=run_keys(label, condition, phase),
        figure=expert_shares(loads),
        alt=f"Heatmap of {layers['layer'].nunique()} layers by {int(layers['experts'].max())} experts for "
        f"{model_on(label, condition)}, {phase}: the busiest expert of any layer takes "
        f"{times(layers['expert_max_over_mean'].max())} the uniform share.",
        note=f"{model_on(label, condition)}, {phase}. " + layer_window_text(layers),
        numbers=_numbers(loads, label, condition, phase),
    )


def _numbers(loads: pd.DataFrame, label: str, condition: str, phase: str) -> Table:
    rows = []
    for layer, loads_of_layer in loads.groupby("layer")["load"]:
        load_E = loads_of_layer.to_numpy()
        mean = float(load_E.mean())
        extremes = {"most": load_E.max(), "median": np.median(load_E), "least": load_E.min()}
        rows.append(
            {
                "layer": layer,
                "busiest": " ".join(map(str, np.argsort(-load_E, kind="stable")[:4])),
                **{name: float(load) / mean if mean else None for name, load in extremes.items()},
                "idle": int((load_E == 0).sum()),
            }
        )
    where = f"{model_on(label, condition)}, {phase}"
    return frame_table(f"{where}: experts by layer, loads over the mean load", _EXPERTS, rows)
