"""``observatory grid``: models x data conditions x EP degrees."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from observatory.cli.options import JsonOption


def grid(
    config: Annotated[Path, typer.Argument(help="Grid file (TOML), see docs/grid.md.")],
    out: Annotated[Path, typer.Option("--out", help="Grid directory; an unfinished grid goes on.")],
    json: JsonOption = False,
) -> None:
    """Profile every model on every data condition; a finished cell is never run twice."""
    from observatory.campaign.grid import load_grid
    from observatory.campaign.ranks import refuse_ranks
    from observatory.cli.cells import run_cells
    from observatory.cli.output import print_json, print_table, say
    from observatory.errors import ObservatoryError

    refuse_ranks("grid")
    results = run_cells(load_grid(config), out)
    if json:
        print_json(
            {
                "grid": out,
                "cells": [
                    {
                        "model": result.cell.job.model,
                        "data": result.cell.job.data,
                        "run": result.run,
                        "state": result.state,
                        "error": result.error,
                    }
                    for result in results
                ],
            }
        )
    else:
        print_table(
            ["model", "data", "state", "run"],
            [
                [result.cell.job.model, result.cell.job.data, result.state, result.run.name]
                for result in results
            ],
        )
    failed = [result for result in results if result.state == "failed"]
    for result in failed:
        say(f"failed: {result.cell.job.model} on {result.cell.job.data}: {result.error}")
    if failed:
        raise ObservatoryError(
            f"{len(failed)} of {len(results)} cells failed; mend what the lines above say, then run it again"
        )
    say(f"grid written to {out}; next: observatory report {out} --out report.html")
