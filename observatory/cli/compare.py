"""``observatory compare``: runs, grids or saved results against a baseline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from observatory.cli.options import OUTPUT, CsvOption, ForceOption, JsonOption, TableOption, WideOption

if TYPE_CHECKING:
    from observatory.analysis.compare.subject import Subject

#: Exit codes: a threshold is passed; one could not be judged.
PASSED, NOT_JUDGED = 1, 4
#: Runs of one comparison; of more, `observatory history` shows the series.
_MOST_RUNS = 256


def compare(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="A B",
            help="Runs, grids, saved --json documents or reports; the first is the baseline.",
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
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=OUTPUT, help="Also write one offline HTML page."),
    ] = None,
    force: ForceOption = False,
    wide: WideOption = False,
    csv: CsvOption = False,
    table: TableOption = None,
    json: JsonOption = False,
) -> None:
    """Compare runs with a baseline: differences with intervals, and what else differs."""
    from observatory.advice.conclusions import conclude_comparison, conclusion_document
    from observatory.analysis.compare.comparing import compare_subjects
    from observatory.analysis.compare.document import (
        LEGEND,
        compare_csv,
        compare_document,
        compare_sentences,
        compare_tables,
        heading,
    )
    from observatory.analysis.compare.inputs import check_repeats, pair_subjects
    from observatory.analysis.compare.thresholds import judge_thresholds, parse_threshold, threshold_sentence
    from observatory.analysis.compare.words import sentence
    from observatory.cli.output import print_conclusion, print_data, print_tables, print_text, say
    from observatory.errors import ComparisonError

    thresholds = [parse_threshold(text) for text in fail_if or ()]
    if len(inputs) < 2:
        raise ComparisonError("one input alone cannot be compared", remedy="give a baseline and another run")
    repeats = repeat or []
    if len(repeats) == 1:
        raise ComparisonError(
            "one further run of the baseline shows no scatter to rely on", expected="two --repeat or more"
        )
    every = _subjects([*inputs, *repeats])
    subjects, further = every[: len(inputs)], [item for side in every[len(inputs) :] for item in side]
    check_repeats(subjects[0], further)
    comparisons, lonely = [], []
    for other in subjects[1:]:
        pairs, without = pair_subjects(subjects[0], other)
        comparisons += [compare_subjects(*pair, repeats=further) for pair in pairs]
        lonely += without
    if not comparisons:
        raise ComparisonError(
            "nothing on one side has a counterpart on the other",
            expected="a model or a data condition that both have",
        )
    document = compare_document(comparisons, lonely)
    document["thresholds"] = judge_thresholds(thresholds, document["comparisons"])
    conclusion = conclude_comparison(document)
    document["conclusion"] = conclusion_document(conclusion)
    if html is not None:
        from observatory.reports.comparison import write_comparison

        write_comparison(document, conclusion, html, overwrite=force)
    for item in {subject.name: subject for side in subjects for subject in side}.values():
        for problem in item.problems:
            say(f"note: {item.name}: {problem}")
    for reason in lonely:
        say(f"note: {sentence(reason)}")
    if not print_data(document, compare_csv(document), json=json, csv=csv, table=table):
        for place, item in enumerate(document["comparisons"]):
            print_text([*([""] if place else []), *heading(item), ""])
            print_tables(compare_tables(item), wide=wide)
            print_text([LEGEND, "", *compare_sentences(item)])
        print_conclusion(conclusion)
    if html is not None:
        say(f"page written to {html}")
    states = {row["state"] for row in document["thresholds"]}
    for row in document["thresholds"]:
        say(threshold_sentence(row))
    raise typer.Exit(PASSED if "passed" in states else NOT_JUDGED if "not_compared" in states else 0)


def _subjects(inputs: list[Path]) -> list[list[Subject]]:
    """The subjects of each input; runs are measured at the EP degrees of all of them."""
    from observatory.analysis.compare.collect import measure_run, own_degrees
    from observatory.analysis.compare.saved import load_subjects
    from observatory.campaign.grid import expand_runs
    from observatory.cli.output import counting
    from observatory.errors import ComparisonError
    from observatory.run import Run, open_run

    opened: list[list[Run | Subject]] = []
    for path in inputs:
        if path.is_file():
            opened.append([*load_subjects(path)])
        else:
            opened.append([open_run(run) for run in expand_runs([path])])
    total = sum(map(len, opened))
    if total > _MOST_RUNS:
        raise ComparisonError(
            f"{total} runs are more than can be compared side by side",
            expected=f"at most {_MOST_RUNS}",
            remedy="see the series with `observatory history DIR`",
        )
    runs = [item for side in opened for item in side if isinstance(item, Run)]
    degrees = sorted({ep for run in runs for ep in own_degrees(run)})
    measured: dict[int, Subject] = {}
    with counting("runs") as report:
        for run in runs:
            measured[id(run)] = measure_run(run, degrees=degrees)
            if len(runs) > 2:
                report(len(measured), len(runs))
    return [[measured[id(item)] if isinstance(item, Run) else item for item in side] for side in opened]
