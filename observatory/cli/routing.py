"""``observatory routing``: imbalance per layer and phase."""

from __future__ import annotations

from typing import Annotated

import typer

from observatory.cli.options import CsvOption, JsonOption, RunArgument, WideOption


def routing(
    run: RunArgument,
    bootstrap: Annotated[
        int, typer.Option(min=0, max=100_000, help="Bootstrap samples over steps; 0: no intervals.")
    ] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    wide: WideOption = False,
    csv: CsvOption = False,
    json: JsonOption = False,
) -> None:
    """Show the imbalance of expert loads per layer and phase, next to its sampling floor."""
    from observatory.advice.conclusions import conclude_routing, conclusion_document
    from observatory.analysis.routing.document import routing_document, routing_tables
    from observatory.cli.output import print_conclusion, print_data, print_tables, say
    from observatory.run import open_run

    document = routing_document(open_run(run), bootstrap=bootstrap, seed=seed)
    conclusion = conclude_routing(document, run)
    document["conclusion"] = conclusion_document(conclusion)
    tables = routing_tables(document)
    for problem in document["problems"]:
        say(f"note: {problem}")
    if print_data(document, tables, json=json, csv=csv):
        return
    print_tables(tables, wide=wide)
    print_conclusion(conclusion)
