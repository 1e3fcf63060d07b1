"""All subcommands under one name."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from observatory import __version__
from observatory.cli import (
    bench,
    clocks,
    doctor,
    energy,
    exchanges,
    export,
    fit,
    grid,
    power,
    profile,
    quickstart,
    replay,
    report,
    reuse,
    routing,
    scan,
)
from observatory.cli.output import say
from observatory.errors import CaptureError
from observatory.host.ranks import find_rank

#: Commands that read runs and results, and that a rank of a job may well call.
_ANALYSIS = frozenset({"routing", "scan", "fit", "export", "exchanges", "energy", "report"})


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moe-observatory {__version__}")
        raise typer.Exit


def _root(
    context: typer.Context,
    _asked: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """See what mixture-of-experts models do to the machines they run on, then decide."""
    if context.invoked_subcommand in _ANALYSIS:
        _note_ranks(context.invoked_subcommand)


def _note_ranks(subcommand: str) -> None:
    """State, on rank 0, that several ranks do the same work."""
    try:
        where = find_rank()
    except CaptureError:  # analysis needs no rank
        return
    if where.world > 1 and where.rank == 0:
        say(
            f"note: {subcommand} runs in one process; {where.launcher} started {where.world}, "
            "and each that runs it does the same work"
        )


def command() -> Any:
    """The command tree, ready to run."""
    app = typer.Typer(
        name="observatory", no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False
    )
    app.callback()(_root)
    app.command("quickstart")(quickstart.quickstart)
    app.command("profile")(profile.profile)
    app.command("grid")(grid.grid)
    app.command("routing")(routing.routing)
    app.command("scan")(scan.scan)
    app.add_typer(bench.bench_group(), name="bench")
    app.add_typer(clocks.clocks_group(), name="clocks")
    app.command("replay")(replay.replay)
    app.command("fit")(fit.fit)
    app.command("export")(export.export)
    app.command("exchanges")(exchanges.exchanges)
    app.command("power")(power.power)
    app.command("energy")(energy.energy)
    app.add_typer(reuse.reuse_group(), name="reuse")
    app.command("report")(report.report)
    app.command("doctor")(doctor.doctor)
    return typer.main.get_command(app)
