"""``observatory exchanges``: waiting and transfer of every layer's exchanges, and whom they wait for."""

from __future__ import annotations

from typing import Annotated

import typer

from observatory.cli.options import CsvOption, JsonOption, RunArgument, TableOption, WideOption


def exchanges(
    run: RunArgument,
    flight_recorder: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RANK=FILE", help="Flight recorder dump (JSON) to compare with that rank's rows."
        ),
    ] = None,
    wide: WideOption = False,
    csv: CsvOption = False,
    table: TableOption = None,
    json: JsonOption = False,
) -> None:
    """Show the time of every layer's exchanges, split into waiting and transfer."""
    from observatory.advice.conclusions import conclude_exchanges, conclusion_document
    from observatory.analysis.exchange.document import exchange_document, exchange_tables
    from observatory.cli.output import print_conclusion, print_data, print_tables, say, say_cores
    from observatory.cli.parsing import parse_files_of_ranks
    from observatory.run import open_run
    from observatory.run.usable_cores import short_of_cores

    opened = open_run(run)
    dumps = parse_files_of_ranks(flight_recorder or (), ranks=opened.manifest.topology.ranks)
    document = exchange_document(opened, dumps=dumps)
    conclusion = conclude_exchanges(document, run)
    document["conclusion"] = conclusion_document(conclusion)
    tables = exchange_tables(document)
    say_cores(short_of_cores(status.cores for status in opened.manifest.ranks))
    for problem in document["problems"]:
        say(f"note: {problem}")
    if print_data(document, tables, json=json, csv=csv, table=table):
        return
    print_tables(tables, wide=wide)
    recorder = document["flight_recorder"]
    for gap in recorder["gaps"] if recorder else ():
        say(f"flight recorder, {gap['rows']} of {document['rows']} rows: {gap['reason']}")
    for unknown in document["unknown"]:
        say(f"no split for {unknown['rows']} of {document['rows']} rows: {unknown['reason']}")
    print_conclusion(conclusion)
