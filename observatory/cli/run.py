"""``observatory run``: watch the models of a command that was not written for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from observatory.cli.options import CAPTURE, OUTPUT, POWER, ForceOption

_SWITCH = {"auto": None, "on": True, "off": False}
#: A year.
_MOST_MINUTES = 525_600
#: Percent.
_WHOLE = 100.0


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
    every: Annotated[
        int,
        typer.Option(
            "--every",
            metavar="N",
            min=1,
            max=1_000_000,
            rich_help_panel=CAPTURE,
            help="Of these steps capture one in N, the first and every Nth after it.",
        ),
    ] = 1,
    max_minutes: Annotated[
        float | None,
        typer.Option(
            "--max-minutes",
            metavar="MIN",
            rich_help_panel=CAPTURE,
            help="End the capture so long after its first step; the command goes on.",
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget",
            metavar="PERCENT",
            rich_help_panel=CAPTURE,
            help="End the capture when it takes more of the program's time; the command goes on.",
        ),
    ] = None,
    stopped: Annotated[
        bool,
        typer.Option(
            "--stopped",
            rich_help_panel=CAPTURE,
            help="Capture nothing before `observatory ctl DIR start`.",
        ),
    ] = False,
    control_port: Annotated[
        int,
        typer.Option(
            "--control-port",
            metavar="PORT",
            min=0,
            max=65535,
            rich_help_panel=CAPTURE,
            help="Take commands by HTTP on this port of the loopback interface; 0: none.",
        ),
    ] = 0,
    control_signal: Annotated[
        str,
        typer.Option(
            "--control-signal",
            metavar="USR1|USR2|none",
            rich_help_panel=CAPTURE,
            help="Signal to this process that stops the capture, or starts it again.",
        ),
    ] = "none",
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
    import signal

    from observatory.campaign.command import CommandControl, run_command
    from observatory.cli.output import say
    from observatory.cli.parsing import parse_steps, parse_word
    from observatory.errors import CaptureError

    if stopped and steps:
        raise CaptureError("--stopped and --steps exclude each other", remedy="give one of them")
    if max_minutes is not None and not 0 < max_minutes < _MOST_MINUTES:
        raise CaptureError(f"--max-minutes is {max_minutes:g}", expected="more than 0")
    if budget is not None and not 0 < budget <= _WHOLE:
        raise CaptureError(f"--budget is {budget:g}", expected="more than 0, up to 100 (percent)")
    signals = {"none": None, "USR1": signal.SIGUSR1, "USR2": signal.SIGUSR2}
    result = run_command(
        command,
        out,
        power=parse_word("--power", power, _SWITCH),
        exchanges=parse_word("--exchanges", exchanges, _SWITCH),
        steps=parse_steps(steps),
        every=every,
        most_s=None if max_minutes is None else 60.0 * max_minutes,
        budget=None if budget is None else budget / _WHOLE,
        stopped=stopped,
        control=CommandControl(
            port=control_port,
            signal=parse_word("--control-signal", control_signal, signals),
            say=lambda line: say(f"observatory: {line}"),
        ),
        overwrite=force,
    )
    for remark in result.remarks:
        say(f"observatory: {remark}")
    for path in result.runs if result.rank == 0 else ():
        say(f"observatory: run written to {path}; next: observatory routing {path}")
    if not result.runs and not result.remarks:
        say(
            "observatory: no run was written: no Python process under the command built a torch model with "
            "modules that are named after experts, routers, gates or MoE"
        )
    raise typer.Exit(result.code)
