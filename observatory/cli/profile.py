"""``observatory profile``: one model on given data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from observatory.cli.options import (
    CAPTURE,
    DATA,
    OUTPUT,
    POWER,
    RANKS,
    BackendOption,
    DtypeOption,
    ForceOption,
    ModelArgument,
    RanksPerNodeOption,
)


def profile(
    model: ModelArgument,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", rich_help_panel=OUTPUT, help="Run directory to write.")
    ],
    data: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            rich_help_panel=DATA,
            help="prose, code, foreign, structured, shuffled, mock, a text file, or datasets:NAME.",
        ),
    ] = "prose",
    batch_size: Annotated[
        int, typer.Option(min=1, rich_help_panel=DATA, help="Sequences per step, on each rank.")
    ] = 8,
    sequence_length: Annotated[
        int, typer.Option(min=1, rich_help_panel=DATA, help="Tokens per sequence; in decode, of the context.")
    ] = 256,
    steps: Annotated[int, typer.Option(min=1, rich_help_panel=DATA, help="Steps of each phase.")] = 20,
    phase: Annotated[
        str, typer.Option(metavar="NAME", rich_help_panel=DATA, help="prefill, decode, or both.")
    ] = "prefill",
    seed: Annotated[
        int, typer.Option(min=0, rich_help_panel=DATA, help="Seed of shuffled and mock tokens.")
    ] = 0,
    device: Annotated[
        str, typer.Option(metavar="NAME", rich_help_panel=DATA, help="Torch device, such as cpu or cuda.")
    ] = "cpu",
    dtype: DtypeOption = None,
    gate_mass: Annotated[
        bool, typer.Option(rich_help_panel=CAPTURE, help="Also record the summed gate weights per expert.")
    ] = False,
    sample_tokens: Annotated[
        int,
        typer.Option(
            min=0,
            rich_help_panel=CAPTURE,
            help="Record the expert ids of N token positions per layer and step.",
        ),
    ] = 0,
    window_steps: Annotated[
        int, typer.Option(min=1, rich_help_panel=CAPTURE, help="Sum the counts of N steps into one row.")
    ] = 1,
    flush_s: Annotated[
        float,
        typer.Option(
            "--flush-seconds",
            min=0.1,
            rich_help_panel=CAPTURE,
            help="Longest time until captured rows are on disk.",
        ),
    ] = 10.0,
    ep: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=RANKS,
            help="Ranks to spread the experts over: started here, or those of the launcher; 1 runs the whole "
            "model on each of them.",
        ),
    ] = None,
    placement: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            rich_help_panel=RANKS,
            help="With --ep: linear, round-robin, or a placement file (JSON), which may replicate experts.",
        ),
    ] = "linear",
    algorithm: Annotated[
        str,
        typer.Option(
            metavar="NAME", rich_help_panel=RANKS, help="Exchange algorithm: flat, hierarchical, or gather."
        ),
    ] = "flat",
    deduplicate: Annotated[
        bool,
        typer.Option("--deduplicate", rich_help_panel=RANKS, help="Send a token once per destination rank."),
    ] = False,
    ranks_per_node: RanksPerNodeOption = None,
    backend: BackendOption = "auto",
    exchange_timeout_s: Annotated[
        float, typer.Option(min=1, rich_help_panel=RANKS, help="Longest wait for a rank in an exchange.")
    ] = 60.0,
    power: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            rich_help_panel=POWER,
            help="auto, on, off, or the devices to sample, separated by commas (listed by `doctor`).",
        ),
    ] = "auto",
    rank_devices: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            rich_help_panel=POWER,
            help="Power device of each rank, in the order of ranks; by default the GPU that torch uses.",
        ),
    ] = None,
    power_shifts: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            rich_help_panel=POWER,
            help="Insert pauses where steps are synchronous with the power sensor: auto (with one rank), "
            "on, or off.",
        ),
    ] = "auto",
    force: ForceOption = False,
) -> None:
    """Profile one model on given data and write a run directory.

    Under torchrun, mpiexec or srun the ranks are those of the launcher; otherwise --ep starts them here.
    """
    from observatory.campaign.job import ProfileJob
    from observatory.campaign.profile import run_profile
    from observatory.campaign.ranks import needs_ranks, requested_ep, start_ranks
    from observatory.cli.output import counting, say, say_cores
    from observatory.host.ranks import find_rank
    from observatory.run import open_run
    from observatory.run.usable_cores import short_of_cores

    job = ProfileJob(
        model=model,
        data=data,
        batch_size=batch_size,
        sequence_length=sequence_length,
        steps=steps,
        phase=phase,  # type: ignore[arg-type]  # checked by ProfileJob, which names the choices
        seed=seed,
        device=device,
        dtype=dtype,
        gate_mass=gate_mass,
        sample_tokens=sample_tokens,
        window_steps=window_steps,
        flush_s=flush_s,
        ep=requested_ep(ep),
        placement=placement,
        algorithm=algorithm,
        deduplicate=deduplicate,
        ranks_per_node=ranks_per_node,
        backend=backend,
        exchange_timeout_s=exchange_timeout_s,
        power=power,
        rank_devices=rank_devices,
        power_shifts=power_shifts,
    )
    if needs_ranks(job):
        start_ranks(job, out, overwrite=force)
        return
    if find_rank().rank > 0:
        run_profile(job, out, overwrite=force)
        return
    with counting("profile") as progress:
        run_profile(job, out, overwrite=force, progress=progress)
    say_cores(short_of_cores(status.cores for status in open_run(out).manifest.ranks))
    say(f"run written to {out}; next: observatory {'exchanges' if job.ep > 1 else 'routing'} {out}")
