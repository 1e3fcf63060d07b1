"""``observatory profile``: one model on given data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from observatory.campaign.job import ProfileJob
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
    record_of,
    with_options,
)

#: Options that are fields of a job.
_OPTIONS = {
    "data": typer.Option(
        metavar="NAME|FILE",
        rich_help_panel=DATA,
        help="prose, code, foreign, structured, shuffled, mock, a text file, or datasets:NAME.",
    ),
    "batch_size": typer.Option(min=1, rich_help_panel=DATA, help="Sequences per step, on each rank."),
    "sequence_length": typer.Option(
        min=1, rich_help_panel=DATA, help="Tokens per sequence; in decode, of the context."
    ),
    "steps": typer.Option(min=1, rich_help_panel=DATA, help="Steps of each phase."),
    "phase": typer.Option(metavar="NAME", rich_help_panel=DATA, help="prefill, decode, or both."),
    "seed": typer.Option(min=0, rich_help_panel=DATA, help="Seed of shuffled and mock tokens."),
    "device": typer.Option(metavar="NAME", rich_help_panel=DATA, help="Torch device, such as cpu or cuda."),
    "dtype": DtypeOption,
    "gate_mass": typer.Option(
        rich_help_panel=CAPTURE, help="Also record the summed gate weights per expert."
    ),
    "sample_tokens": typer.Option(
        min=0,
        rich_help_panel=CAPTURE,
        help="Record the expert ids of N token positions per layer and step.",
    ),
    "window_steps": typer.Option(
        min=1, rich_help_panel=CAPTURE, help="Sum the counts of N steps into one row."
    ),
    "flush_s": typer.Option(
        "--flush-seconds",
        min=0.1,
        rich_help_panel=CAPTURE,
        help="Longest time until captured rows are on disk.",
    ),
    "placement": typer.Option(
        metavar="NAME|FILE",
        rich_help_panel=RANKS,
        help="With --ep: linear, round-robin, or a placement file (JSON), which may replicate experts.",
    ),
    "algorithm": typer.Option(
        metavar="NAME", rich_help_panel=RANKS, help="Exchange algorithm: flat, hierarchical, or gather."
    ),
    "deduplicate": typer.Option(
        "--deduplicate", rich_help_panel=RANKS, help="Send a token once per destination rank."
    ),
    "ranks_per_node": RanksPerNodeOption,
    "backend": BackendOption,
    "exchange_timeout_s": typer.Option(
        min=1, rich_help_panel=RANKS, help="Longest wait for a rank in an exchange."
    ),
    "power": typer.Option(
        metavar="NAME,...",
        rich_help_panel=POWER,
        help="auto, on, off, or the devices to sample, separated by commas (listed by `doctor`).",
    ),
    "rank_devices": typer.Option(
        metavar="NAME,...",
        rich_help_panel=POWER,
        help="Power device of each rank, in the order of ranks; by default the GPU that torch uses.",
    ),
}


@with_options(_OPTIONS, ProfileJob)
def profile(
    model: ModelArgument,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", rich_help_panel=OUTPUT, help="Run directory to write.")
    ],
    *,
    ep: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=RANKS,
            help="Ranks to spread the experts over: started here, or those of the launcher; 1 runs the whole "
            "model on each of them.",
        ),
    ] = None,
    force: ForceOption = False,
    **options: Any,
) -> None:
    """Profile one model on given data and write a run directory.

    Under torchrun, mpiexec or srun the ranks are those of the launcher; otherwise --ep starts them here.
    """
    from observatory.analysis.provenance.notices import provenance_notices
    from observatory.analysis.provenance.words import notice_sentence
    from observatory.campaign.profile import run_profile
    from observatory.campaign.ranks import needs_ranks, requested_ep, start_ranks
    from observatory.cli.output import counting, say, say_cores
    from observatory.host.ranks import find_rank
    from observatory.run.manifest_files import read_manifest
    from observatory.run.usable_cores import short_of_cores

    job = record_of(ProfileJob, options, model=model, ep=requested_ep(ep))
    if needs_ranks(job):
        start_ranks(job, out, overwrite=force)
        return
    if find_rank().rank > 0:
        run_profile(job, out, overwrite=force)
        return
    with counting("profile") as progress:
        run_profile(job, out, overwrite=force, progress=progress)
    manifest = read_manifest(out)
    say_cores(short_of_cores(status.cores for status in manifest.ranks))
    for notice in provenance_notices(manifest):
        say(f"note: {notice_sentence(notice)}")
    say(f"run written to {out}; next: observatory {'exchanges' if job.ep > 1 else 'routing'} {out}")
