"""Which change of an expert-parallel set-up is worth making."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from observatory.advice.conclusions import conclude_advice
from observatory.advice.mitigations.document import COLUMNS, doubt_sentences, missing_sentences, worded_rows
from observatory.advice.words import conclusion_sentences
from observatory.reports.figures.changes import change_bars, label
from observatory.reports.frames.report import ReportFrames
from observatory.reports.page import FigureBlock, Section, Variant, frame_table
from observatory.reports.sections.common import model_on, run_choice, run_keys
from observatory.reports.text import microseconds, percent, plain, shorten

_TITLE = "Which change is worth making"
_NONE = (
    "No run here was spread over ranks that timed their experts. `observatory advise RUN --ranks 8 "
    "--hardware h100-sxm` compares changes for the loads of a run on one rank."
)
_FOLDED = (
    "p10_us",
    "p90_us",
    "counts_us",
    "dispatch_us",
    "experts_us",
    "waiting_us",
    "combine_us",
    "beyond",
    "memory_bytes",
    "kv_tokens",
    "energy_saving",
    "extrapolated",
    "how_far",
    "rests_on",
)


def advice_section(frames: ReportFrames) -> Section:
    """One figure and table per run and phase of those that were spread over ranks."""
    variants = tuple(
        _variant(frames, run, document, phase)
        for run, document in frames.advice.items()
        for phase in document["phases"]
    )
    if not variants:
        reasons = [reason for reasons in frames.no_advice.values() for reason in reasons]
        why = plain(reasons[0]) if reasons else _NONE
        return Section(id="changes", title=_TITLE, reason=why)
    whole = {"runs": list(frames.advice.values())}
    missing = "; ".join(map(plain, missing_sentences(whole)))
    return Section(
        id="changes",
        title=_TITLE,
        short="Changes",
        lead=(
            "Every known change of the set-up on the same captured steps: layouts are chosen on the first "
            "half of the steps of a phase, times are of the other half. A step is its MoE part: exchanges, "
            "experts and waiting of all layers. Nothing on these ranks is faster than the ceiling: perfectly "
            "balanced experts and exchanges that carry nothing.",
            *([f"{missing[:1].upper()}{missing[1:]}."] if missing else ()),
        ),
        blocks=(
            FigureBlock(
                id="change-times",
                title="Predicted time of a step under each change",
                caption="Milliseconds of the MoE part of a step, mean over judged steps, by part. Dotted: "
                "today. Numbers: change of the whole against today. The table has intervals, costs, premises "
                "and verdicts.",
                choice="Run and phase",
                variants=variants,
            ),
        ),
    )


def _variant(
    frames: ReportFrames, run: int, document: Mapping[str, Any], phase: Mapping[str, Any]
) -> Variant:
    name, condition = (str(frames.runs.loc[run, column]) for column in ("label", "condition"))
    setup, rows = document["setup"], phase["verdicts"]
    today = rows[0]
    best = None if phase["best"] is None else rows[phase["best"]]
    concluded = conclude_advice({"runs": [{**document, "phases": [phase]}]})
    verdict = (
        plain(conclusion_sentences(concluded)[0])
        if best is None
        else f"most is gained by {label(best)}: {percent(best['gain'])} of a step"
    )
    where = f"{model_on(name, condition)}, {phase['phase']}"
    return Variant(
        group=shorten(name),
        label=run_choice(name, condition, phase["phase"]),
        keys=run_keys(name, condition, phase["phase"]),
        figure=change_bars(rows),
        alt=f"Bars of the time of a step for {where} under each change; today "
        f"{microseconds(today['step_us'])}; {verdict}.",
        note=f"{where}: {setup['ranks']} ranks, {setup['gpus_per_node']} on a node, "
        f"{setup['algorithm']} exchange. Chosen on {phase['train_steps']} steps, judged on "
        f"{phase['judged_steps']}. "
        f"{verdict[:1].upper()}{verdict[1:]}. " + " ".join(_sentences(document, phase)),
        numbers=frame_table(
            f"{where}: changes of the set-up",
            COLUMNS,
            worded_rows(phase),
            folded=_FOLDED,
        ),
    )


def _sentences(document: Mapping[str, Any], phase: Mapping[str, Any]) -> list[str]:
    """What the numbers of one run and phase rest on."""
    doubts = doubt_sentences({"runs": [{**document, "phases": [phase], "skipped_phases": []}]})
    return [f"{text[:1].upper()}{text[1:]}." for text in map(plain, doubts)]
