"""The order of a page: the questions of the field, each with the sections that answer it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from observatory.reports.frames.report import ReportFrames
from observatory.reports.page import Section
from observatory.reports.sections import (
    advice_section,
    clocks_section,
    committee_section,
    energy_section,
    exchange_sections,
    grid_section,
    heatmap_section,
    layer_section,
    lorenz_section,
    mock_section,
    plan_section,
    power_section,
    route_fetch_section,
    scan_section,
    step_section,
    step_times_section,
)

#: (anchor, question, sections that answer it, in reading order).
_QUESTIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("time", "Where does the time go?", ("step-times", "anatomy", "energy", "power")),
    ("who-waits", "Who waits for whom, and why?", ("waiting", "traffic", "exchange-gaps")),
    (
        "which-experts",
        "Which experts, and is it the model, the data or the sample?",
        ("grid", "mock", "experts", "lorenz", "committee", "layers", "steps"),
    ),
    (
        "what-if",
        "What would another placement, degree, collective or clock do?",
        ("changes", "ep", "realism", "prediction", "bandwidth", "route-fetch", "clocks"),
    ),
    ("how-many", "How many GPUs?", ("plan",)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question with the sections that answer it.

    Attributes:
        id: anchor.
        title: the question.
        sections: at least one.
    """

    id: str
    title: str
    sections: tuple[Section, ...]


def build_sections(frames: ReportFrames, *, gpus_per_node: int) -> list[Section]:
    """All sections in reading order, those that have nothing to show as well."""
    power = [
        section
        for section in (energy_section(frames), power_section(frames), clocks_section(frames))
        if section.blocks or section.reason
    ]
    sections = [step_times_section(frames), *exchange_sections(frames), *power]
    sections += [route_fetch_section(frames)] if frames.route_fetch else []
    sections.append(plan_section(frames))
    telemetry_alone = frames.layers.empty and frames.power is not None and bool(frames.power.runs)
    if not telemetry_alone:
        sections += [
            grid_section(frames),
            mock_section(frames),
            heatmap_section(frames),
            lorenz_section(frames),
            committee_section(frames),
            layer_section(frames),
            step_section(frames),
            advice_section(frames),
            scan_section(frames, gpus_per_node=gpus_per_node),
        ]
    order = [section for _, _, names in _QUESTIONS for section in names]
    return sorted(sections, key=lambda section: order.index(section.id))


def questions(sections: Sequence[Section]) -> list[Question]:
    """The questions that ``sections`` answer."""
    asked = [
        Question(id=anchor, title=title, sections=tuple(each for each in sections if each.id in names))
        for anchor, title, names in _QUESTIONS
    ]
    return [question for question in asked if question.sections]


def absent_parts(sections: Iterable[Section]) -> list[tuple[str, str]]:
    """(what, why) of everything that has nothing to show, what has one reason together."""
    by_reason: dict[str, list[str]] = {}
    for section in sections:
        without = () if section.blocks else ((section.title, section.reason),)
        for what, why in (*without, *section.absent):
            by_reason.setdefault(why, []).append(what)
    return [("; ".join(names), why) for why, names in by_reason.items()]
