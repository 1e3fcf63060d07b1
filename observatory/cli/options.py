"""Options that several subcommands share, so that one thing has one name everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from observatory.errors import PlacementError

JsonOption = Annotated[
    bool,
    typer.Option(
        "--json", rich_help_panel="Output", help="Print one JSON document on stdout (docs/json.md)."
    ),
]
CsvOption = Annotated[
    bool,
    typer.Option("--csv", rich_help_panel="Output", help="Print the table as CSV, with all columns."),
]
TableOption = Annotated[
    str | None,
    typer.Option(
        "--table", metavar="NAME", rich_help_panel="Output", help="With --csv: which of the tables to print."
    ),
]
WideOption = Annotated[
    bool, typer.Option("--wide", rich_help_panel="Output", help="Show all columns of the tables.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is there already.")]
EpOption = Annotated[str, typer.Option("--ep", help="EP degrees, separated by commas.")]
GpusPerNodeOption = Annotated[int, typer.Option("--gpus-per-node", min=1, max=65536, help="Ranks per node.")]
PlacementOption = Annotated[
    str,
    typer.Option(
        "--placement",
        help="linear, round-robin, recorded (where the run had its experts), or a placement file (JSON); "
        "auto: recorded at the degree that the run had, linear at others.",
    ),
]

BackendOption = Annotated[str, typer.Option(help="auto, gloo, nccl or mpi (under mpiexec).")]
AlgorithmsOption = Annotated[str, typer.Option(help="flat, hierarchical, gather, several by commas, or all.")]
WarmupOption = Annotated[int, typer.Option(min=0, max=10_000, help="Rounds before them.")]
RepeatsOption = Annotated[int, typer.Option(min=1, max=100_000, help="Timed rounds over all matrices.")]
IterationsOption = Annotated[
    int, typer.Option(min=1, max=100_000, help="Exchanges one after another in one timed interval.")
]
RanksPerNodeOption = Annotated[
    int | None, typer.Option(min=1, help="Treat so many consecutive ranks as a node.")
]
RankTimeoutOption = Annotated[float, typer.Option(min=1.0, help="Longest wait for a rank.")]
OnlyPhaseOption = Annotated[str | None, typer.Option(help="Only this phase, e.g. prefill.")]
OnlyLayersOption = Annotated[list[int] | None, typer.Option(help="Only this layer; may be given again.")]
MostStepsOption = Annotated[
    int | None, typer.Option(min=1, help="At most so many steps of each phase, evenly spread.")
]
RoleOption = Annotated[str, typer.Option(help="dispatch, combine or both.")]
RowBytesOption = Annotated[
    int | None,
    typer.Option(min=1, max=1 << 30, help="Bytes of one row, when the run does not say its hidden size."),
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
    from observatory.analysis.parallel.placement import PLACEMENT_NAMES

    return text if text in PLACEMENT_NAMES else Path(text)
