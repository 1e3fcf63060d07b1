"""``observatory clocks sweep``: one phase at several SM clocks and power limits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from observatory.cli.options import ForceOption, JsonOption

__all__ = ["sweep"]


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
    batch: Annotated[str, typer.Option(help="Sequences; several by commas, one series each.")] = "8",
    context: Annotated[int, typer.Option(min=1, help="Tokens of context per sequence.")] = 1024,
    tokens_per_iteration: Annotated[
        int | None, typer.Option(min=1, help="Of your own program: tokens of one iteration.")
    ] = None,
    torch_device: Annotated[str, typer.Option(help="Torch device of the model.")] = "cuda",
    dtype: Annotated[str | None, typer.Option(help="Torch dtype of the weights, e.g. bfloat16.")] = None,
    clocks: Annotated[
        str, typer.Option(help="MHz: several by commas, or LOW:HIGH:COUNT, evenly spread; empty for none.")
    ] = "600:1980:8",
    limits: Annotated[str, typer.Option(help="Power limits in W, by commas; empty for none.")] = "",
    repeats: Annotated[int, typer.Option(min=1, max=100, help="Measurements of each setting.")] = 3,
    window_s: Annotated[float, typer.Option(min=0.5, help="Length of a measurement.")] = 5.0,
    settle_s: Annotated[float, typer.Option(min=0.0, help="Run before it.")] = 1.0,
    cool_s: Annotated[float, typer.Option(min=0.0, help="Longest rest until the chip is cool again.")] = 60.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the random order.")] = 0,
    apply: Annotated[
        bool, typer.Option("--apply", help="Really lock clocks and set limits; without it, only say what.")
    ] = False,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Measure time and energy of a phase at several clocks, each verified by the sampled clock.

    Clocks are locked under a lease that a watchdog undoes when this process dies or time is up. Without
    --apply nothing is touched: the plan is printed.
    """
    import sys

    from observatory.campaign.benchmark import check_out
    from observatory.campaign.clock_sweep import SweepJob, plan_settings, run_sweep
    from observatory.campaign.sweep_inputs import make_workloads, parse_clocks, parse_limits
    from observatory.cli.output import print_json, print_table, progress_bar, say
    from probes.power.find import open_device

    check_out(out, force=force)
    with open_device(device) as opened:
        uuid = opened.uuid
    job = SweepJob(
        device_uuid=uuid,
        clocks_mhz=parse_clocks(clocks),
        limits_mw=parse_limits(limits),
        repeats=repeats,
        window_s=window_s,
        settle_s=settle_s,
        cool_s=cool_s,
        seed=seed,
    )
    batches = batch.split(",")
    points = plan_settings(job, len(batches) if model else 1)
    if not apply:
        say(
            f"{len(points)} measurements of {window_s:g} s on {uuid}, locked to {job.clocks_mhz} MHz and "
            f"limited to {[limit / 1e3 for limit in job.limits_mw]} W in turn; nothing was touched: "
            "--apply does it"
        )
        return
    with (
        make_workloads(
            model=model,
            command=command or [],
            phase=phase,
            batches=batches,
            context_tokens=context,
            tokens_per_iteration=tokens_per_iteration,
            torch_device=torch_device,
            dtype=dtype,
        ) as workloads,
        progress_bar() as bar,
    ):
        task = bar.add_task("sweep", total=len(points))
        result = run_sweep(
            job,
            workloads,
            out,
            overwrite=force,
            argv=sys.argv,
            progress=lambda done, _: bar.update(task, completed=done),
        )
    for note in result.notes:
        say(f"note: {note}")
    if json:
        print_json(result.model_dump(mode="json"))
    else:
        rows = [
            [series.name, series.batch_size, point.requested_sm_clock_mhz, point.requested_limit_mw,
             point.sm_clock_mhz, 1e3 * point.iteration_s,
             None if point.energy_mj is None else point.energy_mj / point.iterations, point.label]
            for series in result.series
            for point in sorted(
                series.points,
                key=lambda p: (p.requested_limit_mw or 0, p.requested_sm_clock_mhz or 0, p.repeat),
            )
        ]  # fmt: skip
        print_table(
            ["series", "batch", "locked MHz", "limit mW", "sampled MHz", "ms", "mJ", "label"],
            rows,
            title="per iteration",
        )
    say(f"sweep written to {out}; next: observatory clocks fit {out} --out clocks.json")
