"""The first screen: what was run, what it comes to, and one figure of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import plotly.graph_objects as go

from observatory.advice.conclusions import (
    NEXT_STEPS,
    Code,
    Conclusion,
    conclude_advice,
    conclude_clocks,
    conclude_energy,
    conclude_exchanges,
    conclude_routing,
    stake,
)
from observatory.advice.words import conclusion_sentences
from observatory.reports.frames.report import ReportFrames
from observatory.reports.page import FigureBlock, Section
from observatory.reports.sections.common import choice_label, run_choice, run_text
from observatory.reports.text import plain, shorten
from observatory.run.documents.writing import frame_records
from observatory.run.usable_cores import short_of_cores

#: Figures that show most of what is at stake, the first that a page has; else its first figure.
_KEY_FIGURES = ("layer-anatomy", "energy-tokens", "clock-plane", "ep-models")
#: Of the figure, in pixels: with the head of the page it fits a screen of 900.
_HEIGHT = 340


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one part of the runs comes to.

    Attributes:
        part: what it is about.
        section: anchor of the section that its numbers are in.
        whose: run or file of the conclusion, empty where there is one only.
        sentences: worst place, and what it costs.
        next_step: what to do next, empty for nothing.
        choices: names under which figures show the place.
    """

    part: str
    section: str
    whose: str
    sentences: tuple[str, ...]
    next_step: str
    choices: tuple[str, ...]


def verdicts(frames: ReportFrames) -> list[Verdict]:
    """Of each part that has data: the conclusion of the run in which most is at stake."""
    parts: tuple[tuple[str, str, Sequence[tuple[int | str, Conclusion]]], ...] = (
        ("Changes", "changes", list(_changes(frames))),
        ("Routing", "layers", list(_routing(frames))),
        ("Exchanges", "waiting", list(_exchanges(frames))),
        ("Energy", "energy", list(_energy(frames))),
        ("Clocks", "clocks" if frames.clocks else "power", list(_clocks(frames))),
    )
    return [_verdict(frames, part, section, rows) for part, section, rows in parts if rows]


def key_figure(sections: Sequence[Section], shown: Sequence[Verdict]) -> FigureBlock | None:
    """A small copy of the figure that shows most, with the picture of a place that a verdict names."""
    blocks = {
        block.id: block for section in sections for block in section.blocks if isinstance(block, FigureBlock)
    }
    block = next((blocks[name] for name in _KEY_FIGURES if name in blocks), None)
    block = block or next(iter(blocks.values()), None)
    if block is None:
        return None
    places = {choice for verdict in shown for choice in verdict.choices}
    variant = next((variant for variant in block.variants if variant.label in places), block.variants[0])
    figure = go.Figure(variant.figure)
    figure.update_layout(height=min(_HEIGHT, figure.layout.height))
    return replace(block, id="key-figure", variants=(replace(variant, figure=figure),))


def _verdict(
    frames: ReportFrames, part: str, section: str, concluded: Sequence[tuple[int | str, Conclusion]]
) -> Verdict:
    whose, conclusion = max(concluded, key=lambda pair: stake(pair[1]))
    sentences = [f"{text[:1].upper()}{text[1:]}" for text in map(plain, conclusion_sentences(conclusion))]
    is_last_next = conclusion[-1].code in NEXT_STEPS
    name = whose if isinstance(whose, str) else run_text(frames, whose)
    return Verdict(
        part=part,
        section=section,
        whose=name if len(concluded) > 1 else "",
        sentences=tuple(f"{text}." for text in (sentences[:-1] if is_last_next else sentences)),
        next_step=sentences[-1] if is_last_next and conclusion[-1].code is not Code.OPEN_REPORT else "",
        choices=() if isinstance(whose, str) else _choices(frames, whose, conclusion),
    )


def _choices(frames: ReportFrames, run: int, conclusion: Conclusion) -> tuple[str, ...]:
    label, condition = str(frames.runs.loc[run, "label"]), frames.facts[run].condition
    phase = str(conclusion[0].values.get("phase", ""))
    return (
        run_choice(label, condition, phase),
        choice_label(shorten(condition, 24), phase),
        run_text(frames, run),
    )


def _of_run(frame: pd.DataFrame, run: int) -> list[dict[str, object]]:
    return frame_records(frame[frame["run"] == run]) if "run" in frame else []


def _changes(frames: ReportFrames) -> Iterator[tuple[int, Conclusion]]:
    for run, document in frames.advice.items():
        yield run, conclude_advice({"runs": [document]})


def _routing(frames: ReportFrames) -> Iterator[tuple[int, Conclusion]]:
    """Of runs on real text; of all where none is."""
    runs = frames.runs[frames.runs["kind"] == "real"]
    for run in (runs if len(runs) else frames.runs)["run"]:
        layers = _of_run(frames.layers, run)
        if layers:
            yield run, conclude_routing({"layers": layers}, frames.facts[run].path)


def _exchanges(frames: ReportFrames) -> Iterator[tuple[int, Conclusion]]:
    for fact in frames.facts if frames.exchanges is not None else ():
        assert frames.exchanges is not None
        layers = _of_run(frames.exchanges.layers, fact.run)
        if layers:
            short = short_of_cores(rank.cores for rank in fact.manifest.ranks)
            yield fact.run, conclude_exchanges({"layers": layers, "short_of_cores": short}, fact.path)


def _energy(frames: ReportFrames) -> Iterator[tuple[int, Conclusion]]:
    power = frames.power
    for run in power.runs if power is not None else ():
        assert power is not None
        document = {name: _of_run(getattr(power, name), run) for name in ("phases", "tokens", "totals")}
        yield run, conclude_energy(document, frames.facts[run].path)


def _clocks(frames: ReportFrames) -> Iterator[tuple[int | str, Conclusion]]:
    """Of sweeps where there are any, else of telemetry."""
    if frames.clocks is not None:
        for file in frames.clocks.files:
            yield shorten(file.path.name, 40), conclude_clocks(file.advice.model_dump(mode="json"))
    elif frames.power is not None:
        for run in frames.power.runs:
            devices = _of_run(frames.power.seen, run)
            if devices:
                yield run, conclude_clocks({"telemetry": {"devices": devices}})
