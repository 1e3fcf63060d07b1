"""``observatory report``: one HTML file for one or several runs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from observatory.cli.options import (
    OUTPUT,
    EpOption,
    ForceOption,
    GpusPerNodeOption,
    MaxSlowdownOption,
    parse_ep,
)


class Form(StrEnum):
    """What is written."""

    HTML = "html"
    MD = "md"
    JSON = "json"


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Run directories; a grid or campaign stands for its runs."),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", rich_help_panel=OUTPUT, help="File to write.")
    ],
    title: Annotated[str | None, typer.Option(rich_help_panel=OUTPUT, help="Title of the page.")] = None,
    ep: EpOption = "4,8,16,32",
    gpus_per_node: GpusPerNodeOption = 4,
    bench: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel="Further results",
            help="Result of `bench`: bandwidth curves; may be repeated.",
        ),
    ] = None,
    replay: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel="Further results",
            help="Replay of one of the runs: captured against uniform traffic; may be repeated.",
        ),
    ] = None,
    network: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel="Further results",
            help="Network model of `fit`: measured against predicted; may be repeated.",
        ),
    ] = None,
    clocks: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel="Further results",
            help="Result of `clocks sweep` or `clocks fit`: which clock; may be repeated.",
        ),
    ] = None,
    plan: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel="Further results",
            help="What `plan --out` wrote; may be repeated.",
        ),
    ] = None,
    route_fetch: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel="Further results",
            help="Result of `bench route-fetch`: decision maps; may be repeated.",
        ),
    ] = None,
    max_slowdown: MaxSlowdownOption = 0.02,
    form: Annotated[
        Form,
        typer.Option(
            "--format",
            metavar="html|md|json",
            rich_help_panel=OUTPUT,
            help="Page, Markdown without figures, or the page's JSON.",
        ),
    ] = Form.HTML,
    force: ForceOption = False,
) -> None:
    """Write the report: one file that needs no network."""
    from observatory.campaign.run_folders import expand_runs
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
        route_fetch=route_fetch or (),
        plans=plan or (),
        max_slowdown=max_slowdown,
        form=form.value,
        overwrite=force,
    )
    say(f"report written to {path}")
