"""``observatory export``: captured traffic in other tools' formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from observatory.cli.options import (
    JsonOption,
    MostStepsOption,
    OnlyLayersOption,
    OnlyPhaseOption,
    PlacementOption,
    RoleOption,
    RowBytesOption,
    parse_placement,
)
from observatory.cli.parsing import parse_roles

__all__ = ["export"]


def export(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    form: Annotated[str, typer.Argument(metavar="FORMAT", help="nccl-tests or ucc.")],
    ep: Annotated[int, typer.Option("--ep", min=1, help="EP degree of the matrices.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    placement: PlacementOption = "auto",
    phase: OnlyPhaseOption = None,
    layer: OnlyLayersOption = None,
    steps: MostStepsOption = None,
    role: RoleOption = "both",
    row_bytes: RowBytesOption = None,
    json: JsonOption = False,
) -> None:
    """Write a run's traffic matrices for nccl-tests or UCC's perftest."""
    from observatory.cli.output import print_json, say
    from observatory.interchange.export import export_traffic
    from observatory.parallel.captured import captured_traffic, departures
    from observatory.store import open_run

    opened = open_run(run)
    captured = list(
        captured_traffic(
            opened,
            ep=ep,
            placement=parse_placement(placement),
            bytes_per_row=row_bytes,
            phase=phase,
            layers=layer,
            steps=steps,
        )
    )
    sources = sorted({str(item.sources) for item in captured})
    notes = (
        *(f"source ranks: {text}" for text in sources),
        *departures(opened, ep=ep, placement=parse_placement(placement)),
        *opened.problems,
    )
    written = export_traffic(
        (item.traffic() for item in captured),
        out,
        form=form,  # type: ignore[arg-type]  # checked there, naming the choices
        roles=parse_roles(role),  # type: ignore[arg-type]  # the two names, checked there
        run_id=opened.manifest.run_id,
        placement=captured[0].placement if captured else None,
        notes=notes,
    )
    for note in notes:
        say(f"note: {note}")
    if json:
        print_json(
            {
                "run_id": opened.manifest.run_id,
                "format": form,
                "notes": list(notes),
                "files": [str(path) for path in written],
            }
        )
    say(f"{len(written) - 1} files written to {out}; {written[-1].name} says what each holds")
