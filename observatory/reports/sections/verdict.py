"""The first screen: what was run, what it comes to, and one figure of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

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
    conclude_plan,
    conclude_routing,
    stake,
)
from observatory.advice.conclusions.changes import is_off
from observatory.advice.route_fetch import RouteFetchCode, conclude_maps
from observatory.advice.route_fetch_words import route_fetch_sentences
from observatory.advice.words import conclusion_sentences
from observatory.devices.simulated import SIMULATED_UUID
from observatory.reports.frames.plan import PlannedFile
from observatory.reports.frames.report import ReportFrames, each_row
from observatory.reports.frames.route_fetch import RouteFetchFile
from observatory.reports.page import FigureBlock, Section
from observatory.reports.sections.common import choice_label, model_on, run_choice, run_keys, run_text
from observatory.reports.sections.mock import mock_ratios
from observatory.reports.sections.provenance import formula_anchor
from observatory.reports.sections.scan import mean_over_layers
from observatory.reports.text import millijoules, number, percent, plain, shorten, times
from observatory.run.documents.writing import frame_records
from observatory.run.usable_cores import short_of_cores

#: Codes whose values hold the number that says most.
_TELLING = (
    Code.CHANGE_GAIN,
    Code.WAIT_COST,
    Code.CLOCK_COST,
    Code.COMMON_COST,
    Code.CAP_COST,
    Code.ENERGY_COST,
    Code.LOAD_COST,
)
#: Of each section that a verdict is about: its figure, and the entry of the methods.
_FIGURES = {
    "changes": "change-times",
    "waiting": "layer-waiting",
    "clocks": "clock-plane",
    "power": "power-timeline",
    "energy": "energy-tokens",
    "layers": "expert-map",
}
_FORMULAS = {
    "changes": "step_us",
    "waiting": "wait_s",
    "clocks": "saving",
    "power": "saving",
    "energy": "mj_per_token",
    "layers": "expert_max_over_mean",
}
#: What of a run's power its conclusion about energy is from.
_OF_ENERGY = ("devices", "phases", "tokens", "totals")
#: Of a plan: what makes its number of devices uncertain.
_PLAN_DOUBTS = (Code.PLAN_MAY_MISS, Code.PLAN_ASSUMED, Code.PLAN_EXTRAPOLATED, Code.PLAN_UNCAPTURED)
#: Codes that name something to change.
_CHANGES = (Code.BEST_CHANGE, Code.CLOCK_SAVES, Code.CLOCK_TOO_HIGH, Code.DOES_NOT_FIT)
#: Figures that show most of what is at stake, the first that a page has; else its first figure.
_KEY_FIGURES = ("layer-anatomy", "energy-tokens", "clock-plane", "ep-models")
#: Of the figure, in pixels: with the head of the page it fits a screen of 900.
_HEIGHT = 340


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """A number that stands for a verdict.

    Attributes:
        value: with its unit.
        meaning: what it is of.
        section: anchor of the section that it is in.
    """

    value: str
    meaning: str
    section: str


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
        stake: share of time or energy that is at stake; None where it is about neither.
        is_change: whether it names something to change.
        number: the number that says most; None where nothing is worth changing.
        figure: anchor of the figure of its numbers, empty for none.
        formula: anchor of how they are computed, empty where the section says it.
        keys: what the page is filtered by to show the place alone.
    """

    part: str
    section: str
    whose: str
    sentences: tuple[str, ...]
    next_step: str
    choices: tuple[str, ...]
    stake: float | None
    number: Number | None
    is_change: bool = False
    figure: str = ""
    formula: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> str:
        """Anchor of the rows of its numbers: a table of the section, or the one behind the figure."""
        return f"{self.figure}-rows" if self.figure and self.section != "layers" else self.section


def verdicts(frames: ReportFrames) -> list[Verdict]:
    """Of each part that has data: the conclusion of the run in which most is at stake.

    Those that name something to change come first, then those that only say where time or energy goes; of
    both, those with most of it at stake.
    """
    clocks = "clocks" if frames.clocks else "power"
    parts: tuple[tuple[str, str, bool, Sequence[tuple[int | str, Conclusion]]], ...] = (
        ("Changes", "changes", True, list(_changes(frames))),
        ("Exchanges", "waiting", True, list(_exchanges(frames))),
        ("Clocks", clocks, True, list(_clocks(frames))),
        ("Energy", "energy", False, list(_energy(frames))),
        ("Routing", "layers", False, list(_routing(frames))),
    )
    stated = [_verdict(frames, *part) for part in parts if part[-1]]
    stated += [_of_plan(file, is_only=len(frames.plans) < 2) for file in frames.plans]
    stated += [_of_route_fetch(file, is_only=len(frames.route_fetch) < 2) for file in frames.route_fetch]
    return sorted(stated, key=lambda verdict: (not verdict.is_change, -(verdict.stake or 0.0)))


