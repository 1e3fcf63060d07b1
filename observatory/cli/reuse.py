"""``observatory reuse``: energy of prefill against the cached fraction of the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from observatory.cli.numbers import interval_cell, percent_cell, scaled_cell
from observatory.cli.options import ForceOption, JsonOption

SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Of the random order and of the bootstrap.")]


def reuse_group() -> typer.Typer:
    """The ``reuse`` command and what it can do."""
    group = typer.Typer(help="Energy of prefill against the cached fraction.", no_args_is_help=True)
    group.callback()(lambda: None)
    group.command("measure")(measure)
    group.command("show")(show)
    return group


def measure(
    model: Annotated[str, typer.Argument(help="Bundled name, checkpoint directory or hub id.")],
    device: Annotated[str, typer.Option(help="Power device: GPU UUID, PCI bus id or rapl:DOMAIN.")],
    out: Annotated[Path, typer.Option("--out", help="Result file (JSON) to write.")],
    prompt_tokens: Annotated[int, typer.Option(min=2, max=1 << 20, help="Length of a prompt.")] = 4096,
    fractions: Annotated[
        str, typer.Option(help="Cached fractions: 0 is a miss, 1 an exact hit.")
    ] = "0,0.25,0.5,0.75,1",
    batch_size: Annotated[int, typer.Option(min=1, max=65536, help="Prompts prefilled together.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="Windows of each fraction.")] = 4,
    window_s: Annotated[float, typer.Option(min=0.5, max=3600, help="Length of a window.")] = 5.0,
    settle_s: Annotated[float, typer.Option(min=0.0, max=600, help="Run before it.")] = 0.5,
    torch_device: Annotated[str, typer.Option(help="Torch device of the model.")] = "cuda",
    dtype: Annotated[str | None, typer.Option(help="Torch dtype of the weights, e.g. bfloat16.")] = None,
    seed: SeedOption = 0,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Prefill the rest of a prompt behind a cached part of it, over and over, and measure the energy.

    The device must be the one the model computes on, which is checked where torch tells which GPU that is.
    It is only read.
    """
    from observatory.campaign.benchmark import check_out
    from observatory.campaign.prefix_cache import (
        ReuseJob,
        cached_prefills,
        check_same_device,
        parse_fractions,
        run_reuse,
    )
    from observatory.campaign.ranks import refuse_ranks
    from observatory.cli.output import progress_bar, say
    from observatory.host.provenance import command_line

    refuse_ranks("reuse measure", each_node=True)
    check_out(out, force=force)
    parsed = parse_fractions(fractions)
    note = check_same_device(device, torch_device)
    job = ReuseJob(
        model=model,
        device=device,
        prompt_tokens=prompt_tokens,
        batch_size=batch_size,
        repeats=repeats,
        window_s=window_s,
        settle_s=settle_s,
        seed=seed,
        note=note,
    )
    with (
        cached_prefills(
            model,
            fractions=parsed,
            prompt_tokens=prompt_tokens,
            batch_size=batch_size,
            device=torch_device,
            dtype=dtype,
        ) as workloads,
        progress_bar() as bar,
    ):
        task = bar.add_task("reuse", total=len(workloads) * repeats)
        measured = run_reuse(
            job,
            workloads,
            out,
            overwrite=force,
            argv=command_line(),
            progress=lambda done, _: bar.update(task, completed=done),
        )
    for note in measured.notes:
        say(f"note: {note}")
    show(out, seed=seed, json=json)
    say(f"measurements written to {out}; next: observatory reuse show {out}")


def show(
    measurements: Annotated[Path, typer.Argument(help="Result of `observatory reuse measure`.")],
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Show the energy of a prefill against the cached fraction, with intervals, and what a hit saves."""
    from observatory.analysis.energy import fit_reuse
    from observatory.cli.output import print_json
    from observatory.run.documents.prefix_cache import load_reuse

    measured = load_reuse(measurements)
    curve = fit_reuse(measured, seed=seed)
    if json:
        about = measured.model_dump(mode="json", include={"model", "prompt_tokens", "batch_size", "device"})
        print_json({**about, "notes": list(measured.notes), "reuse": reuse_document(curve)})
        return
    print_reuse(curve, measured.model, measured.prompt_tokens)


def reuse_document(curve: Any) -> dict[str, Any]:
    """A fitted curve as a JSON document."""
    from observatory.analysis.energy.prefix_cache import PUBLISHED_SAVING, PUBLISHED_SOURCE
    from observatory.run.documents.writing import frame_records

    names = (
        "fixed_mj",
        "linear_mj",
        "square_mj",
        "saved",
        "saved_low",
        "saved_high",
        "saved_reason",
        "saved_flag",
    )
    return {
        **{name: getattr(curve, name) for name in names},
        "cells": frame_records(curve.cells),
        "published": {"saved": PUBLISHED_SAVING, "source": PUBLISHED_SOURCE},
    }


def print_reuse(curve: Any, model: str, prompt_tokens: int) -> None:
    """Show a fitted curve as a table, and what an exact hit saves in a sentence."""
    from observatory.cli.output import print_table, say

    found = reuse_document(curve)
    print_table(
        ["cell", "cached", "windows", "mJ per prefill", "90 % interval", "fitted", "saved"],
        [
            [row["cell"], percent_cell(row["cached_fraction"]), row["windows"],
             scaled_cell(row["prefill_mj"], 1, 1),
             interval_cell(row["low_mj"], row["high_mj"], 1, 1), scaled_cell(row["fitted_mj"], 1, 1),
             percent_cell(row["saved"])]
            for row in found["cells"]
        ],
        title=f"{model}: energy of one prefill of {prompt_tokens} tokens against their cached fraction",
    )  # fmt: skip
    if found["saved"] is not None:
        interval = interval_cell(found["saved_low"], found["saved_high"], 100, 1)
        say(
            f"an exact hit saves {100 * found['saved']:.1f} % of a miss's prefill energy here"
            f"{f' ({interval} %)' if interval else ''}; {found['published']['source']} states "
            f"{100 * found['published']['saved']:.0f} % for its models"
        )
    flagged = [percent_cell(row["cached_fraction"]) for row in found["cells"] if row["flag"]]
    if flagged:
        say(
            f"energies at a cached fraction of {', '.join(map(str, flagged))} are integrated power of "
            "prefills in time with the power sensor; their intervals allow for it"
        )
    if found["saved_reason"]:
        say(f"saving: {found['saved_reason']}")
