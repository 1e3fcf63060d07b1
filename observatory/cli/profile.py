"""``observatory profile``: one model on given data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from observatory.cli.options import ForceOption

__all__ = ["profile"]


def profile(
    model: Annotated[str, typer.Argument(help="Bundled name (see doctor), checkpoint directory or hub id.")],
    out: Annotated[Path, typer.Option("--out", help="Run directory to write.")],
    data: Annotated[
        str,
        typer.Option(help="prose, code, foreign, structured, shuffled, mock, a text file, or datasets:NAME."),
    ] = "prose",
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per step.")] = 8,
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
    force: ForceOption = False,
) -> None:
    """Profile one model on given data and write a run directory."""
    from observatory.campaign.profile import ProfileJob, run_profile
    from observatory.cli.output import progress_bar, say

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
    )
    with progress_bar() as bar:
        task = bar.add_task("profile", total=job.prefill_steps + job.decode_steps)
        run_profile(job, out, overwrite=force, progress=lambda done, _: bar.update(task, completed=done))
    say(f"run written to {out}; next: observatory routing {out}")
