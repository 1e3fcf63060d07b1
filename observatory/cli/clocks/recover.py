"""``observatory clocks recover``: the result of a sweep that was killed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from observatory.cli.options import ForceOption, JsonOption, ResultOption


def recover(
    journal: Annotated[
        Path, typer.Argument(metavar="FILE", help="NAME.points.jsonl that the sweep left next to NAME.run.")
    ],
    out: ResultOption,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Make a result of what a killed sweep had measured; its locks were undone by its watchdog."""
    from observatory.campaign.benchmark import check_out
    from observatory.campaign.sweep.document import recover_sweep
    from observatory.cli.output import print_json, say
    from observatory.run.documents.printed import printed_document

    check_out(out, force=force)
    sweep = recover_sweep(journal, out)
    if json:
        print_json(printed_document("clock_sweep", sweep.model_dump(mode="json")))
    count = sum(len(series.points) for series in sweep.series)
    say(f"{count} points written to {out}; next: observatory clocks fit {out} --out clocks.json")
