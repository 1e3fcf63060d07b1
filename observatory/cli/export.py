"""``observatory export``: a run in other tools' formats."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from observatory.cli.options import (
    OUTPUT,
    RANKS,
    JsonOption,
    MostStepsOption,
    OnlyLayersOption,
    OnlyPhaseOption,
    PlacementOption,
    RoleOption,
    RowBytesOption,
    RunArgument,
    parse_placement,
)
from observatory.cli.parsing import parse_roles

if TYPE_CHECKING:
    from observatory.run import Run


_FORMATS = (
    "nccl-tests",
    "ucc",
    "chrome-trace",
    "tensorboard",
    "csv",
    "parquet",
    "markdown",
    "sglang",
    "tensorrt-llm",
    "vllm-ascend",
    "aiconfigurator",
)


def export(
    run: RunArgument,
    form: Annotated[
        str,
        typer.Argument(
            metavar="FORMAT",
            help="nccl-tests, ucc, chrome-trace, tensorboard, csv, parquet, markdown, sglang, tensorrt-llm, "
            "vllm-ascend, aiconfigurator.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="PATH",
            rich_help_panel=OUTPUT,
            help="Directory to write (tensorboard: the log directory); for chrome-trace also a .json or "
            ".json.gz file; a file for placements and aiconfigurator.",
        ),
    ],
    ep: Annotated[
        int | None,
        typer.Option(
            "--ep",
            min=1,
            rich_help_panel=RANKS,
            help="EP degree of matrices and placements; required for them.",
        ),
    ] = None,
    placement: PlacementOption = "auto",
    phase: OnlyPhaseOption = None,
    layer: OnlyLayersOption = None,
    steps: MostStepsOption = None,
    role: RoleOption = "both",
    row_bytes: RowBytesOption = None,
    json: JsonOption = False,
) -> None:
    """Write matrices for nccl-tests or UCC, a trace, a log for TensorBoard, tables, or a placement."""
    from observatory.analysis.parallel.captured import captured_traffic, traffic_notes
    from observatory.cli.output import say
    from observatory.errors import BenchmarkError
    from observatory.interchange.exporters.matrices import export_traffic
    from observatory.interchange.exporters.placements import PLACEMENT_FORMS
    from observatory.interchange.exporters.tables import TABLE_FORMS
    from observatory.run import open_run
    from observatory.text import listing

    if form not in _FORMATS:
        raise BenchmarkError(
            f"export format {form!r} does not exist",
            expected=listing(_FORMATS, most=len(_FORMATS), joined_by="or"),
        )
    opened = open_run(run)
    if form == "chrome-trace":
        _trace(opened, out, phase=phase, layers=layer, steps=steps, json=json)
        return
    if form == "tensorboard":
        _tensorboard(opened, out, phase=phase, layers=layer, steps=steps, json=json)
        return
    if form in TABLE_FORMS:
        if steps is not None:
            raise BenchmarkError(f"{form} holds every step", remedy="leave out --steps")
        _tables(opened, out, form, phase=phase, layers=layer, json=json)
        return
    if form == "aiconfigurator":
        _alpha(opened, out, phase=phase, json=json)
        return
    if ep is None:
        raise BenchmarkError(f"{form} is for one EP degree", remedy="give it with --ep")
    if form in PLACEMENT_FORMS:
        _placement(opened, out, form, ep=ep, placement=placement, json=json)
        return
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
    notes = traffic_notes(opened, captured, ep=ep, placement=parse_placement(placement))
    written = export_traffic(
        (item.traffic() for item in captured),
        out,
        form=form,  # type: ignore[arg-type]  # checked there, naming the choices
        roles=parse_roles(role),  # type: ignore[arg-type]  # the two names, checked there
        run_id=opened.manifest.run_id,
        placement=captured[0].placement if captured else None,
        notes=notes,
    )
    _state(opened, form, written, notes=notes, json=json)
    say(f"{len(written) - 1} files written to {out}; {written[-1].name} says what each holds")


def _state(
    run: Run,
    form: str,
    files: Sequence[Path],
    *,
    notes: Sequence[str] = (),
    counts: Mapping[str, int] | None = None,
    json: bool,
) -> None:
    """Say the notes of an export, and with ``--json`` print what was written."""
    from observatory.cli.output import print_json, say

    for note in notes:
        say(f"note: {note}")
    if json:
        print_json(
            {
                "run_id": run.manifest.run_id,
                "format": form,
                **(counts or {}),
                "notes": list(notes),
                "files": [str(path) for path in files],
            }
        )


def _check_new(out: Path) -> None:
    from observatory.errors import BenchmarkError

    if out.exists():
        raise BenchmarkError(f"{out} is there already", remedy="give another --out")


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    """One sentence where a file cannot be written."""
    from observatory.errors import BenchmarkError
    from observatory.run.files import os_reason

    try:
        yield
    except OSError as error:
        raise BenchmarkError(f"{out} cannot be written: {os_reason(error)}") from error


def _placement(run: Run, out: Path, form: str, *, ep: int, placement: str, json: bool) -> None:
    """Write a placement for an engine."""
    from observatory.advice.placement_layouts import current_layout
    from observatory.analysis.parallel.step_loads import step_loads
    from observatory.cli.output import say
    from observatory.interchange.exporters.placements import placement_text
    from observatory.run.documents.writing import write_text

    _check_new(out)
    loads = step_loads(run)
    named = parse_placement(placement)
    given = None if named in ("auto", "recorded") else named
    slot_LPK, name = current_layout(run, loads, ranks=ep, given=given)
    text = placement_text(
        form,  # type: ignore[arg-type]  # one of the names, checked above
        slot_LPK,
        layers=loads.layers,
        experts=loads.load_SLE.shape[2],
    )
    with _writing(out):
        write_text(out, text)
    _state(run, form, [out], json=json)
    say(f"placement {name} on {ep} ranks written to {out}")


def _trace(
    run: Run, out: Path, *, phase: str | None, layers: list[int] | None, steps: int | None, json: bool
) -> None:
    """Write a trace, and say what was written."""
    from observatory.cli.output import say
    from observatory.interchange.exporters.chrome_trace.trace import write_chrome_trace

    trace = write_chrome_trace(run, out, phase=phase, layers=layers, steps=steps)
    counts = {"events": trace.events}
    _state(run, "chrome-trace", trace.files, notes=trace.notes, counts=counts, json=json)
    say(f"{trace.events} events written to {out}; open it at ui.perfetto.dev or chrome://tracing")


def _tensorboard(
    run: Run, out: Path, *, phase: str | None, layers: list[int] | None, steps: int | None, json: bool
) -> None:
    """Write a log directory, and say what was written."""
    from observatory.cli.output import say
    from observatory.interchange.exporters.tensorboard.write import write_tensorboard

    written = write_tensorboard(run, out, phase=phase, layers=layers, steps=steps)
    counts = {"points": written.points}
    _state(run, "tensorboard", written.files, notes=written.notes, counts=counts, json=json)
    say(f"{written.points} scalars and histograms written; open them with: tensorboard --logdir {out}")


def _tables(
    run: Run, out: Path, form: str, *, phase: str | None, layers: list[int] | None, json: bool
) -> None:
    """Write tables, and say what was written."""
    from observatory.cli.output import say
    from observatory.interchange.exporters.tables import write_tables

    written = write_tables(run, out, form=form, phase=phase, layers=layers)  # type: ignore[arg-type]  # one of the names
    _state(run, form, written.files, notes=written.notes, counts={"rows": written.rows}, json=json)
    say(f"{len(written.files)} tables of {written.rows} rows written to {out}")


def _alpha(run: Run, out: Path, *, phase: str | None, json: bool) -> None:
    """Write the exponents of the loads, and say those of whole phases."""
    from observatory.cli.output import say
    from observatory.interchange.exporters.aiconfigurator import alpha_document
    from observatory.run.documents.writing import write_json

    _check_new(out)
    document = alpha_document(run, phase=phase)
    with _writing(out):
        write_json(out, document)
    _state(run, "aiconfigurator", [out], json=json)
    for row in document["rows"]:
        if row["layer"] is None:
            say(
                f"{row['phase']}: alpha {row['alpha']:.2f}, nearest {row['nearest']}; "
                f"{row['misplaced_share']:.0%} of the assignments lie elsewhere "
                f"({row['balanced_misplaced_share']:.0%} under equal loads)"
            )
    say(f"exponents by phase and layer written to {out}")
