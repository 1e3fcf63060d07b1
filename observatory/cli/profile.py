"""``observatory profile``: one model on given data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from observatory.cli.options import ForceOption


def profile(
    model: Annotated[str, typer.Argument(help="Bundled name (see doctor), checkpoint directory or hub id.")],
    out: Annotated[Path, typer.Option("--out", help="Run directory to write.")],
    data: Annotated[
        str,
        typer.Option(help="prose, code, foreign, structured, shuffled, mock, a text file, or datasets:NAME."),
    ] = "prose",
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per step, on each rank.")] = 8,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens per sequence; decode's context.")] = 256,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each phase.")] = 20,
    phase: Annotated[str, typer.Option(help="prefill, decode or both.")] = "prefill",
    seed: Annotated[int, typer.Option(min=0, help="Seeds shuffled and mock tokens.")] = 0,
    device: Annotated[str, typer.Option(help="Torch device.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Torch dtype of the weights, e.g. bfloat16.")] = None,
    gate_mass: Annotated[bool, typer.Option(help="Also keep summed gate weights per expert.")] = False,
    sample_tokens: Annotated[
        int, typer.Option(min=0, help="Token positions per layer and step whose expert ids are kept.")
    ] = 0,
    window_steps: Annotated[int, typer.Option(min=1, help="Steps folded into one row.")] = 1,
    flush_s: Annotated[
        float, typer.Option("--flush-seconds", min=0.1, help="Seconds after which captured rows are on disk.")
    ] = 10.0,
    ep: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Ranks to spread the experts over: started here, or those of the launcher; 1 runs the whole "
            "model on each of them.",
        ),
    ] = None,
    placement: Annotated[
        str,
        typer.Option(help="With --ep: linear, round-robin, or a placement file (JSON), replicas allowed."),
    ] = "linear",
    algorithm: Annotated[str, typer.Option(help="Dispatch: flat, hierarchical or gather.")] = "flat",
    deduplicate: Annotated[
        bool, typer.Option("--deduplicate", help="Send a token once per destination rank.")
    ] = False,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="Pretend that nodes are so many consecutive ranks.")
    ] = None,
    backend: Annotated[str, typer.Option(help="Exchanges over auto, gloo, nccl or mpi.")] = "auto",
    exchange_timeout_s: Annotated[
        float, typer.Option(min=1, help="Seconds until a rank that does not answer is given up.")
    ] = 60.0,
    power: Annotated[
        str, typer.Option(help="auto, on, off, or devices by name, separated by commas (see doctor).")
    ] = "auto",
    rank_devices: Annotated[
        str | None,
        typer.Option(
            help="Power device that each rank computes on, by name, in the order of ranks, separated by "
            "commas; as torch tells by default."
        ),
    ] = None,
    power_shifts: Annotated[
        str,
        typer.Option(
            help="Pause between steps that move in time with the power sensor: auto (one rank only), on, off."
        ),
    ] = "auto",
    force: ForceOption = False,
) -> None:
    """Profile one model on given data and write a run directory.

    Under torchrun, mpiexec or srun the ranks are those of the launcher; else --ep starts them here.
    """
    from observatory.campaign.job import ProfileJob
    from observatory.campaign.profile import run_profile
    from observatory.campaign.ranks import needs_ranks, requested_ep, start_ranks
    from observatory.cli.output import progress_bar, say, say_cores
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
    with progress_bar() as bar:
        task = bar.add_task("profile", total=job.prefill_steps + job.decode_steps)
        run_profile(job, out, overwrite=force, progress=lambda done, _: bar.update(task, completed=done))
    say_cores(short_of_cores(status.cores for status in open_run(out).manifest.ranks))
    say(f"run written to {out}; next: observatory routing {out}")
