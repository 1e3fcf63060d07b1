"""Options that several subcommands share, so that one thing has one name everywhere."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_origin, get_type_hints

import typer

from observatory.errors import ObservatoryError, PlacementError

Record = TypeVar("Record")
Function = TypeVar("Function", bound=Callable[..., None])

#: Sections of help pages.
DATA, RANKS, POWER, CAPTURE = "Data", "Ranks", "Power", "Capture"
SETTINGS, TIMING, OUTPUT = "Settings", "Timing", "Output"

JsonOption = Annotated[
    bool, typer.Option("--json", rich_help_panel=OUTPUT, help="Print one JSON document (docs/json.md).")
]
CsvOption = Annotated[
    bool,
    typer.Option(
        "--csv", rich_help_panel=OUTPUT, help="Print a table as CSV, all columns, units in the names."
    ),
]
TableOption = Annotated[
    str | None,
    typer.Option(
        "--table",
        metavar="NAME",
        rich_help_panel=OUTPUT,
        help="With --csv: which table to print; by default the first.",
    ),
]
WideOption = Annotated[
    bool, typer.Option("--wide", rich_help_panel=OUTPUT, help="Show all columns of the tables.")
]
HtmlOption = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", rich_help_panel=OUTPUT, help="Also write one offline HTML page."),
]
ForceOption = Annotated[
    bool, typer.Option("--force", rich_help_panel=OUTPUT, help="Replace an existing result.")
]
ResultOption = Annotated[
    Path, typer.Option("--out", metavar="FILE", rich_help_panel=OUTPUT, help="Result file (JSON) to write.")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Bundled model (listed by `doctor`), checkpoint directory, or hub id."
    ),
]
EpOption = Annotated[str, typer.Option("--ep", metavar="N,...", help="EP degrees, separated by commas.")]
GpusPerNodeOption = Annotated[
    int, typer.Option("--gpus-per-node", min=1, max=65536, rich_help_panel=RANKS, help="Ranks per node.")
]
PlacementOption = Annotated[
    str,
    typer.Option(
        "--placement",
        metavar="NAME|FILE",
        rich_help_panel=RANKS,
        help="linear, round-robin, recorded (where the run had its experts), or a placement file (JSON); "
        "auto: recorded at the degree of the run, linear at others.",
    ),
]

BackendOption = Annotated[
    str,
    typer.Option(metavar="NAME", rich_help_panel=RANKS, help="auto, gloo, nccl, or mpi (under mpiexec)."),
]
AlgorithmsOption = Annotated[
    str,
    typer.Option(metavar="NAME,...", help="flat, hierarchical, gather, several separated by commas, or all."),
]
WarmupOption = Annotated[
    int, typer.Option(min=0, max=10_000, rich_help_panel=TIMING, help="Rounds that are not timed, first.")
]
RepeatsOption = Annotated[
    int, typer.Option(min=1, max=100_000, rich_help_panel=TIMING, help="Timed rounds over all matrices.")
]
IterationsOption = Annotated[
    int,
    typer.Option(
        min=1, max=100_000, rich_help_panel=TIMING, help="Consecutive exchanges in one timed interval."
    ),
]
RanksPerNodeOption = Annotated[
    int | None,
    typer.Option(min=1, rich_help_panel=RANKS, help="Treat every N consecutive ranks as one node."),
]
RankTimeoutOption = Annotated[
    float, typer.Option(min=1.0, rich_help_panel=RANKS, help="Longest wait for a rank.")
]
OnlyPhaseOption = Annotated[
    str | None, typer.Option(metavar="NAME", rich_help_panel=DATA, help="Only this phase, such as prefill.")
]
OnlyLayersOption = Annotated[
    list[int] | None, typer.Option(rich_help_panel=DATA, help="Only this layer; may be repeated.")
]
MostStepsOption = Annotated[
    int | None,
    typer.Option(min=1, rich_help_panel=DATA, help="At most N steps of each phase, evenly spread."),
]
RoleOption = Annotated[
    str, typer.Option(metavar="NAME", rich_help_panel=DATA, help="dispatch, combine, or both.")
]
RowBytesOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1 << 30,
        rich_help_panel=DATA,
        help="Bytes of one row of activations, for a run that does not record its hidden size.",
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", rich_help_panel=DATA, help="Torch dtype of the weights, such as bfloat16."),
]
WrapperOption = Annotated[
    str | None,
    typer.Option(
        metavar="COMMAND",
        help="The site's command that locks clocks, with {uuid} and {clock_mhz}; it is added to the "
        "commands that are printed.",
    ),
]
MaxSlowdownOption = Annotated[
    float,
    typer.Option(
        min=0.0, max=10.0, help="Longest an iteration may get, as a fraction: 0.02 allows 2 % more time."
    ),
]


def refuse_ignored(context: typer.Context, names: Collection[str], why: str) -> None:
    """Refuse options that would do nothing.

    Args:
        context: of the running command.
        names: their parameters.
        why: what they do nothing with, such as ``with RUN``.

    Raises:
        ObservatoryError: one of them was given.
    """
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            raise ObservatoryError(f"{parameter.opts[0]} does nothing {why}", remedy="leave it out")


def parse_ep(text: str, option: str = "--ep") -> tuple[int, ...]:
    """EP degrees from ``4,8,16``; raises PlacementError for anything else, naming the option."""
    try:
        degrees = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise PlacementError(f"{option} {text!r} is not a list of whole numbers such as 4,8,16") from None
    if min(degrees) < 1:
        raise PlacementError(f"{option} {text!r} names a degree below 1; degrees are numbers of ranks")
    return degrees


def parse_placement(text: str) -> str | Path:
    """A placement by name, or the path of its file."""
    from observatory.analysis.parallel.placement import PLACEMENT_NAMES

    return text if text in PLACEMENT_NAMES else Path(text)


def with_options(options: Mapping[str, Any], *records: type) -> Callable[[Function], Function]:
    """Let a command take fields of records as options, in the place of its ``**`` parameter.

    Type and default are those of the field, so that an option is declared once. Help pages show the fields
    before what the command takes by keyword only.

    Args:
        options: the `typer.Option` of each field, or an option that several commands share.
        records: dataclasses that have the fields.
    """
    defaults = {field.name: field.default for record in records for field in fields(record)}
    hints = {name: kind for record in records for name, kind in get_type_hints(record).items()}
    taken = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults[name],
            # A choice is checked by the record, whose message names what there is.
            annotation=Annotated[
                str if get_origin(hints[name]) is Literal else hints[name],
                getattr(option, "__metadata__", (option,))[0],
            ],
        )
        for name, option in options.items()
    ]

    def declare(command: Function) -> Function:
        own = inspect.signature(command, eval_str=True)
        first = [item for item in own.parameters.values() if item.kind is item.POSITIONAL_OR_KEYWORD]
        last = [item for item in own.parameters.values() if item.kind is item.KEYWORD_ONLY]
        shown = [*first, *taken, *last]
        command.__signature__ = own.replace(parameters=shown)  # type: ignore[attr-defined]  # read by inspect
        command.__annotations__ = {item.name: item.annotation for item in shown}
        return command

    return declare


def record_of(record: type[Record], options: Mapping[str, Any], **others: Any) -> Record:
    """The record of the options that are its fields, and of others."""
    names = {field.name for field in fields(record)}  # type: ignore[arg-type]  # a dataclass
    return record(**others, **{name: value for name, value in options.items() if name in names})
