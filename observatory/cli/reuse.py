"""``observatory reuse``: energy of prefill against the cached fraction of the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from observatory.cli.options import CsvOption, ForceOption, JsonOption, WideOption

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
    wide: WideOption = False,
    csv: CsvOption = False,
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
    show(out, seed=seed, wide=wide, csv=csv, json=json)
    say(f"measurements written to {out}; next: observatory reuse show {out}")


def show(
    measurements: Annotated[Path, typer.Argument(help="Result of `observatory reuse measure`.")],
    seed: SeedOption = 0,
    wide: WideOption = False,
    csv: CsvOption = False,
    json: JsonOption = False,
) -> None:
    """Show the energy of a prefill against the cached fraction, with intervals, and what a hit saves."""
    from observatory.analysis.energy.document import reuse_document, reuse_sentences, reuse_tables
    from observatory.cli.output import print_data, print_table, say
    from observatory.run.documents.prefix_cache import load_reuse

    measured = load_reuse(measurements)
    document = reuse_document(measured, seed=seed)
    tables = reuse_tables(document["reuse"], measured)
    if print_data(document, tables, json=json, csv=csv):
        return
    for table in tables:
        print_table(table, wide=wide)
    for sentence in reuse_sentences(document["reuse"]):
        say(sentence)
