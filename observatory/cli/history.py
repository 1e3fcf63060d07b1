"""``observatory history``: where a series of runs, or one long run, changes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from observatory.cli.options import CsvOption, ForceOption, HtmlOption, JsonOption, TableOption, WideOption

if TYPE_CHECKING:
    from observatory.analysis.compare.subject import Subject


def history(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of runs or checkpoints; or one long run.")
    ],
    html: HtmlOption = None,
    force: ForceOption = False,
    wide: WideOption = False,
    csv: CsvOption = False,
    table: TableOption = None,
    json: JsonOption = False,
) -> None:
    """Show where a series of runs changes its level: by time, by training step, or inside one run."""
    from observatory.advice.conclusions import conclude_history, conclusion_document
    from observatory.analysis.compare.collect import measure_run
    from observatory.analysis.compare.history import history_of_runs, history_of_steps, series_of
    from observatory.analysis.compare.history_document import (
        LEGEND,
        heading,
        history_csv,
        history_document,
        history_sentences,
        history_tables,
    )
    from observatory.cli.output import print_conclusion, print_data, print_tables, print_text, say
    from observatory.run import open_run

    if html is not None:
        from observatory.reports.comparison import write_history
        from observatory.reports.html import check_target

        check_target(html, overwrite=force)
    left_out: list[tuple[str, str]] = []
    if (folder / "run.json").is_file():
        histories = history_of_steps(measure_run(open_run(folder)))
    else:
        subjects = _subjects(folder, left_out)
        histories = [history_of_runs(", ".join(key), part) for key, part in series_of(subjects).items()]
    document = history_document(histories, left_out=left_out)
    conclusion = conclude_history(document)
    document["conclusion"] = conclusion_document(conclusion)
    if html is not None:
        write_history(document, conclusion, html, overwrite=force)
        say(f"page written to {html}")
    for name, why in left_out:
        say(f"note: left out {name}: {why}")
    if print_data(document, history_csv(document), json=json, csv=csv, table=table):
        return
    for place, series in enumerate(document["series"]):
        print_text([*([""] if place else []), heading(series), ""])
        tables = history_tables(series)
        print_tables(tables, wide=wide)
        print_text([*([LEGEND, ""] if tables else []), *history_sentences(series)])
    print_conclusion(conclusion)


def _subjects(folder: Path, left_out: list[tuple[str, str]]) -> list[Subject]:
    """Every run below a folder; those that cannot be read are named."""
    from dataclasses import replace

    from observatory.analysis.compare.collect import measure_run
    from observatory.campaign.run_folders import find_runs
    from observatory.cli.output import counting
    from observatory.errors import ComparisonError, ObservatoryError
    from observatory.run import open_run

    paths = find_runs(folder)
    if not paths:
        raise ComparisonError(f"{folder} holds no runs", remedy="give a folder of run directories, or a run")
    subjects = []
    with counting("runs") as report:
        for done, path in enumerate(paths, start=1):
            if len(paths) > 8:
                report(done, len(paths))
            name = str(path.relative_to(folder))
            try:
                subjects.append(replace(measure_run(open_run(path)), name=name))
            except ObservatoryError as error:
                left_out.append((name, error.what))
    if not subjects:
        raise ComparisonError(
            f"none of the {len(paths)} runs in {folder} can be read: {left_out[0][1]}",
            remedy="capture them again",
        )
    return subjects
