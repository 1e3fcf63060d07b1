"""Other expert-parallel degrees, from the captured loads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from observatory.analysis.columns import Column, chosen
from observatory.analysis.network.layouts import LAYOUT_COLUMNS
from observatory.reports.figures import crossing_shares, ep_profile, rank_imbalance
from observatory.reports.frames.report import ReportFrames, condition_order, phases_of
from observatory.reports.page import FigureBlock, Section, Variant, frame_table
from observatory.reports.sections.common import choice_label, model_on, run_choice, run_keys, spread
from observatory.reports.text import percent, plain, shorten, times
from observatory.run.documents.writing import frame_records
from observatory.text import listing

_MEANS = [
    "expert_max_over_mean",
    "rank_max_over_mean",
    "rank_max_over_mean_floor",
    "rank_max_over_mean_step_floor",
    "rank_max_over_mean_step_p50",
    "rank_max_over_mean_step_p90",
    "rank_max_over_mean_step_max",
    "cross_rank_fraction",
    "cross_node_fraction",
]

_MODEL = Column(name="label", title="model", text=True)
_WORST = Column(name="rank_max_over_mean_worst", title="worst layer", digits=2)
_OVERVIEW = (
    *chosen(LAYOUT_COLUMNS, "ep", "rank_max_over_mean", "rank_max_over_mean_floor"),
    _WORST,
    *chosen(LAYOUT_COLUMNS, "expert_max_over_mean"),
)
_DETAIL = (
    *chosen(
        LAYOUT_COLUMNS,
        "ep",
        "expert_max_over_mean",
        "rank_max_over_mean",
        "rank_max_over_mean_step_p50",
        "rank_max_over_mean_step_p90",
        "rank_max_over_mean_step_max",
    ),
    _WORST,
    *chosen(LAYOUT_COLUMNS, "rank_max_over_mean_floor", "rank_max_over_mean_step_floor"),
)


def mean_over_layers(scan: pd.DataFrame) -> pd.DataFrame:
    """Unweighted means over layers per run, phase and ep, with the worst layer's per-rank value."""
    groups = scan.groupby(["run", "phase", "ep"], sort=False)
    means = groups[_MEANS].mean()
    means["rank_max_over_mean_worst"] = groups["rank_max_over_mean"].max()
    means["sources"] = groups["sources"].agg(lambda values: ", ".join(sorted(set(values))))
    means["experts"] = groups["experts"].max()
    means["placement"] = groups["placement"].first()
    means["tokens"] = groups["tokens"].max()
    return means.reset_index()


def scan_section(frames: ReportFrames, *, gpus_per_node: int) -> Section:
    """Ranks against EP degree: all models together, then one run in detail, then what crosses."""
    title = "Other expert-parallel degrees"
    if frames.scan.empty:
        reasons = dict.fromkeys(gap for fact in frames.facts for gap in fact.scan_gaps)
        why = " ".join(reasons) or "No run given here holds routing rows with assignments."
        return Section(id="ep", title=title, short="EP scan", reason=f"There is no EP scan. {why}")
    scan = mean_over_layers(frames.scan).merge(frames.runs[["run", "label", "condition", "kind"]], on="run")
    runs = dict(iter(scan.groupby(["run", "phase"], sort=False)))
    cells = [
        (runs[run, phase], label, condition, phase)
        for run, label, condition, phase in frames.cells_in_order()
        if (run, phase) in runs
    ]
    placement = listing(list(dict.fromkeys(scan["placement"])))
    return Section(
        id="ep",
        title=title,
        short="EP scan",
        lead=(
            "The captured loads, laid out again over other numbers of ranks (“Expert-parallel scan” "
            "under Methods): arithmetic on counts, no time was measured. Busiest expert over mean expert "
            "is a property of the routing and is flat by construction: the same tokens choose the same "
            "experts at any EP degree. What placement can change, and what the exchange waits for, is the "
            "busiest rank over the mean rank.",
            f"Placement {plain(placement)}, {gpus_per_node} ranks per node. Source ranks: "
            f"{plain(listing(list(dict.fromkeys(scan['sources']))))}; everything but “captured” is an "
            "estimate. All values are unweighted means over the model's MoE layers.",
        ),
        blocks=(
            FigureBlock(
                id="ep-models",
                title="Busiest rank ÷ mean rank, all models",
                caption="Ranks, whole window, mean over layers. 1× is perfect balance; sampling alone "
                "keeps it above 1. Dotted: what uniform routing of as many tokens would show "
                "(rank_max_over_mean_floor, an estimate).",
                choice="Data and phase",
                variants=tuple(_overview(frames.compared(scan))),
            ),
            FigureBlock(
                id="ep-run",
                title="Experts and ranks, single steps and whole window",
                caption="Mean over layers. A step waits for its own busiest rank: averaging over the "
                "window hides part of the skew, so single steps (median, bar to p90, dash for the worst) "
                "stand above the window's line. Dotted: what uniform routing of as many tokens would show "
                "(rank_max_over_mean_floor, an estimate).",
                choice="Run",
                variants=tuple(_detail(*cell) for cell in cells),
            ),
            FigureBlock(
                id="ep-crossing",
                title="Assignments that leave their rank and their node",
                caption="Share of assignments whose expert lives elsewhere than their token, whole window, "
                "mean over "
                "layers. One assignment counts once, also where two experts of a token share a rank.",
                choice="Run",
                variants=tuple(_crossings(cells, gpus_per_node)),
            ),
        ),
    )


