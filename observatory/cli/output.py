"""What commands print: tables and JSON on stdout, messages and progress on stderr."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from observatory.run.manifest import CoreShare

_LONGEST_COMPLAINT = 1200


def say(message: str) -> None:
    """One line for people, on stderr."""
    sys.stderr.write(_one_line(message) + "\n")


def say_cores(shares: Iterable[CoreShare]) -> None:
    """Where ranks have no core of their own, one line for each machine."""
    from observatory.run.usable_cores import core_sentence

    for share in shares:
        say(f"note: {core_sentence(share)}")


def complain(message: str) -> None:
    """The one line an error gets."""
    say(f"observatory: {_short(message)}")


def print_json(document: dict[str, Any]) -> None:
    """The one JSON document of a ``--json`` command."""
    from observatory.run.documents.writing import dump_json

    sys.stdout.write(dump_json(document) + "\n")


def print_lines(lines: Iterable[str]) -> None:
    """Lines on stdout that another program may read, such as commands."""
    for line in lines:
        sys.stdout.write(_one_line(line) + "\n")


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None
) -> None:
    """A table on stdout; None shows as "n/a". Piped output is not cut at a terminal's width."""
    table = Table(title=escape(_one_line(title)) if title else None, title_justify="left")
    for position, name in enumerate(columns):
        # Folded, for the cut-off half of a UUID is the half that tells devices apart.
        table.add_column(escape(name), justify="left" if position == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(escape(_cell(value)) for value in row))
    console = Console(file=sys.stdout)
    if not sys.stdout.isatty():
        console.width = max(console.width, 400)
    console.print(table)


def progress_bar() -> Progress:
    """Progress on stderr."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(file=sys.stderr),
    )


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "n/a"
    if isinstance(value, float):
        return f"{value:.3f}"
    return _one_line(str(value))


def _short(message: str) -> str:
    """A message whose middle is left out when names in it are absurdly long; its ends say what and how."""
    if len(message) <= _LONGEST_COMPLAINT:
        return message
    half = _LONGEST_COMPLAINT // 2
    return f"{message[:half]} ... {message[-half:]}"


def _one_line(text: str) -> str:
    """Without line breaks and control characters, which could rewrite a terminal."""
    return "".join(char if char.isprintable() else " " for char in text)
