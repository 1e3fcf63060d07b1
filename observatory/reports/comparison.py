"""One page for a comparison, or for a series: differences first, then their rows, then what else differs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from observatory.advice.conclusions import Conclusion
from observatory.advice.words import conclusion_sentences
from observatory.analysis.columns import Table as TerminalTable
from observatory.analysis.compare.architectures import (
    architecture_tables,
    missing_sentences,
    premise_tables,
)
from observatory.analysis.compare.change_points import FALSE_ALARMS
from observatory.analysis.compare.document import (
    DIFFERENCE_COLUMNS,
    LAYER_COLUMNS,
    LEGEND,
    compare_sentences,
    heading,
    shown_row,
)
from observatory.analysis.compare.history_document import CHANGE_COLUMNS, history_sentences, shown_change
from observatory.analysis.compare.history_document import heading as series_heading
from observatory.analysis.compare.thresholds import threshold_sentence
from observatory.reports.embed import script_json
from observatory.reports.figures.architectures import model_dots
from observatory.reports.figures.differences import difference_dots, layer_dots, level_line
from observatory.reports.html import check_target, page_parts, write_page
from observatory.reports.page import FigureBlock, Section, Table, Variant, frame_table
from observatory.reports.text import plain, shorten

#: Rows of layers of one comparison, those that changed most.
_MOST_LAYER_ROWS = 200
#: Figures of one page; more comparisons than this are in the tables alone.
_MOST_VARIANTS = 60


_LEGEND = f"{LEGEND[:1].upper()}{LEGEND[1:]}."
_METHOD = (
    "Times are means without the fastest and the slowest tenth of the steps, Gini and entropy those of "
    "all steps with "
    "the error of a jackknife, all others means over steps. Errors allow for steps that resemble their "
    "neighbours (a "
    "first-order autoregressive series); matching steps of runs on the same tokens are compared one by "
    "one. Of the rows "
    "that are called changed at most 5 % did not change (Benjamini-Hochberg). Changes of level are tested by "
    "permutation, over all splits of a series. Intervals cover the steps of these runs, not how much "
    "runs differ."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One comparison or series of a page."""

    id: str
    title: str
    lines: list[str]
    sections: list[Section]
    is_folded: bool = False


def write_comparison(
    document: Mapping[str, Any],
    conclusion: Conclusion,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> Path:
    """Write the page of a document of ``observatory compare``.

    Raises:
        RunError: ``out`` exists or cannot be written.
    """
    parts = [
        _Part(
            id=f"comparison-{number}",
            title=_title(item),
            lines=[*map(plain, heading(item)), *map(plain, compare_sentences(item))],
            sections=list(_comparison_sections(item, number)),
        )
        for number, item in enumerate(document["comparisons"], start=1)
    ]
    rows = document["architectures"]
    if rows:
        parts = [_models(rows, document["premises"]), *(replace(part, is_folded=True) for part in parts)]
    elif document["premises"]:
        tables = tuple(_frames(premise_tables(document["premises"])))
        section = Section(id="premises-tables", title="Premises", blocks=tables)
        parts.insert(0, _Part(id="premises", title="Premises of changes", lines=[], sections=[section]))
    thresholds = [plain(threshold_sentence(row)) for row in document["thresholds"]]
    return _write("Comparison", parts, thresholds, document, conclusion, out, overwrite=overwrite)


def _models(rows: Sequence[Mapping[str, Any]], premises: Sequence[Mapping[str, Any]]) -> _Part:
    """Models of a grid: a figure of each on each data condition, then their means side by side."""
    tables = {rows_of["phase"]: table for rows_of, table in _by_phase(rows)}
    figure = FigureBlock(
        id="models-figure",
        title="Imbalance by model and data condition",
        caption="Each mark is one model on one data condition; the line joins the most even and the least "
        "even one. Gini: 0 when every expert gets the same, (E - 1) / E when one takes all.",
        choice="Phase",
        variants=tuple(
            Variant(
                label=phase,
                figure=model_dots([row for row in rows if row["phase"] == phase]),
                alt=f"Gini in {phase}: {_spoken_models([row for row in rows if row['phase'] == phase])}",
                note=f"Gini of expert loads in {phase}, mean over layers.",
                numbers=table,
            )
            for phase, table in tables.items()
        ),
    )
    blocks: list[FigureBlock | Table] = [figure, *tables.values(), *_frames(premise_tables(premises))]
    reasons = [
        plain(f"{row['model']} in {row['phase']}, {row['band'] or 'no band'}: {row['band_reason']}")
        for row in rows
    ]
    lines = [*map(plain, missing_sentences(rows, premises)), *reasons]
    section = Section(id="models-tables", title="Means over data conditions", blocks=tuple(blocks))
    return _Part(id="models", title="Models next to each other", lines=lines, sections=[section])


def _by_phase(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], Table]]:
    """A row of each phase, with the table of that phase."""
    firsts = {row["phase"]: row for row in reversed(rows)}
    phases = dict.fromkeys(row["phase"] for row in rows)
    for phase, table in zip(phases, _frames(architecture_tables(rows)), strict=True):
        yield firsts[phase], table


