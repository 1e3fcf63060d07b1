"""``observatory report``: one HTML file for one or several runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from observatory.cli.options import EpOption, ForceOption, GpusPerNodeOption, parse_ep


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; a grid stands for its cells.")],
    out: Annotated[Path, typer.Option("--out", help="HTML file to write.")],
    title: Annotated[str | None, typer.Option(help="Title of the page.")] = None,
    ep: EpOption = "4,8,16,32",
    gpus_per_node: GpusPerNodeOption = 4,
    bench: Annotated[
        list[Path] | None, typer.Option(help="Result of bench: bandwidth curves; may be given again.")
    ] = None,
    replay: Annotated[
        list[Path] | None,
        typer.Option(help="Replay of one of the runs: what realism costs; may be given again."),
    ] = None,
    network: Annotated[
        list[Path] | None,
        typer.Option(help="Network model of fit: measured against predicted; may be given again."),
    ] = None,
    clocks: Annotated[
        list[Path] | None,
        typer.Option(help="Clock sweep, or model of clocks fit: which clock; may be given again."),
    ] = None,
    max_slowdown: Annotated[
        float, typer.Option(min=0.0, max=10.0, help="Longest an iteration may get at a clock, as a share.")
    ] = 0.02,
    force: ForceOption = False,
) -> None:
    """Write the report: one HTML file that needs no network."""
    from observatory.campaign.grid import expand_runs
    from observatory.cli.output import say
    from observatory.reports import write_report

    path = write_report(
        expand_runs(runs),
        out,
        title=title,
        ep_degrees=parse_ep(ep),
        gpus_per_node=gpus_per_node,
        bench=bench or (),
        replays=replay or (),
        networks=network or (),
        clocks=clocks or (),
        max_slowdown=max_slowdown,
        overwrite=force,
    )
    say(f"report written to {path}")
