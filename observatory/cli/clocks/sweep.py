"""``observatory clocks sweep``: one phase at several SM clocks and power limits."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from observatory.campaign.sweep.settings import SweepJob
from observatory.campaign.workloads import WorkloadOptions
from observatory.cli.options import (
    DATA,
    SETTINGS,
    TIMING,
    CsvOption,
    DtypeOption,
    ForceOption,
    JsonOption,
    ResultOption,
    WideOption,
    WrapperOption,
    record_of,
    with_options,
)
from observatory.cli.output import (
    counting,
    print_conclusion,
    print_data,
    print_json,
    print_lines,
    print_tables,
    say,
)

if TYPE_CHECKING:
    from observatory.campaign.sweep.plan import SweepPlan
    from observatory.campaign.workloads import Workload
    from observatory.run.documents.clock_sweep import ClockSweep

_CLOCKS = "600:1980:8"

_DeviceOption = Annotated[
    str, typer.Option(metavar="NAME", help="GPU, by UUID or PCI bus id (see `doctor`).")
]
_ProgramArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PROGRAM",
        help="After `--`: your own program, which prints one line per iteration until it is ended.",
    ),
]
_ClocksOption = Annotated[
    str | None,
    typer.Option(
        metavar="MHZ,...",
        rich_help_panel=SETTINGS,
        help=f"Clocks, separated by commas, or LOW:HIGH:COUNT, evenly spread, or none; {_CLOCKS} by default.",
    ),
]
_LimitsOption = Annotated[
    str,
    typer.Option(
        metavar="W,...", rich_help_panel=SETTINGS, help="Power limits, separated by commas, or none."
    ),
]
_ApplyOption = Annotated[
    bool,
    typer.Option(
        "--apply",
        rich_help_panel=SETTINGS,
        help="Lock clocks and set limits; without it the plan is printed and nothing is changed.",
    ),
]
_SetOutsideOption = Annotated[
    bool,
    typer.Option(
        "--set-outside",
        rich_help_panel=SETTINGS,
        help="The one clock and limit of --clocks and --limits have been set by others (srun --gpu-freq, an "
        "administrator): set nothing, measure, and verify them by the sampled clock.",
    ),
]
#: Options that are fields of the records of a sweep.
_OPTIONS = {
    "model": typer.Option(
        metavar="MODEL", rich_help_panel=DATA, help="Bundled model, checkpoint directory, or hub id."
    ),
    "phase": typer.Option(
        metavar="NAME", rich_help_panel=DATA, help="prefill or decode; of a program, only its label."
    ),
    "batch": typer.Option(
        metavar="N,...",
        rich_help_panel=DATA,
        help="Sequences, separated by commas, one series each; of a model 8 by default.",
    ),
    "context": typer.Option(
        min=1, rich_help_panel=DATA, help="Tokens of context per sequence; of a model 1024 by default."
    ),
    "tokens_per_iteration": typer.Option(
        min=1, rich_help_panel=DATA, help="Of your own program: tokens per iteration."
    ),
    "torch_device": typer.Option(metavar="NAME", rich_help_panel=DATA, help="Torch device of the model."),
    "dtype": DtypeOption,
    "repeats": typer.Option(min=1, max=100, rich_help_panel=TIMING, help="Measurements of each setting."),
    "window_s": typer.Option(min=0.5, max=3600.0, rich_help_panel=TIMING, help="Length of a measurement."),
    "settle_s": typer.Option(
        min=0.0, max=3600.0, rich_help_panel=TIMING, help="Time to run before each measurement."
    ),
    "cool_s": typer.Option(
        min=0.0, max=3600.0, rich_help_panel=TIMING, help="Longest pause until the chip is cool."
    ),
    "seed": typer.Option(min=0, rich_help_panel=TIMING, help="Seed of the random order."),
}


@with_options(_OPTIONS, WorkloadOptions, SweepJob)
def sweep(
    device: _DeviceOption,
    out: ResultOption,
    command: _ProgramArgument = None,
    *,
    clocks: _ClocksOption = None,
    limits: _LimitsOption = "none",
    apply: _ApplyOption = False,
    set_outside: _SetOutsideOption = False,
    wrapper: WrapperOption = None,
    force: ForceOption = False,
    wide: WideOption = False,
    csv: CsvOption = False,
    json: JsonOption = False,
    **options: Any,
) -> None:
    """Measure time and energy of a phase at several clocks, each verified by the sampled clock.

    Clocks are locked under a lease that a watchdog undoes when this process dies or time is up. Without
    --apply nothing is changed: the plan is printed, with the commands for those who may lock. Results of
    --set-outside, one per setting, are fitted together.
    """
    from observatory.campaign.benchmark import check_out
    from observatory.campaign.ranks import refuse_ranks
    from observatory.campaign.sweep.inputs import make_workloads, parse_clocks, parse_limits
    from observatory.campaign.sweep.plan import make_plan
    from observatory.devices.find import open_device
    from observatory.errors import LockNotPermittedError, LockRefusedError

    refuse_ranks("clocks sweep", each_node=True)
    check_out(out, force=force)
    _check_settings(clocks, apply=apply, set_outside=set_outside)
    workload = record_of(WorkloadOptions, options, program=tuple(command or ()))
    series, workloads = make_workloads(workload)
    with open_device(device) as opened:
        uuid = opened.uuid
    job = record_of(
        SweepJob,
        options,
        device_uuid=uuid,
        clocks_mhz=parse_clocks(_CLOCKS if clocks is None else clocks),
        limits_mw=parse_limits(limits),
        set_outside=set_outside,
    )
    of_model = ("torch_device", "seed") if workload.model is None else ("seed",)
    repeated = {
        f"--{name.replace('_', '-')}": value for name, value in options.items() if name not in of_model
    }
    plan = partial(
        make_plan, job, series, options=repeated, out=out, program=workload.program, wrapper=wrapper
    )
    if not apply and not set_outside:
        _print_plan(plan(), json=json)
        return
    try:
        result = _run(job, workloads, out, series=series, force=force)
    except LockNotPermittedError as error:
        _print_plan(plan(refused=True), json=json, refused=error.what)
        raise LockRefusedError(
            f"{error.what}; no point of the plan was set, the commands above get them set in another way"
        ) from error
    _print_result(result, out, json=json, csv=csv, wide=wide)
    say(f"sweep written to {out}")


def _check_settings(clocks: str | None, *, apply: bool, set_outside: bool) -> None:
    """Refuse options that exclude or require each other."""
    from observatory.errors import ClockError

    if set_outside and apply:
        raise ClockError("--apply sets clocks and --set-outside sets none; give one of them")
    if set_outside and clocks is None:
        raise ClockError(
            "--set-outside requires what was set: --clocks MHZ, or --clocks none for the reference"
        )


def _run(
    job: SweepJob,
    workloads: AbstractContextManager[list[Workload]],
    out: Path,
    *,
    series: int,
    force: bool,
) -> ClockSweep:
    """Run a sweep with its progress bar."""
    from observatory.campaign.sweep.clock_sweep import run_sweep
    from observatory.host.provenance import command_line

    with counting("sweep") as progress:
        return run_sweep(
            job, workloads, out, series=series, overwrite=force, argv=command_line(), progress=progress
        )


def _print_plan(plan: SweepPlan, *, json: bool, refused: str | None = None) -> None:
    from observatory.run.documents.printed import printed_document

    if json:
        print_json(printed_document("clock_sweep_plan", plan.document() | {"refused": refused}))
        return
    for sentence in plan.sentences(refused=refused):
        say(sentence)
    for way, lines in plan.commands.items():
        print_lines([f"# {way}:", *lines, ""])


def _print_result(result: ClockSweep, out: Path, *, json: bool, csv: bool, wide: bool) -> None:
    from observatory.advice.conclusions import conclude_sweep, conclusion_document
    from observatory.analysis.frequency.tables import sweep_table
    from observatory.run.documents.printed import printed_document

    for note in result.notes:
        say(f"note: {note}")
    table = sweep_table(result)
    document = printed_document("clock_sweep", result.model_dump(mode="json"))
    conclusion = conclude_sweep(document, out)
    document["conclusion"] = conclusion_document(conclusion)
    if print_data(document, [table], json=json, csv=csv):
        return
    print_tables([table], wide=wide)
    reasons = {
        f"{point.label}: {point.reason}"
        for series in result.series
        for point in series.points
        if point.label != "ok" and point.reason
    }
    for line in sorted(reasons)[:20]:
        say(line)
    print_conclusion(conclusion)
