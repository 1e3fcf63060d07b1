"""``observatory import``: files of other tools as runs and results of ours."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from observatory.cli.options import DATA, OUTPUT, ForceOption, JsonOption


def import_(
    form: Annotated[str, typer.Argument(metavar="FORMAT", help="auto, or a format of docs/interchange.md.")],
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Files of one run, .gz or not.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="PATH",
            rich_help_panel=OUTPUT,
            help="Run directory to make; for benchmarks a folder of results.",
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option("--model", metavar="NAME", rich_help_panel=DATA, help="Name of the model."),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k", min=1, max=65536, rich_help_panel=DATA, help="Experts of a token, if not stated."
        ),
    ] = None,
    experts: Annotated[
        int | None,
        typer.Option(
            "--experts", min=1, max=65536, rich_help_panel=DATA, help="Experts of a layer, if not stated."
        ),
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option(min=1, max=4096, rich_help_panel=DATA, help="Ranks of a benchmark, if not stated."),
    ] = None,
    phase: Annotated[
        str, typer.Option(metavar="NAME", rich_help_panel=DATA, help="Phase of the steps, such as decode.")
    ] = "unknown",
    utc_offset: Annotated[
        str | None,
        typer.Option(
            "--utc-offset", metavar="+HH:MM", rich_help_panel=DATA, help="Of local times without a zone."
        ),
    ] = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Make a run directory, or results for `fit`, of files that other tools wrote."""
    from observatory.cli.output import print_json, say
    from observatory.errors import InterchangeError
    from observatory.interchange.importers.formats import import_files
    from observatory.interchange.importers.imported import ImportOptions
    from observatory.run.manifest import PHASES
    from observatory.text import counted, listing

    if phase not in PHASES:
        raise InterchangeError(
            f"phase {phase!r} does not exist", expected=listing(PHASES, most=len(PHASES), joined_by="or")
        )
    options = ImportOptions(
        name=name,
        top_k=top_k,
        experts=experts,
        ranks=ranks,
        phase=phase,
        utc_offset_s=None if utc_offset is None else _offset_s(utc_offset),
    )
    found, written = import_files(form, files, out, options, overwrite=force)
    for note in written.notes:
        say(f"note: {note}")
    if json:
        print_json(
            {
                "format": found,
                "rows": dict(written.rows),
                "notes": list(written.notes),
                "files": [str(path) for path in written.paths],
            }
        )
    rows = ", ".join(f"{count:,} of {table}" for table, count in written.rows.items())
    what = f"rows: {rows}" if rows else counted(len(written.paths), "result")
    say(f"{out} written from {found}; {what}")


def _offset_s(text: str) -> int:
    from observatory.errors import InterchangeError

    found = re.fullmatch(r"([+-])(\d\d):?(\d\d)", text)
    if found is None or int(found[2]) > 14 or int(found[3]) > 59:
        raise InterchangeError(f"UTC offset {text!r} is none", expected="+HH:MM or -HH:MM")
    seconds = int(found[2]) * 3600 + int(found[3]) * 60
    return -seconds if found[1] == "-" else seconds