def _tokens_text(scan: pd.DataFrame) -> str:
    return f"{spread(scan['tokens'])} tokens per layer"


def _overview(scan: pd.DataFrame) -> list[Variant]:
    variants = []
    for phase in phases_of(scan):
        for condition in condition_order(scan):
            selected = scan[(scan["phase"] == phase) & (scan["condition"] == condition)]
            if selected.empty:
                continue
            models, cell = selected["label"].nunique(), choice_label(condition, phase)
            variants.append(
                Variant(
                    group=phase,
                    label=cell,
                    keys=run_keys("", condition, phase),
                    figure=rank_imbalance(selected),
                    alt=f"Line chart, {cell}: busiest rank over mean rank from "
                    f"{times(selected['rank_max_over_mean'].min())} to "
                    f"{times(selected['rank_max_over_mean'].max())} over EP "
                    f"{selected['ep'].min()} to {selected['ep'].max()}.",
                    note=f"{cell}; {models} {'model' if models == 1 else 'models'}; "
                    f"{_tokens_text(selected)}; floor {spread(selected['rank_max_over_mean_floor'], times)}.",
                    numbers=frame_table(
                        f"Busiest rank ÷ mean rank, {cell}",
                        (_MODEL, *_OVERVIEW),
                        frame_records(selected.assign(label=selected["label"].map(shorten))),
                    ),
                )
            )
    return variants


def _detail(scan: pd.DataFrame, label: str, condition: str, phase: str) -> Variant:
    return Variant(
        group=shorten(label),
        label=run_choice(label, condition, phase),
        keys=run_keys(label, condition, phase),
        figure=ep_profile(scan),
        alt=f"Line chart for {model_on(label, condition)}, {phase}: per-rank imbalance "
        f"{spread(scan['rank_max_over_mean'], times)} over the window, per-expert "
        f"{spread(scan['expert_max_over_mean'], times)}.",
        note=f"{model_on(label, condition)}, {phase}; {_tokens_text(scan)}. Source ranks: "
        f"{plain(scan['sources'].iloc[0])}.",
        numbers=frame_table(
            f"{model_on(label, condition)}, {phase}: busiest ÷ mean, mean over layers",
            _DETAIL,
            frame_records(scan.sort_values("ep")),
        ),
    )


def _crossings(cells: list[tuple[pd.DataFrame, str, str, str]], gpus_per_node: int) -> list[Variant]:
    """One variant per run and phase, or a single one where the shares follow from the ranks alone."""
    by_construction = all(
        np.allclose(scan["cross_rank_fraction"], 1 - 1 / scan["ep"], atol=1e-9) for scan, *_ in cells
    )
    if not by_construction or len(cells) == 1:
        return [_crossing(*cell, gpus_per_node) for cell in cells]
    only = replace(_crossing(cells[0][0], "All models", "all data", "all phases", gpus_per_node), keys={})
    reason = (
        "No run here recorded more than one source rank, so tokens are spread evenly and the shares follow "
        "from the number of ranks alone: 1 − 1/EP, the same for every run."
    )
    return [replace(only, note=f"{only.note} {reason}")]


def _crossing(scan: pd.DataFrame, label: str, condition: str, phase: str, gpus_per_node: int) -> Variant:
    return Variant(
        group=shorten(label),
        label=run_choice(label, condition, phase),
        keys=run_keys(label, condition, phase),
        figure=crossing_shares(scan),
        alt=f"Line chart for {model_on(label, condition)}, {phase}: up to "
        f"{percent(scan['cross_rank_fraction'].max())} of assignments cross ranks and "
        f"{percent(scan['cross_node_fraction'].max())} cross nodes.",
        note=f"{model_on(label, condition)}, {phase}; {gpus_per_node} ranks per node. "
        f"Source ranks: {plain(scan['sources'].iloc[0])}.",
        numbers=frame_table(
            f"{model_on(label, condition)}, {phase}: share of assignments",
            chosen(LAYOUT_COLUMNS, "ep", "cross_rank_fraction", "cross_node_fraction", "sources"),
            frame_records(scan.sort_values("ep")),
        ),
    )
