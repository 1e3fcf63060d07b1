"""``observatory place``: which placement of experts, chosen and judged on different steps of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from observatory.cli.options import RANKS, CsvOption, JsonOption, RunArgument, WideOption


def place(
    run: RunArgument,
    ranks: Annotated[
        int, typer.Option("--ranks", min=1, max=65536, rich_help_panel=RANKS, help="Expert-parallel ranks.")
    ],
    replicas: Annotated[
        int,
        typer.Option(min=0, max=65536, rich_help_panel=RANKS, help="Copies beyond one of each expert."),
    ] = 0,
    current: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=RANKS,
            help="Placement file of today; by default that of the run, or contiguous blocks.",
        ),
    ] = None,
    phase: Annotated[
        str, typer.Option(metavar="NAME", help="Steps to place for: prefill, decode, or all.")
    ] = "all",
    train_share: Annotated[
        float,
        typer.Option(
            min=0.05,
            max=0.95,
            help="Share of the steps of each phase that placements are made on, the first ones.",
        ),
    ] = 0.5,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the chosen placement (JSON).")
    ] = None,
    wide: WideOption = False,
    csv: CsvOption = False,
    json: JsonOption = False,
) -> None:
    """Choose a placement of experts on some steps and judge it on the others."""
    from observatory.advice.placement import advise_placement, current_layout, step_loads
    from observatory.advice.placement_document import placement_document, placement_file, placement_tables
    from observatory.advice.words import placement_sentences
    from observatory.cli.output import print_data, print_tables, say
    from observatory.errors import PlacementError
    from observatory.run import open_run
    from observatory.run.documents.writing import write_json
    from observatory.run.manifest import PHASES

    if phase not in (*PHASES, "all"):
        raise PlacementError(f"--phase {phase!r} is not known; expected one of {', '.join(PHASES)}, all")
    opened = open_run(run)
    loads = step_loads(opened, phase=None if phase == "all" else phase)
    today, name = current_layout(opened, loads, ranks=ranks, file=current)
    advice = advise_placement(
        loads, ranks=ranks, today=today, named_today=name, replicas=replicas, train_share=train_share
    )
    document = placement_document(advice, opened.problems)
    tables = placement_tables(document)
    for problem in opened.problems:
        say(f"note: {problem}")
    if out is not None:
        write_json(out, placement_file(advice, loads.load_SLE.shape[2]))
    if print_data(document, tables, json=json, csv=csv):
        return
    print_tables(tables, wide=wide)
    for sentence in placement_sentences(advice.verdict):
        say(sentence)
    if out is not None:
        say(f"placement written to {out}; try it: observatory profile MODEL --ep {ranks} --placement {out}")
