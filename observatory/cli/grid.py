"""``observatory grid``: models x data conditions x EP degrees."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from observatory.cli.options import OUTPUT, CsvOption, JsonOption


def grid(
    config: Annotated[Path, typer.Argument(metavar="FILE", help="Grid file (TOML), see docs/grid.md.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="DIR",
            rich_help_panel=OUTPUT,
            help="Grid directory; an unfinished grid is continued.",
        ),
    ],
    csv: CsvOption = False,
    json: JsonOption = False,
) -> None:
    """Profile every model on every data condition; a finished cell is never run twice."""
    from observatory.campaign.documents import grid_document, grid_table
    from observatory.campaign.grid import load_grid
    from observatory.campaign.ranks import refuse_ranks
    from observatory.cli.cells import run_cells
    from observatory.cli.output import print_data, print_table, say
    from observatory.errors import ObservatoryError

    refuse_ranks("grid")
    results = run_cells(load_grid(config), out)
    document = grid_document(out, results)
    table = grid_table(document)
    if not print_data(document, [table], json=json, csv=csv):
        print_table(table)
    failed = [result for result in results if result.state == "failed"]
    for result in failed:
        say(f"failed: {result.cell.job.model} on {result.cell.job.data}: {result.error}")
    if failed:
        raise ObservatoryError(
            f"{len(failed)} of {len(results)} cells failed; mend what the lines above say, then run it again"
        )
    say(f"grid written to {out}; next: observatory report {out} --out report.html")