def answer(shown: Sequence[Verdict]) -> str:
    """What all comes to, in one sentence: what is worth changing, else the first verdict with a number."""
    if not shown:
        return "No run given here holds routing rows, exchanges or power samples: there is nothing to judge."
    first = next((verdict for verdict in shown if verdict.is_change or verdict.number), shown[0])
    # What waiting costs says itself what it is of; where it is longest is a detail.
    chosen = first.sentences[-1:] if first.part == "Exchanges" else first.sentences
    sentences = [text.rstrip(".") for text in chosen]
    rest = [f"{text[:1].lower()}{text[1:]}" for text in sentences[1:]]
    whose = f" ({first.whose})" if first.whose else ""
    return f"{'; '.join([*sentences[:1], *rest])}{whose}."


def three_numbers(frames: ReportFrames, shown: Sequence[Verdict]) -> list[Number]:
    """Those of the first verdicts; where there are fewer, what the counts say."""
    stated = [verdict.number for verdict in shown if verdict.number is not None]
    return [*stated, *islice(_of_counts(frames), max(0, 3 - len(stated)))][:3]


def _of_counts(frames: ReportFrames) -> Iterator[Number]:
    """What mock tokens get wrong, the busiest rank, the most concentrated model: beyond uniform routing."""
    cells = frames.compared(frames.cells.dropna(subset=["gini"]))
    ratios = mock_ratios(cells)
    for row in each_row(ratios[ratios["verdict"].isin(["over", "under"])].sort_values("ratio")[-1:]):
        meaning = f"the Gini of real text, on mock tokens ({shorten(row.label)}, {row.phase})"
        yield Number(value=times(row.ratio), meaning=plain(meaning), section="mock")
    means = mean_over_layers(frames.scan) if len(frames.scan) else frames.scan
    uneven = means[means["rank_max_over_mean"] > means["rank_max_over_mean_floor"]] if len(means) else means
    for row in each_row(uneven.sort_values("rank_max_over_mean")[-1:] if len(uneven) else uneven):
        meaning = f"the mean load on the busiest rank at EP {row.ep} ({row.phase})"
        yield Number(value=times(row.rank_max_over_mean), meaning=plain(meaning), section="ep")
    beyond = cells[cells["gini"] > cells["gini_uniform_limit"]]
    for row in each_row(beyond.sort_values("gini")[-1:]):
        where = f"{model_on(row.label, row.condition)}, {row.phase}"
        meaning = f"the largest Gini of a model ({where})"
        yield Number(value=number(row.gini, 2), meaning=plain(meaning), section="grid")


def _number(conclusion: Conclusion, section: str, ending: str) -> Number | None:
    """The number that says most of a conclusion; None where nothing is at stake, or that is not certain."""
    if not stake(conclusion) > 0:
        return None
    values: dict[str, Any] = {}
    for reason in conclusion:
        values |= reason.values
    match next((reason.code for reason in conclusion if reason.code in _TELLING), None):
        case Code.CHANGE_GAIN:
            value = percent(values["gain"], 0)
            meaning = f"less time of a step of {values['phase']}, predicted for {values['change']}"
            if is_off(values["measured_over_predicted"]):
                meaning += ", not certain"
        case Code.WAIT_COST:
            value, meaning = percent(values["wait_share"], 0), "of the time in exchanges is waiting"
        case Code.CLOCK_COST | Code.COMMON_COST:
            value, meaning = percent(values["saving_value"], 0), "less energy at a lower clock"
        case Code.CAP_COST:
            value, meaning = (
                percent(values["power_cap_busy_share"], 0),
                "of the busy time a power limit held the clock",
            )
        case Code.ENERGY_COST if values["mj_per_token"] is not None:
            value, meaning = millijoules(values["mj_per_token"]), f"per token of {values['phase']}"
        case Code.LOAD_COST:
            value = times(values["max_over_mean"])
            meaning = f"the mean load on the busiest expert of layer {values['layer']} in {values['phase']}"
        case _:
            return None
    return Number(value=value, meaning=plain(meaning) + ending, section=section)


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
    return replace(block, id="key-figure", narrow=True, variants=(replace(variant, figure=figure),))


