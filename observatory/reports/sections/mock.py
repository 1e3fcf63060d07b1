"""Mock tokens against real text."""

from __future__ import annotations

import math

import pandas as pd

from observatory.analysis.columns import Column
from observatory.reports.figures import condition_dots
from observatory.reports.frames.report import ReportFrames, phases_of
from observatory.reports.page import FigureBlock, Section, Table, Variant, frame_table
from observatory.reports.sections.common import NO_LOADS, run_keys, window_text
from observatory.run.documents.writing import frame_records

_MODEL = Column(name="label", title="model", text=True)
_CONDITIONS = (
    _MODEL,
    Column(name="condition", title="data", text=True),
    Column(name="kind", title="kind", text=True),
    Column(
        name="gini",
        title="Gini",
        digits=3,
        interval=("gini_low", "gini_high"),
        legend="with its 95 % interval",
    ),
    Column(name="gini_floor", title="floor", digits=3),
    Column(name="gini_excess", title="excess", digits=3),
)
_RATIOS = (
    _MODEL,
    Column(name="phase", title="phase", text=True),
    Column(name="verdict", title="what mock does", text=True),
    Column(name="real", title="real text", digits=3, interval=("real_low", "real_high")),
    Column(
        name="mock",
        title="mock",
        digits=3,
        interval=("mock_low", "mock_high"),
        legend="with its 95 % interval (bootstrap over steps)",
    ),
    Column(name="ratio", title="ratio", digits=2, interval=("ratio_low", "ratio_high")),
)


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
    cells = frames.compared(frames.cells.dropna(subset=["gini"]))
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
        keys=run_keys("", "", phase),
        figure=condition_dots(cells),
        alt=f"Dot plot of Gini over experts in {phase}: {cells['label'].nunique()} models, "
        f"{cells['condition'].nunique()} data conditions, from {cells['gini'].min():.3f} to "
        f"{cells['gini'].max():.3f}.",
        note=window_text(cells),
        numbers=frame_table(f"Gini by data condition, {phase}", _CONDITIONS, frame_records(cells)),
    )


def _ratio_table(ratios: pd.DataFrame) -> Table:
    words = {
        "over": "mock overstates the imbalance",
        "under": "mock understates the imbalance",
        "same": "no difference beyond the interval",
        "unknown": "not decided: too few steps for an interval",
    }
    return frame_table(
        "Gini on mock tokens ÷ mean Gini on real text",
        _RATIOS,
        frame_records(ratios.assign(verdict=ratios["verdict"].map(words))),
        note="Real text: unweighted mean over the real-text conditions of the model, shuffled text left "
        "out; its interval is the mean of their intervals. The ratio's interval divides the ends "
        "crosswise: at least as wide as a 95 % interval (an estimate on the safe side).",
    )
