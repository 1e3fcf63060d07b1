"""Options that several subcommands share, so that one thing has one name everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from observatory.errors import PlacementError

__all__ = [
    "EpOption",
    "ForceOption",
    "GpusPerNodeOption",
    "JsonOption",
    "PlacementOption",
    "parse_ep",
    "parse_placement",
]

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is there already.")]
EpOption = Annotated[str, typer.Option("--ep", help="EP degrees, separated by commas.")]
GpusPerNodeOption = Annotated[int, typer.Option("--gpus-per-node", min=1, max=65536, help="Ranks per node.")]
PlacementOption = Annotated[
    str, typer.Option("--placement", help="linear, round-robin, or a placement file (JSON).")
]


def parse_ep(text: str) -> tuple[int, ...]:
    """EP degrees from ``4,8,16``; raises PlacementError for anything else."""
    try:
        degrees = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise PlacementError(f"--ep {text!r} is not a list of whole numbers such as 4,8,16") from None
    if min(degrees) < 1:
        raise PlacementError(f"--ep {text!r} names a degree below 1; degrees are numbers of ranks")
    return degrees


def parse_placement(text: str) -> str | Path:
    """A placement by name, or the path of its file."""
    return text if text in ("linear", "round-robin") else Path(text)
