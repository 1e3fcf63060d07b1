"""``observatory reduce``: metrics of many runs, by one process or by the ranks of MPI."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from observatory.cli.options import OUTPUT, CsvOption, ForceOption, JsonOption, WideOption


def reduce(
    directories: Annotated[
        list[Path],
        typer.Argument(metavar="DIR", help="Runs, grids, batch campaigns, or folders that hold runs."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", rich_help_panel=OUTPUT, help="Also write the JSON document."),
    ] = None,
    force: ForceOption = False,
    wide: WideOption = False,
    csv: CsvOption = False,
    json: JsonOption = False,
) -> None:
    """Compute the metrics of many runs, a row per run and phase.

    Under mpiexec or srun the ranks share the work; the result is the same to the last digit.
    """
    from observatory.analysis.reduction.document import reduction_document, reduction_tables
    from observatory.campaign.benchmark import check_out
    from observatory.campaign.message_passing import working_together
    from observatory.campaign.reduction import reduce_runs
    from observatory.cli.output import counting, print_data, print_tables, say
    from observatory.run.documents.writing import write_json

    with working_together() as world:
        if world.rank == 0 and out is not None:
            check_out(out, force=force)
        if world.rank:
            reduce_runs(directories, world=world)
            return
        with counting("shards of rank 0") as progress:
            rows = reduce_runs(directories, progress=progress, world=world)
    document = reduction_document(rows)
    tables = reduction_tables(document)
    for run in document["runs"]:
        for problem in run["problems"]:
            say(f"note: {run['run']}: {problem}")
    if out is not None:
        write_json(out, document)
    if not print_data(document, tables, json=json, csv=csv):
        print_tables(tables, wide=wide)
    if out is not None:
        say(f"metrics written to {out}")
    if all(run["run_id"] is None for run in document["runs"]):
        raise typer.Exit(1)
