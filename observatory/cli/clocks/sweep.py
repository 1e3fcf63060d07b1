"""``observatory clocks sweep``: one phase at several SM clocks and power limits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from observatory.cli.options import CsvOption, ForceOption, JsonOption, WideOption

if TYPE_CHECKING:
    from observatory.analysis.columns import Table
    from observatory.campaign.sweep.plan import SweepPlan
    from observatory.run.documents.clock_sweep import ClockSweep

_CLOCKS = "600:1980:8"


def sweep(
    device: Annotated[str, typer.Option(help="GPU, by UUID or PCI bus id (see doctor).")],
    out: Annotated[Path, typer.Option("--out", help="Result file (JSON) to write.")],
    command: Annotated[
        list[str] | None,
        typer.Argument(
            help="After `--`: your own program, which prints one line per iteration, until ended."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Bundled name, checkpoint directory or hub id.")] = None,
    phase: Annotated[str, typer.Option(help="prefill or decode; with a program, its name only.")] = "decode",
    batch: Annotated[
        str | None,
        typer.Option(help="Sequences; several by commas, one series each. Of a model 8 unless told."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of context per sequence. Of a model 1024 unless told."),
    ] = None,
    tokens_per_iteration: Annotated[
        int | None, typer.Option(min=1, help="Of your own program: tokens of one iteration.")
    ] = None,
    torch_device: Annotated[str, typer.Option(help="Torch device of the model.")] = "cuda",
    dtype: Annotated[str | None, typer.Option(help="Torch dtype of the weights, e.g. bfloat16.")] = None,
    clocks: Annotated[
        str | None,
        typer.Option(
            help=f"MHz: several by commas, or LOW:HIGH:COUNT, evenly spread ({_CLOCKS} unless told), or none."
        ),
    ] = None,
    limits: Annotated[str, typer.Option(help="Power limits in W, by commas, or none.")] = "none",
    repeats: Annotated[int, typer.Option(min=1, max=100, help="Measurements of each setting.")] = 3,
    window_s: Annotated[float, typer.Option(min=0.5, max=3600.0, help="Length of a measurement.")] = 5.0,
    settle_s: Annotated[float, typer.Option(min=0.0, max=3600.0, help="Run before it.")] = 1.0,
    cool_s: Annotated[
        float, typer.Option(min=0.0, max=3600.0, help="Longest rest until the chip is cool again.")
    ] = 60.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the random order.")] = 0,
    apply: Annotated[
        bool, typer.Option("--apply", help="Really lock clocks and set limits; without it, only say what.")
    ] = False,
    set_outside: Annotated[
        bool,
        typer.Option(
            "--set-outside",
            help="Somebody else has set the one clock and limit that --clocks and --limits name (srun "
            "--gpu-freq, an administrator): set nothing, measure there, let the sampled clock verify it.",
        ),
    ] = False,
    wrapper: Annotated[
        str | None, typer.Option(help="The site's own command, with {uuid} and {clock_mhz}, for the plan.")
    ] = None,
    force: ForceOption = False,
    wide: WideOption = False,
    csv: CsvOption = False,
    json: JsonOption = False,
) -> None:
    """Measure time and energy of a phase at several clocks, each verified by the sampled clock.

    Clocks are locked under a lease that a watchdog undoes when this process dies or time is up. Without
    --apply nothing is touched: the plan is printed, with the commands for those who may lock. Results of
    --set-outside, one per setting, are fitted together.
    """
    from observatory.analysis.frequency.tables import sweep_table
    from observatory.campaign.benchmark import check_out
    from observatory.campaign.ranks import refuse_ranks
    from observatory.campaign.sweep.clock_sweep import run_sweep
    from observatory.campaign.sweep.inputs import make_workloads, parse_clocks, parse_limits
    from observatory.campaign.sweep.plan import make_plan
    from observatory.campaign.sweep.settings import SweepJob
    from observatory.cli.output import print_data, progress_bar, say
    from observatory.devices.find import open_device
    from observatory.errors import ClockError, LockNotPermittedError, LockRefusedError
    from observatory.host.provenance import command_line
    from observatory.run.documents.printed import printed_document

    refuse_ranks("clocks sweep", each_node=True)
    check_out(out, force=force)
    if set_outside and apply:
        raise ClockError("--apply sets clocks and --set-outside sets none; give one of them")
    if set_outside and clocks is None:
        raise ClockError(
            "--set-outside wants to know what was set: --clocks MHZ, or --clocks none for the reference"
        )
    series, workloads = make_workloads(
        model=model,
        command=command or [],
        phase=phase,
        batches=None if batch is None else batch.split(","),
        context_tokens=context,
        tokens_per_iteration=tokens_per_iteration,
        torch_device=torch_device,
        dtype=dtype,
    )
    with open_device(device) as opened:
        uuid = opened.uuid
    job = SweepJob(
        device_uuid=uuid,
        clocks_mhz=parse_clocks(_CLOCKS if clocks is None else clocks),
        limits_mw=parse_limits(limits),
        set_outside=set_outside,
        repeats=repeats,
        window_s=window_s,
        settle_s=settle_s,
        cool_s=cool_s,
        seed=seed,
    )

    def plan(*, refused: bool = False) -> SweepPlan:
        options = {
            "--model": model, "--phase": phase, "--batch": batch, "--context": context,
            "--tokens-per-iteration": tokens_per_iteration, "--dtype": dtype,
            "--torch-device": None if model is None else torch_device, "--repeats": repeats,
            "--window-s": window_s, "--settle-s": settle_s, "--cool-s": cool_s,
        }  # fmt: skip
        return make_plan(
            job, series, options=options, out=out, program=command or [], wrapper=wrapper, refused=refused
        )

    if not apply and not set_outside:
        _print_plan(plan(), json=json)
        return
    try:
        with progress_bar() as bar:
            task = bar.add_task("sweep", total=None)
            result = run_sweep(
                job,
                workloads,
                out,
                series=series,
                overwrite=force,
                argv=command_line(),
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except LockNotPermittedError as error:
        _print_plan(plan(refused=True), json=json, refused=error.what)
        raise LockRefusedError(
            f"{error.what}; no point of the plan was set, the commands above get them set in another way"
        ) from error
    for note in result.notes:
        say(f"note: {note}")
    table = sweep_table(result)
    document = printed_document("clock_sweep", result.model_dump(mode="json"))
    if not print_data(document, [table], json=json, csv=csv):
        _print_result(result, table, wide=wide)
    if set_outside:
        say(
            f"sweep written to {out}; when every clock has its own result: observatory clocks fit RESULTS "
            "--out clocks.json"
        )
    else:
        say(f"sweep written to {out}; next: observatory clocks fit {out} --out clocks.json")


def _print_plan(plan: SweepPlan, *, json: bool, refused: str | None = None) -> None:
    from observatory.cli.output import print_json, print_lines, say
    from observatory.run.documents.printed import printed_document

    if json:
        print_json(printed_document("clock_sweep_plan", plan.document() | {"refused": refused}))
        return
    for sentence in plan.sentences(refused=refused):
        say(sentence)
    for way, lines in plan.commands.items():
        print_lines([f"# {way}:", *lines, ""])


def _print_result(result: ClockSweep, table: Table, *, wide: bool) -> None:
    from observatory.cli.output import print_table, say

    print_table(table, wide=wide)
    reasons = {
        f"{point.label}: {point.reason}"
        for series in result.series
        for point in series.points
        if point.label != "ok" and point.reason
    }
    for line in sorted(reasons)[:20]:
        say(line)
