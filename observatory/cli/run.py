"""``observatory run``: watch the models of a command that was not written for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from observatory.cli.options import CAPTURE, OUTPUT, POWER, ForceOption

_SWITCH = {"auto": None, "on": True, "off": False}


def run(
    command: Annotated[
        list[str],
        typer.Argument(metavar="COMMAND ...", help="The command and its arguments, after two dashes."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="DIR",
            rich_help_panel=OUTPUT,
            help="Run directory; of further models -2, -3 ...",
        ),
    ] = Path("observatory-run"),
    *,
    steps: Annotated[
        str,
        typer.Option(
            "--steps",
            metavar="A:B",
            rich_help_panel=CAPTURE,
            help="Capture steps from A to before B alone, counted from 0; either may be left out.",
        ),
    ] = "",
    exchanges: Annotated[
        str,
        typer.Option(
            "--exchanges",
            metavar="auto|on|off",
            rich_help_panel=CAPTURE,
            help="Time exchanges between ranks; auto: if there are several.",
        ),
    ] = "auto",
    power: Annotated[
        str,
        typer.Option(
            "--power",
            metavar="auto|on|off",
            rich_help_panel=POWER,
            help="Sample power; auto: if the model is on a GPU.",
        ),
    ] = "auto",
    force: ForceOption = False,
) -> None:
    """Run a command unchanged and watch every MoE model in it.

    Each Python process under the command that builds a model with MoE layers writes its part of a run. A step
    is an optimiser step in training, else a forward of the whole model. Exit code and output are the
    command's own; a failure of the observatory never stops it.
    """
    from observatory.campaign.command import run_command
    from observatory.cli.output import say
    from observatory.cli.parsing import parse_steps, parse_word

    result = run_command(
        command,
        out,
        power=parse_word("--power", power, _SWITCH),
        exchanges=parse_word("--exchanges", exchanges, _SWITCH),
        steps=parse_steps(steps),
        overwrite=force,
    )
    for remark in result.remarks:
        say(f"observatory: {remark}")
    for path in result.runs:
        say(f"observatory: run written to {path}; next: observatory routing {path}")
    if not result.runs and not result.remarks:
        say(
            "observatory: no run was written: no Python process under the command built a torch model with "
            "modules that are named after experts, routers, gates or MoE"
        )
    raise typer.Exit(result.code)
