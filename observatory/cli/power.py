"""``observatory power``: telemetry of power, clocks and temperature into a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from observatory.cli.options import OUTPUT, CsvOption, ForceOption, JsonOption


def power(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", rich_help_panel=OUTPUT, help="Run directory to write.")
    ],
    command: Annotated[
        list[str] | None,
        typer.Argument(help="Program to run meanwhile, after `--`; its exit code is passed on."),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            metavar="SECONDS",
            help="How long to sample; by default until the program, Ctrl-C or a recording ends it.",
        ),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="GPU UUID, PCI bus id, rapl:DOMAIN, or replay:FILE; may be repeated."
        ),
    ] = None,
    period_ms: Annotated[float, typer.Option(min=1.0, max=60_000.0, help="Time between samples.")] = 50.0,
    calibrate_s: Annotated[
        float, typer.Option(min=0.0, max=60.0, help="Time to calibrate the sensors first; 0: do not.")
    ] = 1.2,
    force: ForceOption = False,
    csv: CsvOption = False,
    json: JsonOption = False,
) -> None:
    """Sample power, clocks and temperature of devices into a run directory, while a program runs or alone.

    Reads only: no clock, limit or other setting is touched.
    """
    from observatory.campaign.documents import power_document, power_table
    from observatory.campaign.ranks import refuse_ranks
    from observatory.campaign.telemetry import TelemetryJob, run_telemetry
    from observatory.cli.output import print_data, print_table, say

    refuse_ranks("power", each_node=True)
    status, code = run_telemetry(
        TelemetryJob(
            selectors=tuple(device or ()),
            command=tuple(command or ()),
            seconds=seconds,
            period_s=period_ms / 1e3,
            calibrate_s=calibrate_s,
        ),
        out,
        overwrite=force,
        started=lambda: say("sampling"),
    )
    for note in status.notes:
        say(f"note: {note}")
    table = power_table(status)
    if not print_data(power_document(out, status, code), [table], json=json, csv=csv):
        print_table(table)
    say(f"run written to {out}; next: observatory report {out}")
    if code:
        raise typer.Exit(code)
