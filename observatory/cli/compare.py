"""``observatory compare``: runs, grids or saved results against a baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from observatory.cli.options import CsvOption, ForceOption, HtmlOption, JsonOption, TableOption, WideOption

#: Exit codes: a threshold is passed; one could not be judged.
PASSED, NOT_JUDGED = 1, 4
#: Comparisons whose tables are printed.
_MOST_SHOWN = 6


def compare(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="A B",
            help="Runs, grids, saved --json documents or reports; the first is the baseline. Of one grid "
            "alone the models are compared.",
        ),
    ],
    repeat: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="RUN",
            help="Another run of the baseline's set-up; with two or more, differences are judged by how much "
            "these runs differ. May be repeated.",
        ),
    ] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="THRESHOLD",
            rich_help_panel="Thresholds",
            help='End with exit code 1 when the whole interval of a difference is beyond, as in "decode.ms > '
            '+3 %"; with 4 when there is no interval to judge by. May be repeated.',
        ),
    ] = None,
    advice: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Result of `advise --out` on these runs: also show which premises of changes hold, by "
            "model.",
        ),
    ] = None,
    html: HtmlOption = None,
    force: ForceOption = False,
    wide: WideOption = False,
    csv: CsvOption = False,
    table: TableOption = None,
    json: JsonOption = False,
) -> None:
    """Compare runs with a baseline: differences with intervals, and what else differs."""
    from observatory.advice.conclusions import conclude_comparison, conclusion_document
    from observatory.analysis.compare.architectures import (
        architecture_tables,
        missing_sentences,
        premise_tables,
    )
    from observatory.analysis.compare.document import (
        LEGEND,
        compare_csv,
        compare_document,
        compare_sentences,
        compare_tables,
        heading,
    )
    from observatory.analysis.compare.saved import load_premises
    from observatory.analysis.compare.thresholds import judge_thresholds, parse_threshold, threshold_sentence
    from observatory.analysis.compare.words import lonely_sentences
    from observatory.campaign.comparison import compare_inputs
    from observatory.cli.output import (
        counting,
        print_conclusion,
        print_data,
        print_tables,
        print_text,
        say,
    )
    from observatory.text import listing

    if html is not None:
        from observatory.reports.comparison import write_comparison
        from observatory.reports.html import check_target

    thresholds = [parse_threshold(text) for text in fail_if or ()]
    premises = [] if advice is None else load_premises(advice)
    if html is not None:
        check_target(html, overwrite=force)
    with counting("runs") as progress:
        compared = compare_inputs(inputs, repeat or (), progress=progress)
    document = compare_document(compared.comparisons, compared.lonely)
    document["architectures"] = compared.architectures
    document["premises"] = premises
    document["thresholds"] = judge_thresholds(thresholds, document["comparisons"])
    conclusion = conclude_comparison(document)
    document["conclusion"] = conclusion_document(conclusion)
    if html is not None:
        write_comparison(document, conclusion, html, overwrite=force)
    if not print_data(document, compare_csv(document), json=json, csv=csv, table=table):
        grid_tables = [*architecture_tables(compared.architectures), *premise_tables(document["premises"])]
        print_tables(grid_tables, wide=wide)
        print_text(missing_sentences(compared.architectures, premises))
        items = document["comparisons"]
        for place, item in enumerate(items if len(items) <= _MOST_SHOWN else ()):
            print_text([*([""] if place or grid_tables else []), *heading(item), ""])
            tables = compare_tables(item)
            print_tables(tables, wide=wide)
            print_text([*([LEGEND, ""] if tables else []), *compare_sentences(item)])
        if len(items) > _MOST_SHOWN:
            print_text(["", f"{len(items)} comparisons: their rows are in --json, --csv and --html"])
        print_conclusion(conclusion)
    concerned: dict[str, list[str]] = {}
    for subject in compared.subjects:
        for problem in subject.problems:
            concerned.setdefault(problem, []).append(subject.name)
    for problem, names in concerned.items():
        say(f"note: {listing(names, most=3)}: {problem}")
    for text in lonely_sentences(compared.lonely):
        say(f"note: {text}")
    if html is not None:
        say(f"page written to {html}")
    states = {row["state"] for row in document["thresholds"]}
    for row in document["thresholds"]:
        say(threshold_sentence(row))
    raise typer.Exit(PASSED if "passed" in states else NOT_JUDGED if "not_compared" in states else 0)