def _verdict(
    frames: ReportFrames,
    part: str,
    section: str,
    is_share: bool,
    concluded: Sequence[tuple[int | str, Conclusion]],
) -> Verdict:
    whose, conclusion = max(concluded, key=lambda pair: stake(pair[1]))
    sentences = [f"{text[:1].upper()}{text[1:]}" for text in map(plain, conclusion_sentences(conclusion))]
    is_last_next = conclusion[-1].code in NEXT_STEPS
    name = whose if isinstance(whose, str) else run_text(frames, whose)
    # Of a simulated device nothing was measured: whatever is quoted says so itself.
    simulated = section in ("energy", "power") and SIMULATED_UUID in name
    said = [f"Simulated device: {text[:1].lower()}{text[1:]}" if simulated else text for text in sentences]
    return Verdict(
        part=part,
        section=section,
        whose=name if len(concluded) > 1 or simulated else "",
        sentences=tuple(f"{text}." for text in (said[:-1] if is_last_next else said)),
        next_step=sentences[-1] if is_last_next and conclusion[-1].code is not Code.OPEN_REPORT else "",
        choices=() if isinstance(whose, str) else _choices(frames, whose, conclusion),
        stake=stake(conclusion) if is_share else None if simulated else _energy_share(conclusion),
        is_change=conclusion[0].code in _CHANGES,
        number=_number(conclusion, section, f" ({SIMULATED_UUID})" if simulated else ""),
        figure=_FIGURES[section],
        formula=formula_anchor(_FORMULAS[section]),
        keys={} if isinstance(whose, str) else _keys(frames, whose, conclusion),
    )


def _energy_share(conclusion: Conclusion) -> float | None:
    """Share of the energy of all devices that the phase with most of it has; None for other conclusions."""
    values: Mapping[str, Any] = conclusion[0].values
    if conclusion[0].code is not Code.MOST_ENERGY:
        return None
    return float(values["share"]) * (1.0 - (values["unattributed"] or 0.0))


def _of_plan(file: PlannedFile, *, is_only: bool) -> Verdict:
    """How many devices the targets of a plan take."""
    conclusion = conclude_plan(file.document)
    sentences = [plain(f"{text[:1].upper()}{text[1:]}.") for text in conclusion_sentences(conclusion)]
    rows = file.document["candidates"]
    number = None
    if rows:
        meaning = (
            f"devices ({rows[0]['hardware']}) for {file.document['targets']['tokens_per_s']:,.0f} tokens/s"
        )
        if any(reason.code in _PLAN_DOUBTS for reason in conclusion):
            meaning += ", not certain"
        number = Number(value=str(rows[0]["gpus"]), meaning=plain(meaning), section="plan")
    return Verdict(
        part="Capacity",
        section="plan",
        whose="" if is_only else shorten(file.path.name, 32),
        sentences=tuple(sentences),
        next_step="",
        choices=(),
        stake=None,
        number=number,
        figure="plan-plane" if rows else "",
        formula=formula_anchor("gpus"),
    )


def _of_route_fetch(file: RouteFetchFile, *, is_only: bool) -> Verdict:
    """From where on fetching costs less, and whether that is to be relied on."""
    reasons = conclude_maps(file.document)
    sentences = list(map(plain, route_fetch_sentences(reasons)))
    is_last_next = reasons[-1].code is RouteFetchCode.MEASURE_AGAIN
    next_step = sentences.pop() if is_last_next else ""
    return Verdict(
        part="Route or fetch",
        section="route-fetch",
        whose="" if is_only else shorten(file.path.name, 32),
        sentences=tuple(f"{text}." for text in sentences),
        next_step=f"{next_step[:1].upper()}{next_step[1:]}",
        choices=(),
        stake=None,
        number=None,
        figure="decision-map",
    )


def _keys(frames: ReportFrames, run: int, conclusion: Conclusion) -> dict[str, str]:
    phase = str(conclusion[0].values.get("phase") or "")
    return run_keys(str(frames.runs.loc[run, "label"]), frames.facts[run].condition, phase)


def _choices(frames: ReportFrames, run: int, conclusion: Conclusion) -> tuple[str, ...]:
    label, condition = str(frames.runs.loc[run, "label"]), frames.facts[run].condition
    phase = str(conclusion[0].values.get("phase", ""))
    return (
        run_choice(label, condition, phase),
        choice_label(condition, phase),
        run_text(frames, run),
    )


def _of_run(frame: pd.DataFrame, run: int) -> list[dict[str, object]]:
    return frame_records(frame[frame["run"] == run]) if "run" in frame else []


def _changes(frames: ReportFrames) -> Iterator[tuple[int, Conclusion]]:
    for run, document in frames.advice.items():
        yield run, conclude_advice({"runs": [document]})


def _routing(frames: ReportFrames) -> Iterator[tuple[int, Conclusion]]:
    """Of runs on real text; of all where none is."""
    compared = frames.compared(frames.runs)
    runs = compared[compared["kind"] == "real"]
    for run in (runs if len(runs) else compared)["run"]:
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
        document = {name: _of_run(getattr(power, name), run) for name in _OF_ENERGY}
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
