"""``observatory energy``: energy of a run per phase and token, idle apart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from observatory.cli.options import CsvOption, JsonOption, TableOption, WideOption


def energy(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory with power samples.")],
    reuse: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also show this result of `observatory reuse measure`."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    wide: WideOption = False,
    csv: CsvOption = False,
    table: TableOption = None,
    json: JsonOption = False,
) -> None:
    """Show the energy of a run: per device, phase and token, with intervals, or why it is not known."""
    from observatory.advice.conclusions import conclude_energy, conclusion_document
    from observatory.analysis.energy.document import (
        energy_document,
        energy_sentences,
        energy_tables,
        reuse_sentences,
        reuse_tables,
    )
    from observatory.cli.output import print_conclusion, print_data, print_tables, say
    from observatory.run import open_run
    from observatory.run.documents.prefix_cache import load_reuse

    opened = open_run(run)
    measured = None if reuse is None else load_reuse(reuse)
    document = energy_document(opened, seed=seed, reuse=measured)
    conclusion = conclude_energy(document, run)
    document["conclusion"] = conclusion_document(conclusion)
    tables = energy_tables(document)
    if measured is not None:
        tables += reuse_tables(document["reuse"], measured)
    for problem in document["problems"]:
        say(f"note: {problem}")
    if print_data(document, tables, json=json, csv=csv, table=table):
        return
    print_tables(tables, wide=wide)
    for sentence in energy_sentences(document):
        say(sentence)
    for sentence in reuse_sentences(document["reuse"]) if measured is not None else ():
        say(sentence)
    print_conclusion(conclusion)
