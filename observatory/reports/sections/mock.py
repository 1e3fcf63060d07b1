"""Mock tokens against real text."""

from __future__ import annotations

import math

import pandas as pd

from observatory.reports.figures import condition_dots
from observatory.reports.frames.report import ReportFrames, each_row, phases_of
from observatory.reports.page import Cell, FigureBlock, Head, Section, Table, Variant, table
from observatory.reports.sections.common import NO_LOADS, window_text
from observatory.reports.text import interval, number, shorten, times


def mock_ratios(cells: pd.DataFrame) -> pd.DataFrame:
    """Gini on mock tokens over mean Gini on real text, per model and phase.

    The interval of the ratio divides the ends of the two intervals crosswise, so that it is at least as
    wide as a 95 % one. Models without mock or without real text are left out.

    Returns:
        label, phase, conditions (number of real ones), real, real_low, real_high, mock, mock_low, mock_high,
        ratio, ratio_low, ratio_high, verdict (over, under, same, or unknown without intervals).
    """
    rows = []
    for (phase, label), conditions in cells.dropna(subset=["gini"]).groupby(["phase", "label"], sort=False):
        real, mock = conditions[conditions["kind"] == "real"], conditions[conditions["kind"] == "mock"]
        if real.empty or mock.empty or not float(real["gini"].mean()) > 0:
            continue
        real_gini, real_low, real_high = (
            float(real[name].mean(skipna=False)) for name in ("gini", "gini_low", "gini_high")
        )
        gini, low, high = (float(mock[name].iloc[0]) for name in ("gini", "gini_low", "gini_high"))
        ratio_low = low / real_high if real_high > 0 else math.nan
        ratio_high = high / real_low if real_low > 0 else math.nan
        rows.append(
            {
                "label": label,
                "phase": phase,
                "conditions": len(real),
                "real": real_gini,
                "real_low": real_low,
                "real_high": real_high,
                "mock": gini,
                "mock_low": low,
                "mock_high": high,
                "ratio": gini / real_gini,
                "ratio_low": ratio_low,
                "ratio_high": ratio_high,
                "verdict": _verdict(ratio_low, ratio_high),
            }
        )
    names = ["label", "phase", "conditions", "real", "real_low", "real_high", "mock", "mock_low", "mock_high"]
    return pd.DataFrame(rows, columns=[*names, "ratio", "ratio_low", "ratio_high", "verdict"])


def _verdict(ratio_low: float, ratio_high: float) -> str:
    if math.isnan(ratio_low) or math.isnan(ratio_high):
        return "unknown"
    return "over" if ratio_low > 1 else "under" if ratio_high < 1 else "same"


def mock_section(frames: ReportFrames) -> Section:
    """Dots per condition and the table of ratios."""
    cells = frames.cells.dropna(subset=["gini"])
    if cells.empty:
        return Section(
            id="mock", title="Mock tokens against real text", short="Mock and real text", reason=NO_LOADS
        )
    ratios = mock_ratios(cells)
    if ratios.empty and cells.groupby("label")["condition"].nunique().max() < 2:
        return Section(
            id="mock",
            title="Mock tokens against real text",
            short="Mock and real text",
            reason="No model here was run on mock tokens and on real text.",
        )
    lead = (
        "Random token ids are a common stand-in for text when MoE systems are benchmarked. The dots show "
        "what each data condition does to the same model; the closer the orange square stands to the blue "
        "dots, the better mock tokens stand for text."
    )
    return Section(
        id="mock",
        title="Mock tokens against real text",
        short="Mock and real text",
        lead=(lead,),
        absent=()
        if len(ratios)
        else (("Ratios of mock to real text", "No model here was run on mock tokens and on real text."),),
        blocks=(
            FigureBlock(
                id="mock-dots",
                title="Gini by data condition",
                caption="Experts, whole window, unweighted mean over layers (gini, under Methods). Bars "
                "are 95 % bootstrap intervals over steps; ticks are the sampling floor (gini_floor).",
                choice="Phase",
                variants=tuple(_variant(cells[cells["phase"] == phase], phase) for phase in phases_of(cells)),
            ),
            *((_ratio_table(ratios),) if len(ratios) else ()),
        ),
    )


def _variant(cells: pd.DataFrame, phase: str) -> Variant:
    return Variant(
        label=phase,
        figure=condition_dots(cells),
        alt=f"Dot plot of Gini over experts in {phase}: {cells['label'].nunique()} models, "
        f"{cells['condition'].nunique()} data conditions, from {cells['gini'].min():.3f} to "
        f"{cells['gini'].max():.3f}.",
        note=window_text(cells),
        numbers=table(
            f"Gini by data condition, {phase}",
            ["Model", "Condition", "Kind", "Gini", "95 % interval", "Floor", "Excess"],
            [
                [
                    shorten(row.label),
                    shorten(row.condition),
                    row.kind,
                    number(row.gini),
                    interval(row.gini_low, row.gini_high),
                    number(row.gini_floor),
                    number(row.gini_excess),
                ]
                for row in each_row(cells)
            ],
            text=3,
        ),
    )


def _ratio_table(ratios: pd.DataFrame) -> Table:
    words = {
        "over": "mock overstates the imbalance",
        "under": "mock understates the imbalance",
        "same": "no difference beyond the interval",
        "unknown": "not decided: too few steps for an interval",
    }
    return table(
        "Gini on mock tokens ÷ mean Gini on real text",
        [
            "Model",
            "Phase",
            "What mock does",
            Head(title="Real text", detail="95 % interval"),
            Head(title="Mock", detail="95 % interval"),
            Head(title="Ratio", detail="interval"),
        ],
        [
            [
                shorten(row.label),
                row.phase,
                words[row.verdict],
                Cell(text=number(row.real), detail=interval(row.real_low, row.real_high)),
                Cell(text=number(row.mock), detail=interval(row.mock_low, row.mock_high)),
                Cell(text=times(row.ratio), detail=interval(row.ratio_low, row.ratio_high, 2)),
            ]
            for row in each_row(ratios)
        ],
        text=3,
        note="Real text: unweighted mean over the real-text conditions of the model, shuffled text left "
        "out; its interval is the mean of their intervals. The ratio's interval divides the ends "
        "crosswise: at least as wide as a 95 % interval (an estimate on the safe side).",
    )