def _frames(tables: Iterable[TerminalTable]) -> Iterator[Table]:
    return (frame_table(table.title, table.columns, table.rows) for table in tables)


def _spoken_models(rows: Sequence[Mapping[str, Any]]) -> str:
    """The means in words, for those who do not see the figure."""
    known = [row for row in rows if row["gini"] is not None]
    return "; ".join(f"{row['model']} {row['gini']:.3f}" for row in known[:12]) + "."


def write_history(
    document: Mapping[str, Any],
    conclusion: Conclusion,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> Path:
    """Write the page of a document of ``observatory history``.

    Raises:
        RunError: ``out`` exists or cannot be written.
    """
    parts = [
        _Part(
            id=f"series-{number}",
            title=shorten(series["name"], 80),
            lines=[plain(series_heading(series)), *map(plain, history_sentences(series))],
            sections=list(_series_sections(series, number)),
        )
        for number, series in enumerate(document["series"], start=1)
    ]
    return _write("History", parts, [], document, conclusion, out, overwrite=overwrite)


def _write(
    kind: str,
    parts: Sequence[_Part],
    thresholds: Sequence[str],
    document: Mapping[str, Any],
    conclusion: Conclusion,
    out: str | os.PathLike[str],
    *,
    overwrite: bool,
) -> Path:
    target = check_target(out, overwrite=overwrite)
    environment, values = page_parts()
    sentences = [f"{text[:1].upper()}{text[1:]}." for text in map(plain, conclusion_sentences(conclusion))]
    page = environment.get_template("comparison.html.j2").render(
        **values,
        kind=kind,
        title=kind if len(parts) != 1 else f"{kind}: {parts[0].title}",
        answer=sentences[0],
        further=sentences[1:],
        thresholds=thresholds,
        parts=parts,
        method=_METHOD,
        embedded=script_json([_without_values(document)]),
    )
    write_page(target, page)
    return target


def _without_values(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document for programs; long series are in its CSV alone."""
    kept = dict(document)
    if "series" in kept:
        kept["series"] = [
            {
                **series,
                "layers": [],
                "tracks": [{**track, "values": [], "at": []} for track in series["tracks"]],
            }
            for series in kept["series"]
        ]
    return kept


def _title(item: Mapping[str, Any]) -> str:
    """The two by what sets them apart: models, data, or where they are."""
    base, other = item["base"], item["other"]
    if base["model"] != other["model"]:
        on = f" on {base['data']}" if base["data"] == other["data"] and base["data"] else ""
        return shorten(f"{base['model']} and {other['model']}{on}", 80)
    names = (shorten(Path(subject["name"]).name or subject["name"], 40) for subject in (base, other))
    return " and ".join(names)


def _comparison_sections(item: Mapping[str, Any], number: int) -> Iterator[Section]:
    blocks: list[FigureBlock | Table] = []
    variants = []
    for phase in dict.fromkeys(row["phase"] for row in item["rows"]):
        rows = [row for row in item["rows"] if row["phase"] == phase and row["difference"] is not None]
        if not rows:
            continue
        shown = [shown_row(row, phase=False) for row in rows]
        table = frame_table(
            f"Differences in {phase}, all layers", DIFFERENCE_COLUMNS, shown, note=_LEGEND, folded=_FOLDED
        )
        blocks.append(table)
        drawn = [
            {**row, "label": text["name"]}
            for row, text in zip(rows, shown, strict=True)
            if row["relative"] is not None
        ]
        if drawn:
            variants.append(
                Variant(
                    label=phase,
                    figure=difference_dots(drawn),
                    alt=f"Differences in {phase}: {_spoken(drawn, 'label')}",
                    note=f"{len(drawn)} quantities of {phase}; whiskers are 95 % intervals, those that "
                    "leave the "
                    "figure are in the table.",
                    numbers=table,
                )
            )
    if variants:
        figure = FigureBlock(
            id=f"differences-{number}",
            title="Differences",
            caption="Each dot is the other run less the baseline, over the baseline. What crosses the "
            "dotted line is "
            "the same within noise.",
            choice="Phase",
            variants=tuple(variants),
        )
        blocks.insert(0, figure)
    yield Section(
        id=f"whole-{number}", title="Whole run", blocks=tuple(blocks), reason="nothing is comparable"
    )
    yield from _layer_sections(item, number)


_FOLDED = ("adjusted_p", "paired", "steps")


def _layer_sections(item: Mapping[str, Any], number: int) -> Iterator[Section]:
    shown = [row for row in item["layers"] if row["relative"] is not None and row["verdict"] != "unknown"]
    if not shown:
        return
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in shown:
        groups.setdefault(shown_row(row)["name"], []).append(row)
    ranked = sorted(
        shown, key=lambda row: (row["adjusted_p"] is None, row["adjusted_p"], -abs(row["relative"]))
    )
    changed = sum(row["verdict"] in ("higher", "lower") for row in shown)
    table = frame_table(
        f"Layers: {changed} of {len(shown)} rows changed; those that are surest first",
        LAYER_COLUMNS,
        [shown_row(row) for row in ranked[:_MOST_LAYER_ROWS]],
        note=_LEGEND,
        folded=_FOLDED,
    )
    variants = tuple(
        Variant(
            label=name,
            figure=layer_dots(rows),
            alt=f"Differences of {name} by layer: {_spoken(rows, 'layer')}",
            note=f"{len(rows)} layers; whiskers are 95 % intervals.",
            numbers=frame_table(name, LAYER_COLUMNS, [shown_row(row) for row in rows], folded=_FOLDED),
        )
        for name, rows in list(groups.items())[:_MOST_VARIANTS]
    )
    figure = FigureBlock(
        id=f"layers-{number}-figure",
        title="Differences by layer",
        caption="The other run less the baseline, over the baseline, for each layer.",
        choice="Metric",
        variants=variants,
    )
    yield Section(id=f"layers-{number}", title="Single layers", blocks=(figure, table))


def _spoken(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """The changes in words, for those who do not see the figure."""
    changed = [row for row in rows if row["verdict"] in ("higher", "lower")]
    if not changed:
        return "none beyond noise."
    return "; ".join(f"{row[name]} {100 * row['relative']:+.1f} %" for row in changed[:8]) + "."


def _series_sections(series: Mapping[str, Any], number: int) -> Iterator[Section]:
    rows = [shown_change(row, series) for row in series["changes"]]
    if not rows:
        return
    table = frame_table("Changes of level", CHANGE_COLUMNS, rows[:_MOST_LAYER_ROWS])
    changed = [track for track in (*series["tracks"], *series["layers"]) if track["changes"]]
    variants = tuple(
        Variant(
            label=_track_label(track),
            figure=level_line(track, _AXES[series["order_by"]]),
            alt=f"{_track_label(track)} over {len(track['at'])} points, {len(track['changes'])} changes "
            "of level.",
            note=f"{len(track['at'])} points; lines are the medians between changes.",
            numbers=frame_table(
                _track_label(track), CHANGE_COLUMNS, [shown_change(row, series) for row in _own(track)]
            ),
        )
        for track in changed[:_MOST_VARIANTS]
    )
    figure = FigureBlock(
        id=f"levels-{number}",
        title="Levels",
        caption="Each point is a run, or a step or group of steps of one run. Of series without a change "
        "at most "
        f"{100 * FALSE_ALARMS:.0f} % show one.",
        choice="Metric",
        variants=variants,
    )
    yield Section(id=f"changes-{number}", title="Changes", blocks=(figure, table))


_AXES = {
    "training_step": "checkpoint, in order of training",
    "time": "run, in order of time",
    "step": "step or group of steps, in order",
}


def _track_label(track: Mapping[str, Any]) -> str:
    layer = "" if track["layer"] is None else f", layer {track['layer']}"
    ep = "" if track["ep"] is None else f" EP {track['ep']}"
    return f"{track['name']}{ep}{layer}"


def _own(track: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {**change, "name": track["name"], "layer": track["layer"], "ep": track["ep"]}
        for change in track["changes"]
    ]
